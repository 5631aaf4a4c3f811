"""`apply`, `shrink` and `expand` on the CPU, in memory where every stray read is a NaN."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from math import inf
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorax_kernels import Operands, Plan, Thresholds, apply, expand, shrink
from lorax_kernels.reference import reference

MIXED = [(0, 1), (-1, 2), (1, 15), (2, 16), (0, 0), (3, 17), (-1, 1), (0, 33), (4, 3), (5, 5)]
"""Segments as (slot, rows)."""

GUARD = 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {2: torch.int16, 4: torch.int32}
INTEGERS, POSITIVE, SIGNED = "integers", "positive", "signed"


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def guarded(values: Tensor) -> Tensor:
    buffer = torch.full((values.numel() + 2 * GUARD,), torch.nan, dtype=values.dtype)
    view = buffer[GUARD : GUARD + values.numel()].view(values.shape)
    view.copy_(values)
    return view


def memory_of(view: Tensor) -> tuple[Tensor, int]:
    buffer = view.new_empty(0).set_(view.untyped_storage())
    return buffer, int(view.storage_offset())


def guards_hold(view: Tensor) -> bool:
    buffer, start = memory_of(view)
    return bool(buffer[:start].isnan().all() and buffer[start + view.numel() :].isnan().all())


class GuardedTables:
    """Tables of one device, filled by hand; satisfies the protocol `Tables`."""

    def __init__(self, modules: int, slots: int) -> None:
        self.address = torch.zeros(2, modules, slots, dtype=torch.int64)
        self.rank = torch.zeros(modules, slots, dtype=torch.int32)
        self.scale = torch.zeros(modules, slots)
        self._operands: dict[tuple[int, int], Operands] = {}

    def put(self, module: int, slot: int, a: Tensor, b: Tensor, scale: float) -> None:
        a, b = guarded(a), guarded(b)
        self.address[:, module, slot] = torch.tensor([a.data_ptr(), b.data_ptr()])
        self.rank[module, slot] = a.shape[0]
        self.scale[module, slot] = scale
        self._operands[module, slot] = (a, b, scale)

    def operands(self, module: int, slot: int) -> Operands | None:
        return self._operands.get((module, slot))


def draw(kind: str, *shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == INTEGERS:
        return torch.randint(-1, 2, shape, generator=generator).to(dtype)
    low = -1.0 if kind == SIGNED else 0.0
    return torch.empty(shape).uniform_(low, 1.0, generator=generator).to(dtype)


def make_tables(
    kind: str, ranks: Sequence[int], features: tuple[int, int], dtype: torch.dtype, scale: float
) -> GuardedTables:
    """Slot i has an adapter of `ranks[i]` (0: none) for module 1; module 0 is poison."""
    tables = GuardedTables(2, len(ranks))
    for slot, rank in enumerate(ranks):
        tables.put(0, slot, torch.full((1, 1), torch.nan), torch.full((1, 1), torch.nan), 1.0)
        if rank:
            a = draw(kind, rank, features[0], dtype=dtype, seed=10 + slot)
            b = draw(kind, features[1], rank, dtype=dtype, seed=50 + slot)
            tables.put(1, slot, a, b, scale)
    return tables


def make_plan(segments: Sequence[tuple[int, int]], thresholds: Thresholds | None = None) -> Plan:
    bounds = (0, *accumulate(rows for _, rows in segments))
    slots = [slot for slot, _ in segments]
    return Plan.from_segments(bounds, slots, thresholds=thresholds or Thresholds())


def error_bound(y: Tensor, x: Tensor, plan: Plan, tables: GuardedTables, module: int = 1) -> Tensor:
    """Worst rounding error of `apply`, per element (Higham, Accuracy and Stability, ch. 3).

    Sums accumulate in float32 (relative error n·v each); both products, the scaled delta and the
    sum are rounded to the working type (u each, or its underflow). |y| + |scale| |B| |A| |x| bounds
    what is rounded.
    """
    u, v = torch.finfo(y.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    tiny = torch.finfo(y.dtype).smallest_normal * u
    magnitudes = GuardedTables(*tables.rank.shape)
    grown = torch.ones(len(y), 1, dtype=torch.float64)
    for start, stop, slot in plan.segments:
        if (operands := tables.operands(module, slot)) is not None:
            a, b, scale = operands
            magnitudes.put(module, slot, a.abs(), b.abs(), abs(scale))
            sums = (1 + a.shape[1] * v) * (1 + a.shape[0] * v)
            grown[start:stop] = sums * (1 + u) ** 3 * (1 + v)
            tiny = max(tiny, tiny * abs(scale) * (2 + a.shape[0] * float(b.abs().max())))
    total = reference(y.abs(), x.abs(), plan, module, magnitudes)
    delta = total - y.double().abs()
    return (grown - 1) * delta + u * (total + (grown - 1) * delta) + tiny


def assert_right(
    y: Tensor, before: Tensor, x: Tensor, plan: Plan, tables: GuardedTables, module: int = 1
) -> None:
    """Within the rounding bound; rows without an adapter keep every bit."""
    expected = reference(before, x, plan, module, tables)
    assert y.is_inference() or guards_hold(y)
    assert ((y.double() - expected).abs() <= error_bound(before, x, plan, tables, module)).all()
    base = torch.ones(len(y), dtype=torch.bool)
    for start, stop, slot in plan.segments:
        base[start:stop] = tables.operands(module, slot) is None
    assert torch.equal(bits(y[base]), bits(before[base]))


Call = Callable[..., None]
ones = torch.ones

ALONE = Thresholds(dense_bfloat16=0, dense_float16=0, dense_float32=0, turned_rank=0)
WAYS = {
    "default": Thresholds(),
    "alone": ALONE,
    "turned": Thresholds(dense_bfloat16=0, turned_rank=999, turned_features=0),
    "dense": Thresholds(dense_bfloat16=inf, dense_float16=inf, dense_float32=inf),
}
PASSES = 3  # a plan looks, puts weights together, and uses them again

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_way = pytest.mark.parametrize("way", WAYS)


def check(
    kind: str,
    segments: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    features: tuple[int, int],
    dtype: torch.dtype,
    scales: Sequence[float],
    way: str,
) -> None:
    tables, plan = make_tables(kind, ranks, features, dtype, 1.0), make_plan(segments, WAYS[way])
    for slot, rank in enumerate(ranks):
        if rank:
            a, b, _ = tables.operands(1, slot) or pytest.fail("no operands")
            tables.put(1, slot, a, b, scales[slot % len(scales)])
    for seed in range(PASSES):
        x = guarded(draw(kind, plan.tokens, features[0], dtype=dtype, seed=seed))
        y = guarded(draw(kind, plan.tokens, features[1], dtype=dtype, seed=20 + seed))
        expected, before = reference(y, x, plan, 1, tables), y.clone()
        apply(y, x, plan, 1, tables)
        assert kind != INTEGERS or torch.equal(y.double(), expected)
        assert_right(y, before, x, plan, tables)


@each_dtype
@each_way
@pytest.mark.parametrize(
    ("kind", "scales"),
    [(SIGNED, (7 / 3,)), (POSITIVE, (2.0, 0.5, 3.0)), (SIGNED, (0.3, 2.0)), (INTEGERS, (-1.0,))],
)
def test_within_the_rounding_bound(
    kind: str, scales: tuple[float, ...], way: str, dtype: torch.dtype
) -> None:
    ranks = [1, 2, 3, 4, 0, 5] if kind == INTEGERS else [1, 3, 12, 20, 0, 256]
    more = [(480, 60), (1, 5)] if scales == (7 / 3,) else []
    for features in [(67, 129), (33, 1), *more]:
        check(kind, MIXED, ranks, features, dtype, scales, way)


@settings(max_examples=60, deadline=None)
@given(
    segments=st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 9)), max_size=12),
    ranks=st.lists(st.integers(0, 7), min_size=4, max_size=4),
    features=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([INTEGERS, POSITIVE, SIGNED]),
    scales=st.sampled_from([[1.0], [-2.0]]),
    way=st.sampled_from(sorted(WAYS)),
)
def test_any_segments(**drawn: Any) -> None:
    check(**drawn)


def passes(y: Tensor, x: Tensor, plan: Plan, tables: GuardedTables, count: int = PASSES) -> Tensor:
    for _ in range(count):
        result = y.clone()
        apply(result, x, plan, 1, tables)
    return result


def inputs(rows: int, features: int, out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = draw(SIGNED, rows, features, dtype=dtype, seed=1)
    return x, draw(SIGNED, rows, out, dtype=dtype, seed=2)


@each_dtype
@each_way
def test_rows_without_adapter_keep_every_bit_and_spoil_no_other(
    way: str, dtype: torch.dtype
) -> None:
    """Slot 1 has no such module, and slot 2 an adapter that is not finite."""
    tables = make_tables(SIGNED, [4, 0, 4, 4], (16, 8), dtype, 2.0)
    a, b, _ = tables.operands(1, 2) or pytest.fail("no operands")
    a[0], b[0] = torch.nan, torch.inf
    segments = [(0, 2), (-1, 1), (3, 2), (1, 1), (2, 2), (-1, 1)]
    x, y = inputs(9, 16, 8, dtype)
    without = [2, 5, 8]
    x[without] = torch.nan
    y[2] = torch.tensor([-0.0, torch.nan, -torch.nan, torch.inf, 1e-7, 0.0, -1.0, 3.0]).to(dtype)
    result = passes(y, x, make_plan(segments, WAYS[way]), tables)
    assert torch.equal(bits(result[without]), bits(y[without]))
    sound = result[[0, 1, 3, 4]]
    assert sound.isfinite().all()
    assert (sound != y[[0, 1, 3, 4]]).any(dim=1).all()
    assert not result[6:8].isfinite().all()


def test_in_float32_a_row_does_not_depend_on_who_else_is_there() -> None:
    tables = make_tables(SIGNED, [8, 4, 16], (576, 192), torch.float32, 2.0)
    x, y = inputs(12, 576, 192, torch.float32)
    mixed = passes(y, x, make_plan([(0, 1), (1, 4), (2, 7)]), tables)
    for rows, alone in (
        (slice(0, 1), [(0, 1), (-1, 11)]),
        (slice(1, 5), [(-1, 1), (1, 4), (-1, 7)]),
        (slice(5, 12), [(-1, 5), (2, 7)]),
    ):
        result = passes(y, x, make_plan(alone), tables, count=1)
        assert torch.equal(bits(result[rows]), bits(mixed[rows]))


@each_way
def test_a_plan_stays_right_whatever_comes_between(way: str) -> None:
    """Inference mode, and other weights in a slot; with nothing kept, segments are computed alone."""
    tables = make_tables(SIGNED, [4, 4], (16, 16), torch.bfloat16, 2.0)
    x, y = inputs(4, 16, 16, torch.bfloat16)
    segments = [(0, 2), (1, 2)]
    forgetful = make_plan(segments, Thresholds(dense_bfloat16=inf, kept_bytes=0))
    nothing = passes(y, x, forgetful, tables)
    assert torch.equal(nothing, passes(y, x, make_plan(segments, ALONE), tables))
    expected = passes(y, x, make_plan(segments, WAYS[way]), tables)
    plan = make_plan(segments, WAYS[way])
    with torch.inference_mode():
        assert torch.equal(passes(y, x, plan, tables), expected)
    assert torch.equal(passes(y, x, plan, tables), expected)
    a, b = (draw(SIGNED, *size, dtype=torch.bfloat16, seed=9) for size in ((6, 16), (16, 6)))
    tables.put(1, 1, a, b, 3.0)
    for _ in range(PASSES):
        assert_right(passes(y, x, plan, tables, count=1), y, x, plan, tables)


@each_way
def test_threads_that_share_a_plan_do_not_disturb_each_other(way: str) -> None:
    tables = make_tables(SIGNED, [8, 8, 8, 8], (256, 256), torch.bfloat16, 2.0)
    plan = make_plan([(slot, 2) for slot in range(4)], WAYS[way])
    xs = [draw(SIGNED, 8, 256, dtype=torch.bfloat16, seed=seed) for seed in range(4)]
    y = draw(SIGNED, 8, 256, dtype=torch.bfloat16, seed=9)
    before = [passes(y, x, plan, tables) for x in xs]
    barrier, wrong = Barrier(len(xs)), []

    def compute(number: int) -> None:
        barrier.wait()
        for _ in range(40):
            result = passes(y, xs[number], plan, tables, count=1)
            bound = error_bound(y, xs[number], plan, tables) * 2
            if not ((result.double() - before[number].double()).abs() <= bound).all():
                wrong.append(number)

    with ThreadPoolExecutor(len(xs)) as threads:
        assert list(threads.map(compute, range(len(xs)))) == [None] * len(xs)
    assert not wrong


def peft_linear(rank: int, *, rslora: bool) -> LoraLinear:
    config = LoraConfig(
        r=rank, lora_alpha=7, use_rslora=rslora, target_modules=["q"], init_lora_weights=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(rank)
        model = inject_adapter_in_model(config, nn.ModuleDict({"q": nn.Linear(576, 192)}))
    layer = model.eval().get_submodule("q")
    assert isinstance(layer, LoraLinear)
    return layer


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 12, 16, 20])
def test_float32_has_the_bits_of_peft(rank: int, rslora: bool) -> None:
    layer, tables = peft_linear(rank, rslora=rslora), GuardedTables(1, 1)
    a, b = (layer.get_parameter(f"lora_{part}.default.weight") for part in "AB")
    tables.put(0, 0, a.detach(), b.detach(), layer.scaling["default"])
    for shape in ((1, 1), (1, 5), (2, 17), (3, 33)):
        x, rows = draw(SIGNED, *shape, 576, dtype=torch.float32, seed=1), shape[0] * shape[1]
        with torch.inference_mode():
            y = layer.base_layer(x)
            apply(y.view(rows, 192), x.view(rows, 576), make_plan([(0, rows)]), 0, tables)
            assert torch.equal(y, layer(x))
            assert not torch.equal(y, layer.base_layer(x))


def by_hand() -> GuardedTables:
    tables = GuardedTables(1, 2)
    tables.put(0, 0, torch.tensor([[3.0, 1.0]]), torch.tensor([[5.0], [7.0]]), 0.5)
    return tables


def test_values_worked_out_by_hand() -> None:
    x, y, h = torch.tensor([[2.0, 4.0], [1.0, 1.0]]), torch.ones(2, 2), torch.ones(2, 2)
    plan = Plan.from_segments([0, 1, 2], [0, 1])  # slot 1 has no such module
    expected = [[26.0, 36.0], [1.0, 1.0]]  # 1 + 0.5 * 5 * (3*2 + 1*4), 1 + 0.5 * 7 * 10
    assert reference(y, x, plan, 0, by_hand()).tolist() == expected
    apply(y, x, plan, 0, by_hand())
    assert y.tolist() == expected
    shrink(h, x, plan, 0, by_hand())
    assert h.tolist() == [[10.0, 0.0], [0.0, 0.0]]
    y.fill_(1)
    expand(y, h, plan, 0, by_hand())
    assert y.tolist() == expected
    y = nn.Linear(2, 2)(x.requires_grad_())
    recorded, before = y.grad_fn, y.tolist()
    apply(y, x, plan, 0, by_hand())
    assert y.grad_fn is recorded
    assert y.tolist() != before


@each_dtype
def test_shrink_is_x_times_a_or_zero_and_expand_adds_the_rest(dtype: torch.dtype) -> None:
    """What is beyond an adapter's rank is not read."""
    ranks = [1, 2, 12, 20, 0, 5]
    tables, plan = make_tables(INTEGERS, ranks, (31, 45), dtype, -1.0), make_plan(MIXED)
    x = guarded(draw(INTEGERS, plan.tokens, 31, dtype=dtype, seed=1))
    h = guarded(torch.full((plan.tokens, 24), torch.nan, dtype=dtype))
    before = draw(INTEGERS, plan.tokens, 45, dtype=dtype, seed=2)
    for _ in range(PASSES):
        shrink(h, x, plan, 1, tables)
        assert guards_hold(h)
        exact = torch.zeros(h.shape).double()
        for start, stop, slot in plan.segments:
            if (operands := tables.operands(1, slot)) is not None:
                rank = len(operands[0])
                exact[start:stop, :rank] = x[start:stop].double() @ operands[0].double().T
        assert torch.equal(h.double(), exact)
        unread = torch.full_like(h, torch.nan)
        for start, stop, slot in plan.segments:
            unread[start:stop, : ranks[slot]] = h[start:stop, : ranks[slot]]
        y = guarded(before)
        expand(y, unread, plan, 1, tables)
        assert_right(y, before, x, plan, tables)


def test_apply_refuses_what_does_not_fit() -> None:
    for y, x, module, slot, named in [
        (ones(4, 2), ones(3, 2), 0, 0, r"expected y contiguous \[3, features\] on cpu, got \[4, 2"),
        (ones(3, 2), ones(2, 2), 0, 0, r"expected x contiguous \[3, features\] on cpu, got \[2, 2"),
        (ones(3, 1, 2), ones(3, 2), 0, 0, r"expected y contiguous \[3, features\]"),
        (ones(3, 5), ones(3, 2), 0, 0, r"y \[tokens, 2\] in torch.float32, got .* y \[3, 5\]"),
        (ones(3, 2), ones(3, 5), 0, 0, r"x \[tokens, 2\] in torch.float32 .* got x \[3, 5\]"),
        (ones(3, 2), ones(3, 2), 1, 0, "expected a module from 0 to 0, got 1"),
        (ones(3, 2), ones(3, 2), -1, 0, "expected a module from 0 to 0, got -1"),
        (ones(3, 2), ones(3, 2), 0, 2, "expected slots below 2, the plan has slot 2"),
        (ones(3, 2), ones(3, 2).bfloat16(), 0, 0, "torch.float32, got x .* in torch.bfloat16"),
        (ones(3, 2).double(), ones(3, 2), 0, 0, r"y \[3, 2\] in torch.float64"),
        (ones(3, 2).half(), ones(3, 2).half(), 0, 0, r"expected x \[tokens, 2\] in torch.float32"),
        (ones(2, 3).t(), ones(3, 2), 0, 0, r"expected y contiguous .* strides \(1, 3\)"),
        (ones(3, 2), ones(3, 2).to("meta"), 0, 0, "expected x contiguous .* on meta"),
    ]:
        with pytest.raises(ValueError, match=named):
            apply(y, x, Plan.from_segments([0, 3], [slot]), module, by_hand())
        assert (y == 1).all()


def test_a_later_segment_that_does_not_fit_leaves_the_earlier_ones_alone() -> None:
    good, tables = ones(2, 2), by_hand()
    later = Plan.from_segments([0, 1, 2], [0, 1])
    for a, b, named in (
        (torch.ones(1, 3), torch.ones(2, 1), r"expected x \[tokens, 3\]"),
        (torch.ones(1, 2), torch.ones(2, 1).half(), "x .* in torch.float32 and y .* torch.float1"),
    ):
        tables.put(0, 1, a, b, 1.0)
        with pytest.raises(ValueError, match=named):
            apply(good, torch.ones(2, 2), later, 0, tables)
    assert (good == 1).all()


def test_halves_refuse_what_does_not_fit() -> None:
    for half, written, read, module, slot, named in [
        (shrink, ones(3, 2), ones(2, 8), 1, 0, r"expected x contiguous \[3, features\] on cpu"),
        (shrink, ones(2, 2), ones(3, 8), 1, 0, r"expected h contiguous \[3, features\] on cpu"),
        (shrink, ones(3, 1), ones(3, 8), 1, 0, r"expected h \[tokens, 2 or more\] in torch.flo"),
        (shrink, ones(3, 2).half(), ones(3, 8), 1, 0, r"expected h \[tokens, 2 or more\] in t"),
        (shrink, ones(3, 2), ones(3, 7), 1, 0, r"expected x \[tokens, 8\] in torch.float32, got"),
        (shrink, ones(3, 2), ones(3, 8), 2, 0, "expected a module from 0 to 1, got 2"),
        (shrink, ones(3, 2), ones(3, 8), 1, 1, "expected slots below 1, the plan has slot 1"),
        (expand, ones(2, 6), ones(3, 2), 1, 0, r"expected y contiguous \[3, features\] on cpu"),
        (expand, ones(3, 5), ones(3, 2), 1, 0, r"y \[tokens, 6\] in torch.float32, got y \[3, 5"),
        (expand, ones(3, 6), ones(3, 1), 1, 0, r"expected h \[tokens, 2 or more\] .* got \[3, 1"),
        (expand, ones(3, 6), ones(3, 2), 1, 1, "expected slots below 1, the plan has slot 1"),
    ]:
        tables = make_tables(SIGNED, [2], (8, 6), torch.float32, 1.0)
        with pytest.raises(ValueError, match=named):
            half(written, read, make_plan([(slot, 3)]), module, tables)
        assert (written == 1).all()


ROWS, FEATURES, RANK = 6, 8, 8
"""All alike, so that x, h and y may be any part of one buffer."""

SIZE = ROWS * FEATURES
SEGMENTS = [(0, 2), (-1, 1), (1, 3)]
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
    for _ in range(PASSES):
        call(torch.zeros(ROWS, FEATURES), read, plan)
        for refusing in (plan, make_plan([(-1, ROWS)])):
            with pytest.raises(ValueError, match=r"memory of their own, .* overlap by \d+ bytes"):
                call(written, read, refusing)
        assert torch.equal(buffer, fresh())


def test_neighbours_in_one_buffer_are_apart(call: Call) -> None:
    """So are columns of a single row, and rows of an empty batch."""
    for apart in (-SIZE, SIZE):
        plan, buffer, expected = make_plan(SEGMENTS), fresh(), part(fresh(), SIZE + apart).clone()
        call(expected, part(fresh(), SIZE).clone(), plan)
        for _ in range(PASSES):
            buffer.copy_(fresh())
            call(part(buffer, SIZE + apart), part(buffer, SIZE), plan)
            assert torch.equal(part(buffer, SIZE + apart), expected)
            assert torch.equal(part(buffer, SIZE), part(fresh(), SIZE))
    plan, row = make_plan([(0, 1)]), fresh()[None, : 2 * FEATURES].clone()
    expected = row[:, FEATURES:].clone()
    call(expected, row[:, :FEATURES].clone(), plan)
    call(row[:, FEATURES:], row[:, :FEATURES], plan)
    assert torch.equal(row[:, FEATURES:], expected)
    call(row[0, 5:5].view(0, FEATURES), row[0, 5:5].view(0, FEATURES), make_plan([(0, 0)]))


@pytest.mark.parametrize("factor", [0, 1])
@pytest.mark.parametrize("slot", [0, 1])
def test_outputs_in_the_memory_of_weights_are_refused(call: Call, slot: int, factor: int) -> None:
    operands = TABLES.operands(1, slot)
    assert operands is not None
    memory, first = memory_of(operands[:2][factor])
    before, plan = memory.clone(), make_plan(SEGMENTS)
    # From where an element is shared with the beginning of the weights, to their last one.
    for start in (first + 1 - SIZE, first, first + RANK * FEATURES - 1):
        for _ in range(PASSES):
            call(torch.zeros(ROWS, FEATURES), part(fresh(), 0), plan)
            with pytest.raises(ValueError, match=f"weights of slot {slot} .*overlap"):
                call(part(memory, start), part(fresh(), 0), plan)
    assert torch.equal(memory.nan_to_num(0.5), before.nan_to_num(0.5))


class _Scaled(GuardedTables):
    """Of modules 0 and 1, of which one slot of module 1 has the scale."""

    def __init__(self, scale: float, dtype: torch.dtype) -> None:
        super().__init__(2, 2)
        self.given, self.rank[:] = scale, RANK
        self.made = make_tables(SIGNED, [RANK, RANK], (FEATURES, FEATURES), dtype, 1.0)

    def operands(self, module: int, slot: int) -> Operands | None:
        a, b, scale = self.made.operands(1, slot) or pytest.fail("no operands")
        return a, b, self.given if (module, slot) == (1, 1) else scale


@each_dtype
@pytest.mark.parametrize(
    "scale", [3.41e38, -1e39, 1e308, float("inf"), float("nan"), 10**400], ids=lambda s: str(s)[:8]
)
def test_scales_that_float32_does_not_hold_are_refused(scale: float, dtype: torch.dtype) -> None:
    tables, plan = _Scaled(scale, dtype), make_plan(SEGMENTS)
    x, y = (part(fresh(), n * SIZE).to(dtype) for n in range(2))
    before = y.clone()
    for _ in range(PASSES):
        for half in (apply, expand):
            with pytest.raises(ValueError, match=r"finite scale .* for module 1, slot 1 has"):
                half(y, x, plan, 1, tables)
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
    result = passes(y, x, plan, tables, count=1)
    assert result.isfinite().all()
    assert_right(result, y, x, plan, tables)


QKV = (0, 1, 2)
STACKED = Thresholds(dense_bfloat16=0, share_float32=True)
DENSE = Thresholds(dense_bfloat16=inf, dense_float16=inf, dense_float32=inf, share_float32=True)
SHARING = {"stacked": STACKED, "dense": DENSE}
OUT = (24, 12, 17)
WIDTH = 40
RUNS = [(0, 3), (-1, 2), (1, 1), (0, 2), (2, 5), (1, 4)]


def three_modules(dtype: torch.dtype, ranks: Sequence[Sequence[int]]) -> GuardedTables:
    """q, k and v of adapters in as many slots; `ranks` by slot and module, 0: not touched."""
    tables = GuardedTables(len(OUT), len(ranks))
    for slot, by_module in enumerate(ranks):
        for module, rank in enumerate(by_module):
            if rank:
                seed = 10 * slot + module
                a = draw(SIGNED, rank, WIDTH, dtype=dtype, seed=seed)
                b = draw(SIGNED, OUT[module], rank, dtype=dtype, seed=500 + seed)
                tables.put(module, slot, a, b, 2.0)
    return tables


def require_right(x: Tensor, plan: Plan, tables: GuardedTables, *modules: int) -> None:
    for module in modules or QKV:
        before = draw(SIGNED, plan.tokens, OUT[module], dtype=x.dtype, seed=module)
        y = guarded(before)
        apply(y, x, plan, module, tables, group=QKV)
        assert_right(y, before, x, plan, tables, module)


def drawn(seed: int, dtype: torch.dtype) -> Tensor:
    return draw(SIGNED, sum(rows for _, rows in RUNS), WIDTH, dtype=dtype, seed=seed)


BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@settings(max_examples=15, deadline=None)
@given(
    segments=st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 5)), max_size=8),
    ranks=st.lists(st.tuples(*[st.integers(0, 5)] * 3), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
@example(segments=RUNS, ranks=[(4, 4, 4), (8, 8, 8), (4, 4, 4)], dtype=BFLOAT16)
@example(segments=RUNS, ranks=[(4, 4, 4), (8, 8, 8), (4, 4, 4)], dtype=FLOAT32)
@example(segments=RUNS, ranks=[(4, 3, 1), (8, 1, 5), (16, 2, 2)], dtype=FLOAT16)
@example(segments=RUNS, ranks=[(4, 0, 4), (8, 8, 0), (4, 4, 4)], dtype=BFLOAT16)
@example(segments=RUNS, ranks=[(4, 4, 0), (8, 8, 0), (4, 4, 0)], dtype=BFLOAT16)
@example(segments=RUNS, ranks=[(0, 4, 0), (0, 0, 0), (0, 0, 4)], dtype=FLOAT32)
@example(segments=RUNS, ranks=[(0, 4, 0), (0, 0, 0), (0, 2, 0)], dtype=BFLOAT16)
def test_any_segments_and_ranks_are_within_the_rounding_bound(
    segments: list[tuple[int, int]], ranks: list[tuple[int, int, int]], dtype: torch.dtype
) -> None:
    tables = three_modules(dtype, ranks)
    for way in [*SHARING.values(), Thresholds(kept_bytes=0)]:
        plan = make_plan(segments, way)
        for seed in range(3):
            x = guarded(draw(SIGNED, plan.tokens, WIDTH, dtype=dtype, seed=seed))
            require_right(x, plan, tables)


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts products, and results that are in memory of their own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = self.new_storages = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += str(func).startswith(("aten.mm.", "aten.addmm_."))
        self.new_storages += len(storages(result) - storages((args, kwargs)))
        return result


def storages(values: Any) -> set[int]:
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor))
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def watched(seed: int, dtype: torch.dtype, plan: Plan, tables: Any, group: Any) -> Watched:
    x = draw(SIGNED, plan.tokens, WIDTH, dtype=dtype, seed=seed)
    ys = [draw(SIGNED, plan.tokens, out, dtype=dtype, seed=out) for out in OUT]
    watch = Watched()
    with watch:
        for module, y in enumerate(ys):
            apply(y, x, plan, module, tables, group=group)
    return watch


@pytest.mark.parametrize("group", [(), QKV], ids=["alone", "together"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", SHARING)
@pytest.mark.parametrize("segments", [[(0, 6)], RUNS], ids=["one", "mixed"])
def test_nothing_is_allocated_once_a_plan_was_used_twice(
    segments: list[tuple[int, int]], way: str, dtype: torch.dtype, group: tuple[int, ...]
) -> None:
    tables = three_modules(dtype, [(4, 4, 4), (256, 8, 8), (4, 4, 4)])
    plan = make_plan(segments, SHARING[way])
    storages = [watched(seed, dtype, plan, tables, group).new_storages for seed in range(4)]
    assert storages[0] > 0  # it can be seen
    assert storages[2:] == [0, 0]


def test_one_shrink_for_q_k_and_v() -> None:
    for dtype, adapters, group, products in [
        (torch.bfloat16, 1, (), 6),
        (torch.bfloat16, 1, QKV, 4),  # one shrink for q, k and v
        (torch.bfloat16, 8, QKV, 4),  # small work of many adapters is one product each way
        (torch.float32, 1, QKV, 6),  # float32 shares no shrink unless asked to
    ]:
        tables = three_modules(dtype, [(4, 4, 4)] * adapters)
        plan = make_plan([(n, 1) for n in range(adapters)])
        watches = [watched(seed, dtype, plan, tables, group) for seed in range(3)]
        assert watches[-1].products == products


@pytest.fixture(params=SHARING)
def warm(request: pytest.FixtureRequest) -> tuple[Plan, GuardedTables]:
    tables = three_modules(torch.bfloat16, [(4, 4, 4), (8, 8, 8), (4, 4, 4)])
    plan = make_plan(RUNS, SHARING[request.param])
    for seed in range(3):
        require_right(drawn(seed, torch.bfloat16), plan, tables)
    return plan, tables


def test_an_input_that_was_written_to_is_shrunk_again(warm: tuple[Plan, GuardedTables]) -> None:
    x = drawn(7, torch.bfloat16)
    require_right(x, *warm, 0)
    x.neg_()
    require_right(x, *warm, 1)
    x[3:] += 1
    require_right(x, *warm, 2, 0)
    x.data.neg_()  # of which the version of x does not tell
    require_right(x.data, *warm, 1)
    with torch.inference_mode():  # whose tensors tell of no change
        x = drawn(8, torch.bfloat16)
        require_right(x, *warm, 0)
        x.neg_()
        require_right(x, *warm, 1)


def test_another_input_of_the_same_values_or_place_is_not_taken_for_it(warm: Any) -> None:
    for seed in range(20):  # what was freed is often given out again
        x = drawn(seed, torch.bfloat16)
        require_right(x, *warm, seed % 3)
        del x


def test_other_weights_and_work_in_between_do_not_spoil_it(warm: Any) -> None:
    plan, tables = warm
    x, other = drawn(8, torch.bfloat16), drawn(9, torch.bfloat16)
    require_right(x, *warm, 0)
    y = draw(SIGNED, plan.tokens, OUT[1], dtype=torch.bfloat16, seed=1)
    apply(y, other, plan, 1, tables)
    require_right(x, *warm, 1)
    a = draw(SIGNED, 4, WIDTH, dtype=torch.bfloat16, seed=77)
    b = draw(SIGNED, OUT[1], 4, dtype=torch.bfloat16, seed=78)
    tables.put(1, 0, a, b, 2.0)
    require_right(x, *warm, 1, 2, 0, 1)


def test_a_group_of_modules_that_are_not_there_is_refused() -> None:
    tables, plan = three_modules(torch.bfloat16, [(4, 4, 4)]), make_plan([(0, 3)])
    x = draw(SIGNED, 3, WIDTH, dtype=torch.bfloat16, seed=0)
    y = draw(SIGNED, 3, OUT[0], dtype=torch.bfloat16, seed=1)
    before = y.clone()
    for _ in range(3):
        with pytest.raises(ValueError, match="expected a module from 0 to 2, got 3"):
            apply(y, x, plan, 0, tables, group=(0, 3))
        with pytest.raises(ValueError, match=r"expected module 0 in its group, got \[1, 2\]"):
            apply(y, x, plan, 0, tables, group=(1, 2))
    assert torch.equal(y, before)
