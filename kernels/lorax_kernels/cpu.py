"""The CPU's way: segment by segment, all adapters in one product, or several modules at once.

What is quicker is decided by :class:`lorax_kernels.Thresholds`. Nothing is allocated once a plan
has been used twice for each module.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorax_kernels import dense, together
from lorax_kernels.plan import Plan
from lorax_kernels.segments import apply_alone, expand_rows, shrink_rows
from lorax_kernels.tables import Tables
from lorax_kernels.work import Work
from lorax_kernels.workspace import Workspace


def apply_cpu(
    y: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables, group: Sequence[int]
) -> None:
    """As :func:`lorax_kernels.apply`, for tensors that it has checked against the plan."""
    with plan.workspace.lent() as space:
        work = space.work(plan.tokens, plan.segments, module, tables)
        if not work.pieces:
            return
        work.check(x=x, y=y)
        shared = _shared(x, work, plan, group, space) if len(group) > 1 and work.again else None
        if shared is not None:
            together.expand(y, work, shared, space)
        else:
            _apply_one(y, x, work, space)


def shrink_cpu(h: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """As :func:`lorax_kernels.shrink`, for tensors that it has checked against the plan."""
    with plan.workspace.lent() as space:
        work = space.work(plan.tokens, plan.segments, module, tables)
        work.check(x=x)
        _check_planes(h, work)
        h.zero_()
        x_parts, h_parts = work.parts(x), work.parts(h)
        for piece in work.pieces:
            shrunk = shrink_rows(x_parts[piece.part], piece.a, piece.a_t, space, "h")
            h_parts[piece.part][:, : piece.rank].copy_(shrunk)


def expand_cpu(y: Tensor, h: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """As :func:`lorax_kernels.expand`, for tensors that it has checked against the plan."""
    with plan.workspace.lent() as space:
        work = space.work(plan.tokens, plan.segments, module, tables)
        work.check(y=y)
        _check_planes(h, work)
        y_parts, h_parts = work.parts(y), work.parts(h)
        for piece in work.pieces:
            expand_rows(y_parts[piece.part], h_parts[piece.part][:, : piece.rank], piece, space)


def _apply_one(y: Tensor, x: Tensor, work: Work, space: Workspace) -> None:
    expanding = dense.expanding(work, space)
    shrinking = dense.shrinking((work,), space) if expanding else None
    if expanding is None or shrinking is None:
        apply_alone(y, x, work, space)
    else:
        h = dense.shrink(x, shrinking, space, "dense")
        dense.expand(y, h, shrinking.first, expanding, space)


def _shared(
    x: Tensor, work: Work, plan: Plan, group: Sequence[int], space: Workspace
) -> together.Shared | None:
    """What `x` gave for the group, or gives now. Tensors of inference mode tell of no change."""
    if x.is_inference() or not space.thresholds.shares(x.dtype):
        return None
    if space.shared is not None and space.shared.is_of(x, work):
        return space.shared
    if work.module not in group:
        return None
    of = (space.work(plan.tokens, plan.segments, module, work.tables) for module in group)
    return together.shrink(x, tuple(of), space)


def _check_planes(h: Tensor, work: Work) -> None:
    for piece in work.adapters:
        if h.shape[1] < piece.rank or h.dtype != piece.a.dtype:
            raise ValueError(
                f"expected h [tokens, {piece.rank} or more] in {piece.a.dtype}, "
                f"got {list(h.shape)} in {h.dtype}"
            )
