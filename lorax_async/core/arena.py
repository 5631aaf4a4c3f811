"""Extents of one aligned arena: best fit from a free list, neighbours merge, nothing is moved."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Self

from lorax_async.errors import InternalError

_Run = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` of the arena from `offset` on; both are multiples of its alignment."""

    offset: int
    nbytes: int


class Arena:
    """Which bytes of a device's arena are taken. Sizes and offsets in bytes.

    Parameters
    ----------
    nbytes
        Size of the arena; what is left over after the last whole `alignment` is never given out.
    alignment
        A power of two. Every extent starts and ends on a multiple of it.

    Raises
    ------
    InternalError
        The arguments are out of range.
    """

    __slots__ = ("_alignment", "_free", "_free_bytes", "_live", "nbytes")

    def __init__(self, nbytes: int, alignment: int) -> None:
        if alignment < 1 or alignment & (alignment - 1) or nbytes < 0:
            raise InternalError(f"an arena of {nbytes} bytes aligned to {alignment} cannot be")
        self._alignment = alignment
        self.nbytes = nbytes & -alignment
        # Free runs as (size, offset), sorted: bisecting finds the best fit, of equals the lowest.
        self._free: list[_Run] = [(self.nbytes, 0)] if self.nbytes else []
        self._free_bytes = self.nbytes
        self._live: dict[int, int] = {}

    @property
    def free_bytes(self) -> int:
        return self._free_bytes

    def allocate(self, sizes: Sequence[int]) -> tuple[Extent, ...] | None:
        """One extent per size, in the order given, or None (and no change) if not all fit.

        The largest is placed first, each in the smallest run that holds it. So it always succeeds
        where one run holds them all; None does not prove that no other packing exists.

        Raises
        ------
        InternalError
            A size is not positive.
        """
        fitted = self._fit(sizes)
        if fitted is None:
            return None
        free, extents = fitted
        self._free = free
        for extent in extents:
            self._live[extent.offset] = extent.nbytes
            self._free_bytes -= extent.nbytes
        return extents

    def reserve(self, extents: Iterable[Extent]) -> Self:
        """Take these extents of an arena that is empty, given out by one of the same size."""
        taken = sorted(extents, key=attrgetter("offset"))
        ends = [0, *(extent.offset + extent.nbytes for extent in taken)]
        starts = [*(extent.offset for extent in taken), self.nbytes]
        runs = [(start - end, end) for end, start in zip(ends, starts, strict=True)]
        if self._live or any(size < 0 for size, _ in runs):
            raise InternalError("extents were reserved that are not free")
        live = {extent.offset: extent.nbytes for extent in taken}
        free = sorted(run for run in runs if run[0])
        self._adopt(free, self.nbytes - sum(live.values()), live)
        return self

    def can_allocate(self, sizes: Sequence[int]) -> bool:
        """Whether `allocate` would succeed now; raises as it does."""
        return self._fit(sizes) is not None

    def free(self, extents: Sequence[Extent]) -> None:
        """Give extents back.

        Raises
        ------
        InternalError
            One of them is not allocated as it is, or is given twice; nothing is freed then.
        """
        returned = {extent.offset: extent.nbytes for extent in extents}
        live = self._live
        if len(returned) != len(extents) or any(live.get(o) != n for o, n in returned.items()):
            raise InternalError(f"extents that are not allocated were freed: {extents}")
        for offset, nbytes in returned.items():
            del live[offset]
            self._free_bytes += nbytes
        self._free = _merged([*self._free, *((n, o) for o, n in returned.items())])

    def copy(self) -> Self:
        """An independent arena in the same state."""
        twin = type(self)(0, self._alignment)
        twin.nbytes = self.nbytes
        twin._adopt(self._free.copy(), self._free_bytes, self._live.copy())  # noqa: SLF001 (its own)
        return twin

    def _adopt(self, free: list[_Run], free_bytes: int, live: dict[int, int]) -> None:
        self._free, self._free_bytes, self._live = free, free_bytes, live

    def _fit(self, sizes: Sequence[int]) -> tuple[list[_Run], tuple[Extent, ...]] | None:
        mask = -self._alignment
        rounded = [-(-size & mask) for size in sizes]
        if rounded and min(rounded) <= 0:
            raise InternalError(f"an extent must have a positive size, not {min(sizes)}")
        if sum(rounded) > self._free_bytes:
            return None
        free = self._free.copy()
        extents: list[Extent | None] = [None] * len(rounded)
        order = sorted(range(len(rounded)), key=rounded.__getitem__, reverse=True)
        done = 0
        while done < len(order):
            nbytes = rounded[order[done]]
            best = bisect_left(free, (nbytes, 0))
            if best == len(free):
                return None
            size, offset = free.pop(best)
            # What is left of the smallest run is the smallest for the next of this size, too.
            while size >= nbytes and done < len(order) and rounded[order[done]] == nbytes:
                extents[order[done]] = Extent(offset, nbytes)
                offset, size, done = offset + nbytes, size - nbytes, done + 1
            if size:
                insort(free, (size, offset))
        return free, tuple(extents)  # type: ignore[arg-type]


def _merged(runs: list[_Run]) -> list[_Run]:
    runs.sort(key=itemgetter(1))
    merged: list[_Run] = []
    size, offset = runs[0] if runs else (0, 0)
    for next_size, next_offset in runs[1:]:
        if offset + size == next_offset:
            size += next_size
        else:
            merged.append((size, offset))
            size, offset = next_size, next_offset
    if size:
        merged.append((size, offset))
    merged.sort()
    return merged
