"""Cases in Triton's interpreter: `python -m sgmv.interpreted by_hand pairs …`."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from lorax_kernels import sgmv
from sgmv import cases
from sgmv.cases import Arena, Case, World

_LOADS_AND_STORES = "_interpreter"  # Triton's name for the object that does them


class _Watched:
    """Triton's own loads and stores; `strays` counts elements outside an arena's tensors."""

    def __init__(self, inner: Any, arena: Arena) -> None:
        self.inner = inner
        self._base = arena.memory.data_ptr()
        self._owned = arena.owned().numpy()
        self.strays = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def load(self, addresses: Any, mask: Any, *rest: Any) -> Any:
        self._look(addresses[mask])
        return self.inner.load(addresses, mask, *rest)

    def store(self, addresses: Any, value: Any, mask: Any) -> Any:
        self._look(addresses[mask])
        return self.inner.store(addresses, value, mask)

    def _look(self, addresses: Any) -> None:
        places = addresses.astype("int64") - self._base
        inside = (places >= 0) & (places < len(self._owned))
        self.strays += int(len(places) - self._owned[places[inside]].sum())


@contextmanager
def watched(arena: Arena) -> Iterator[_Watched]:
    """While a kernel runs whose tensors are all in `arena`, and nothing is put there any more."""
    watching = _Watched(getattr(interpreter, _LOADS_AND_STORES), arena)
    setattr(interpreter, _LOADS_AND_STORES, watching)
    try:
        yield watching
    finally:
        setattr(interpreter, _LOADS_AND_STORES, watching.inner)


def _complaints(world: World) -> list[str]:
    partials = world.partials(sgmv)
    with watched(world.arena) as watching:
        world.compute(sgmv, partials)
    strays = [f"{watching.strays} accesses outside of tensors"] if watching.strays else []
    return strays + world.complaints(partials)


def _run_all(all_: Iterable[Case]) -> int:
    worlds = 0
    wrong: list[str] = []
    for case in all_:
        worlds += 1
        wrong += [f"{case}: {text}" for text in _complaints(World(case))]
    assert not wrong, "\n".join(wrong[:20])
    return worlds


def segments() -> int:
    seen = []

    @settings(max_examples=40, deadline=None, database=None)
    @given(
        segments=st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 18)), max_size=8),
        ranks=st.tuples(*[st.integers(0, 17)] * 4),
        features=st.tuples(st.integers(1, 40), st.integers(1, 40)),
        dtype=st.sampled_from(cases.DTYPES),
        kind=st.sampled_from(cases.KINDS),
        tile_rows=st.sampled_from(cases.TILE_ROWS),
    )
    def any_case(**fields: object) -> None:
        fields["segments"] = tuple(fields["segments"])  # type: ignore[arg-type]
        seen.append(_run_all([Case(**fields)]))  # type: ignore[arg-type]

    any_case()
    return len(seen)


def unfit_ranks() -> int:
    """A rank that is not a multiple of 8, or above the plan's, makes its rows NaN and nothing else."""
    for rank in (12, 24):
        world = World(Case(ranks=(16, 8), segments=((0, 2), (1, 2)), features=(64, 32)))
        [module] = world.modules
        world.tables.rank[module, 0] = rank
        before = world.ys_before[0]
        wrong = _complaints(world)
        y = world.ys[0]
        assert y[:2].isnan().all(), f"rank {rank}: {y[:2]}"
        assert not before.isnan().any()
        assert all("of slot 0" in text or "partials" in text for text in wrong), wrong
    return 2


def halves() -> int:
    """`shrink` and `expand` of the public entries, whose middle is rounded and zero elsewhere."""
    segments = ((0, 2), (-1, 1), (1, 3), (2, 1))
    world = World(Case(kind=cases.INTEGERS, segments=segments, features=(160, 40)))
    [module], x = world.modules, world.x_before
    expected = torch.zeros(7, 32, dtype=torch.float64)
    for start, stop, slot in world.plan.segments:
        if (operands := world.tables.operands(module, slot)) is not None:
            rank = len(operands[0])
            expected[start:stop, :rank] = x[start:stop].double() @ operands[0].double().T
    h = world.arena.room(7, 32, dtype=world.dtype)
    sgmv.shrink_one(h, world.x, world.plan, module, world.tables)
    assert torch.equal(h.double(), expected)
    world.arena.remember()
    sgmv.expand_one(world.ys[0], h, world.plan, module, world.tables)
    assert not (wrong := world.complaints(h.new_empty(0, 1, 7, 24))), wrong
    return 1


PARTS: dict[str, Callable[[], int]] = {
    "by_hand": lambda: _run_all(cases.BY_HAND.values()),
    "pairs": lambda: _run_all(cases.pairwise()),
    "grid": lambda: _run_all(cases.full_grid()),
    **{part.__name__: part for part in (segments, unfit_ranks, halves)},
}
if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        sys.stdout.write(f"{name}: {PARTS[name]()} tried\n")
