"""Byte ranges of a file, sets of them, and strided spans."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

ByteRange = tuple[int, int]
"""Bytes [start, stop) of a file."""


class SpanSet:
    """A set of bytes as ascending, non-empty spans, of which no two are adjacent."""

    __slots__ = ("_starts", "_stops", "nbytes")

    def __init__(self, spans: Iterable[ByteRange] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.nbytes = 0
        for start, stop in spans:
            self.add(start, stop)

    def __iter__(self) -> Iterator[ByteRange]:
        return zip(tuple(self._starts), tuple(self._stops), strict=True)

    @property
    def end(self) -> int:
        """The position after the last byte; 0 if the set is empty."""
        return self._stops[-1] if self._stops else 0

    def add(self, start: int, stop: int) -> ByteRange:
        """Add the non-empty range [start, stop). Return the span that now contains it."""
        first = bisect_left(self._stops, start)
        end = bisect_right(self._starts, stop)
        if first < end:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[end - 1])
        replaced = sum(self._stops[first:end]) - sum(self._starts[first:end])
        self.nbytes += stop - start - replaced
        self._starts[first:end] = [start]
        self._stops[first:end] = [stop]
        return start, stop

    def covers(self, start: int, stop: int) -> bool:
        return self.reach(start) >= stop

    def reach(self, start: int) -> int:
        """Return the end of the gapless run from `start`; `start` if that byte is missing."""
        index = bisect_right(self._starts, start) - 1
        return max(start, self._stops[index]) if index >= 0 else start

    def missing(self, start: int, stop: int) -> list[ByteRange]:
        """Return the ranges of [start, stop) that are not in the set, ascending."""
        gaps = []
        while (start := self.reach(start)) < stop:
            index = bisect_right(self._starts, start)
            end = min(stop, self._starts[index]) if index < len(self._starts) else stop
            gaps.append((start, end))
            start = end
        return gaps


class ByteSpan(NamedTuple):
    """Strided bytes of a file: `rows` ranges of equal length, the first [start, stop).

    Rows begin `pitch` bytes apart. With one row, `pitch` is 0; otherwise it is at least the length
    of a row. One object stands for the thousands of rows of a matrix cut by columns.
    """

    start: int
    stop: int
    rows: int = 1
    pitch: int = 0

    @property
    def nbytes(self) -> int:
        return (self.stop - self.start) * self.rows

    @property
    def end(self) -> int:
        """The end of the last row."""
        return self.stop + (self.rows - 1) * self.pitch

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield [start, stop) of every row, in order."""
        start, stop, rows, pitch = self
        for n in range(rows):
            yield start + n * pitch, stop + n * pitch

    def cut(self, first: int, last: int) -> list[ByteSpan]:
        """Return the bytes [first, last) of the concatenated rows, as at most three spans."""
        start, stop, rows, pitch = self
        if rows == 1:
            return [ByteSpan(start + first, start + last)]
        cut: list[ByteSpan] = []
        size = stop - start
        row, skipped = divmod(first, size)
        if skipped:
            row_start = start + row * pitch
            taken = min(skipped + last - first, size)
            cut.append(ByteSpan(row_start + skipped, row_start + taken))
            first, row = first + taken - skipped, row + 1
        whole, rest = divmod(last - first, size)
        row_start = start + row * pitch
        if whole:
            cut.append(ByteSpan(row_start, row_start + size, whole, pitch if whole > 1 else 0))
        if rest:
            row_start += whole * pitch
            cut.append(ByteSpan(row_start, row_start + rest))
        return cut
