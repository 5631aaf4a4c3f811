"""`apply` against float64, exact integers and PEFT, in memory where every stray read is a NaN."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from kernel_cases import (
    DTYPES,
    INTEGERS,
    MIXED,
    POSITIVE,
    SIGNED,
    GuardedTables,
    assert_untouched,
    check_apply,
    draw,
    make_plan,
    make_tables,
)
from lorax_kernels import Plan, apply
from lorax_kernels.reference import reference


def check(
    kind: str,
    segments: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    features: tuple[int, int],
    dtype: torch.dtype,
    scale: float,
) -> None:
    tables, plan = make_tables(kind, ranks, features, dtype, scale), make_plan(segments)
    check_apply(kind, plan, tables, segments, ranks, features, dtype, (1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [POSITIVE, SIGNED])
@pytest.mark.parametrize("features", [(67, 129), (480, 60), (1, 5), (33, 1)], ids=str)
def test_within_the_rounding_bound(
    kind: str, features: tuple[int, int], dtype: torch.dtype
) -> None:
    check(kind, MIXED, [1, 3, 12, 20, 0, 64], features, dtype, 7 / 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize("rank", [1, 3, 12, 20, 64, 256])
def test_one_segment(rows: int, rank: int, dtype: torch.dtype) -> None:
    check(POSITIVE, [(1, rows)], [2, rank], (65, 127), dtype, 0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_integers_are_exact(dtype: torch.dtype) -> None:
    check(INTEGERS, MIXED, [1, 2, 3, 4, 0, 5], (31, 45), dtype, -1.0)


@settings(max_examples=60, deadline=None)
@given(
    segments=st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 9)), max_size=12),
    ranks=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    features=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([INTEGERS, POSITIVE, SIGNED]),
)
def test_any_segments(
    segments: list[tuple[int, int]],
    ranks: list[int],
    features: tuple[int, int],
    dtype: torch.dtype,
    kind: str,
) -> None:
    check(kind, segments, ranks, features, dtype, 1.0)


def by_hand() -> GuardedTables:
    tables = GuardedTables(1, 2)
    tables.put(0, 0, torch.tensor([[3.0, 1.0]]), torch.tensor([[5.0], [7.0]]), 0.5)
    return tables


def test_values_worked_out_by_hand() -> None:
    x, y = torch.tensor([[2.0, 4.0], [1.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    plan = Plan.from_segments([0, 1, 2], [0, 1])  # slot 1 has no such module
    expected = [[26.0, 36.0], [1.0, 1.0]]  # 1 + 0.5 * 5 * (3*2 + 1*4), 1 + 0.5 * 7 * 10
    assert reference(y, x, plan, 0, by_hand()).tolist() == expected
    apply(y, x, plan, 0, by_hand())
    assert y.tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_an_adapter_keep_every_bit_and_leak_nothing(dtype: torch.dtype) -> None:
    tables, segments = make_tables(SIGNED, [4, 0], (8, 8), dtype, 2.0), [(-1, 2), (0, 3), (1, 2)]
    plan, base = make_plan(segments), [0, 1, 5, 6]
    x, y = draw(SIGNED, 7, 8, dtype=dtype, seed=1), draw(SIGNED, 7, 8, dtype=dtype, seed=2)
    x[base] = torch.nan
    y[base] = torch.tensor([-0.0, torch.nan, -torch.nan, torch.inf, 1e-7, 0.0, -1.0, 3.0]).to(dtype)
    before = y.clone()
    apply(y, x, plan, 1, tables)
    assert_untouched(y, before, segments, [4, 0])
    assert y[2:5].isfinite().all()
    assert (y[2:5] != before[2:5]).any(dim=1).all()


def peft_linear(rank: int, features: tuple[int, int], *, rslora: bool) -> LoraLinear:
    config = LoraConfig(
        r=rank, lora_alpha=7, use_rslora=rslora, target_modules=["q"], init_lora_weights=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(rank)
        model = inject_adapter_in_model(config, nn.ModuleDict({"q": nn.Linear(*features)}))
    layer = model.eval().get_submodule("q")
    assert isinstance(layer, LoraLinear)
    return layer


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 12, 16, 20])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 17), (3, 33)], ids=str)
def test_float32_has_the_bits_of_peft(shape: tuple[int, int], rank: int, rslora: bool) -> None:
    layer, rows = peft_linear(rank, (576, 192), rslora=rslora), shape[0] * shape[1]
    a, b = (layer.get_parameter(f"lora_{part}.default.weight") for part in "AB")
    tables = GuardedTables(1, 1)
    tables.put(0, 0, a.detach(), b.detach(), layer.scaling["default"])
    x = draw(SIGNED, *shape, 576, dtype=torch.float32, seed=1)
    with torch.inference_mode():
        y = layer.base_layer(x)
        apply(y.view(rows, 192), x.view(rows, 576), make_plan([(0, rows)]), 0, tables)
        assert torch.equal(y, layer(x))
        assert not torch.equal(y, layer.base_layer(x))


def test_nothing_is_recorded_for_autograd() -> None:
    base = nn.Linear(2, 2)
    x = torch.ones(3, 2, requires_grad=True)
    y = base(x)
    recorded, before = y.grad_fn, y.tolist()
    apply(y, x, Plan.from_segments([0, 1, 3], [0, 0]), 0, by_hand())
    assert y.grad_fn is recorded
    assert y.tolist() != before


@pytest.mark.parametrize(
    ("y", "x", "module", "slot", "named"),
    [
        ((4, 2), (3, 2), 0, 0, r"expected y contiguous \[3, features\] on cpu, got \[4, 2\]"),
        ((3, 2), (2, 2), 0, 0, r"expected x contiguous \[3, features\] on cpu, got \[2, 2\]"),
        ((3, 1, 2), (3, 2), 0, 0, r"expected y contiguous \[3, features\]"),
        ((3, 5), (3, 2), 0, 0, r"y \[tokens, 2\] in torch.float32, got .* y \[3, 5\]"),
        ((3, 2), (3, 5), 0, 0, r"expected x \[tokens, 2\] in torch.float32 .* got x \[3, 5\]"),
        ((3, 2), (3, 2), 1, 0, "expected a module from 0 to 0, got 1"),
        ((3, 2), (3, 2), -1, 0, "expected a module from 0 to 0, got -1"),
        ((3, 2), (3, 2), 0, 2, "expected slots below 2, the plan has slot 2"),
    ],
)
def test_refuses_what_does_not_fit(
    y: tuple[int, ...], x: tuple[int, ...], module: int, slot: int, named: str
) -> None:
    output = torch.ones(y)
    with pytest.raises(ValueError, match=named):
        apply(output, torch.ones(x), Plan.from_segments([0, 3], [slot]), module, by_hand())
    assert torch.equal(output, torch.ones(y))


def test_refuses_other_dtypes_strides_and_devices() -> None:
    plan, good = Plan.from_segments([0, 2], [0]), torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"torch.float32, got x .* in torch.bfloat16"):
        apply(good, good.bfloat16(), plan, 0, by_hand())
    with pytest.raises(ValueError, match=r"y \[2, 2\] in torch.float64"):
        apply(good.double(), good, plan, 0, by_hand())
    with pytest.raises(ValueError, match=r"expected x \[tokens, 2\] in torch.float32"):
        apply(good.half(), good.half(), plan, 0, by_hand())
    with pytest.raises(ValueError, match=r"expected y contiguous .* strides \(1, 2\)"):
        apply(good.t(), good, plan, 0, by_hand())
    with pytest.raises(ValueError, match=r"expected x contiguous .* on meta"):
        apply(good, good.to("meta"), plan, 0, by_hand())


def test_a_later_segment_that_does_not_fit_leaves_the_earlier_ones_alone() -> None:
    tables, y = by_hand(), torch.ones(2, 2)
    tables.put(0, 1, torch.ones(1, 3), torch.ones(2, 1), 1.0)
    with pytest.raises(ValueError, match=r"expected x \[tokens, 3\]"):
        apply(y, torch.ones(2, 2), Plan.from_segments([0, 1, 2], [0, 1]), 0, tables)
    assert torch.equal(y, torch.ones(2, 2))
