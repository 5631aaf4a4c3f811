"""Six adapters of uneven sizes, in versions, and what a device must hold of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from safetensors.torch import load, save

import tiny

IDS = "abcdef"
DTYPE, RANK_MULTIPLE = torch.bfloat16, 8
LAYOUT = tiny.layout("BF16")
LAYERS = tuple(module.layer for module in LAYOUT.modules)

KINDS = (
    (8, torch.bfloat16),
    (16, torch.float32),
    (24, torch.float32),
    (12, torch.float16),
    (8, torch.float32),
    (24, torch.bfloat16),
)
"""Rank and dtype of the files: as the device has them, to be cast, to be cast and padded."""

LARGEST = 24 * (tiny.HIDDEN + 2 * tiny.HIDDEN) * DTYPE.itemsize * len(LAYERS)
"""Device bytes of an adapter of rank 24."""
LARGEST_FILE = 2 * LARGEST
"""In float32, without its header."""

Weights = tuple[torch.Tensor, torch.Tensor, float]


@dataclass(frozen=True, slots=True)
class Made:
    """The files of one version; `weights` by module, as they must lie on the device: padded."""

    config: bytes
    content: bytes
    weights: Mapping[int, Weights]


@cache
def made(id: str, version: int) -> Made:
    """Each version has another rank and dtype than the one before."""
    number = IDS.index(id)
    rank, dtype = KINDS[(number + version) % len(KINDS)]
    content = save(tiny.tensors(number + 100 * version, rank, dtype))
    config = json.dumps(tiny.config(rank)).encode()
    return Made(config, content, _on_device(load(content), tiny.config(rank)))


def _on_device(saved: dict[str, torch.Tensor], config: dict[str, object]) -> dict[int, Weights]:
    """By PEFT's definition, with safetensors' reader and torch's cast."""
    rank, alpha = config["r"], config["lora_alpha"]
    assert isinstance(rank, int)
    assert isinstance(alpha, int)
    more = -rank % RANK_MULTIPLE
    found = {}
    for number, module in enumerate(LAYOUT.modules):
        a = saved[f"base_model.model.{module.name}.lora_A.weight"].to(DTYPE)
        b = saved[f"base_model.model.{module.name}.lora_B.weight"].to(DTYPE)
        a = torch.cat([a, torch.zeros(more, a.shape[1], dtype=DTYPE)])
        b = torch.cat([b, torch.zeros(b.shape[0], more, dtype=DTYPE)], dim=1)
        found[number] = (a, b, alpha / rank)
    return found
