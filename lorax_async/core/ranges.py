"""Which ranges of a file are asked for, in which order: waves of balanced pieces.

What it costs, on N connections: one delay for each request in sequence, and the bytes ÷ (N · rate).
A wave that is cut into N equal pieces costs one delay and ends everywhere at the same time; waves
one after the other bring layers in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

from lorax_async.core.spans import Span, SpanSet

Wave = tuple[Span, ...]
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
class Link:
    """What one connection does: seconds until an answer begins, then bytes per second."""

    delay: float
    rate: float


@dataclass(frozen=True, slots=True)
class PieceSizes:
    """Least and most bytes of one request, where the spans allow it."""

    least: int = 64 * KiB
    most: int = 32 * MiB


def plan_waves(
    groups: Sequence[Sequence[Span]],
    *,
    first: int,
    connections: int,
    link: Link,
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


def without(spans: Iterable[Span], have: Iterable[Span]) -> tuple[Span, ...]:
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


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """In order, those that adjoin as one, none empty."""
    return tuple(SpanSet(span for span in spans if span[0] < span[1]))


def overlaps(spans: Iterable[Span], span: Span) -> tuple[Span, ...]:
    """What of `spans` lies in `span`, in order."""
    parts = ((max(start, span[0]), min(stop, span[1])) for start, stop in sorted(spans))
    return tuple(part for part in parts if part[0] < part[1])


def size_of(spans: Iterable[Span]) -> int:
    return sum(stop - start for start, stop in spans)


def split_of(left: Span, own_rate: float, link: Link, least: int) -> int | None:
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
    groups: Sequence[Sequence[Span]], first: int, connections: int, link: Link
) -> list[Sequence[Sequence[Span]]]:
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


def _balanced(spans: Iterable[Span], connections: int, sizes: PieceSizes) -> Wave:
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
    pieces: list[Span] = []
    for (start, stop), end in zip(runs, ends, strict=True):
        inside = [stop - (end - cut) for cut in cuts if end - (stop - start) < cut < end]
        pieces += _cut((start, stop), inside, sizes)
    return tuple(pieces)


def _cut(run: Span, cuts: Sequence[int], sizes: PieceSizes) -> list[Span]:
    start, stop = run
    pieces: list[Span] = []
    for cut in cuts:
        if cut - start >= sizes.least and stop - cut >= sizes.least:
            pieces.append((start, cut))
            start = cut
    pieces.append((start, stop))
    return [part for piece in pieces for part in _limited(piece, sizes.most)]


def _limited(piece: Span, most: int) -> list[Span]:
    start, stop = piece
    parts = -(-(stop - start) // most)
    cuts = [start + (stop - start) * n // parts for n in range(parts + 1)]
    return list(pairwise(cuts))
