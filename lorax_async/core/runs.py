"""Runs of an adapter's bytes: what adjoins in the file, on the device, or on both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
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

    def cut(self, first: int, last: int) -> list[Span]:
        """The bytes [first, last) of its rows, one after the other: at most three spans."""
        start, stop, rows, pitch = self
        if rows == 1:
            return [Span(start + first, start + last)]
        cut: list[Span] = []
        size = stop - start
        row, skipped = divmod(first, size)
        if skipped:
            begun = start + row * pitch
            taken = min(skipped + last - first, size)
            cut.append(Span(begun + skipped, begun + taken))
            first, row = first + taken - skipped, row + 1
        whole, rest = divmod(last - first, size)
        begun = start + row * pitch
        if whole:
            cut.append(Span(begun, begun + size, whole, pitch if whole > 1 else 0))
        if rest:
            begun += whole * pitch
            cut.append(Span(begun, begun + rest))
        return cut


@dataclass(slots=True)
class Run:
    """Bytes of the file, as a `Span` has them, that take [target, end) of a group's extent."""

    dtype: str
    start: int
    stop: int
    target: int
    end: int
    rows: int = 1
    pitch: int = 0


def adjoining(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """The runs, those together that follow each other on the device and are of one dtype."""
    together: list[Run] = []
    for run in runs:
        if together and (run.target != together[-1].end or run.dtype != together[-1].dtype):
            yield together
            together = []
        together.append(run)
    if together:
        yield together


def portions(runs: Iterable[Run], nbytes: int) -> Iterator[list[Span]]:
    """The runs' bytes of the file, `nbytes` of them at a time."""
    portion: list[Span] = []
    room = nbytes
    for run in runs:
        span = Span(run.start, run.stop, run.rows, run.pitch)
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


def merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Spans that share no byte, in order; those of one row that adjoin are one."""
    made: list[Span] = []
    for span in sorted(spans):
        if made and made[-1].stop == span.start and made[-1].rows == span.rows == 1:
            made[-1] = Span(made[-1].start, span.stop)
        else:
            made.append(span)
    return tuple(made)
