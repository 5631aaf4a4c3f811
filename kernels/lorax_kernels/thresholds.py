"""Which way a batch is computed on the CPU, and how much memory a plan may keep for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Measured by `benchmarks/measure_sgmv_thresholds.py`; give `Plan.from_segments` others.

    One product over all adapters, with a mask, saves calls and computes what the mask throws away.
    `dense_*` are the multiply-adds in vain that a segment less is worth; 0 computes each segment
    alone. That is the default in float32, where 1e5 were quicker: a row's bits are then PEFT's,
    whoever else is in the batch. For that, too, float32 shares no shrink unless asked to.

    Attributes
    ----------
    dense_bfloat16, dense_float16, dense_float32
        Multiply-adds in vain per segment.
    share_float32
        Whether modules of a group share a shrink in float32, too.
    turned_rank, turned_features
        In bfloat16, `A @ x.T` is quicker than `x @ A.T` for more rows than rank, up to this rank
        and from so many input features.
    kept_bytes
        What a plan may keep of weights that it put together, in bytes.
    """

    dense_bfloat16: float = 6e6
    dense_float16: float = 0.0
    dense_float32: float = 0.0
    share_float32: bool = False
    turned_rank: int = 16
    turned_features: int = 1024
    kept_bytes: int = 64 << 20

    def dense(self, dtype: torch.dtype) -> float:
        """Multiply-adds in vain per segment, for operands of `dtype`."""
        return {
            torch.bfloat16: self.dense_bfloat16,
            torch.float16: self.dense_float16,
            torch.float32: self.dense_float32,
        }.get(dtype, 0.0)

    def shares(self, dtype: torch.dtype) -> bool:
        """Whether a group of modules may have one shrink."""
        return dtype != torch.float32 or self.share_float32

    def turns(self, rows: int, rank: int, features: int, dtype: torch.dtype) -> bool:
        """Whether a segment is shrunk as `A @ x.T`."""
        return (
            dtype == torch.bfloat16
            and rank <= self.turned_rank
            and rank < rows
            and features >= self.turned_features
        )
