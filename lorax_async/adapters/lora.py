"""The names of `lorax_server.adapters.lora`: code written for it runs with this import instead."""

from __future__ import annotations

from math import sqrt

from lorax_async.adapters.base import AdapterConfig, AdapterWeights, ModuleMap
from lorax_async.adapters.batches import (
    LORA,
    AdapterBatchMetadata,
    BatchAdapterWeights,
    BatchLoraWeights,
)
from lorax_async.adapters.batching.rank_segments import RankSegments
from lorax_async.adapters.config import LoraConfig
from lorax_async.adapters.weights import LoraWeights

__all__ = [
    "LORA",
    "AdapterBatchMetadata",
    "AdapterConfig",
    "AdapterWeights",
    "BatchAdapterWeights",
    "BatchLoraWeights",
    "LoraConfig",
    "LoraWeights",
    "ModuleMap",
    "RankSegments",
    "get_scaling_factor",
]


def get_scaling_factor(lora_alpha: float, r: int, uses_rslora: bool = False) -> float:
    """What a delta of the (unpadded) rank `r` is multiplied with."""
    return lora_alpha / (sqrt(r) if uses_rslora else r)
