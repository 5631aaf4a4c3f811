"""Tensors as a source has them: copies within a budget, for as long as somebody needs them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pytest
import safetensors.torch
import torch
from cancelling import was_cancelled
from source_conformance import bring_all
from source_inputs import CONFIG, groups_of, read, read_rows, rows_of, tensors

from lorax_async.adapter import AdapterKey, TensorsKey
from lorax_async.config import Limits
from lorax_async.core.runs import Span
from lorax_async.errors import (
    AdapterNotFoundError,
    CapacityError,
    FetchError,
    IntegrityError,
)
from lorax_async.io.ports import Demand
from lorax_async.io.sources.from_memory import MemorySource
from lorax_async.testing import FakeSource

ROOM = 1 << 20


class World:
    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.inner = FakeSource()
        self.source = MemorySource(self.inner, nbytes=ROOM, limits=Limits(), threads=threads)

    async def take(self, seed: int = 1) -> AdapterKey:
        return await self.source.take(tensors(seed), CONFIG, lambda: None)

    @property
    def used(self) -> int:
        return self.source.copies.used


@pytest.fixture
def world() -> Iterator[World]:
    with ThreadPoolExecutor(2) as threads:
        world = World(threads)
        yield world
        world.source.copies.clear()
    assert world.used == 0
    assert world.inner.counts.open_readers == 0


async def test_it_is_opened_like_a_file(world: World) -> None:
    key = await world.take()
    assert isinstance(key, TensorsKey)
    file = await world.source.open(key, Demand())
    content = read(file.reader, 0, file.reader.nbytes)
    loaded = safetensors.torch.load(content)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(1).items())
    assert loaded.keys() == tensors(1).keys()
    assert file.config == CONFIG
    assert content.startswith(file.prefix)
    assert not file.holdable
    await bring_all(world.source, file, content)
    again = world.source.reopen(key)
    assert read(again, 3, 40) == content[3:40]
    parts = [memoryview(bytearray(n)) for n in (0, 5, 1, 64)]
    again.read_into(parts, 7)
    assert b"".join(parts) == content[7:77]
    apart = Span(50, 55, 7, 11)
    assert read_rows(again, apart) == rows_of(content, apart)
    for reader in (file.reader, again):
        with pytest.raises(IntegrityError, match="ends before byte"):
            read(reader, len(content) - 3, len(content) + 1)
        with pytest.raises(IntegrityError, match="ends before byte"):
            read_rows(reader, Span(len(content) - 20, len(content) - 16, 3, 9))
        reader.close()
        reader.close()
        with pytest.raises(FetchError, match="was closed"):
            read(reader, 0, 1)
        with pytest.raises(FetchError, match="was closed"):
            read_rows(reader, apart)
    assert world.used == len(content)
    hold = await world.source.populate(key)
    assert (hold.nbytes, hold.locked) == (0, False)
    hold.close()
    assert await world.source.digest(key) == sha256(content).hexdigest()
    file, demand = await world.source.open(key, Demand()), Demand()
    demand.end()
    with pytest.raises(FetchError, match="nobody waits"):
        await world.source.bring(file, groups_of(content), lambda _: None, demand)
    file.reader.close()


async def test_what_was_dropped_is_read_to_its_end_and_no_more(world: World) -> None:
    key = await world.take()
    file = await world.source.open(key, Demand())
    nbytes = world.used
    world.source.copies.drop(key)
    world.source.copies.drop(key)
    assert world.source.copies.sizes == {}
    assert world.used == nbytes, "who reads has the bytes"
    assert len(read(file.reader, 0, nbytes)) == nbytes
    with pytest.raises(AdapterNotFoundError, match="give them again") as caught:
        await world.source.open(key, Demand())
    assert caught.value.stage == "fetch"
    with pytest.raises(FetchError, match="give them again"):
        await world.source.populate(key)
    with pytest.raises(FetchError, match="load_tensors") as refused:
        await world.source.digest(key)
    assert not refused.value.retryable
    late = world.source.reopen(key)
    with pytest.raises(FetchError, match="give them again"):
        read(late, 0, 1)
    late.close()
    again = await world.take()
    assert (again, world.used) == (key, 2 * nbytes)
    file.reader.close()
    assert world.used == nbytes


async def test_the_budget_counts_what_is_being_copied(world: World) -> None:
    large = {"x": torch.zeros(ROOM // 8)}  # F32: half of it, and the header besides
    keys = await asyncio.gather(
        *(world.source.take(large, CONFIG + b" " * n, lambda: None) for n in range(6)),
        return_exceptions=True,
    )
    (key,) = (key for key in keys if isinstance(key, AdapterKey))
    assert sum(isinstance(key, CapacityError) for key in keys) == 5
    assert world.used == world.source.copies.sizes[key] < ROOM


@pytest.mark.parametrize("late", [0.0, 0.003])
async def test_cancelled_at_any_await(world: World, late: float) -> None:
    ends = [await was_cancelled(_forget(world), at, late) for at in range(8)]
    assert ends.count(True) >= 2
    assert ends == sorted(ends, reverse=True)


async def _forget(world: World) -> None:
    world.source.copies.drop(await world.take())
