"""Batches for kernels: tables in memory where every stray read is a NaN, and how far off is right."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lorax_kernels import Operands, Plan, Thresholds, apply
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
    """The same values, contiguous, in the middle of a buffer of NaN."""
    buffer = torch.full((values.numel() + 2 * GUARD,), torch.nan, dtype=values.dtype)
    view = buffer[GUARD : GUARD + values.numel()].view(values.shape)
    view.copy_(values)
    return view


def memory_of(view: Tensor) -> tuple[Tensor, int]:
    """The whole buffer of a guarded tensor, and where in it that begins."""
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
    """Plan of (slot, rows) pairs."""
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


def assert_untouched(
    y: Tensor, before: Tensor, segments: Sequence[tuple[int, int]], ranks: Sequence[int]
) -> None:
    base = torch.tensor(
        [slot < 0 or not ranks[slot] for slot, rows in segments for _ in range(rows)],
        dtype=torch.bool,
    )
    assert torch.equal(bits(y[base]), bits(before[base]))


def check_apply(
    kind: str,
    plan: Plan,
    tables: GuardedTables,
    segments: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    features: tuple[int, int],
    dtype: torch.dtype,
    seeds: tuple[int, int],
) -> None:
    """`apply` once, to `x` and `y` drawn from the seeds, against float64."""
    x = guarded(draw(kind, plan.tokens, features[0], dtype=dtype, seed=seeds[0]))
    y = guarded(draw(kind, plan.tokens, features[1], dtype=dtype, seed=seeds[1]))
    expected, before = reference(y, x, plan, 1, tables), y.clone()
    bound = error_bound(y, x, plan, tables)
    apply(y, x, plan, 1, tables)
    assert guards_hold(y)
    if kind == INTEGERS:
        assert torch.equal(y.double(), expected)
    assert ((y.double() - expected).abs() <= bound).all()
    assert_untouched(y, before, segments, ranks)
