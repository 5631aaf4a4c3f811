"""The products of one segment.

In float32 a segment has the bits of PEFT's `lora.Linear`, which shrinks, expands, multiplies by the
scale and adds. Other types round once less.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from math import frexp
from typing import NamedTuple

import torch
from torch import Tensor

from lorax_kernels.work import Piece, Work
from lorax_kernels.workspace import Workspace


class Shrinking(NamedTuple):
    """`out = x @ a_t`, or `out = a @ x.T` where `a` is there. `h` is `out` by row."""

    a: Tensor | None
    a_t: Tensor
    out: Tensor
    h: Tensor


class Expanding(NamedTuple):
    """`y += scale * (h @ b_t)` for part `part` of the rows; by way of `delta`, or at once."""

    part: int
    b_t: Tensor
    scale: float
    delta: Tensor | None


Step = tuple[Shrinking, Expanding]


def shrinking(a: Tensor, rows: int, space: Workspace, name: Hashable) -> Shrinking:
    """For `rows` of x and A `[rank, in]`, into memory of that name."""
    rank, features = a.shape
    if space.thresholds.turns(rows, rank, features, a.dtype):
        out = space.view(name, a.dtype, rank, rows)
        return Shrinking(a, a.t(), out, out.t())
    out = space.view(name, a.dtype, rows, rank)
    return Shrinking(None, a.t(), out, out)


def expanding(piece: Piece, space: Workspace) -> Expanding:
    """Of one segment, alone or not."""
    b, scale = piece.b, piece.scale
    delta = None
    if b.dtype == torch.float32 and not (_is_power_of_two(scale) and _adds_alike(piece.rank)):
        delta = space.view("delta", b.dtype, piece.rows, b.shape[0])
    return Expanding(piece.part, b.t(), scale, delta)


def shrink_rows(x: Tensor, by: Shrinking) -> Tensor:
    """`[rows, rank]`, in the memory of `by`."""
    if by.a is None:
        return torch.mm(x, by.a_t, out=by.out)
    torch.mm(by.a, x.t(), out=by.out)
    return by.h


def expand_rows(y: Tensor, h: Tensor, by: Expanding) -> None:
    """Add to `y` `[rows, out]`."""
    _, b_t, scale, delta = by
    if delta is None:
        y.addmm_(h, b_t, alpha=scale)
    else:
        y.add_(torch.mm(h, b_t, out=delta).mul_(scale))


def prepare(work: Work, space: Workspace) -> tuple[Step, ...]:
    """Each segment alone."""
    return tuple(
        (shrinking(piece.a, piece.rows, space, "h"), expanding(piece, space))
        for piece in work.pieces
    )


def run(y_parts: Sequence[Tensor], x_parts: Sequence[Tensor], steps: tuple[Step, ...]) -> None:
    """One after the other: they may share memory.

    As :func:`shrink_rows` and :func:`expand_rows`, whose calls would take as long as a token does.
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
    """Then to multiply by it rounds nothing."""
    return abs(frexp(scale)[0]) == 0.5


@lru_cache
def _adds_alike(rank: int) -> bool:
    """Whether the BLAS of this machine rounds `y += h @ B.T` as it rounds a product and a sum.

    Most do, up to a rank at which they split the inner sum. No BLAS says so: it is tried.
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
