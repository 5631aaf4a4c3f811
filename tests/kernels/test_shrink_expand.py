"""`shrink` and `expand`, between which a sum or a gather over processes may stand."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import (
    DTYPES,
    INTEGERS,
    MIXED,
    SIGNED,
    GuardedTables,
    assert_untouched,
    bits,
    draw,
    guarded,
    guards_hold,
    make_plan,
    make_tables,
)
from lorax_kernels import Plan, expand, shrink
from lorax_kernels.reference import reference

RANKS = [1, 3, 12, 20, 0, 64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shrink_is_x_times_a_and_zero_elsewhere(dtype: torch.dtype) -> None:
    tables, plan = make_tables(INTEGERS, RANKS, (31, 45), dtype, -1.0), make_plan(MIXED)
    x = guarded(draw(INTEGERS, plan.tokens, 31, dtype=dtype, seed=1))
    h = guarded(torch.full((plan.tokens, 70), torch.nan, dtype=dtype))
    for _ in range(3):
        shrink(h, x, plan, 1, tables)
        assert guards_hold(h)
        row = 0
        for slot, rows in MIXED:
            for at in range(row, row + rows):
                operands = tables.operands(1, slot) if slot >= 0 else None
                width = 0 if operands is None else operands[0].shape[0]
                if operands is not None:
                    exact = (operands[0].double() * x[at].double()).sum(dim=1)
                    assert torch.equal(h[at, :width].double(), exact)
                assert (h[at, width:] == 0).all()
            row += rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_together_are_apply(dtype: torch.dtype) -> None:
    ranks = [1, 2, 3, 4, 0, 5]
    tables, plan = make_tables(INTEGERS, ranks, (31, 45), dtype, -1.0), make_plan(MIXED)
    x = guarded(draw(INTEGERS, plan.tokens, 31, dtype=dtype, seed=1))
    y = guarded(draw(INTEGERS, plan.tokens, 45, dtype=dtype, seed=2))
    expected, before = reference(y, x, plan, 1, tables), y.clone()
    h = x.new_empty(plan.tokens, 5)
    shrink(h, x, plan, 1, tables)
    expand(y, h, plan, 1, tables)
    assert guards_hold(y)
    assert torch.equal(y.double(), expected)
    assert_untouched(y, before, MIXED, ranks)


def test_what_is_beyond_an_adapters_rank_is_not_read() -> None:
    tables = make_tables(SIGNED, [2, 4], (8, 8), torch.float32, 2.0)
    plan = make_plan([(0, 2), (-1, 1), (1, 2)])
    x, y = (draw(SIGNED, 5, 8, dtype=torch.float32, seed=seed) for seed in (1, 2))
    h = torch.full((5, 6), torch.nan)
    shrink(h, x, plan, 1, tables)
    other, before = y.clone(), y.clone()
    expand(y, h, plan, 1, tables)
    h[:2, 2:], h[2], h[3:, 4:] = torch.nan, torch.nan, torch.nan
    expand(other, h, plan, 1, tables)
    assert torch.equal(bits(y), bits(other))
    assert torch.equal(bits(y[2]), bits(before[2]))
    assert (y[:2] != before[:2]).any()


def test_worked_out_by_hand() -> None:
    tables = GuardedTables(1, 1)
    tables.put(0, 0, torch.tensor([[3.0, 1.0]]), torch.tensor([[5.0], [7.0]]), 0.5)
    plan = Plan.from_segments([0, 1, 2], [0, -1])
    x, h, y = torch.tensor([[2.0, 4.0], [1.0, 1.0]]), torch.ones(2, 2), torch.ones(2, 2)
    shrink(h, x, plan, 0, tables)
    assert h.tolist() == [[10.0, 0.0], [0.0, 0.0]]  # 3 * 2 + 1 * 4
    expand(y, h, plan, 0, tables)
    assert y.tolist() == [[26.0, 36.0], [1.0, 1.0]]  # 1 + 0.5 * 5 * 10, 1 + 0.5 * 7 * 10


@pytest.mark.parametrize(
    ("h", "x", "dtype", "module", "named"),
    [
        ((3, 2), (2, 8), torch.float32, 1, r"expected x contiguous \[3, features\] on cpu"),
        ((2, 2), (3, 8), torch.float32, 1, r"expected h contiguous \[3, features\] on cpu"),
        ((3, 1), (3, 8), torch.float32, 1, r"expected h \[tokens, 2 or more\] in torch.float32"),
        ((3, 2), (3, 7), torch.float32, 1, r"expected x \[tokens, 8\] in torch.float32, got x"),
        ((3, 2), (3, 8), torch.float16, 1, r"expected h \[tokens, 2 or more\] in torch.float32"),
        ((3, 2), (3, 8), torch.float32, 2, "expected a module from 0 to 1, got 2"),
    ],
)
def test_shrink_refuses(
    h: tuple[int, int], x: tuple[int, int], dtype: torch.dtype, module: int, named: str
) -> None:
    tables = make_tables(SIGNED, [2], (8, 6), torch.float32, 1.0)
    result = torch.ones(h, dtype=dtype)
    with pytest.raises(ValueError, match=named):
        shrink(result, torch.ones(x), make_plan([(0, 3)]), module, tables)
    assert (result == 1).all()


@pytest.mark.parametrize(
    ("y", "h", "slot", "named"),
    [
        ((2, 6), (3, 2), 0, r"expected y contiguous \[3, features\] on cpu"),
        ((3, 5), (3, 2), 0, r"expected y \[tokens, 6\] in torch.float32, got y \[3, 5\]"),
        ((3, 6), (3, 1), 0, r"expected h \[tokens, 2 or more\] .* got \[3, 1\]"),
        ((3, 6), (3, 2), 1, "expected slots below 1, the plan has slot 1"),
    ],
)
def test_expand_refuses(y: tuple[int, int], h: tuple[int, int], slot: int, named: str) -> None:
    tables = make_tables(SIGNED, [2], (8, 6), torch.float32, 1.0)
    result = torch.ones(y)
    with pytest.raises(ValueError, match=named):
        expand(result, torch.ones(h), make_plan([(slot, 3)]), 1, tables)
    assert (result == 1).all()
