"""The free bytes of an arena, in runs: which of them are taken, and how they join again."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Self

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
