"""The CPU's way: segment by segment, all adapters in one product, or several modules at once.

What is quicker is decided by :class:`lorax_kernels.Thresholds`. Nothing is allocated once a plan
has been used twice for each module.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorax_kernels import dense, segments, together
from lorax_kernels.checks import check_apart, check_group, check_rows, check_tables
from lorax_kernels.plan import Plan
from lorax_kernels.tables import Tables
from lorax_kernels.work import Work
from lorax_kernels.workspace import Workspace


def apply_cpu(
    y: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables, group: Sequence[int]
) -> None:
    """As :func:`lorax_kernels.apply`."""
    with plan.workspace.lent() as space:
        work = _work(plan, module, tables, space)
        if not work.fits(y, x):
            check_rows("y", y, plan)
            check_rows("x", x, plan)
            check_apart("y", y, "x", x)
            work.check(x=x, y=y, written=y)
        if group and group != work.group:
            check_group(module, group, plan, tables)
            work.group = tuple(group)
        if not work.pieces:
            return
        if group and work.again:
            shared = _shared(x, work, plan, group, space)
            if shared is not None:
                shared.expand(y, work)
                return
        _apply_one(y, x, work, space)


def shrink_cpu(h: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """As :func:`lorax_kernels.shrink`."""
    check_rows("h", h, plan)
    check_rows("x", x, plan)
    check_apart("h", h, "x", x)
    with plan.workspace.lent() as space:
        work = _work(plan, module, tables, space)
        work.check(x=x, written=h)
        _check_planes(h, work)
        h.zero_()
        x_parts, h_parts = work.parts(x), work.parts(h)
        for piece, (by, _) in zip(work.pieces, _steps(work, space), strict=True):
            shrunk = segments.shrink_rows(x_parts[piece.part], by)
            h_parts[piece.part][:, : piece.rank].copy_(shrunk)


def expand_cpu(y: Tensor, h: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """As :func:`lorax_kernels.expand`."""
    check_rows("y", y, plan)
    check_rows("h", h, plan)
    check_apart("y", y, "h", h)
    with plan.workspace.lent() as space:
        work = _work(plan, module, tables, space)
        work.check(y=y, written=y)
        _check_planes(h, work)
        y_parts, h_parts = work.parts(y), work.parts(h)
        for piece, (_, by) in zip(work.pieces, _steps(work, space), strict=True):
            segments.expand_rows(y_parts[piece.part], h_parts[piece.part][:, : piece.rank], by)


def _work(plan: Plan, module: int, tables: Tables, space: Workspace) -> Work:
    found = space.known_work(module, tables)
    if found is not None:
        return found
    check_tables(plan, (module,), tables)
    return space.new_work(plan.tokens, plan.segments, module, tables)


def _steps(work: Work, space: Workspace) -> tuple[segments.Step, ...]:
    if work.steps is None:
        work.steps = segments.prepare(work, space)
    return work.steps


def _apply_one(y: Tensor, x: Tensor, work: Work, space: Workspace) -> None:
    if work.again and not work.decided:
        work.decided = True
        (work.dense,) = dense.dense((work,), space) or (None,)
    if work.dense is None:
        segments.run(work.parts(y), work.parts(x), _steps(work, space))
    else:
        dense.shrink(x, work.dense.shrinking)
        work.dense.expand(y)


def _shared(
    x: Tensor, work: Work, plan: Plan, group: Sequence[int], space: Workspace
) -> together.Shared | None:
    """What `x` gave for the group, or gives now. Tensors of inference mode tell of no change."""
    if x.is_inference() or not space.thresholds.shares(x.dtype):
        return None
    if space.shared is not None and space.shared.is_of(x, work):
        return space.shared
    works = tuple(_work(plan, module, work.tables, space) for module in group)
    return together.shrink(x, works, space)


def _check_planes(h: Tensor, work: Work) -> None:
    for piece in work.adapters:
        if h.shape[1] < piece.rank or h.dtype != piece.a.dtype:
            raise ValueError(
                f"expected h [tokens, {piece.rank} or more] in {piece.a.dtype}, "
                f"got {list(h.shape)} in {h.dtype}"
            )
