"""Allocate extents of one aligned arena by best fit. Extents are never moved."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple, Self

from lorax_async.errors import InternalError

Run = tuple[int, int]
"""Offset and size."""


class FreeRuns:
    """Disjoint runs of free bytes; adjacent runs are merged. No two of `runs` may touch."""

    __slots__ = ("_by_size", "_sizes", "_starts", "nbytes")

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self._sizes = dict(runs)
        self._starts = {offset + size: offset for offset, size in self._sizes.items()}
        # As (size, offset): bisecting finds the best fit, of equals the lowest.
        self._by_size = sorted((size, offset) for offset, size in self._sizes.items())
        self.nbytes = sum(self._sizes.values())

    @classmethod
    def of_whole(cls, nbytes: int) -> Self:
        """Return a single run of `nbytes`, from offset 0."""
        return cls([(0, nbytes)] if nbytes else [])

    def take(self, kinds: Iterable[tuple[int, int]]) -> list[Run] | None:
        """Take `count` pieces of each (size, count). Return None, without change, unless all fit.

        The pieces of one size lie together in the smallest run that holds them all, the lowest
        of equal ones. If there is none, fill the largest run, the highest of equal ones, and place
        the rest in the same way. This cuts few runs and leaves few small ones.

        The returned runs hold whole pieces, in the order of `kinds`.
        """
        taken: list[Run] = []
        for nbytes, count in kinds:
            chosen = self._choose(nbytes, count)
            if chosen is None:
                self.give(taken)
                return None
            left = nbytes * count
            for size, offset in chosen:
                cut = min(size - size % nbytes, left)
                left -= cut
                taken.append((offset, cut))
                self._cut(offset, size, cut)
        return taken

    def give(self, runs: Sequence[Run]) -> None:
        """Return runs that were taken, whole or in part, and merge them with their neighbours."""
        by_size, sizes, starts = self._by_size, self._sizes, self._starts
        for offset, size in runs:
            self.nbytes += size
            end = offset + size
            behind = sizes.pop(end, None)
            if behind is not None:
                del by_size[bisect_left(by_size, (behind, end))]
                end += behind
            start = starts.pop(offset, offset)
            if start != offset:
                del by_size[bisect_left(by_size, (offset - start, start))]
            sizes[start], starts[end] = end - start, start
            insort(by_size, (end - start, start))

    def copy(self) -> Self:
        """Return an independent copy."""
        clone = self.__new__(type(self))
        clone._by_size, clone.nbytes = self._by_size.copy(), self.nbytes  # noqa: SLF001 (its own)
        clone._sizes, clone._starts = self._sizes.copy(), self._starts.copy()  # noqa: SLF001
        return clone

    def _choose(self, nbytes: int, count: int) -> list[tuple[int, int]] | None:
        """Remove runs for `count` pieces from `_by_size`; return them as (size, offset)."""
        by_size = self._by_size
        first = len(by_size)
        while first and by_size[first - 1][0] < nbytes * count:
            pieces = by_size[first - 1][0] // nbytes
            if not pieces:
                return None
            count -= pieces
            first -= 1
        if not first:
            return None
        chosen = by_size[first:]
        chosen.reverse()
        del by_size[first:]
        chosen.append(by_size.pop(bisect_left(by_size, (nbytes * count, 0))))
        return chosen

    def _cut(self, offset: int, size: int, nbytes: int) -> None:
        """Take the first `nbytes` of a run that is no longer in `_by_size`."""
        self.nbytes -= nbytes
        del self._sizes[offset]
        if size == nbytes:
            del self._starts[offset + size]
            return
        start, left = offset + nbytes, size - nbytes
        self._sizes[start], self._starts[offset + size] = left, start
        insort(self._by_size, (left, start))


Kinds = tuple[tuple[int, int], ...]
"""Pieces to allocate, as (size, count), the largest size first."""


def kinds_of(sizes: Sequence[int], alignment: int) -> Kinds:
    """Return the aligned sizes and their counts, the largest size first.

    Raise `InternalError` for a size that is not positive.
    """
    return _count_by_size(_round_up(sizes, alignment))


class Extent(NamedTuple):
    """`nbytes` of the arena from `offset`; both are multiples of its alignment."""

    offset: int
    nbytes: int


class Arena:
    """Track which bytes of an arena are allocated. Sizes and offsets are in bytes.

    Every extent starts and ends on a multiple of `alignment`, a power of two, to which `nbytes` is
    rounded down.
    """

    __slots__ = ("_alignment", "_free", "_live", "nbytes")

    def __init__(self, nbytes: int, alignment: int) -> None:
        if alignment < 1 or alignment & (alignment - 1) or nbytes < 0:
            raise InternalError(f"invalid arena: {nbytes} bytes, alignment {alignment}")
        self._alignment = alignment
        self.nbytes = nbytes & -alignment
        self._free = FreeRuns.of_whole(self.nbytes)
        self._live: dict[int, int] = {}

    @property
    def free_bytes(self) -> int:
        return self._free.nbytes

    def allocate(self, sizes: Sequence[int]) -> tuple[Extent, ...] | None:
        """Return one extent per size, in order. Return None, without change, unless all fit.

        The largest sizes are placed first, equal sizes as in `FreeRuns.take`. This succeeds
        whenever one run holds them all; None does not prove that no packing exists. Raise
        `InternalError` for a size that is not positive.
        """
        rounded = _round_up(sizes, self._alignment)
        taken = self._free.take(_count_by_size(rounded))
        if taken is None:
            return None
        order = sorted(range(len(rounded)), key=rounded.__getitem__, reverse=True)
        extents = _split_extents(taken, map(rounded.__getitem__, order))
        self._live.update([(extent.offset, extent.nbytes) for extent in extents])
        placed = dict(zip(order, extents, strict=True))
        return tuple(map(placed.__getitem__, range(len(sizes))))

    def reserve(self, extents: Iterable[Extent]) -> Self:
        """Allocate exactly these extents in an empty arena; return the arena."""
        taken = sorted(extents, key=attrgetter("offset"))
        ends = [0, *(extent.offset + extent.nbytes for extent in taken)]
        starts = [*(extent.offset for extent in taken), self.nbytes]
        runs = [(end, start - end) for end, start in zip(ends, starts, strict=True)]
        if self._live or any(size < 0 for _, size in runs):
            raise InternalError("reserved extents are not free")
        self._live = {extent.offset: extent.nbytes for extent in taken}
        self._free = FreeRuns(run for run in runs if run[1])
        return self

    def can_hold(self, sizes: Sequence[int]) -> bool:
        """Return whether `allocate` would succeed in the empty arena. Raises as it does."""
        return sum(_round_up(sizes, self._alignment)) <= self.nbytes

    def can_allocate(self, sizes: Sequence[int]) -> bool:
        """Return whether `allocate` would succeed now. Raises as it does."""
        return self._free.copy().take(kinds_of(sizes, self._alignment)) is not None

    def free(self, extents: Sequence[Extent]) -> None:
        """Free extents. Raise `InternalError`, and free none, unless each was allocated once."""
        returned = {extent.offset: extent.nbytes for extent in extents}
        live = self._live
        if len(returned) != len(extents) or not returned.items() <= live.items():
            raise InternalError(f"freed extents are not allocated: {extents}")
        for offset in returned:
            del live[offset]
        self._free.give(_join_neighbours(sorted(returned.items())))

    def copy(self) -> Self:
        """Return an independent copy."""
        clone = self.__new__(type(self))
        clone._alignment, clone.nbytes = self._alignment, self.nbytes  # noqa: SLF001 (its own)
        clone._free, clone._live = self._free.copy(), self._live.copy()  # noqa: SLF001 (its own)
        return clone


def _round_up(sizes: Sequence[int], alignment: int) -> list[int]:
    rounded = [-(-size & -alignment) for size in sizes]
    if rounded and min(rounded) <= 0:
        raise InternalError(f"extent size must be positive, not {min(sizes)}")
    return rounded


def _count_by_size(rounded: Sequence[int]) -> Kinds:
    return tuple(sorted(Counter(rounded).items(), reverse=True))


def _split_extents(taken: Iterable[Run], sizes: Iterator[int]) -> list[Extent]:
    """Cut the runs into extents of these sizes, in order."""
    extents: list[Extent] = []
    for start, size in taken:
        offset = start
        while offset < start + size:
            # As `Extent._make` does, without a call of Python code for each group.
            extents.append(tuple.__new__(Extent, (offset, next(sizes))))
            offset += extents[-1].nbytes
    return extents


def _join_neighbours(runs: Sequence[Run]) -> list[Run]:
    """Merge adjacent runs of a sorted sequence."""
    joined: list[Run] = []
    for offset, size in runs:
        if joined and sum(joined[-1]) == offset:
            start, before = joined[-1]
            joined[-1] = (start, before + size)
        else:
            joined.append((offset, size))
    return joined
