"""The products of one segment.

In float32 the order of operations (shrink, expand, times scale, plus) is that of PEFT's
`lora.Linear`, so that a segment has PEFT's bits. Other types round once less.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from lorax_kernels.work import Piece, Work
from lorax_kernels.workspace import Workspace


def shrink_rows(x: Tensor, a: Tensor, a_t: Tensor, space: Workspace, name: Hashable) -> Tensor:
    """`x @ A.T`, `[rows, rank]`, in memory of that name."""
    rows, rank = x.shape[0], a.shape[0]
    if space.thresholds.turns(rows, rank, x.shape[1], x.dtype):
        return torch.mm(a, x.t(), out=space.view(name, x.dtype, rank, rows)).t()
    return torch.mm(x, a_t, out=space.view(name, x.dtype, rows, rank))


def expand_rows(y: Tensor, h: Tensor, piece: Piece, space: Workspace) -> None:
    """`y += scale * (h @ B.T)`."""
    if y.dtype != torch.float32:
        y.addmm_(h, piece.b_t, alpha=piece.scale)
        return
    delta = torch.mm(h, piece.b_t, out=space.view("delta", y.dtype, *y.shape))
    if piece.scale_is_exact:  # then one pass rounds as two do
        y.add_(delta, alpha=piece.scale)
    else:
        y.add_(delta.mul_(piece.scale))


def apply_alone(y: Tensor, x: Tensor, work: Work, space: Workspace) -> None:
    """Each segment by itself."""
    x_parts, y_parts = work.parts(x), work.parts(y)
    for piece in work.pieces:
        h = shrink_rows(x_parts[piece.part], piece.a, piece.a_t, space, "h")
        expand_rows(y_parts[piece.part], h, piece, space)
