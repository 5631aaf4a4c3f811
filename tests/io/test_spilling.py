"""Tensors that go from memory to a disk cache: who reads, and who waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import safetensors.torch
import torch
from cache_inputs import stored
from disk_cache_world import open_below
from rows_conformance import read_rows, rows_of
from source_conformance import bring_all
from source_inputs import CONFIG, read, tensors
from spilling_world import SIZE, World, entry_key

from common import until
from lorax_async.core.cache_names import CacheKey
from lorax_async.core.policies import policy
from lorax_async.core.runs import Span
from lorax_async.errors import CapacityError, FetchError, LoaderClosedError
from lorax_async.io import spilled
from lorax_async.io.disk_cache import DiskCache
from lorax_async.io.ports import Demand


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = DiskCache(tmp_path, 4 * SIZE, policy("lru"))
    with ThreadPoolExecutor(2) as threads:
        world = World(made, threads)
        yield world
        world.close()
    assert made.used() == 0
    made.close()
    assert open_below(tmp_path) == []


async def test_it_is_opened_like_a_file(world: World) -> None:
    key = await world.take(1)
    await world.take(2)
    assert world.is_spilled(key)
    file = await world.source.open(key, Demand())
    content = read(file.reader, 0, file.reader.nbytes)
    loaded = safetensors.torch.load(content)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors(1).items())
    assert (file.config, file.holdable) == (CONFIG, False)
    assert content.startswith(file.prefix)
    assert len(file.prefix) == 8 + int.from_bytes(content[:8], "little")
    await bring_all(world.source, file, content)
    again = world.source.reopen(key)
    apart = Span(50, 55, 7, 11)
    assert read(again, 3, 40) == content[3:40]
    assert read_rows(again, apart) == rows_of(content, apart)
    for reader in (file.reader, again):
        reader.close()
        reader.close()
        with pytest.raises(FetchError, match="closed"):
            read(reader, 0, 1)
    hold = await world.source.populate(key)
    assert (hold.nbytes, hold.locked) == (0, False)
    hold.close()
    demand = Demand()
    demand.end()
    file = await world.source.open(key, Demand())
    with pytest.raises(FetchError, match="nobody waits"):
        await world.source.bring(file, [], lambda _: None, demand)
    file.reader.close()


async def test_what_is_dropped_is_read_to_its_end_and_then_removed(world: World) -> None:
    key = await world.take(1)
    await world.take(2)
    reader = world.source.reopen(key)
    size = reader.nbytes
    content = read(reader, 0, size)
    world.source.copies.drop(key)
    assert read(reader, 0, size) == content
    assert world.cache.used() > 0
    assert not world.cache.remove(entry_key(key)), "it is held"
    reader.close()
    await until(lambda: world.cache.used() == 0)
    assert world.source.spills == 1


async def test_who_has_the_memory_keeps_it_and_who_needs_it_waits(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = Event(), Event()

    digest = spilled._digest

    def slowly(*given: Any) -> Any:
        began.set()
        assert go_on.wait(20)
        return digest(*given)

    monkeypatch.setattr(spilled, "_digest", slowly)
    key = await world.take(1)
    taking = asyncio.create_task(world.take(2))
    await asyncio.to_thread(began.wait, 20)
    reader = world.source.reopen(key)
    content = read(reader, 0, reader.nbytes)
    go_on.set()
    await until(lambda: world.is_spilled(key))
    await asyncio.sleep(0.01)
    assert not taking.done()
    assert world.used == len(content)
    assert read(reader, 0, len(content)) == content
    reader.close()
    await taking
    assert world.used == in_memory(world)
    await world.assert_is(key, 1)


def in_memory(world: World) -> int:
    return sum(world.source.copies.sizes.values())


async def test_what_is_read_or_copied_now_is_waited_for(world: World) -> None:
    key = await world.take(1)
    reader = world.source.reopen(key)
    second, third = (asyncio.create_task(world.take(seed)) for seed in (2, 3))
    await asyncio.sleep(0.02)
    assert not world.is_spilled(key)
    assert {second.done(), third.done()} == {False}
    reader.close()
    keys = [key, await second, await third]
    assert [world.is_spilled(each) for each in keys] == [True, True, False]
    for seed, each in enumerate(keys, 1):
        await world.assert_is(each, seed)


async def test_one_that_takes_all_memory_waits_for_what_is_read(world: World) -> None:
    key = await world.take(1)
    reader = world.source.reopen(key)
    waiting = asyncio.create_task(world.take(2))
    await asyncio.sleep(0.01)
    world.source.copies.drop(key)
    assert not waiting.done(), "who reads has the bytes"
    reader.close()
    assert not world.is_spilled(await waiting)
    assert world.source.spills == 0


async def test_where_nothing_fits_the_disk_it_says_so(world: World) -> None:
    held = stored(world.cache, CacheKey("hub:org/name", "1"), bytes(3 * SIZE))
    key = await world.take(1)
    with pytest.raises(CapacityError, match="memory_bytes.*; nor can others") as caught:
        await world.take(2)
    assert (caught.value.retryable, caught.value.stage) == (True, "fetch")
    assert not world.is_spilled(key)
    held.close()
    await world.take(2)  # that makes room, for nobody holds it
    await world.assert_is(key, 1)
    world.cache.remove(CacheKey("hub:org/name", "1"))


async def test_each_reader_that_leaves_is_heard_of(world: World) -> None:
    """The last makes room; also in a thread, while the loop has nothing else to do."""
    key = await world.take(1)
    first, last = world.source.reopen(key), world.source.reopen(key)
    taking = asyncio.create_task(world.take(2))
    await asyncio.sleep(0.01)
    first.close()
    await asyncio.sleep(0.01)
    assert not taking.done()

    def close_late() -> None:
        Event().wait(0.05)
        last.close()

    closing = Thread(target=close_late)
    closing.start()
    await taking
    closing.join()
    assert world.is_spilled(key)


async def test_once_it_is_closed_nothing_goes_any_more(world: World) -> None:
    def closed() -> None:
        raise LoaderClosedError("the loader is closed")

    key = await world.take(1)
    with pytest.raises(LoaderClosedError):
        await world.source.take(tensors(2), CONFIG, closed)
    assert not world.is_spilled(key)


async def test_what_is_dropped_need_not_go_on(world: World) -> None:
    key = await world.take(1)
    copy = world.source.copies.get(key)
    assert copy is not None
    assert copy.in_memory is not None
    file, copy.moving = copy.in_memory.file, Demand()
    world.source.copies.drop(key)
    assert copy.moving.ended
    with pytest.raises(FetchError, match="nobody wants it on disk"):
        spilled.written(world.cache, file, copy.moving)
