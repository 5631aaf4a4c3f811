"""Many LoRA adapters in one batch: `y[segment] += scale * (x[segment] @ A.T) @ B.T`.

Depends on torch, and for GPUs on Triton, which torch brings there. A caller has a :class:`Tables`
(what is on the device), makes a :class:`Plan` once per batch and calls :func:`apply` once per
adapted linear layer; or :func:`shrink` and :func:`expand`, where something belongs between the two
products.
"""

from lorax_kernels.dispatch import apply, expand, shrink
from lorax_kernels.plan import Plan
from lorax_kernels.tables import Operands, Segment, Tables
from lorax_kernels.thresholds import Thresholds

__all__ = ["Operands", "Plan", "Segment", "Tables", "Thresholds", "apply", "expand", "shrink"]
