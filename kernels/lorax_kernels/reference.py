"""The reference implementation, row by row in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from lorax_kernels.plan import Plan
from lorax_kernels.tables import Tables


@torch.no_grad()
def reference(y: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables) -> Tensor:
    """Return the exact result of `apply` for `y` `[tokens, out]`, as a new float64 tensor.

    Sum products without BLAS, and read the plan's tensors instead of its integers, to share no step
    with an implementation.
    """
    result = y.double()
    for segment, slot in enumerate(plan.slots.tolist()):
        operands = tables.operands(module, slot) if slot >= 0 else None
        if operands is None:
            continue
        a, b, scale = operands[0].double(), operands[1].double(), operands[2]
        for row in range(int(plan.bounds[segment]), int(plan.bounds[segment + 1])):
            shrunk = (a * x[row].double()).sum(dim=1)
            result[row] += scale * (b * shrunk).sum(dim=1)
    return result
