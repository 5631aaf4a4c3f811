"""Which bytes of a file are here, while they arrive in any order."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

Span = tuple[int, int]
"""Bytes [start, stop) of a file."""


class SpanSet:
    """A set of bytes, as the fewest spans: ascending, none empty, no two adjoining."""

    __slots__ = ("_starts", "_stops", "nbytes")

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.nbytes = 0
        for start, stop in spans:
            self.add(start, stop)

    def __iter__(self) -> Iterator[Span]:
        return zip(tuple(self._starts), tuple(self._stops), strict=True)

    @property
    def end(self) -> int:
        """Where the last byte's successor is."""
        return self._stops[-1] if self._stops else 0

    def add(self, start: int, stop: int) -> Span:
        """Bytes [start, stop), not empty, are here; returns the span that they are part of."""
        first = bisect_left(self._stops, start)
        end = bisect_right(self._starts, stop)
        if first < end:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[end - 1])
        gone = sum(self._stops[first:end]) - sum(self._starts[first:end])
        self.nbytes += stop - start - gone
        self._starts[first:end] = [start]
        self._stops[first:end] = [stop]
        return start, stop

    def covers(self, start: int, stop: int) -> bool:
        return self.reach(start) >= stop

    def reach(self, start: int) -> int:
        """How far the bytes from `start` on are here without a gap: `start` if not even its own."""
        index = bisect_right(self._starts, start) - 1
        return max(start, self._stops[index]) if index >= 0 else start

    def missing(self, start: int, stop: int) -> list[Span]:
        """What of [start, stop) is not here, ascending."""
        gaps = []
        while (start := self.reach(start)) < stop:
            index = bisect_right(self._starts, start)
            end = min(stop, self._starts[index]) if index < len(self._starts) else stop
            gaps.append((start, end))
            start = end
        return gaps
