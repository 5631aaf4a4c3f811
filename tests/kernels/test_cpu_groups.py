"""Modules that get the same input: one shrink for all, and never one of another input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernel_cases import (
    DTYPES,
    SIGNED,
    GuardedTables,
    assert_untouched,
    draw,
    error_bound,
    guarded,
    guards_hold,
    make_plan,
)
from lorax_kernels import Plan, Thresholds, apply
from lorax_kernels.reference import reference

QKV = (0, 1, 2)
STACKED = Thresholds(dense_bfloat16=0, share_float32=True)
DENSE = Thresholds(dense_bfloat16=inf, dense_float16=inf, dense_float32=inf, share_float32=True)
WAYS = {"stacked": STACKED, "dense": DENSE}
OUT = (24, 12, 17)
FEATURES = 40
SEGMENTS = [(0, 3), (-1, 2), (1, 1), (0, 2), (2, 5), (1, 4)]


def three_modules(dtype: torch.dtype, ranks: Sequence[Sequence[int]]) -> GuardedTables:
    """q, k and v of adapters in as many slots; `ranks` by slot and module, 0: not touched."""
    tables = GuardedTables(len(OUT), len(ranks))
    for slot, by_module in enumerate(ranks):
        for module, rank in enumerate(by_module):
            if rank:
                seed = 10 * slot + module
                a = draw(SIGNED, rank, FEATURES, dtype=dtype, seed=seed)
                b = draw(SIGNED, OUT[module], rank, dtype=dtype, seed=500 + seed)
                tables.put(module, slot, a, b, 2.0)
    return tables


def layer(
    x: Tensor, plan: Plan, tables: GuardedTables, modules: Sequence[int] = QKV
) -> list[tuple[Tensor, Tensor]]:
    """`y` before and after, by module, as an attention layer asks for them."""
    results = []
    for module in modules:
        before = draw(SIGNED, plan.tokens, OUT[module], dtype=x.dtype, seed=module)
        y = guarded(before)
        apply(y, x, plan, module, tables, group=QKV)
        assert y.is_inference() or guards_hold(y)
        results.append((before, y))
    return results


def drawn(seed: int, dtype: torch.dtype) -> Tensor:
    return draw(SIGNED, sum(rows for _, rows in SEGMENTS), FEATURES, dtype=dtype, seed=seed)


BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@settings(max_examples=15, deadline=None)
@given(
    segments=st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 5)), max_size=8),
    ranks=st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
@example(segments=SEGMENTS, ranks=[(4, 4, 4), (8, 8, 8), (4, 4, 4)], dtype=BFLOAT16)
@example(segments=SEGMENTS, ranks=[(4, 4, 4), (8, 8, 8), (4, 4, 4)], dtype=FLOAT32)
@example(segments=SEGMENTS, ranks=[(4, 3, 1), (8, 1, 5), (16, 2, 2)], dtype=FLOAT16)
@example(segments=SEGMENTS, ranks=[(4, 0, 4), (8, 8, 0), (4, 4, 4)], dtype=BFLOAT16)
@example(segments=SEGMENTS, ranks=[(4, 4, 0), (8, 8, 0), (4, 4, 0)], dtype=BFLOAT16)
@example(segments=SEGMENTS, ranks=[(0, 4, 0), (0, 0, 0), (0, 0, 4)], dtype=FLOAT32)
@example(segments=SEGMENTS, ranks=[(0, 4, 0), (0, 0, 0), (0, 2, 0)], dtype=BFLOAT16)
def test_any_segments_and_ranks_are_within_the_rounding_bound(
    segments: list[tuple[int, int]], ranks: list[tuple[int, int, int]], dtype: torch.dtype
) -> None:
    tables = three_modules(dtype, ranks)
    for way in [*WAYS.values(), Thresholds(kept_bytes=0)]:
        plan = make_plan(segments, way)
        for seed in range(3):
            x = guarded(draw(SIGNED, plan.tokens, FEATURES, dtype=dtype, seed=seed))
            for module, (before, y) in enumerate(layer(x, plan, tables)):
                expected = reference(before, x, plan, module, tables)
                bound = error_bound(before, x, plan, tables, module)
                assert ((y.double() - expected).abs() <= bound).all()
                assert_untouched(y, before, segments, [of[module] for of in ranks])


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts products, and results that are in memory of their own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = self.new_storages = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage().data_ptr() for one in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self.products += str(func).startswith(("aten.mm.", "aten.addmm_."))
        new = {one.untyped_storage().data_ptr() for one in _tensors(result)} - given
        self.new_storages += len(new)
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


def watched(seed: int, dtype: torch.dtype, plan: Plan, tables: Any, group: Any) -> Watched:
    x = draw(SIGNED, plan.tokens, FEATURES, dtype=dtype, seed=seed)
    ys = [draw(SIGNED, plan.tokens, out, dtype=dtype, seed=out) for out in OUT]
    watch = Watched()
    with watch:
        for module, y in enumerate(ys):
            apply(y, x, plan, module, tables, group=group)
    return watch


@pytest.mark.parametrize("group", [(), QKV], ids=["alone", "together"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("segments", [[(0, 6)], SEGMENTS], ids=["one", "mixed"])
def test_nothing_is_allocated_once_a_plan_was_used_twice(
    segments: list[tuple[int, int]], way: str, dtype: torch.dtype, group: tuple[int, ...]
) -> None:
    tables = three_modules(dtype, [(4, 4, 4), (256, 8, 8), (4, 4, 4)])
    plan = make_plan(segments, WAYS[way])
    storages = [watched(seed, dtype, plan, tables, group).new_storages for seed in range(4)]
    assert storages[0] > 0  # it can be seen
    assert storages[2:] == [0, 0]


@pytest.mark.parametrize(
    ("dtype", "adapters", "group", "products"),
    [
        (torch.bfloat16, 1, (), 6),
        (torch.bfloat16, 1, QKV, 4),  # one shrink for q, k and v
        (torch.bfloat16, 8, QKV, 4),  # small work of many adapters is one product each way
        (torch.float32, 1, QKV, 6),  # float32 shares no shrink unless asked to
    ],
)
def test_one_shrink_for_q_k_and_v(
    dtype: torch.dtype, adapters: int, group: tuple[int, ...], products: int
) -> None:
    tables, plan = (
        three_modules(dtype, [(4, 4, 4)] * adapters),
        make_plan([(n, 1) for n in range(adapters)]),
    )
    assert [watched(seed, dtype, plan, tables, group) for seed in range(3)][-1].products == products


@pytest.fixture(params=WAYS)
def warm(request: pytest.FixtureRequest) -> tuple[Plan, GuardedTables]:
    """A plan that has put its weights together."""
    tables = three_modules(torch.bfloat16, [(4, 4, 4), (8, 8, 8), (4, 4, 4)])
    plan = make_plan(SEGMENTS, WAYS[request.param])
    for seed in range(3):
        layer(drawn(seed, torch.bfloat16), plan, tables)
    return plan, tables


def agrees(x: Tensor, plan: Plan, tables: GuardedTables, module: int) -> bool:
    ((before, y),) = layer(x, plan, tables, [module])
    expected = reference(before, x, plan, module, tables)
    bound = error_bound(before, x, plan, tables, module)
    return bool(((y.double() - expected).abs() <= bound).all())


def test_an_input_that_was_written_to_is_shrunk_again(warm: tuple[Plan, GuardedTables]) -> None:
    x = drawn(7, torch.bfloat16)
    assert agrees(x, *warm, module=0)
    x.neg_()
    assert agrees(x, *warm, module=1)
    x[3:] += 1
    assert agrees(x, *warm, module=2)
    assert agrees(x, *warm, module=0)
    x.data.neg_()  # of which the version of x does not tell
    assert agrees(x.data, *warm, module=1)
    with torch.inference_mode():  # whose tensors tell of no change
        x = drawn(8, torch.bfloat16)
        assert agrees(x, *warm, module=0)
        x.neg_()
        assert agrees(x, *warm, module=1)


def test_another_input_of_the_same_values_or_place_is_not_taken_for_it(
    warm: tuple[Plan, GuardedTables],
) -> None:
    for seed in range(20):  # what was freed is often given out again
        x = drawn(seed, torch.bfloat16)
        assert agrees(x, *warm, module=seed % 3)
        del x


def test_other_weights_and_work_in_between_do_not_spoil_it(
    warm: tuple[Plan, GuardedTables],
) -> None:
    plan, tables = warm
    x, other = drawn(8, torch.bfloat16), drawn(9, torch.bfloat16)
    assert agrees(x, plan, tables, module=0)
    y = draw(SIGNED, plan.tokens, OUT[1], dtype=torch.bfloat16, seed=1)
    apply(y, other, plan, 1, tables)
    assert agrees(x, plan, tables, module=1)
    a = draw(SIGNED, 4, FEATURES, dtype=torch.bfloat16, seed=77)
    b = draw(SIGNED, OUT[1], 4, dtype=torch.bfloat16, seed=78)
    tables.put(1, 0, a, b, 2.0)
    for module in (1, 2, 0, 1):
        assert agrees(x, plan, tables, module)


def test_a_group_of_modules_that_are_not_there_is_refused() -> None:
    tables, plan = three_modules(torch.bfloat16, [(4, 4, 4)]), make_plan([(0, 3)])
    x = draw(SIGNED, 3, FEATURES, dtype=torch.bfloat16, seed=0)
    y = draw(SIGNED, 3, OUT[0], dtype=torch.bfloat16, seed=1)
    before = y.clone()
    for _ in range(3):
        with pytest.raises(ValueError, match="expected a module from 0 to 2, got 3"):
            apply(y, x, plan, 0, tables, group=(0, 3))
        with pytest.raises(ValueError, match=r"expected module 0 in its group, got \[1, 2\]"):
            apply(y, x, plan, 0, tables, group=(1, 2))
    assert torch.equal(y, before)
