"""Many LoRA adapters in one batch: `y[segment] += scale * (x[segment] @ A.T) @ B.T`.

Depends on torch alone. A caller has a :class:`Tables` (what is on the device), makes a
:class:`Plan` once per batch and calls :func:`apply` once per adapted linear layer.
"""

from lorax_kernels.dispatch import apply
from lorax_kernels.plan import Plan, Segment
from lorax_kernels.tables import Operands, Tables

__all__ = ["Operands", "Plan", "Segment", "Tables", "apply"]
