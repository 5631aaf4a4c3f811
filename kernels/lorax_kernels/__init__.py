"""Apply many LoRA adapters in one batch: `y[segment] += scale * (x[segment] @ A.T) @ B.T`.

Make a :class:`Plan` once per batch, and call :func:`apply` once per adapted linear layer with the
:class:`Tables` of the device; or :func:`shrink` and :func:`expand`, for work between the products.

- `dispatch`: the public functions; `checks`: their argument checks
- `plan`, `tiles`, `tables`, `thresholds`: a batch's segments, its GPU tiles, the device, the tuning
- `cpu`: the CPU implementation; `segments`, `dense`, `grouped`: its three ways to compute a batch
- `module_batch`, `workspace`: what a plan keeps between calls on the CPU
- `sgmv`, `sgmv_programs`, `sgmv_checks`: the GPU implementation in Triton
- `reference`: the definition in float64

The package may know only torch, and Triton for GPUs.
"""

from lorax_kernels.dispatch import apply, expand, shrink
from lorax_kernels.plan import Plan
from lorax_kernels.tables import Operands, Segment, Tables
from lorax_kernels.thresholds import Thresholds

__all__ = ["Operands", "Plan", "Segment", "Tables", "Thresholds", "apply", "expand", "shrink"]
