"""The arena against a bitmap that is searched cell by cell."""

from itertools import groupby

import pytest
from hypothesis import stateful
from hypothesis import strategies as st
from refusals import refusals

from lorax_async.errors import InternalError
from lorax_async.lifecycle.arena import Arena, Extent

ALIGNMENT = 64
SIZES = st.lists(st.integers(1, 5 * ALIGNMENT), min_size=1, max_size=6)


class Bitmap:
    """The contract, naively: the largest size first, all that have it into the smallest hole for them.

    Where no hole holds them all, as many as fit go into the largest hole, and then the others.
    """

    def __init__(self, cells: int) -> None:
        self.taken = [False] * cells

    def holes(self) -> list[tuple[int, int]]:
        found, start = [], 0
        for taken, cells in groupby(self.taken):
            count = len(list(cells))
            found += [] if taken else [(count, start)]
            start += count
        return found

    def allocate(self, sizes: list[int]) -> tuple[Extent, ...] | None:
        before = self.taken.copy()
        cells = [-(-size // ALIGNMENT) for size in sizes]
        result: dict[int, Extent] = {}
        for size in sorted(set(cells), reverse=True):
            waiting = [index for index, each in enumerate(cells) if each == size]
            while waiting:
                start, count = self.place(size, len(waiting))
                if not count:
                    self.taken = before
                    return None
                for number, index in enumerate(waiting[:count]):
                    where = start + number * size
                    self.taken[where : where + size] = [True] * size
                    result[index] = Extent(where * ALIGNMENT, size * ALIGNMENT)
                del waiting[:count]
        return tuple(result[index] for index in range(len(cells)))

    def place(self, size: int, count: int) -> tuple[int, int]:
        """Where the next of so many of a size go, and how many of them."""
        fitting = [hole for hole in self.holes() if hole[0] >= size * count]
        if fitting:
            return min(fitting)[1], count
        cells, start = max(self.holes(), default=(0, 0))
        return start, cells // size

    def free(self, extents: tuple[Extent, ...]) -> None:
        for extent in extents:
            start, count = extent.offset // ALIGNMENT, extent.nbytes // ALIGNMENT
            assert all(self.taken[start : start + count])
            self.taken[start : start + count] = [False] * count


class ArenaMachine(stateful.RuleBasedStateMachine):
    @stateful.initialize(cells=st.integers(0, 40), rest=st.integers(0, ALIGNMENT - 1))
    def make(self, cells: int, rest: int) -> None:
        self.arena = Arena(cells * ALIGNMENT + rest, ALIGNMENT)
        self.bitmap = Bitmap(cells)
        self.held: list[tuple[Extent, ...]] = []

    @stateful.rule(sizes=SIZES)
    def allocate(self, sizes: list[int]) -> None:
        possible = self.arena.can_allocate(sizes)
        extents = self.arena.allocate(sizes)
        assert extents == self.bitmap.allocate(sizes)
        assert possible == (extents is not None)
        if extents is not None:
            self.held.append(extents)

    @stateful.precondition(lambda self: self.held)
    @stateful.rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        extents = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.arena.free(extents)
        self.bitmap.free(extents)

    @stateful.precondition(lambda self: self.held)
    @stateful.rule(data=st.data())
    def free_wrongly(self, data: st.DataObject) -> None:
        good = data.draw(st.sampled_from(self.held))
        offset, nbytes = good[0].offset, good[0].nbytes
        wrong = [good[0], Extent(offset, nbytes + ALIGNMENT), Extent(self.arena.nbytes, ALIGNMENT)]
        bad = [*((*good, each) for each in wrong), (Extent(offset + 1, nbytes), *good[1:])]
        refusals(
            self.arena.free, InternalError, {"not allocated": [data.draw(st.sampled_from(bad))]}
        )

    @stateful.rule(sizes=SIZES)
    def change_a_copy(self, sizes: list[int]) -> None:
        twin = self.arena.copy()
        for extents in self.held:
            twin.free(extents)
        assert twin.free_bytes == self.arena.nbytes
        assert not self.arena.nbytes or twin.can_allocate([self.arena.nbytes])
        twin.allocate(sizes)

    @stateful.invariant()
    def agrees(self) -> None:
        holes = self.bitmap.holes()
        assert self.arena.free_bytes == sum(size for size, _ in holes) * ALIGNMENT
        largest = max((size for size, _ in holes), default=0) * ALIGNMENT
        assert not largest or self.arena.can_allocate([largest])
        assert not self.arena.can_allocate([largest + 1])


@pytest.mark.slow
def test_the_arena_is_the_bitmap() -> None:
    stateful.run_state_machine_as_test(ArenaMachine)


def test_what_cannot_be() -> None:
    arena = Arena(256, 64)
    assert arena.allocate([]) == ()
    for call in (arena.allocate, arena.can_allocate):
        cases = {"must be positive": [[64, 0], [64, -1], [-64]]}
        refusals(call, InternalError, cases)
    assert arena.free_bytes == 256
    arenas = [(-1, 64), (64, 0), (64, 48), (64, -64)]
    refusals(lambda sizes: Arena(*sizes), InternalError, {"invalid arena": arenas})
