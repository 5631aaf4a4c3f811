"""Byte ranges: runs of adjoining bytes, and sets of the bytes that have arrived."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

ByteRange = tuple[int, int]
"""Bytes [start, stop) of a file."""


class SpanSet:
    """A set of bytes, as the fewest spans: ascending, none empty, no two adjoining."""

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
        """Where the last byte's successor is."""
        return self._stops[-1] if self._stops else 0

    def add(self, start: int, stop: int) -> ByteRange:
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

    def missing(self, start: int, stop: int) -> list[ByteRange]:
        """What of [start, stop) is not here, ascending."""
        gaps = []
        while (start := self.reach(start)) < stop:
            index = bisect_right(self._starts, start)
            end = min(stop, self._starts[index]) if index < len(self._starts) else stop
            gaps.append((start, end))
            start = end
        return gaps


class ByteSpan(NamedTuple):
    """Bytes of a file: [start, stop), and as many, `pitch` further on each, `rows` times in all.

    Strided, for of a matrix cut by columns thousands of rows would else be thousands of objects.
    Where there is one row, `pitch` is 0; else it is not less than a row.
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
        """Where the last row stops."""
        return self.stop + (self.rows - 1) * self.pitch

    def ranges(self) -> Iterator[tuple[int, int]]:
        """[start, stop) of every row, in order."""
        start, stop, rows, pitch = self
        for n in range(rows):
            yield start + n * pitch, stop + n * pitch

    def cut(self, first: int, last: int) -> list[ByteSpan]:
        """The bytes [first, last) of its rows, one after the other: at most three spans."""
        start, stop, rows, pitch = self
        if rows == 1:
            return [ByteSpan(start + first, start + last)]
        cut: list[ByteSpan] = []
        size = stop - start
        row, skipped = divmod(first, size)
        if skipped:
            begun = start + row * pitch
            taken = min(skipped + last - first, size)
            cut.append(ByteSpan(begun + skipped, begun + taken))
            first, row = first + taken - skipped, row + 1
        whole, rest = divmod(last - first, size)
        begun = start + row * pitch
        if whole:
            cut.append(ByteSpan(begun, begun + size, whole, pitch if whole > 1 else 0))
        if rest:
            begun += whole * pitch
            cut.append(ByteSpan(begun, begun + rest))
        return cut


@dataclass(slots=True)
class TargetRun:
    """Bytes of the file, as a `Span` has them, that take [target, end) of a group's extent."""

    dtype: str
    start: int
    stop: int
    target: int
    end: int
    rows: int = 1
    pitch: int = 0


def adjoining(runs: Iterable[TargetRun]) -> Iterator[list[TargetRun]]:
    """The runs, those together that follow each other on the device and are of one dtype."""
    together: list[TargetRun] = []
    for run in runs:
        if together and (run.target != together[-1].end or run.dtype != together[-1].dtype):
            yield together
            together = []
        together.append(run)
    if together:
        yield together


def portions(runs: Iterable[TargetRun], nbytes: int) -> Iterator[list[ByteSpan]]:
    """The runs' bytes of the file, `nbytes` of them at a time."""
    portion: list[ByteSpan] = []
    room = nbytes
    for run in runs:
        span = ByteSpan(run.start, run.stop, run.rows, run.pitch)
        first, end = 0, span.nbytes
        while first < end:
            last = min(end, first + room)
            portion += span.cut(first, last)
            room -= last - first
            first = last
            if not room:
                yield portion
                portion, room = [], nbytes
    if portion:
        yield portion


def merged(spans: Iterable[ByteSpan]) -> tuple[ByteSpan, ...]:
    """Spans that share no byte, in order; those of one row that adjoin are one."""
    made: list[ByteSpan] = []
    for span in sorted(spans):
        if made and made[-1].stop == span.start and made[-1].rows == span.rows == 1:
            made[-1] = ByteSpan(made[-1].start, span.stop)
        else:
            made.append(span)
    return tuple(made)
