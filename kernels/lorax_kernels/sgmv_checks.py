"""Argument checks for the GPU, before a launch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lorax_kernels.checks import check_apart, check_rows, check_scale, check_tables
from lorax_kernels.plan import Plan
from lorax_kernels.tables import Tables

ALIGNMENT = 16
"""The size of the largest load, in bytes."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_MEMBERS = 3


def check_members(modules: Sequence[int]) -> None:
    """Raise ValueError unless there are 1 to `MAX_MEMBERS` modules."""
    if not 1 <= len(modules) <= MAX_MEMBERS:
        raise ValueError(f"expected one to {MAX_MEMBERS} modules, got {len(modules)}")


def check_inputs(x: Tensor, plan: Plan, modules: Sequence[int], tables: Tables) -> None:
    """Raise ValueError unless `x` is `[plan.tokens, in]`, and the modules take it."""
    check_rows("x", x, plan.tokens, plan.slots.device.type)
    if x.dtype not in DTYPES:
        raise ValueError(f"expected x in {' or '.join(map(str, DTYPES))}, got {x.dtype}")
    check_tables(plan.top_slot, modules, tables)
    for module in modules:
        _check_fit("x", x, plan, module, tables)


def check_outputs(
    ys: Sequence[Tensor], dtype: torch.dtype, plan: Plan, modules: Sequence[int], tables: Tables
) -> None:
    """Raise ValueError unless each of `ys` is `[plan.tokens, out]` of its module, in `dtype`."""
    if not 1 <= len(ys) == len(modules) <= MAX_MEMBERS:
        raise ValueError(
            f"expected one to {MAX_MEMBERS} outputs, each with its module, "
            f"got {len(ys)} and {len(modules)}"
        )
    check_tables(plan.top_slot, modules, tables)
    for y, module in zip(ys, modules, strict=True):
        check_rows("y", y, plan.tokens, plan.slots.device.type)
        if y.dtype != dtype:
            raise ValueError(f"expected y in {dtype}, got {y.dtype}")
        _check_fit("y", y, plan, module, tables)


def check_memory(written: Sequence[tuple[str, Tensor]], read: tuple[str, Tensor]) -> None:
    """Raise ValueError if what a launch writes overlaps what it reads, or each other.

    Weights are not compared: their addresses are on the device.
    """
    extents = [(one.data_ptr(), one.nbytes) for _, one in (read, *written)]
    extents.sort()
    if all(b + n <= next_b for (b, n), (next_b, _) in pairwise(extents)):
        return
    for place, (name, tensor) in enumerate(written):
        for other in (read, *written[:place]):
            check_apart(name, tensor, *other)


def check_split_k_partials(partials: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError for another shape, dtype or alignment."""
    fits = (
        partials.shape == expected and partials.dtype == torch.float32 and partials.is_contiguous()
    )
    if not (fits and partials.data_ptr() % ALIGNMENT == 0):
        raise ValueError(
            f"expected partials contiguous {list(expected)} in torch.float32 from a multiple of "
            f"{ALIGNMENT} bytes on, got {list(partials.shape)} in {partials.dtype}"
        )


def _check_fit(name: str, rows: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """Check against the first adapter present: all of a module share sizes and dtype."""
    for _, _, slot in plan.segments:
        operands = tables.operands(module, slot)
        if operands is None:
            continue
        a, b, scale = operands
        check_scale(module, slot, scale)
        features = a.shape[1] if name == "x" else b.shape[0]
        if rows.shape[1] != features or rows.dtype != a.dtype:
            raise ValueError(
                f"expected {name} [tokens, {features}] in {a.dtype}, "
                f"got {name} {list(rows.shape)} in {rows.dtype}"
            )
        return
