"""What a device must hold of each adapter, by safetensors' own reader; and what it holds."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import Any

import torch
from safetensors.torch import load

from lorax_async import AdapterHandle
from soak.library import LAYERS, MODULES, Stored, library

Digests = tuple[str, ...]
"""One for each layer, over A and B of its modules."""

PER_LAYER = len(MODULES) // LAYERS


@cache
def expected(seed: int) -> tuple[Digests, ...]:
    """Of the whole library."""
    return tuple(map(_of_source, library(seed)))


def on_device(handle: AdapterHandle, layers: range) -> Digests:
    """Of those layers. In any thread: the slot is kept meanwhile, whoever releases the handle."""
    with handle.use():
        return tuple(_of_device(handle, layer) for layer in layers)


def _of_source(stored: Stored) -> Digests:
    saved = load(stored.weights())
    found = []
    for layer in range(LAYERS):
        digest = hashlib.sha256()
        for name in _names(layer):
            for part in ("A", "B"):
                digest.update(_raw(saved[f"base_model.model.{name}.lora_{part}.weight"]))
        found.append(digest.hexdigest())
    return tuple(found)


def _of_device(handle: AdapterHandle, layer: int) -> str:
    digest = hashlib.sha256()
    modules = handle.modules
    for name in _names(layer):
        module = modules[name]
        for tensor in (module.a, module.b):
            digest.update(_raw(tensor))
    return digest.hexdigest()


def _names(layer: int) -> tuple[str, ...]:
    return MODULES[layer * PER_LAYER : (layer + 1) * PER_LAYER]


def _raw(tensor: torch.Tensor) -> Any:
    """The bytes as they are: not all of them are numbers."""
    return tensor.contiguous().view(torch.uint8).numpy()
