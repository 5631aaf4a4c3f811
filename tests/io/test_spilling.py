"""Tensors that go from memory to a disk cache: who reads, who waits, what others have there."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import safetensors.torch
import torch
from disk_cache_world import begun, content_of, open_below, put, stored
from source_inputs import CONFIG, read, read_rows, rows_of, tensors

from common import until
from lorax_async.adapter import AdapterKey
from lorax_async.config import Limits
from lorax_async.core.cache_names import CONFIG_FILE, WEIGHTS_FILE, CacheKey
from lorax_async.core.policies import policy
from lorax_async.core.runs import Span
from lorax_async.errors import CapacityError, FetchError
from lorax_async.io.cache.ports import Cache
from lorax_async.io.disk_cache import DiskCache
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


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = DiskCache(tmp_path, 1 << 30, policy("lru"))
    with ThreadPoolExecutor(2) as threads:
        world = World(made, threads)
        yield world
        world.close()
    made.close()
    assert open_below(tmp_path) == []


async def test_it_is_opened_like_a_file(world: World) -> None:
    key = await world.take(1)
    await world.take(2)
    assert world.is_spilled(key)
    file = await world.source.open(key, Demand())
    content = read(file.reader, 0, file.reader.nbytes)
    assert (file.config, file.holdable) == (CONFIG, False)
    assert content.startswith(file.prefix)
    again, apart = world.source.reopen(key), Span(50, 55, 7, 11)
    assert read(again, 3, 40) == content[3:40]
    assert read_rows(again, apart) == rows_of(content, apart)
    world.source.copies.drop(key)
    assert read(again, 0, len(content)) == content, "it is read to its end"
    for reader in (file.reader, again):
        reader.close()
        reader.close()
        with pytest.raises(FetchError, match="closed"):
            read(reader, 0, 1)
    await until(lambda: world.cache.used() == 0)


async def test_what_is_read_or_copied_now_is_waited_for(world: World) -> None:
    key = await world.take(1)
    reader = world.source.reopen(key)
    content = read(reader, 0, reader.nbytes)
    second, third = (asyncio.create_task(world.take(seed)) for seed in (2, 3))
    await asyncio.sleep(0.1)  # long enough for them, were nobody reading
    assert not world.is_spilled(key)
    assert {second.done(), third.done()} == {False}
    assert world.used == len(content)
    assert read(reader, 0, len(content)) == content
    reader.close()
    keys = [key, await second, await third]
    assert [world.is_spilled(each) for each in keys] == [True, True, False]
    assert world.used == sum(world.source.copies.sizes.values())
    for seed, each in enumerate(keys, 1):
        await world.assert_is(each, seed)


# -- entries that other loaders, or killed processes, have in the same folder ---------------------


def inode(folder: Path, key: AdapterKey) -> int | None:
    """Which entry it is."""
    path = folder / "entries" / entry_key(key).name
    return path.stat().st_ino if path.exists() else None


async def test_two_loaders_share_an_entry(world: World, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        other_cache = DiskCache(tmp_path, 1 << 30, policy("lru"))
        other = World(other_cache, threads)
        key = await world.take(1)
        await world.take(2)
        written = inode(tmp_path, key)
        assert await other.take(1) == key
        await other.take(3)
        assert inode(tmp_path, key) == written
        world.source.copies.drop(key)
        await world.take(4)  # after what was to be removed
        await world.take(5)
        assert inode(tmp_path, key) == written
        await other.assert_is(key, 1)
        other.close()
        assert inode(tmp_path, key) is None
        other_cache.close()


async def test_what_was_half_written_is_written_anew(world: World) -> None:
    """By a killed process, and the disk has lost its bytes."""
    key = await world.take(1)
    with closing(world.source.reopen(key)) as reader:
        nbytes = reader.nbytes
    download = begun(world.cache, entry_key(key))
    put(download.file(WEIGHTS_FILE, nbytes), bytes(nbytes), [(0, nbytes)])
    download.close()
    await world.take(2)
    assert world.is_spilled(key)
    await world.assert_is(key, 1)


@pytest.mark.parametrize("wrong", ["damaged", "another's"])
async def test_wrong_bytes_under_its_name_are_never_read(
    world: World, tmp_path: Path, wrong: str
) -> None:
    key = await world.take(1)
    content = safetensors.torch.save(tensors(1))
    other = bytes(len(content))
    stored(world.cache, entry_key(key), other if wrong == "another's" else content, CONFIG).close()
    if wrong == "damaged":
        path = tmp_path / "entries" / entry_key(key).name / "adapter_model.safetensors"
        times = path.stat()
        path.write_bytes(other)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        await world.take(2)
    else:
        with pytest.raises(CapacityError, match="other bytes under the name"):
            await world.take(2)
        assert not world.is_spilled(key)
        await world.take(2)
    assert world.is_spilled(key)
    await world.assert_is(key, 1)
    entry = world.cache.open(entry_key(key))
    assert entry is not None
    assert content_of(entry, CONFIG_FILE) == CONFIG
    entry.close()
