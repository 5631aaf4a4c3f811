"""Thresholds that choose how the CPU computes a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Limits measured by `benchmarks/measure_sgmv_thresholds.py`, for `Plan.from_segments`.

    One masked product over all adapters saves calls, but computes products that the mask discards.
    `dense_*` is the number of discarded multiply-adds that one saved segment is worth; 0 computes
    each segment separately. That is the default in float32, where 1e5 would be faster: a row then
    has PEFT's bits, regardless of the rest of the batch. Float32 shares no shrink for that reason.

    Attributes
    ----------
    dense_bfloat16, dense_float16, dense_float32
        Discarded multiply-adds per saved segment.
    share_float32
        Whether modules of a group share a shrink in float32 too.
    turned_rank, turned_features
        In bfloat16, `A @ x.T` is faster than `x @ A.T` with more rows than rank, up to this rank
        and from this many input features.
    kept_bytes
        The bytes of combined weights that a plan may keep.
    """

    dense_bfloat16: float = 6e6
    dense_float16: float = 0.0
    dense_float32: float = 0.0
    share_float32: bool = False
    turned_rank: int = 16
    turned_features: int = 1024
    kept_bytes: int = 64 << 20

    def dense(self, dtype: torch.dtype) -> float:
        """Return the discarded multiply-adds per saved segment for `dtype`."""
        return {
            torch.bfloat16: self.dense_bfloat16,
            torch.float16: self.dense_float16,
            torch.float32: self.dense_float32,
        }.get(dtype, 0.0)

    def shares(self, dtype: torch.dtype) -> bool:
        """Return whether a group of modules may share one shrink."""
        return dtype != torch.float32 or self.share_float32

    def prefers_transposed(self, rows: int, rank: int, features: int, dtype: torch.dtype) -> bool:
        """Return whether to shrink a segment as `A @ x.T`."""
        return (
            dtype == torch.bfloat16
            and rank <= self.turned_rank
            and rank < rows
            and features >= self.turned_features
        )
