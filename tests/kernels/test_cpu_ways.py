"""The CPU's ways, each forced by thresholds: against float64, and what none of them may do."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from threading import Barrier, Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernel_cases import (
    DTYPES,
    INTEGERS,
    MIXED,
    POSITIVE,
    SIGNED,
    GuardedTables,
    bits,
    check_apply,
    draw,
    error_bound,
    make_plan,
    make_tables,
)
from lorax_kernels import Plan, Thresholds, apply
from lorax_kernels.reference import reference

ALONE = Thresholds(dense_bfloat16=0, dense_float16=0, dense_float32=0, turned_rank=0)
TURNED = Thresholds(dense_bfloat16=0, turned_rank=999, turned_features=0)
DENSE = Thresholds(dense_bfloat16=inf, dense_float16=inf, dense_float32=inf)
WAYS = {"alone": ALONE, "turned": TURNED, "dense": DENSE}
PASSES = 3
"""A plan looks, puts weights together, and uses them again."""


def check(
    kind: str,
    segments: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    features: tuple[int, int],
    dtype: torch.dtype,
    scales: Sequence[float],
    way: Thresholds,
) -> None:
    """Each pass of one plan against float64, with other rows each time."""
    tables, plan = make_tables(kind, ranks, features, dtype, 1.0), make_plan(segments, way)
    for slot, rank in enumerate(ranks):
        if rank:
            a, b, _ = tables.operands(1, slot) or pytest.fail("no operands")
            tables.put(1, slot, a, b, scales[slot % len(scales)])
    for seed in range(PASSES):
        check_apply(kind, plan, tables, segments, ranks, features, dtype, (seed, 20 + seed))


@pytest.mark.parametrize("scales", [(7 / 3,), (2.0, 0.5, 3.0), (0.3, 2.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("features", [(67, 129), (480, 60), (1, 5), (33, 1)], ids=str)
def test_within_the_rounding_bound(
    features: tuple[int, int], way: str, dtype: torch.dtype, scales: tuple[float, ...]
) -> None:
    check(SIGNED, MIXED, [1, 3, 12, 20, 0, 64], features, dtype, scales, WAYS[way])


@settings(max_examples=60, deadline=None)
@given(
    segments=st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 9)), max_size=12),
    ranks=st.lists(st.integers(0, 7), min_size=4, max_size=4),
    features=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([INTEGERS, POSITIVE, SIGNED]),
    scale=st.sampled_from([1.0, -2.0]),
    way=st.sampled_from(sorted(WAYS)),
)
def test_any_segments(
    segments: list[tuple[int, int]],
    ranks: list[int],
    features: tuple[int, int],
    dtype: torch.dtype,
    kind: str,
    scale: float,
    way: str,
) -> None:
    check(kind, segments, ranks, features, dtype, [scale], WAYS[way])


def passes(y: Tensor, x: Tensor, plan: Plan, tables: GuardedTables, count: int = PASSES) -> Tensor:
    """What the last of several calls makes of `y`."""
    for _ in range(count):
        result = y.clone()
        apply(result, x, plan, 1, tables)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_that_is_not_finite_spoils_its_own_rows_only(
    way: str, dtype: torch.dtype
) -> None:
    tables = make_tables(SIGNED, [4, 4, 4], (16, 16), dtype, 2.0)
    a, b, _ = tables.operands(1, 1) or pytest.fail("no operands")
    a[0], b[0] = torch.nan, torch.inf
    segments = [(0, 2), (1, 2), (2, 2), (-1, 2)]
    x, y = draw(SIGNED, 8, 16, dtype=dtype, seed=1), draw(SIGNED, 8, 16, dtype=dtype, seed=2)
    x[6:] = torch.nan
    plan = make_plan(segments, WAYS[way])
    result = passes(y, x, plan, tables)
    assert torch.equal(bits(result[6:]), bits(y[6:]))
    assert result[[0, 1, 4, 5]].isfinite().all()
    assert not result[2:4].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_the_base_between_others_keep_every_bit(way: str, dtype: torch.dtype) -> None:
    tables = make_tables(SIGNED, [4, 4, 4], (16, 8), dtype, 2.0)
    x, y = draw(SIGNED, 7, 16, dtype=dtype, seed=1), draw(SIGNED, 7, 8, dtype=dtype, seed=2)
    y[2] = torch.tensor([-0.0, torch.nan, -torch.nan, torch.inf, 1e-7, 0.0, -1.0, 3.0]).to(dtype)
    plan = make_plan([(0, 2), (-1, 1), (1, 2), (2, 2)], WAYS[way])
    result = passes(y, x, plan, tables)
    assert torch.equal(bits(result[2]), bits(y[2]))
    assert (result[[0, 1, 3, 4, 5, 6]] != y[[0, 1, 3, 4, 5, 6]]).any(dim=1).all()


def test_in_float32_a_row_does_not_depend_on_who_else_is_there() -> None:
    tables = make_tables(SIGNED, [8, 4, 16], (576, 192), torch.float32, 2.0)
    x, y = (draw(SIGNED, 12, n, dtype=torch.float32, seed=n) for n in (576, 192))
    mixed = passes(y, x, make_plan([(0, 1), (1, 4), (2, 7)]), tables)
    for rows, alone in (
        (slice(0, 1), [(0, 1), (-1, 11)]),
        (slice(1, 5), [(-1, 1), (1, 4), (-1, 7)]),
        (slice(5, 12), [(-1, 5), (2, 7)]),
    ):
        result = passes(y, x, make_plan(alone), tables, count=1)
        assert torch.equal(bits(result[rows]), bits(mixed[rows]))


def test_a_plan_that_may_keep_nothing_computes_each_segment_alone() -> None:
    tables = make_tables(SIGNED, [4, 4], (16, 16), torch.bfloat16, 2.0)
    x, y = (draw(SIGNED, 4, 16, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    segments = [(0, 2), (1, 2)]
    nothing = Thresholds(dense_bfloat16=inf, kept_bytes=0)
    result = passes(y, x, make_plan(segments, nothing), tables)
    assert torch.equal(result, passes(y, x, make_plan(segments, ALONE), tables))


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_others_took_the_place_of_are_not_used_again(way: str) -> None:
    tables = make_tables(SIGNED, [4, 4], (16, 16), torch.bfloat16, 2.0)
    x, y = (draw(SIGNED, 4, 16, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    plan = make_plan([(0, 2), (1, 2)], WAYS[way])
    passes(y, x, plan, tables)
    a, b = (draw(SIGNED, *size, dtype=torch.bfloat16, seed=9) for size in ((6, 16), (16, 6)))
    tables.put(1, 1, a, b, 3.0)
    for _ in range(PASSES):
        result = passes(y, x, plan, tables, count=1)
        expected = reference(y, x, plan, 1, tables)
        assert ((result.double() - expected).abs() <= error_bound(y, x, plan, tables)).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_plan_may_be_used_inside_and_outside_of_inference_mode(way: str) -> None:
    tables = make_tables(SIGNED, [4, 4], (16, 16), torch.bfloat16, 2.0)
    x, y = (draw(SIGNED, 4, 16, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    segments = [(0, 2), (1, 2)]
    expected = passes(y, x, make_plan(segments, WAYS[way]), tables)
    plan = make_plan(segments, WAYS[way])
    with torch.inference_mode():
        assert torch.equal(passes(y, x, plan, tables), expected)
    assert torch.equal(passes(y, x, plan, tables), expected)


@pytest.mark.parametrize("way", WAYS)
def test_threads_that_share_a_plan_do_not_disturb_each_other(way: str) -> None:
    tables = make_tables(SIGNED, [8, 8, 8, 8], (256, 256), torch.bfloat16, 2.0)
    plan = make_plan([(slot, 2) for slot in range(4)], WAYS[way])
    inputs = [draw(SIGNED, 8, 256, dtype=torch.bfloat16, seed=seed) for seed in range(4)]
    y = draw(SIGNED, 8, 256, dtype=torch.bfloat16, seed=9)
    before = [passes(y, x, plan, tables) for x in inputs]
    barrier, wrong = Barrier(len(inputs)), []

    def compute(number: int) -> None:
        barrier.wait()
        for _ in range(40):
            result = passes(y, inputs[number], plan, tables, count=1)
            bound = error_bound(y, inputs[number], plan, tables) * 2
            if not ((result.double() - before[number].double()).abs() <= bound).all():
                wrong.append(number)

    threads = [Thread(target=compute, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
