"""Loaders whose memory is for few adapters, and what of the others is in the disk cache."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from safetensors.torch import save

import tiny
from given import assert_holds, used
from lorax_async import AdapterLoader, LoaderConfig
from lorax_async.core.cache_names import CacheKey
from lorax_async.identity import AdapterKey, TensorsKey
from lorax_async.testing import FakeSource

FILE = 14_500
"""Bytes of a tiny F32 adapter of rank 4 with its header, and less than 300 more."""

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def roomy(folder: Path, files: float, **settings: Any) -> AdapterLoader:
    """A loader with memory for so many tiny adapters, and a disk cache in `folder`."""
    plain: dict[str, Any] = {
        "device_bytes": 1 << 20,
        "max_slots": 4,
        "io_threads": 2,
        "timeout": 20,
        "memory_bytes": int(files * FILE),
        "cache_dir": folder,
    }
    config = LoaderConfig(**(plain | settings))
    return AdapterLoader(tiny.layout(), config, source=FakeSource())


def entry_of(folder: Path, key: AdapterKey) -> Path:
    """Where the cache has what was spilled."""
    assert isinstance(key, TensorsKey)
    digest = key.location.removeprefix("tensors:sha256:")
    return folder / "entries" / CacheKey("tensors", digest).name


def entries(folder: Path) -> list[str]:
    """Names of all that is in the cache, whole or on its way there."""
    found = []
    for kind in ("entries", "partials", "trash"):
        if (folder / kind).is_dir():
            found += os.listdir(folder / kind)
    return found


def in_memory(there: AdapterLoader) -> list[AdapterKey]:
    return list(there._machinery.given)


def nbytes_on_disk(folder: Path) -> int:
    """Of adapters' files, those that are being written included."""
    found = 0
    for base, _, names in os.walk(folder):
        for name in names:
            if name in {WEIGHTS, CONFIG} and "/trash/" not in base:
                with suppress(FileNotFoundError):
                    found += os.stat(os.path.join(base, name)).st_size
    return found


async def off_device(there: AdapterLoader) -> None:
    """Nothing that nobody holds is resident any more; other adapters took the slots."""
    source = there._machinery._source
    assert isinstance(source, FakeSource)
    for number in range(there.config.max_slots):
        name, weights = f"filler {number}", save(tiny.tensors(1000 + number))
        source.put(name, json.dumps(tiny.config()).encode(), weights)
        (await there.load(name)).release()


async def assert_all_there(there: AdapterLoader, *seeds: int) -> None:
    await off_device(there)
    for seed in seeds:
        async with await there.load(str(seed)) as handle:
            assert_holds(handle, tiny.tensors(seed))


class Stalled:
    """A step that waits in its thread: `began` is set when it is there, until `go_on` is set."""

    def __init__(self) -> None:
        self.began = Event()
        self.go_on = Event()

    def wait(self) -> None:
        self.began.set()
        assert self.go_on.wait(20)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.began.wait, 20)


STEPS = {
    "hash": "lorax_async.io.spilled._digest",
    "write": "lorax_async.io.cache.partial_file.PartialFile.write",
    "publish": "lorax_async.io.cache.download.DiskDownload.publish",
    "switch": "lorax_async.io.host_copies.HostCopy.move",
}
"""Of a spill, in their order."""


@contextmanager
def stalled(monkeypatch: pytest.MonkeyPatch, step: str) -> Iterator[Stalled]:
    """Every spill waits at that step, until the end of this at most."""
    stall = Stalled()
    path, _, name = STEPS[step].rpartition(".")
    try:
        owner: Any = importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, kind = path.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    real = getattr(owner, name)

    def slowly(*given: Any) -> Any:
        stall.wait()
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, slowly)
        try:
            yield stall
        finally:
            stall.go_on.set()


@asynccontextmanager
async def spilled(
    folder: Path, count: int = 1, **settings: Any
) -> AsyncIterator[tuple[AdapterLoader, list[AdapterKey]]]:
    """A loader with room for one, and the keys of `count + 1`, of which the last is in memory.

    Their ids are the numbers, of which each is the seed of its tensors.
    """
    async with roomy(folder, 1, **settings) as there:
        keys = [await given(there, seed) for seed in range(count + 1)]
        assert in_memory(there) == keys[-1:]
        yield there, keys
        assert used(there) == sum(there._machinery.given.values())


async def given(there: AdapterLoader, seed: int) -> AdapterKey:
    """Give the tensors of that seed the seed as their name."""
    handle = await there.load_tensors(str(seed), tiny.tensors(seed), tiny.config())
    handle.release()
    return handle.key
