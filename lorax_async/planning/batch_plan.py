"""Which rows of a batch belong to which adapter slot, as plain integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorax_async.errors import HandleClosedError

BASE_ONLY = -1
"""The slot of rows that no adapter touches."""

TILE_ROWS = 16
"""Rows that a kernel takes at a time, unless said otherwise."""


@dataclass(frozen=True, slots=True)
class TokenSegments:
    """A partition of a batch's tokens into runs of one slot.

    Segment i is the rows `bounds[i]` to `bounds[i + 1]` (not included) and belongs to `slots[i]`.
    No segment is empty and no two neighbours share a slot, so equal batches have equal segments.
    """

    bounds: tuple[int, ...]
    slots: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.bounds[-1]


def plan_rows(slots: Sequence[int], lengths: Sequence[int]) -> TokenSegments:
    """Segments of a batch whose i-th sequence has `lengths[i]` tokens and uses `slots[i]`.

    The order of the sequences is kept. Raises ValueError for a negative length, a slot below
    `BASE_ONLY`, or sequences of different sizes.
    """
    bounds, merged = [0], list[int]()
    for slot, length in zip(slots, lengths, strict=True):
        if length < 0 or slot < BASE_ONLY:
            raise ValueError(f"a sequence cannot have slot {slot} and {length} tokens")
        if length == 0:
            continue
        if merged and merged[-1] == slot:
            bounds[-1] += length
        else:
            merged.append(slot)
            bounds.append(bounds[-1] + length)
    return TokenSegments(tuple(bounds), tuple(merged))


class SlotRef(NamedTuple):
    """A slot and which of its tenants; the base's is `NOWHERE`."""

    slot: int
    generation: int


NO_SLOT = SlotRef(BASE_ONLY, -1)


class SlotOccupant(NamedTuple):
    """Who has a slot now: its generation, and its rank."""

    generation: int
    rank: int


_NOBODY = SlotOccupant(-2, 0)

Tile = tuple[int, int, int]
"""(segment, start, stop): rows from start to stop, not included, of one segment."""

RankGroup = tuple[int, int, int]
"""(rank, first, stop): segments from first to stop, not included, of one rank; 0 is the base's."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A batch in the order in which kernels want it.

    Attributes
    ----------
    order
        `order[i]` is which of the given sequences is the i-th: by rank, then by slot, then as
        given. The base's are the first.
    segments
        Of the rows in that order; each slot has one.
    tiles
        The segments in pieces of a kernel's size, in order. They do not cross segments.
    groups
        The segments by rank, in order.
    """

    order: tuple[int, ...]
    segments: TokenSegments
    tiles: tuple[Tile, ...]
    groups: tuple[RankGroup, ...]


def plan_batch(
    places: Sequence[SlotRef],
    lengths: Sequence[int],
    lease_table: Mapping[int, SlotOccupant],
    *,
    tile_rows: int = TILE_ROWS,
) -> BatchPlan:
    """Plan for a batch whose i-th sequence has `lengths[i]` tokens and its adapter at `places[i]`.

    Parameters
    ----------
    places, lengths
        Of the sequences, in any order. Each has at least one token.
    tenants
        Who has which slot now.
    tile_rows
        The most rows of a tile.

    Raises
    ------
    HandleClosedError
        A sequence's slot has another tenant now, or none.
    ValueError
        A sequence without tokens, or sequences of different sizes.
    """
    if len(places) != len(lengths) or min(lengths, default=1) < 1:
        raise ValueError("each sequence of a batch has a place and at least one token")
    members: dict[SlotRef, list[int]] = {}
    latest: SlotRef | None = None
    for number, place in enumerate(places):
        if place is not latest:  # those of one adapter mostly come together
            here = members.setdefault(place, [])
            latest = place
        here.append(number)
    order, bounds, slots, ranks = list[int](), [0], list[int](), list[int]()
    tokens = 0
    for rank, slot, there in _by_rank(members, lease_table):
        for number in there:
            tokens += lengths[number]
        order += there
        bounds.append(tokens)
        slots.append(slot)
        ranks.append(rank)
    segments = TokenSegments(tuple(bounds), tuple(slots))
    return BatchPlan(tuple(order), segments, _tiles(bounds, tile_rows), _groups(ranks))


def _by_rank(
    members: Mapping[SlotRef, list[int]], lease_table: Mapping[int, SlotOccupant]
) -> list[tuple[int, int, list[int]]]:
    """Rank, slot and sequences of each place, by rank and slot: no slot is there twice."""
    found = []
    for place, here in members.items():
        slot, generation = place
        occupant = lease_table.get(slot, _NOBODY)
        if occupant[0] != generation:
            _refuse(place, lease_table)
        found.append((occupant[1], slot, here))
    found.sort()
    return found


def require_current(places: Sequence[SlotRef], lease_table: Mapping[int, SlotOccupant]) -> None:
    """Raise `HandleClosedError` for the first place that has another tenant now, or none."""
    for place in places:
        if lease_table.get(place.slot, _NOBODY)[0] != place.generation:
            _refuse(place, lease_table)


def _refuse(place: SlotRef, lease_table: Mapping[int, SlotOccupant]) -> None:
    """Unless it is the base's, which has no slot that anybody could take."""
    if place == NO_SLOT:
        return
    occupant = lease_table.get(place.slot)
    now = "nobody" if occupant is None else f"generation {occupant.generation}"
    raise HandleClosedError(
        f"a row is of generation {place.generation} of slot {place.slot}, which {now} has by now"
    )


def _tiles(bounds: Sequence[int], rows: int) -> tuple[Tile, ...]:
    tiles, start = list[Tile](), 0
    for segment, stop in enumerate(bounds[1:]):
        while stop - start > rows:
            tiles.append((segment, start, start + rows))
            start += rows
        tiles.append((segment, start, stop))
        start = stop
    return tuple(tiles)


def _groups(ranks: Sequence[int]) -> tuple[RankGroup, ...]:
    groups, first = list[RankGroup](), 0
    for segment, rank in enumerate(ranks):
        if rank != ranks[first]:
            groups.append((ranks[first], first, segment))
            first = segment
    if ranks:
        groups.append((ranks[first], first, len(ranks)))
    return tuple(groups)
