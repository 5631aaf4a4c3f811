"""Tiny adapters from tensors, and loaders with memory for few of them."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import tiny

from lorax_async.config import LoaderConfig
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.testing import FakeSource
from lorax_async.types import AdapterId

FILE = 14_500  # Bytes of a tiny F32 adapter of rank 4 with its header, and less than 300 more
# Other adapters that the source of a `roomy` loader has: as many as there are slots.
FILLERS = [f"filler {number}" for number in range(4)]


async def assert_means(there: AdapterLoader, id: AdapterId, seed: int, **settings: Any) -> None:
    """Assert that a load of `id` gets the tensors of this seed."""
    async with await there.load(id, **settings) as handle:
        tiny.assert_holds(handle, tiny.tensors(seed))


def used(there: AdapterLoader) -> int:
    """Return the used part of `memory_bytes`, also of a closed loader."""
    return there.placement().usage.memory_bytes.used


def held_bytes(there: AdapterLoader) -> int:
    """Return the bytes of adapters in host memory: equals `used` when no call runs."""
    return sum(where.host_bytes for where in there.placement().adapters.values())


async def give(there: AdapterLoader, seed: int, name: str = "mine") -> AdapterHandle:
    return await there.load_tensors(name, tiny.tensors(seed), tiny.config())


async def put(there: AdapterLoader, seed: int, name: str | Path = "mine") -> AdapterHandle:
    return await there.replace(name, tiny.tensors(seed), tiny.config())


def acquired(there: AdapterLoader, name: AdapterId = "mine") -> AdapterHandle:
    handle = there.try_acquire(name)
    assert handle is not None
    return handle


def roomy(folder: Path, files: float, **settings: Any) -> AdapterLoader:
    """Return a loader with memory for this many tiny adapters, and a disk cache in `folder`."""
    plain: dict[str, Any] = {"device_bytes": 1 << 20, "max_slots": len(FILLERS), "io_threads": 2}
    plain |= {"timeout": 20, "memory_bytes": int(files * FILE), "cache_dir": folder}
    source = FakeSource()
    for number, name in enumerate(FILLERS):
        weights = safetensors.torch.save(tiny.tensors(1000 + number))
        source.put(name, json.dumps(tiny.config()).encode(), weights)
    return AdapterLoader(tiny.layout(), LoaderConfig(**(plain | settings)), source=source)
