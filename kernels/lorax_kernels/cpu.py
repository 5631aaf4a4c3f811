"""The CPU implementation: by segment, by one product over all adapters, or by groups of modules.

:class:`lorax_kernels.Thresholds` chooses the fastest. No memory is allocated once a plan has been
used twice for each module.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorax_kernels import dense, grouped, segments
from lorax_kernels.checks import check_apart, check_group, check_rows, check_tables
from lorax_kernels.module_batch import ModuleBatch, SegmentStep
from lorax_kernels.plan import Plan
from lorax_kernels.tables import Tables
from lorax_kernels.workspace import Workspace


def apply_cpu(
    y: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables, group: Sequence[int]
) -> None:
    """Compute :func:`lorax_kernels.apply`."""
    with plan.workspace.acquire() as space:
        batch = _batch(plan, module, tables, space)
        if not batch.fits(y, x):
            check_rows("y", y, plan.tokens)
            check_rows("x", x, plan.tokens)
            check_apart("y", y, "x", x)
            batch.check(x=x, y=y, written=y)
        if group and group != batch.group:
            check_group(module, group, plan.top_slot, tables)
            batch.group = tuple(group)
        if not batch.segments:
            return
        if group and batch.is_reused:
            shared = _shared(x, batch, plan, group, space)
            if shared is not None:
                shared.expand(y, batch)
                return
        _apply_one(y, x, batch, space)


def shrink_cpu(h: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """Compute :func:`lorax_kernels.shrink`."""
    check_rows("h", h, plan.tokens)
    check_rows("x", x, plan.tokens)
    check_apart("h", h, "x", x)
    with plan.workspace.acquire() as space:
        batch = _batch(plan, module, tables, space)
        batch.check(x=x, written=h)
        _check_shrunk(h, batch)
        h.zero_()
        x_parts, h_parts = batch.parts(x), batch.parts(h)
        for segment, (by, _) in zip(batch.segments, _steps(batch, space), strict=True):
            shrunk = segments.shrink_rows(x_parts[segment.part], by)
            h_parts[segment.part][:, : segment.rank].copy_(shrunk)


def expand_cpu(y: Tensor, h: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """Compute :func:`lorax_kernels.expand`."""
    check_rows("y", y, plan.tokens)
    check_rows("h", h, plan.tokens)
    check_apart("y", y, "h", h)
    with plan.workspace.acquire() as space:
        batch = _batch(plan, module, tables, space)
        batch.check(y=y, written=y)
        _check_shrunk(h, batch)
        y_parts, h_parts = batch.parts(y), batch.parts(h)
        for segment, (_, by) in zip(batch.segments, _steps(batch, space), strict=True):
            segments.expand_rows(
                y_parts[segment.part], h_parts[segment.part][:, : segment.rank], by
            )


def _batch(plan: Plan, module: int, tables: Tables, space: Workspace) -> ModuleBatch:
    found = space.known_batch(module, tables)
    if found is not None:
        return found
    check_tables(plan.top_slot, (module,), tables)
    return space.new_batch(plan.tokens, plan.segments, module, tables)


def _steps(batch: ModuleBatch, space: Workspace) -> tuple[SegmentStep, ...]:
    if batch.steps is None:
        batch.steps = segments.prepare(batch, space)
    return batch.steps


def _apply_one(y: Tensor, x: Tensor, batch: ModuleBatch, space: Workspace) -> None:
    if batch.is_reused and not batch.is_decided:
        batch.is_decided = True
        (batch.product,) = dense.dense((batch,), space) or (None,)
    if batch.product is None:
        segments.run(batch.parts(y), batch.parts(x), _steps(batch, space))
    else:
        batch.product.apply(y, x)


def _shared(
    x: Tensor, batch: ModuleBatch, plan: Plan, group: Sequence[int], space: Workspace
) -> grouped.Shared | None:
    """Return the shrunk `x` of the group, cached or new. Inference tensors have no version."""
    if x.is_inference() or not space.thresholds.shares(x.dtype):
        return None
    if isinstance(space.shared, grouped.Shared) and space.shared.is_of(x, batch):
        return space.shared
    batches = tuple(_batch(plan, module, batch.tables, space) for module in group)
    return grouped.shrink(x, batches, space)


def _check_shrunk(h: Tensor, batch: ModuleBatch) -> None:
    for segment in batch.adapters:
        if h.shape[1] < segment.rank or h.dtype != segment.a.dtype:
            raise ValueError(
                f"expected h [tokens, {segment.rank} or more] in {segment.a.dtype}, "
                f"got {list(h.shape)} in {h.dtype}"
            )
