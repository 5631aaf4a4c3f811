"""Which ranges of a file to request, in which order, and which layer groups have arrived."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

from lorax_async.errors import InternalError
from lorax_async.formats.spans import ByteRange, SpanSet

Wave = tuple[ByteRange, ...]
"""Pieces that are asked for together, each in one request, in the order of the file."""

KiB = 1 << 10
MiB = 1 << 20

FIRST_WAVE_COST = 0.15
"""The delay of a first wave of its own may be this part of the time of all bytes."""

LATER_WAVES_COST = 0.05
"""The same for all waves together, where the rest is cut into several."""

_LATER_PIECE_SECONDS = 0.005
"""Below it, and below ten delays, requests would cost more than their order is worth."""

_LATER_PIECE_BYTES = 96 * KiB
"""Below it they do in any case, also where the rate is but a guess."""

_SPLIT_SECONDS = 0.02
"""What a split has to gain at least: rates are not measured exactly."""


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """What one connection does: seconds until an answer begins, then bytes per second."""

    delay: float
    rate: float


@dataclass(frozen=True, slots=True)
class PieceSizes:
    """Least and most bytes of one request, where the spans allow it."""

    least: int = 64 * KiB
    most: int = 32 * MiB


def plan_waves(
    groups: Sequence[Sequence[ByteRange]],
    *,
    first: int,
    connections: int,
    link: LinkEstimate,
    sizes: PieceSizes | None = None,
) -> tuple[Wave, ...]:
    """Waves that bring every byte of the groups once, earlier groups no later than later ones.

    Parameters
    ----------
    groups
        The file's spans of each layer group, in the order in which they are wanted. No byte is in
        two of them.
    first
        How many groups somebody waits for before all others; 0 if nobody does: then it is one wave.
    connections
        How many pieces a wave is balanced for.
    link
        What was measured of one connection.
    sizes
        Limits of a piece. A span that is smaller by itself is a smaller piece.
    """
    sizes = sizes or PieceSizes()
    waves = (
        _balanced(chain.from_iterable(wave), connections, sizes)
        for wave in _in_waves(groups, first, connections, link)
    )
    return tuple(wave for wave in waves if wave)


def without(spans: Iterable[ByteRange], have: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    """What of `spans` is in none of `have`; in order, each as large as it goes."""
    left = list(_joined(spans))
    for start, stop in (span for span in have if span[0] < span[1]):
        left = [
            part
            for first, last in left
            for part in ((first, min(last, start)), (max(first, stop), last))
            if part[0] < part[1]
        ]
    return tuple(left)


def _joined(spans: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    """In order, those that adjoin as one, none empty."""
    return tuple(SpanSet(span for span in spans if span[0] < span[1]))


def overlaps(spans: Iterable[ByteRange], span: ByteRange) -> tuple[ByteRange, ...]:
    """What of `spans` lies in `span`, in order."""
    parts = ((max(start, span[0]), min(stop, span[1])) for start, stop in sorted(spans))
    return tuple(part for part in parts if part[0] < part[1])


def size_of(spans: Iterable[ByteRange]) -> int:
    return sum(stop - start for start, stop in spans)


def split_of(left: ByteRange, own_rate: float, link: LinkEstimate, least: int) -> int | None:
    """Where another connection should take over a straggler's piece; None if that gains little.

    `left` is what the straggler has not begun to read, `own_rate` what it does per second. Both
    would end at the same moment; that has to be two delays earlier than if it went on alone (and 20
    ms), for the straggler's connection is lost, and another must be opened instead.
    """
    start, stop = left
    alone = (stop - start) / own_rate
    together = (stop - start + link.delay * link.rate) / (own_rate + link.rate)
    given = int((together - link.delay) * link.rate)
    if (
        alone - together <= max(2 * link.delay, _SPLIT_SECONDS)
        or given < least
        or stop - given - start < 1
    ):
        return None
    return stop - given


def _in_waves(
    groups: Sequence[Sequence[ByteRange]], first: int, connections: int, link: LinkEstimate
) -> list[Sequence[Sequence[ByteRange]]]:
    """The groups of each wave."""
    seconds = size_of(chain.from_iterable(groups)) / (connections * link.rate)
    if not first or link.delay > FIRST_WAVE_COST * seconds:
        return [groups]
    rest = groups[first:]
    affordable = int(LATER_WAVES_COST * seconds / link.delay) if link.delay else len(rest)
    piece = max(_LATER_PIECE_BYTES, link.rate * max(_LATER_PIECE_SECONDS, 10 * link.delay))
    worth = int(size_of(chain.from_iterable(rest)) / (connections * piece))
    count = max(1, min(affordable, worth, len(rest)))
    cuts = [len(rest) * n // count for n in range(count + 1)]
    return [groups[:first], *(rest[a:b] for a, b in pairwise(cuts))]


def _balanced(spans: Iterable[ByteRange], connections: int, sizes: PieceSizes) -> Wave:
    """The spans in pieces of equal size: as many as there are connections, or a multiple.

    A piece lies in one span. A cut that would leave less than the least before or after a span's
    end is left out.
    """
    runs = _joined(spans)
    total = size_of(runs)
    if not total:
        return ()
    rounds = -(-total // (connections * sizes.most))
    parts = max(1, min(connections * rounds, total // sizes.least), -(-total // sizes.most))
    cuts = [total * n // parts for n in range(1, parts)]
    ends = accumulate(stop - start for start, stop in runs)
    pieces: list[ByteRange] = []
    for (start, stop), end in zip(runs, ends, strict=True):
        inside = [stop - (end - cut) for cut in cuts if end - (stop - start) < cut < end]
        pieces += _cut((start, stop), inside, sizes)
    return tuple(pieces)


def _cut(run: ByteRange, cuts: Sequence[int], sizes: PieceSizes) -> list[ByteRange]:
    start, stop = run
    pieces: list[ByteRange] = []
    for cut in cuts:
        if cut - start >= sizes.least and stop - cut >= sizes.least:
            pieces.append((start, cut))
            start = cut
    pieces.append((start, stop))
    return [part for piece in pieces for part in _limited(piece, sizes.most)]


def _limited(piece: ByteRange, most: int) -> list[ByteRange]:
    start, stop = piece
    parts = -(-(stop - start) // most)
    cuts = [start + (stop - start) * n // parts for n in range(parts + 1)]
    return list(pairwise(cuts))


class GroupArrivals:
    """Counts the bytes of each group that are still missing.

    `groups` are the spans of each group, in the order in which they are told of; no byte is in two.
    A group without bytes is whole as soon as those before it are.
    """

    def __init__(self, groups: Sequence[Sequence[ByteRange]]) -> None:
        self._missing = [size_of(group) for group in groups]
        self._told = 0
        self._spans = sorted(
            (*span, n) for n, group in enumerate(groups) for span in group if span[0] < span[1]
        )
        self._starts = [start for start, _, _ in self._spans]

    @property
    def missing(self) -> int:
        """Bytes that have not landed."""
        return sum(self._missing)

    def landed(self, span: ByteRange) -> None:
        """These bytes are here, for the first time."""
        n = max(0, bisect_right(self._starts, span[0]) - 1)
        while n < len(self._spans) and self._spans[n][0] < span[1]:
            start, stop, group = self._spans[n]
            self._missing[group] -= size_of(overlaps([(start, stop)], span))
            if self._missing[group] < 0:
                raise InternalError(f"bytes {span[0]:,}-{span[1]:,} landed twice")
            n += 1

    def groups_in(self, span: ByteRange) -> tuple[int, int] | None:
        """The first and the last group that have bytes in the span; None if no group has."""
        first = max(0, bisect_right(self._starts, span[0]) - 1)
        found = [
            group
            for start, stop, group in self._spans[first : bisect_left(self._starts, span[1])]
            if start < span[1] and span[0] < stop
        ]
        return (min(found), max(found)) if found else None

    def take(self) -> list[int]:
        """The groups that are whole, as are all before them, and were not taken yet."""
        first = self._told
        while self._told < len(self._missing) and not self._missing[self._told]:
            self._told += 1
        return list(range(first, self._told))
