"""What `populate` of every `Source` keeps to. A test class derives from `PopulateConformance`.

Its module has the fixtures of `source_conformance`; `world` also asserts that no hold stayed open.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import pytest
from cancelling import was_cancelled
from source_conformance import World as SourceWorld
from source_conformance import bring_all
from source_inputs import CONFIG, read, weights

from lorax_async.adapter import AdapterKey
from lorax_async.errors import IntegrityError
from lorax_async.io.ports import Demand


class World(SourceWorld, Protocol):
    holds: bool
    """Its adapters can be held."""


async def resolved(world: World, content: bytes) -> AdapterKey:
    return await world.source.resolve(world.put("one", CONFIG, content))


async def is_holdable(world: World, key: AdapterKey) -> bool:
    file = await world.source.open(key, Demand())
    file.reader.close()
    return file.holdable


class PopulateConformance:
    async def test_a_hold_is_what_the_opened_file_promised(self, world: World) -> None:
        content = weights(1)
        key = await resolved(world, content)
        hold = await world.source.populate(key)
        assert hold.nbytes == (len(content) if world.holds else 0)
        assert await is_holdable(world, key) is world.holds
        assert isinstance(hold.locked, bool)
        assert not (hold.locked and not world.holds)
        hold.close()

    async def test_holds_are_closed_once_each_in_any_thread(self, world: World) -> None:
        key = await resolved(world, weights(1))
        holds = await asyncio.gather(*(world.source.populate(key) for _ in range(6)))
        with ThreadPoolExecutor(3) as threads:
            closings = [threads.submit(hold.close) for hold in (*holds[:5], *holds[:5])]
            assert [closing.result() for closing in closings] == [None] * 10
        holds[5].close()
        holds[5].close()

    @pytest.mark.parametrize("closed", [False, True])
    async def test_a_hold_leaves_readers_alone(self, world: World, closed: bool) -> None:
        content = weights(1)
        key = await resolved(world, content)
        file = await world.source.open(key, Demand())
        await bring_all(world.source, file, content)
        hold = await world.source.populate(key)
        if closed:
            hold.close()
        reader = world.source.reopen(key)
        for each in (file.reader, reader):
            assert read(each, 0, len(content)) == content
            each.close()
        hold.close()

    async def test_a_held_adapter_may_be_replaced(self, world: World) -> None:
        first, second = weights(1), weights(2, {"note": "longer"})
        hold = await world.source.populate(await resolved(world, first))
        newer = await world.source.populate(await resolved(world, second))
        sizes = (len(first), len(second)) if world.holds else (0, 0)
        assert (hold.nbytes, newer.nbytes) == sizes
        hold.close()
        newer.close()

    @pytest.mark.parametrize("part", ["config", "weights"])
    async def test_another_version_is_not_held(self, world: World, part: str) -> None:
        key = await resolved(world, weights(1))
        config = CONFIG.replace(b"8", b"9") if part == "config" else CONFIG
        world.put("one", config, weights(2 if part == "weights" else 1))
        with pytest.raises(IntegrityError, match="again"):
            await world.source.populate(key)

    @pytest.mark.parametrize("late", [0.0, 0.003])
    async def test_cancelled_at_any_await_of_populate(self, world: World, late: float) -> None:
        key = await resolved(world, weights(1))
        ends = [await was_cancelled(world.source.populate(key), at, late) for at in range(12)]
        assert ends.count(True) >= 1
        assert ends == sorted(ends, reverse=True)
