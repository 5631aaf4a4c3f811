"""Tensors as a source has them, over a disk cache where they go on; memory is for one of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import safetensors.torch
import torch
from source_inputs import CONFIG, read, tensors

from lorax_async.adapter import AdapterKey
from lorax_async.config import Limits
from lorax_async.core.cache_names import CacheKey
from lorax_async.io.cache.ports import Cache
from lorax_async.io.ports import Demand
from lorax_async.io.sources.from_memory import MemorySource
from lorax_async.testing import FakeSource

SIZE = len(safetensors.torch.save(tensors(1)))
ROOM = SIZE + SIZE // 2
"""For one of them."""


def entry_key(key: AdapterKey) -> CacheKey:
    return CacheKey("tensors", key.location.removeprefix("tensors:sha256:"))


class World:
    def __init__(self, cache: Cache, threads: ThreadPoolExecutor, room: int = ROOM) -> None:
        self.cache = cache
        self.source = MemorySource(
            FakeSource(), nbytes=room, limits=Limits(), threads=threads, cache=lambda: cache
        )

    async def take(self, seed: int = 1) -> AdapterKey:
        return await self.source.take(tensors(seed), CONFIG, lambda: None)

    @property
    def used(self) -> int:
        return self.source.copies.used

    def is_spilled(self, key: AdapterKey) -> bool:
        return key not in self.source.copies.sizes

    async def assert_is(self, key: AdapterKey, seed: int) -> None:
        file = await self.source.open(key, Demand())
        try:
            loaded = safetensors.torch.load(read(file.reader, 0, file.reader.nbytes))
        finally:
            file.reader.close()
        assert loaded.keys() == tensors(seed).keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(seed).items())

    def close(self) -> None:
        self.source.copies.clear()
        self.source.close()
        assert self.used == 0
