"""Compute the products of each segment separately.

In float32 the result has the bits of PEFT's `lora.Linear`, which shrinks, expands, multiplies by
the scale and adds. Other dtypes round once less.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from math import frexp

import torch
from torch import Tensor

from lorax_kernels.module_batch import (
    AdapterSegment,
    ModuleBatch,
    SegmentExpand,
    SegmentShrink,
    SegmentStep,
)
from lorax_kernels.workspace import Workspace


def plan_shrink(a: Tensor, rows: int, space: Workspace, name: Hashable) -> SegmentShrink:
    """Prepare the shrink of `rows` rows by A `[rank, in]`, into memory called `name`."""
    rank, features = a.shape
    if space.thresholds.prefers_transposed(rows, rank, features, a.dtype):
        out = space.view(name, a.dtype, rank, rows)
        return SegmentShrink(a, a.t(), out, out.t())
    out = space.view(name, a.dtype, rows, rank)
    return SegmentShrink(None, a.t(), out, out)


def plan_expand(segment: AdapterSegment, space: Workspace) -> SegmentExpand:
    """Prepare the expand of one segment."""
    b, scale = segment.b, segment.scale
    delta = None
    if b.dtype == torch.float32 and not (_is_power_of_two(scale) and _adds_alike(segment.rank)):
        delta = space.view("delta", b.dtype, segment.rows, b.shape[0])
    return SegmentExpand(segment.part, b.t(), scale, delta)


def shrink_rows(x: Tensor, by: SegmentShrink) -> Tensor:
    """Return `x @ A.T` `[rows, rank]`, in the memory of `by`."""
    if by.a is None:
        return torch.mm(x, by.a_t, out=by.out)
    torch.mm(by.a, x.t(), out=by.out)
    return by.h


def expand_rows(y: Tensor, h: Tensor, by: SegmentExpand) -> None:
    """Add `scale * h @ B.T` to `y` `[rows, out]`."""
    _, b_t, scale, delta = by
    if delta is None:
        y.addmm_(h, b_t, alpha=scale)
    else:
        y.add_(torch.mm(h, b_t, out=delta).mul_(scale))


def prepare(batch: ModuleBatch, space: Workspace) -> tuple[SegmentStep, ...]:
    """Prepare every segment of a module batch."""
    return tuple(
        (plan_shrink(segment.a, segment.rows, space, "h"), plan_expand(segment, space))
        for segment in batch.segments
    )


def run(
    y_parts: Sequence[Tensor], x_parts: Sequence[Tensor], steps: tuple[SegmentStep, ...]
) -> None:
    """Compute the segments in order; they may share memory.

    Inlines :func:`shrink_rows` and :func:`expand_rows`, whose calls would take as long as a token.
    """
    mm = torch.mm
    for (a, a_t, out, h), (part, b_t, scale, delta) in steps:
        if a is None:
            mm(x_parts[part], a_t, out=out)
        else:
            mm(a, x_parts[part].t(), out=out)
        if delta is None:
            y_parts[part].addmm_(h, b_t, alpha=scale)
        else:
            y_parts[part].add_(mm(h, b_t, out=delta).mul_(scale))


def _is_power_of_two(scale: float) -> bool:
    """Return whether multiplying by `scale` is exact."""
    return abs(frexp(scale)[0]) == 0.5


@lru_cache
def _adds_alike(rank: int) -> bool:
    """Return whether this BLAS rounds `y += h @ B.T` like a product followed by a sum.

    Most do, up to a rank at which they split the inner sum. No BLAS documents it, so measure.
    """
    generator = torch.Generator().manual_seed(rank)
    for rows, out in ((1, 96), (2, 96), (5, 96), (16, 1040), (67, 576)):
        h, b, y = (
            torch.empty(size).uniform_(-1, 1, generator=generator)
            for size in ((rows, rank), (out, rank), (rows, out))
        )
        if not torch.equal(torch.addmm(y, h, b.t(), alpha=2.0), y + torch.mm(h, b.t()) * 2.0):
            return False
    return True
