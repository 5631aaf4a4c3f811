"""The one public entry: checks what every device needs checked, then picks the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from lorax_kernels.cpu import apply_cpu
from lorax_kernels.plan import Plan
from lorax_kernels.tables import Tables


@torch.no_grad()
def apply(y: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """Add each row's adapter to a linear layer's output: `y += scale * (x @ A.T) @ B.T`, in place.

    `x` `[tokens, in]` is the layer's input, `y` `[tokens, out]` its output; both are contiguous
    and of the operands' dtype and device. `module` is the row of `tables`. Rows without a slot,
    or whose adapter does not touch the module, keep their bits. Nothing is recorded for autograd.

    Raises ValueError, before `y` is touched, for tensors, a module or a slot that do not fit.
    """
    _check_batch("y", y, plan)
    _check_batch("x", x, plan)
    modules, slots = tables.rank.shape
    if not 0 <= module < modules:
        raise ValueError(f"expected a module from 0 to {modules - 1}, got {module}")
    if plan.top_slot >= slots:
        raise ValueError(f"expected slots below {slots}, the plan has slot {plan.top_slot}")
    apply_cpu(y, x, plan, module, tables)


def _check_batch(name: str, tensor: Tensor, plan: Plan) -> None:
    fits = tensor.dim() == 2 and tensor.shape[0] == plan.tokens
    if not (fits and tensor.is_contiguous() and tensor.device.type == "cpu"):
        raise ValueError(
            f"expected {name} contiguous [{plan.tokens}, features] on cpu, "
            f"got {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )
