"""Cutting a group's extent into windows, each filled in a staging buffer and copied as one."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from lorax_async.core.moves import Convert, GroupPlan, Read, Zero
from lorax_async.errors import InternalError

_CUT = 64


@dataclass(frozen=True, slots=True)
class Window:
    """The bytes [start, stop) of a group's extent, and the moves that fill them.

    The moves' targets count from `start`. What no move writes lies between tensors.
    """

    start: int
    stop: int
    reads: tuple[Read, ...]
    converts: tuple[Convert, ...]
    zeros: tuple[Zero, ...]

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def windows(group: GroupPlan, nbytes: int, item_bytes: int) -> tuple[Window, ...]:
    """Cut the extent of `group` into as few windows of at most `nbytes` as go one after the other.

    They end at multiples of 64 bytes of the extent; where that would cut a `Convert`, at one of
    its ends. `item_bytes` is the size of an element on the device.

    Raises
    ------
    InternalError
        A `Convert` writes more than `nbytes`, or `nbytes` is less than 64.
    """
    if group.nbytes <= nbytes:
        return (_whole(group),)
    starts = _starts(group, nbytes, item_bytes)
    made = [_Moves() for _ in starts]
    for read in group.reads:
        for n, first, last in _pieces(starts, read.target, read.nbytes):
            made[n].reads.extend(_part(read, first, last, starts[n]))
    for convert in group.converts:
        n = bisect_right(starts, convert.target) - 1
        made[n].converts.append(_moved(convert, convert.target - starts[n]))
    for zero in group.zeros:
        for n, first, last in _pieces(starts, zero.target, zero.nbytes):
            made[n].zeros.append(Zero(first - starts[n], last - first))
    stops = [*starts[1:], group.nbytes]
    return tuple(map(_Moves.between, made, starts, stops))


class _Moves:
    """The moves of one window, while they are collected."""

    def __init__(self) -> None:
        self.reads: list[Read] = []
        self.converts: list[Convert] = []
        self.zeros: list[Zero] = []

    def between(self, start: int, stop: int) -> Window:
        return Window(start, stop, tuple(self.reads), tuple(self.converts), tuple(self.zeros))


def _whole(group: GroupPlan) -> Window:
    return Window(0, group.nbytes, group.reads, group.converts, group.zeros)


def _part(read: Read, first: int, last: int, start: int) -> Iterator[Read]:
    """What of a read fills [first, last) of the extent, in the window that begins at `start`."""
    target = first - start
    for piece in read.source.cut(first - read.target, last - read.target):
        yield Read(piece.start, piece.nbytes, target, piece.rows, piece.pitch)
        target += piece.nbytes


def _moved(convert: Convert, target: int) -> Convert:
    return Convert(
        convert.file_offset,
        convert.nbytes,
        convert.source_dtype,
        convert.rows,
        convert.columns,
        target,
        convert.row_pitch,
        convert.pieces,
    )


def _starts(group: GroupPlan, nbytes: int, item_bytes: int) -> list[int]:
    whole = sorted(
        (convert.target, convert.target + convert.rows * convert.row_pitch * item_bytes)
        for convert in group.converts
    )
    starts = [0]
    while (limit := starts[-1] + nbytes) < group.nbytes:
        stop = _last_cut(limit, whole)
        if stop <= starts[-1]:
            raise InternalError(f"a window of {nbytes:,} bytes is too small for one move")
        starts.append(stop)
    return starts


def _last_cut(limit: int, whole: list[tuple[int, int]]) -> int:
    """Where a window that reaches at most to `limit` ends; the ranges in `whole` stay whole."""
    cut = limit - limit % _CUT
    before = bisect_left(whole, (cut,)) - 1
    if before >= 0:
        first, last = whole[before]
        if last > cut:
            return last if last <= limit else first
    return cut


def _pieces(starts: list[int], target: int, nbytes: int) -> Iterator[tuple[int, int, int]]:
    """Window and [first, last) in the extent, of each window that [target, + nbytes) touches."""
    n, first, end = bisect_right(starts, target) - 1, target, target + nbytes
    while first < end:
        last = min(end, starts[n + 1]) if n + 1 < len(starts) else end
        yield n, first, last
        n, first = n + 1, last
