"""Assign the rows of a batch to adapter slots, in plain integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorax_async.errors import HandleClosedError

BASE_ONLY = -1
"""The slot of rows without an adapter."""

TILE_ROWS = 16
"""The default number of rows per kernel tile."""


@dataclass(frozen=True, slots=True)
class TokenSegments:
    """A partition of a batch's tokens into runs of one slot.

    Segment i is the rows `bounds[i]` to `bounds[i + 1]` (exclusive), of slot `slots[i]`. No segment
    is empty and no two neighbours share a slot, so equal batches have equal segments.
    """

    bounds: tuple[int, ...]
    slots: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.bounds[-1]


def plan_rows(slots: Sequence[int], lengths: Sequence[int]) -> TokenSegments:
    """Return the segments of a batch whose i-th sequence has `lengths[i]` tokens in `slots[i]`.

    The order of the sequences is kept. Raises ValueError for a negative length, a slot below
    `BASE_ONLY`, or sequences of different sizes.
    """
    bounds, merged = [0], list[int]()
    for slot, length in zip(slots, lengths, strict=True):
        if length < 0 or slot < BASE_ONLY:
            raise ValueError(f"invalid sequence: slot {slot}, {length} tokens")
        if length == 0:
            continue
        if merged and merged[-1] == slot:
            bounds[-1] += length
        else:
            merged.append(slot)
            bounds.append(bounds[-1] + length)
    return TokenSegments(tuple(bounds), tuple(merged))


class SlotRef(NamedTuple):
    """A slot and the generation of its occupant; `NO_SLOT` for the base."""

    slot: int
    generation: int


NO_SLOT = SlotRef(BASE_ONLY, -1)


class SlotOccupant(NamedTuple):
    """The present occupant of a slot."""

    generation: int
    rank: int


_VACANT = SlotOccupant(-2, 0)

Tile = tuple[int, int, int]
"""(segment, start, stop): rows [start, stop) of one segment."""

RankGroup = tuple[int, int, int]
"""(rank, first, stop): segments [first, stop) of one rank; rank 0 is the base."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """A batch in the order that kernels need.

    `order[i]` is the input position of the i-th sequence, sorted by rank, then slot, then input
    position; sequences of the base come first. `segments` are those of the rows in that order, one
    per slot; `tiles` the segments cut into tiles, and `groups` the segments by rank, both in order.
    """

    order: tuple[int, ...]
    segments: TokenSegments
    tiles: tuple[Tile, ...]
    groups: tuple[RankGroup, ...]


def plan_batch(
    places: Sequence[SlotRef],
    lengths: Sequence[int],
    occupants: Mapping[int, SlotOccupant],
    *,
    tile_rows: int = TILE_ROWS,
) -> BatchPlan:
    """Plan a batch whose i-th sequence has `lengths[i]` tokens and its adapter at `places[i]`.

    `occupants` has the present occupant of each slot; a tile has at most `tile_rows` rows.

    Raises
    ------
    HandleClosedError
        A sequence's slot has another occupant by now, or none.
    ValueError
        A sequence has no tokens, or `places` and `lengths` differ in length.
    """
    if len(places) != len(lengths) or min(lengths, default=1) < 1:
        raise ValueError("each sequence of a batch has a place and at least one token")
    members: dict[SlotRef, list[int]] = {}
    latest: SlotRef | None = None
    for number, place in enumerate(places):
        if place is not latest:  # those of one adapter mostly come together
            sequences = members.setdefault(place, [])
            latest = place
        sequences.append(number)
    order, bounds, slots, ranks = list[int](), [0], list[int](), list[int]()
    tokens = 0
    for rank, slot, sequences in _by_rank(members, occupants):
        for number in sequences:
            tokens += lengths[number]
        order += sequences
        bounds.append(tokens)
        slots.append(slot)
        ranks.append(rank)
    segments = TokenSegments(tuple(bounds), tuple(slots))
    return BatchPlan(tuple(order), segments, _tiles(bounds, tile_rows), _groups(ranks))


def _by_rank(
    members: Mapping[SlotRef, list[int]], occupants: Mapping[int, SlotOccupant]
) -> list[tuple[int, int, list[int]]]:
    """Return rank, slot and sequences of each place, sorted. No slot occurs twice."""
    entries = []
    for place, sequences in members.items():
        slot, generation = place
        occupant = occupants.get(slot, _VACANT)
        if occupant[0] != generation:
            _raise_closed(place, occupants)
        entries.append((occupant[1], slot, sequences))
    entries.sort()
    return entries


def require_current(places: Sequence[SlotRef], occupants: Mapping[int, SlotOccupant]) -> None:
    """Raise `HandleClosedError` for the first place that has another occupant by now, or none."""
    for place in places:
        if occupants.get(place.slot, _VACANT)[0] != place.generation:
            _raise_closed(place, occupants)


def _raise_closed(place: SlotRef, occupants: Mapping[int, SlotOccupant]) -> None:
    """Raise `HandleClosedError`, except for the base, which has no slot."""
    if place == NO_SLOT:
        return
    occupant = occupants.get(place.slot)
    current = "no occupant" if occupant is None else f"generation {occupant.generation}"
    raise HandleClosedError(
        f"a row uses generation {place.generation} of slot {place.slot}, which has {current} by now"
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
