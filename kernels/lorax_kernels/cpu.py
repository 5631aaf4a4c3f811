"""Per-segment matrix products on the CPU.

The order of operations (shrink, expand, times scale, plus) is that of PEFT's `lora.Linear`, so that
in float32 a batch of one adapter gives PEFT's bits.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from lorax_kernels.plan import Plan
from lorax_kernels.tables import Operands, Tables


def apply_cpu(y: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """As :func:`lorax_kernels.apply`, for tensors that it has checked against the plan."""
    work = [
        (start, stop, operands)
        for start, stop, slot in plan.segments
        if (operands := tables.operands(module, slot)) is not None
    ]
    for _, _, operands in work:
        _check_fit(y, x, operands)
    for start, stop, operands in work:
        if stop - start == plan.tokens:  # the usual case: one adapter, nothing to slice
            _add(y, x, operands)
        else:
            _add(y[start:stop], x[start:stop], operands)


def _add(y: Tensor, x: Tensor, operands: Operands) -> None:
    a, b, scale = operands
    y.add_(linear(linear(x, a), b).mul_(scale))


def _check_fit(y: Tensor, x: Tensor, operands: Operands) -> None:
    a, b, _ = operands
    shapes_fit = x.shape[1] == a.shape[1] and y.shape[1] == b.shape[0]
    if not (shapes_fit and x.dtype == y.dtype == a.dtype == b.dtype):
        raise ValueError(
            f"expected x [tokens, {a.shape[1]}] in {a.dtype} and y [tokens, {b.shape[0]}] in "
            f"{b.dtype}, got x {list(x.shape)} in {x.dtype} and y {list(y.shape)} in {y.dtype}"
        )
