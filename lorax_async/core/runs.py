"""Runs of an adapter's bytes: what adjoins in the file, on the device, or on both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class Run:
    """Bytes [start, stop) of the file that take [target, end) of a group's extent."""

    dtype: str
    start: int
    stop: int
    target: int
    end: int


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


def portions(runs: Iterable[Run], nbytes: int) -> Iterator[list[tuple[int, int]]]:
    """The runs' [start, stop) of the file, `nbytes` of them at a time."""
    portion: list[tuple[int, int]] = []
    room = nbytes
    for run in runs:
        start = run.start
        while start < run.stop:
            stop = min(run.stop, start + room)
            portion.append((start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield portion
                portion, room = [], nbytes
    if portion:
        yield portion


def merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges that share no byte, in order, those that adjoin as one."""
    spans: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start, stop))
    return tuple(spans)
