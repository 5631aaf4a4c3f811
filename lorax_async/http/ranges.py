"""Plan a download's ranges and their order, and track which layer groups have arrived."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import ceil

from lorax_async.errors import InternalError
from lorax_async.formats.spans import ByteRange, SpanSet

Wave = tuple[ByteRange, ...]
"""Pieces that are requested together, one request each, in file order."""

KiB = 1 << 10
MiB = 1 << 20

FIRST_WAVE_COST = 0.15
"""The delay of a separate first wave may be this fraction of the time of all bytes."""

LATER_WAVES_COST = 0.05
"""The same for all later waves together."""

_LATER_PIECE_SECONDS = 0.005
"""Smaller pieces, or pieces of less than ten delays, cost more than their order gains."""

_LATER_PIECE_BYTES = 96 * KiB
"""The same in bytes, for a rate that is only a guess."""

_MACHINE_RATE = 1e9
"""Bytes per second that a machine receives, writes and copies, about. On a faster link, requests
cost its CPU time: 84 MB took 63 ms of it in 8 requests, 76 in 16 and 97 in 50.
"""

_REQUEST_SECONDS = 0.0005
"""A request's CPU time, without its bytes."""

_LEAST_CONNECTIONS = 8
"""Not fewer: the first bytes, which are measured, may come faster than the rest."""

_SPLIT_SECONDS = 0.02
"""The least gain of a split: measured rates are inexact."""


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """One connection's performance: seconds until a response begins, then bytes per second."""

    delay: float
    rate: float


@dataclass(frozen=True, slots=True)
class PieceSizes:
    """Minimum and maximum bytes of one request, as far as the spans allow."""

    least: int = 64 * KiB
    most: int = 32 * MiB


def plan_waves(
    groups: Sequence[Sequence[ByteRange]],
    *,
    first: int,
    connections: int,
    link: LinkEstimate,
    sizes: PieceSizes,
) -> tuple[Wave, ...]:
    """Return waves that request every byte of the groups once, in the groups' order.

    `groups` are the file's spans of each layer group, in the order to fetch them; no byte is in two
    groups. The `first` ones are urgent; if none is, there is one wave. A wave is balanced for
    `connections` pieces, by the measured `link` of one; for fewer if they are faster than the
    machine.
    """
    nbytes = size_of(chain.from_iterable(groups))
    connections = min(connections, max(_LEAST_CONNECTIONS, ceil(2 * _MACHINE_RATE / link.rate)))
    seconds = nbytes / (connections * link.rate)
    # While the machine waits for the link, requests cost nothing.
    free_waves = int((seconds - nbytes / _MACHINE_RATE) / (connections * _REQUEST_SECONDS))
    cuts = [0, len(groups)]
    if first and free_waves > 0 and link.delay <= FIRST_WAVE_COST * seconds:
        rest = groups[first:]
        affordable = int(LATER_WAVES_COST * seconds / link.delay) if link.delay else len(rest)
        affordable = min(affordable, free_waves)
        piece = max(_LATER_PIECE_BYTES, link.rate * max(_LATER_PIECE_SECONDS, 10 * link.delay))
        worth = int(size_of(chain.from_iterable(rest)) / (connections * piece))
        count = max(1, min(affordable, worth, len(rest)))
        cuts = [0, *(first + len(rest) * n // count for n in range(count + 1))]
    waves = (
        _balance(chain.from_iterable(groups[start:stop]), connections, sizes)
        for start, stop in pairwise(cuts)
    )
    return tuple(wave for wave in waves if wave)


def _balance(spans: Iterable[ByteRange], connections: int, sizes: PieceSizes) -> Wave:
    """Cut the spans into pieces of equal size, one per connection or a multiple of that.

    A piece lies in one span. A cut is left out if a part would be smaller than `sizes.least`.
    """
    runs = SpanSet(span for span in spans if span[0] < span[1])
    if not runs.nbytes:
        return ()
    rounds = -(-runs.nbytes // (connections * sizes.most))
    parts = min(connections * rounds, runs.nbytes // sizes.least)
    parts = max(1, parts, -(-runs.nbytes // sizes.most))
    cuts = [runs.nbytes * n // parts for n in range(1, parts)]
    pieces: list[ByteRange] = []
    before = 0
    for start, stop in runs:
        begin = start
        for cut in cuts:
            at = start + cut - before
            if at - begin >= sizes.least and stop - at >= sizes.least:
                pieces += _limit(begin, at, sizes.most)
                begin = at
        pieces += _limit(begin, stop, sizes.most)
        before += stop - start
    return tuple(pieces)


def _limit(start: int, stop: int, most: int) -> list[ByteRange]:
    parts = -(-(stop - start) // most)
    return list(pairwise(start + (stop - start) * n // parts for n in range(parts + 1)))


def size_of(spans: Iterable[ByteRange]) -> int:
    return sum(stop - start for start, stop in spans)


def split_of(left: ByteRange, own_rate: float, link: LinkEstimate, least: int) -> int | None:
    """Return where another connection should take over a straggler's piece; None for little gain.

    `left` is the range that the straggler has not begun to read, `own_rate` its bytes per second.
    Both connections would end at the same moment. That must be two delays (and 20 ms) earlier than
    the straggler alone, because its connection is lost and another must be opened.
    """
    start, stop = left
    alone = (stop - start) / own_rate
    together = (stop - start + link.delay * link.rate) / (own_rate + link.rate)
    taken = int((together - link.delay) * link.rate)
    if (
        alone - together <= max(2 * link.delay, _SPLIT_SECONDS)
        or taken < least
        or stop - taken - start < 1
    ):
        return None
    return stop - taken


class GroupArrivals:
    """Counts the missing bytes of each group.

    `groups` are the spans of each group; no byte is in two groups.
    """

    def __init__(self, groups: Sequence[Sequence[ByteRange]]) -> None:
        self._missing = [size_of(group) for group in groups]
        self._spans = sorted(
            (*span, n) for n, group in enumerate(groups) for span in group if span[0] < span[1]
        )
        self._starts = [start for start, _, _ in self._spans]

    def landed(self, span: ByteRange) -> list[int]:
        """Record that these bytes arrived, for the first time; return the groups they complete."""
        complete = []
        for group, nbytes in self._overlaps(span):
            self._missing[group] -= nbytes
            if self._missing[group] < 0:
                raise InternalError(f"bytes {span[0]:,}-{span[1]:,} arrived twice")
            if not self._missing[group]:
                complete.append(group)
        return complete

    def groups_in(self, span: ByteRange) -> list[int]:
        """Return the first and the last group with bytes in the span; empty if no group has any."""
        groups = [group for group, _ in self._overlaps(span)]
        return [min(groups), max(groups)] if groups else []

    def _overlaps(self, span: ByteRange) -> Iterator[tuple[int, int]]:
        """Yield the group and the size of each overlap of its spans with this one."""
        first = max(0, bisect_right(self._starts, span[0]) - 1)
        for start, stop, group in self._spans[first : bisect_left(self._starts, span[1])]:
            if span[0] < stop:
                yield group, min(stop, span[1]) - max(start, span[0])
