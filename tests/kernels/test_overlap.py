"""Outputs that share memory with an input or weights, and scales that float32 does not hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernel_cases import GUARD, SIGNED, GuardedTables, draw, error_bound, make_plan, make_tables
from lorax_kernels import Operands, Plan, apply, expand, shrink
from lorax_kernels.reference import reference

ROWS, FEATURES, RANK = 6, 8, 8
"""All alike, so that x, h and y may be any part of one buffer."""

SIZE = ROWS * FEATURES
SEGMENTS = [(0, 2), (-1, 1), (1, 3)]
Call = Callable[[Tensor, Tensor, Plan], None]
TABLES = make_tables(SIGNED, [RANK, RANK], (FEATURES, FEATURES), torch.float32, 0.5)

CALLS: dict[str, Call] = {
    "apply": lambda y, x, plan: apply(y, x, plan, 1, TABLES),
    "grouped": lambda y, x, plan: apply(y, x, plan, 1, TABLES, group=(0, 1)),
    "shrink": lambda h, x, plan: shrink(h, x, plan, 1, TABLES),
    "expand": lambda y, h, plan: expand(y, h, plan, 1, TABLES),
}


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest) -> Call:
    return CALLS[request.param]


def part(buffer: Tensor, start: int) -> Tensor:
    return buffer[start : start + SIZE].view(ROWS, FEATURES)


def fresh() -> Tensor:
    return draw(SIGNED, 3 * SIZE, dtype=torch.float32, seed=7)


@pytest.mark.parametrize("apart", [-SIZE + 1, -FEATURES, -1, 0, 1, FEATURES, SIZE - 1])
def test_overlapping_tensors_are_refused(call: Call, apart: int) -> None:
    plan, buffer = make_plan(SEGMENTS), fresh()
    written, read = part(buffer, SIZE + apart), part(buffer, SIZE)
    for _ in range(3):  # a plan prepares itself in its first two calls
        call(torch.zeros(ROWS, FEATURES), read, plan)
        with pytest.raises(ValueError, match=r"memory of their own, .* overlap by \d+ bytes"):
            call(written, read, plan)
        assert torch.equal(buffer, fresh())


@pytest.mark.parametrize("apart", [-SIZE, SIZE])
def test_neighbours_in_one_buffer_are_apart(call: Call, apart: int) -> None:
    plan, buffer = make_plan(SEGMENTS), fresh()
    expected = part(fresh(), SIZE + apart).clone()
    call(expected, part(fresh(), SIZE).clone(), plan)
    for _ in range(3):
        buffer.copy_(fresh())
        call(part(buffer, SIZE + apart), part(buffer, SIZE), plan)
        assert torch.equal(part(buffer, SIZE + apart), expected)
        assert torch.equal(part(buffer, SIZE), part(fresh(), SIZE))


def test_columns_of_a_single_row_are_apart(call: Call) -> None:
    """As a decoding step has them: only then are such views contiguous."""
    plan, row = make_plan([(0, 1)]), fresh()[None, : 2 * FEATURES].clone()
    expected = row[:, FEATURES:].clone()
    call(expected, row[:, :FEATURES].clone(), plan)
    call(row[:, FEATURES:], row[:, :FEATURES], plan)
    assert torch.equal(row[:, FEATURES:], expected)


def test_empty_batches_overlap_nothing(call: Call) -> None:
    buffer = fresh()
    call(buffer[5:5].view(0, FEATURES), buffer[5:5].view(0, FEATURES), make_plan([(0, 0)]))
    assert torch.equal(buffer, fresh())


def test_a_batch_without_adapters_refuses_the_same(call: Call) -> None:
    buffer = fresh()
    with pytest.raises(ValueError, match="overlap"):
        call(part(buffer, 1), part(buffer, 0), make_plan([(-1, ROWS)]))


@pytest.mark.parametrize("factor", [0, 1])
@pytest.mark.parametrize("slot", [0, 1])
def test_outputs_in_the_memory_of_weights_are_refused(call: Call, slot: int, factor: int) -> None:
    operands = TABLES.operands(1, slot)
    assert operands is not None
    base = operands[:2][factor]._base
    assert isinstance(base, Tensor)
    before, plan = base.clone(), make_plan(SEGMENTS)
    first = GUARD + 1 - SIZE  # shares an element with the beginning of the weights
    for start in (first, GUARD, GUARD + RANK * FEATURES - 1):
        for _ in range(3):
            call(torch.zeros(ROWS, FEATURES), part(fresh(), 0), plan)
            with pytest.raises(ValueError, match=f"weights of slot {slot} .*overlap"):
                call(part(base, start), part(fresh(), 0), plan)
    assert torch.equal(base.nan_to_num(0.5), before.nan_to_num(0.5))


def test_a_slot_with_factors_of_two_dtypes_is_refused_beside_a_sound_one() -> None:
    tables, y = make_tables(SIGNED, [RANK, 0], (FEATURES, FEATURES), torch.float32, 1.0), fresh()
    a = torch.ones(RANK, FEATURES)
    tables.put(1, 1, a, a.half(), 1.0)
    with pytest.raises(ValueError, match="expected x .* in torch.float32 and y .* in torch.float1"):
        apply(part(y, 0), part(y, SIZE), make_plan(SEGMENTS), 1, tables)
    assert torch.equal(y, fresh())


# -- scales ---------------------------------------------------------------------------------------


class _Scaled:
    """Tables of modules 0 and 1, of which one slot of module 1 has the scale."""

    address = torch.zeros(2, 2, 2, dtype=torch.int64)
    rank = torch.full((2, 2), RANK, dtype=torch.int32)
    scale = torch.ones(2, 2)

    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        made = make_tables(SIGNED, [RANK, RANK], (FEATURES, FEATURES), dtype, 1.0)
        self._made: dict[tuple[int, int], Operands] = {}
        for module in range(2):
            for slot in range(2):
                operands = made.operands(1, slot)
                assert operands is not None
                chosen = scale if (module, slot) == (1, 1) else 1.0
                self._made[module, slot] = (*operands[:2], chosen)

    def operands(self, module: int, slot: int) -> Operands:
        return self._made[module, slot]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "scale", [3.41e38, -1e39, 1e308, float("inf"), float("nan"), 10**400], ids=lambda s: str(s)[:8]
)
def test_scales_that_float32_does_not_hold_are_refused(scale: float, dtype: torch.dtype) -> None:
    tables, plan = _Scaled(scale, dtype), make_plan(SEGMENTS)
    x, y = (part(fresh(), n * SIZE).to(dtype) for n in range(2))
    before = y.clone()
    for _ in range(3):
        with pytest.raises(ValueError, match=r"finite scale .* for module 1, slot 1 has"):
            apply(y, x, plan, 1, tables)
        with pytest.raises(ValueError, match=r"finite scale .* for module 1, slot 1 has"):
            expand(y, x, plan, 1, tables)
        assert torch.equal(y, before)
    apply(y, x, plan, 0, tables)
    assert not torch.equal(y, before)


@pytest.mark.parametrize("scale", [3.4e38, -3.4e38, 0.0, -0.0, 1e-46, -2.5], ids=str)
def test_all_other_scales_are_applied(scale: float) -> None:
    tables = GuardedTables(2, 1)
    a, b = (draw(SIGNED, RANK, FEATURES, dtype=torch.float32, seed=seed) for seed in (1, 2))
    tables.put(1, 0, a / 64, b.T.contiguous() / 64, scale)
    x, y = (part(fresh(), n * SIZE) for n in range(2))
    plan = make_plan([(0, ROWS)])
    expected, bound = reference(y, x, plan, 1, tables), error_bound(y, x, plan, tables)
    apply(y, x, plan, 1, tables)
    assert y.isfinite().all()
    assert ((y.double() - expected).abs() <= bound).all()
