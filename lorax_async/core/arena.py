"""Extents of one aligned arena: best fit among its free runs, and nothing is moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Self

from lorax_async.core.free_runs import FreeRuns, Run
from lorax_async.errors import InternalError

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
