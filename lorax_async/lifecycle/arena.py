"""Extents of one aligned arena: best fit among its free runs; nothing is moved."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Self

from lorax_async.errors import InternalError

Run = tuple[int, int]
"""Offset and size."""


class FreeRuns:
    """Runs of free bytes that do not touch. Offsets and sizes in bytes; sizes are positive.

    Parameters
    ----------
    runs
        In any order; no two may touch.
    """

    __slots__ = ("_by_size", "_sizes", "_starts", "nbytes")

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self._sizes = dict(runs)
        self._starts = {offset + size: offset for offset, size in self._sizes.items()}
        # As (size, offset): bisecting finds the best fit, of equals the lowest.
        self._by_size = sorted((size, offset) for offset, size in self._sizes.items())
        self.nbytes = sum(self._sizes.values())

    @classmethod
    def of_whole(cls, nbytes: int) -> Self:
        """All of so many bytes."""
        return cls([(0, nbytes)] if nbytes else [])

    def take(self, kinds: Iterable[tuple[int, int]]) -> list[Run] | None:
        """So many pieces of each size, given as (size, count); None (and no change) if not all fit.

        The pieces of a size lie together in the smallest run that holds them all, of equals the
        lowest. Where there is none, as many as fit are in the largest, of equals the highest, and
        the others are placed in the same way. So few runs are cut, and few small ones made.

        What is returned are whole pieces, size by size in the order given.
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
        """Have these back, which must have been taken, whole or in part."""
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
        """The same runs, to be changed independently."""
        twin = self.__new__(type(self))
        twin._by_size, twin.nbytes = self._by_size.copy(), self.nbytes  # noqa: SLF001 (its own)
        twin._sizes, twin._starts = self._sizes.copy(), self._starts.copy()  # noqa: SLF001
        return twin

    def _choose(self, nbytes: int, count: int) -> list[tuple[int, int]] | None:
        """Runs for so many pieces, as (size, offset), which have left `_by_size` then."""
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
        """Take the beginning of a run, which is not among `_by_size`."""
        self.nbytes -= nbytes
        del self._sizes[offset]
        if size == nbytes:
            del self._starts[offset + size]
            return
        start, left = offset + nbytes, size - nbytes
        self._sizes[start], self._starts[offset + size] = left, start
        insort(self._by_size, (left, start))


Kinds = tuple[tuple[int, int], ...]
"""How many pieces of which size there are, as (size, count)."""


def kinds_of(sizes: Sequence[int], alignment: int) -> Kinds:
    """What extents of these sizes take, the largest first.

    Raises
    ------
    InternalError
        A size is not positive.
    """
    return _counted(_rounded(sizes, alignment))


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

    __slots__ = ("_alignment", "_free", "_live", "nbytes")

    def __init__(self, nbytes: int, alignment: int) -> None:
        if alignment < 1 or alignment & (alignment - 1) or nbytes < 0:
            raise InternalError(f"an arena of {nbytes} bytes aligned to {alignment} cannot be")
        self._alignment = alignment
        self.nbytes = nbytes & -alignment
        self._free = FreeRuns.of_whole(self.nbytes)
        self._live: dict[int, int] = {}

    @property
    def free_bytes(self) -> int:
        return self._free.nbytes

    def allocate(self, sizes: Sequence[int]) -> tuple[Extent, ...] | None:
        """One extent per size, in the order given, or None (and no change) if not all fit.

        The largest are placed first, those of equal size as `FreeRuns.take` says. So it always
        succeeds where one run holds them all; None does not prove that no other packing exists.

        Raises
        ------
        InternalError
            A size is not positive.
        """
        rounded = _rounded(sizes, self._alignment)
        taken = self._free.take(_counted(rounded))
        if taken is None:
            return None
        order = sorted(range(len(rounded)), key=rounded.__getitem__, reverse=True)
        placed = dict(zip(order, _pieces(taken, map(rounded.__getitem__, order)), strict=True))
        self._live.update((extent.offset, extent.nbytes) for extent in placed.values())
        return tuple(placed[number] for number in range(len(sizes)))

    def reserve(self, extents: Iterable[Extent]) -> Self:
        """Take these extents of an arena that is empty, given out by one of the same size."""
        taken = sorted(extents, key=attrgetter("offset"))
        ends = [0, *(extent.offset + extent.nbytes for extent in taken)]
        starts = [*(extent.offset for extent in taken), self.nbytes]
        runs = [(end, start - end) for end, start in zip(ends, starts, strict=True)]
        if self._live or any(size < 0 for _, size in runs):
            raise InternalError("extents were reserved that are not free")
        self._live = {extent.offset: extent.nbytes for extent in taken}
        self._free = FreeRuns(run for run in runs if run[1])
        return self

    def can_allocate(self, sizes: Sequence[int]) -> bool:
        """Whether `allocate` would succeed now; raises as it does."""
        return self._free.copy().take(kinds_of(sizes, self._alignment)) is not None

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
        for offset in returned:
            del live[offset]
        self._free.give(_joined(sorted(returned.items())))

    def copy(self) -> Self:
        """An independent arena in the same state."""
        twin = self.__new__(type(self))
        twin._alignment, twin.nbytes = self._alignment, self.nbytes  # noqa: SLF001 (its own)
        twin._free, twin._live = self._free.copy(), self._live.copy()  # noqa: SLF001 (its own)
        return twin


def _rounded(sizes: Sequence[int], alignment: int) -> list[int]:
    rounded = [-(-size & -alignment) for size in sizes]
    if rounded and min(rounded) <= 0:
        raise InternalError(f"an extent must have a positive size, not {min(sizes)}")
    return rounded


def _counted(rounded: Sequence[int]) -> Kinds:
    return tuple(sorted(Counter(rounded).items(), reverse=True))


def _pieces(taken: Iterable[Run], sizes: Iterator[int]) -> Iterator[Extent]:
    """Each by itself; of these sizes, in the order in which they were taken."""
    for start, size in taken:
        offset = start
        while offset < start + size:
            yield (extent := Extent(offset, next(sizes)))
            offset += extent.nbytes


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Neighbours as one, of runs in their order."""
    joined: list[Run] = []
    for offset, size in runs:
        if joined and sum(joined[-1]) == offset:
            start, before = joined[-1]
            joined[-1] = (start, before + size)
        else:
            joined.append((offset, size))
    return joined
