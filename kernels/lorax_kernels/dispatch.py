"""The public functions, which pick the implementation by device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorax_kernels.cpu import apply_cpu, expand_cpu, shrink_cpu
from lorax_kernels.plan import Plan
from lorax_kernels.tables import Tables


def apply(
    y: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables, *, group: Sequence[int] = ()
) -> None:
    """Add each row's adapter to a linear layer's output: `y += scale * (x @ A.T) @ B.T`, in place.

    `x` `[tokens, in]` is the layer's input, `y` `[tokens, out]` its output; both are contiguous
    and of the operands' dtype and device. `y` shares no memory with `x` or the weights (weights are
    compared on the CPU only). `module` is the row of `tables`. Rows without a slot, or whose
    adapter does not touch the module, keep their bits. Nothing is recorded for autograd.

    `group` lists modules, including this one, that get the same tensor `x` in turn (q, k and v;
    gate and up). The first call shrinks it for all of them. The result is reused if `x` is the same
    object and was not written to (by its version, which `x.data` and numpy bypass), and the tables
    return the same operands. A GPU computes each module separately; use
    `lorax_kernels.sgmv.apply_group` if all outputs are available at once.

    Raises ValueError, before `y` is touched, for tensors, modules or a slot that do not fit, for
    tensors that overlap, and for a scale that is not finite or beyond float32.
    """
    if x.is_cuda:
        with torch.no_grad(), torch.cuda.device(x.device):
            _sgmv().apply_one(y, x, plan, module, tables)
    elif not torch.is_grad_enabled():
        apply_cpu(y, x, plan, module, tables, group)
    else:
        with torch.no_grad():
            apply_cpu(y, x, plan, module, tables, group)


@torch.no_grad()
def shrink(h: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """Compute the first half of :func:`apply`, without the scale: `h = x @ A.T`, row by row.

    `x` is `[tokens, in]`; `h` is `[tokens, width]`, of which a row gets as many columns as its
    adapter's rank, at most `width`. The other columns, and rows without an adapter, become zero.
    Both are contiguous, apart, and of the operands' dtype and device.

    Raises ValueError, before `h` is touched, for tensors, a module or a slot that do not fit.
    """
    if x.is_cuda:
        with torch.cuda.device(x.device):
            _sgmv().shrink_one(h, x, plan, module, tables)
    else:
        shrink_cpu(h, x, plan, module, tables)


@torch.no_grad()
def expand(y: Tensor, h: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """Compute the second half of :func:`apply`: `y += scale * h @ B.T`, row by row, in place.

    `h` `[tokens, width]` is what :func:`shrink` made, or the sum of that of several processes; of
    a row only the first columns are read, as many as its adapter's rank. `y` is `[tokens, out]`.
    Both are contiguous, apart, and of the operands' dtype and device. Rows without an adapter keep
    their bits.

    Raises ValueError, before `y` is touched, for tensors, a module or a slot that do not fit.
    """
    if y.is_cuda:
        with torch.cuda.device(y.device):
            _sgmv().expand_one(y, h, plan, module, tables)
    else:
        expand_cpu(y, h, plan, module, tables)


def _sgmv() -> Any:
    """Import the GPU implementation late: Triton is slow to import and may be missing."""
    from lorax_kernels import sgmv  # noqa: PLC0415

    return sgmv
