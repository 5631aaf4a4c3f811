"""Tiny adapters that are given as tensors, and what a loader has of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import tiny
from lorax_async import AdapterHandle, AdapterLoader
from lorax_async.adapter import AdapterId


def assert_holds(handle: AdapterHandle, given: dict[str, torch.Tensor]) -> None:
    """The device has what was given, cast by torch."""
    assert len(given) == 2 * len(handle.modules)
    for name, module in handle.modules.items():
        a = given[f"base_model.model.{name}.lora_A.weight"]
        b = given[f"base_model.model.{name}.lora_B.weight"]
        assert torch.equal(module.a, a.to(module.a.dtype))
        assert torch.equal(module.b, b.to(module.b.dtype))


async def assert_means(there: AdapterLoader, id: AdapterId, seed: int, **settings: Any) -> None:
    """A load of `id` gets the tensors of that seed."""
    async with await there.load(id, **settings) as handle:
        assert_holds(handle, tiny.tensors(seed))


def used(there: AdapterLoader) -> int:
    """Bytes of `memory_bytes` that are taken, also once the loader is closed."""
    return there.last_numbers()[1].memory_bytes.used


def kept(there: AdapterLoader) -> int:
    """Bytes of the adapters that are in host memory: what is taken when nothing is under way."""
    return sum(where.host_bytes for where in there.residency().values())


def file_bytes(seed: int = 0) -> int:
    """Of the tensors alone: a file has its header before them."""
    return sum(tensor.nbytes for tensor in tiny.tensors(seed).values())


async def give(there: AdapterLoader, seed: int, name: str = "mine") -> AdapterHandle:
    return await there.load_tensors(name, tiny.tensors(seed), tiny.config())


async def put(there: AdapterLoader, seed: int, name: str | Path = "mine") -> AdapterHandle:
    return await there.replace(name, tiny.tensors(seed), tiny.config())


def acquired(there: AdapterLoader, name: str | Path = "mine") -> AdapterHandle:
    handle = there.try_acquire(name)
    assert handle is not None
    return handle
