"""Who is waited for, and who not: adapters that stream, rows that wait in vain."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import tiny
from common import until
from lorax_async import (
    Request,
)
from scheduling.serving import MANY, opened, rows, step, streaming, warm
from tiny_sources import is_resident, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


# -- who is waited for -----------------------------------------------------------------------------


async def test_nobody_waits_for_an_adapter_that_does_not_come(tmp_path: Path) -> None:
    source = stocked(tmp_path, "cold", "warm")
    source.hold("cold")
    async with opened(source) as (loader, scheduler):
        await warm(loader, "warm")
        cold = scheduler.submit(Request("cold", 5, 1))
        ready = [scheduler.submit(Request(id, 5, 4)) for id in ("warm", None)]
        for _ in range(4):
            assert len((await step(scheduler)).rows) == 2
        assert [await each for each in ready] == [4, 4]
        assert not cold.done
        source.allow("cold")
        assert rows(await step(scheduler)) == [("cold", 0, 5, True)]
        assert await cold == 1


async def test_next_batch_waits_until_there_is_something(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path)) as (_, scheduler):
        waiting = asyncio.create_task(scheduler.next_batch(MANY, MANY))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        ticket = scheduler.submit(Request(None, 1, 1))
        batch = await asyncio.wait_for(waiting, 5)
        scheduler.complete(batch)
        assert await ticket == 1


async def test_alone_a_streaming_adapter_joins_when_its_first_layer_is_there(
    tmp_path: Path,
) -> None:
    source = stocked(tmp_path, "a")
    source.hold("a")
    async with opened(source) as (_, scheduler):
        ticket = scheduler.submit(Request("a", 10, 1))
        waiting = asyncio.create_task(scheduler.next_batch(MANY, MANY))
        source.allow("a", 0)
        batch = await asyncio.wait_for(waiting, 5)
        (handle,) = batch.streaming
        assert handle is batch.rows[0].handle
        assert handle.is_ready(0)
        assert not handle.resident
        source.allow("a")
        for layer in range(tiny.LAYERS):
            await handle.layer_ready(layer)
        scheduler.complete(batch)
        assert await ticket == 1


async def test_it_does_not_join_others_before_their_pace_is_known(tmp_path: Path) -> None:
    source = stocked(tmp_path, "cold")
    source.hold("cold")
    source.allow("cold", 0)
    async with opened(source) as (_, scheduler):
        cold = scheduler.submit(Request("cold", 10, 1))
        handle = await streaming(scheduler, cold)
        await handle.layer_ready(0)
        scheduler.submit(Request(None, 10, 1))
        assert [row[0] for row in rows(await step(scheduler))] == [None]
        source.allow("cold")
        assert [row[0] for row in rows(await step(scheduler))] == ["cold"]


async def test_who_waited_in_vain_joins_when_all_is_there(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    source.hold("a")
    source.allow("a", 0)
    async with opened(source) as (_, scheduler):
        ticket = scheduler.submit(Request("a", 10, 2))
        batch = await asyncio.wait_for(scheduler.next_batch(MANY, MANY), 5)
        told = [batch.others_wait]
        scheduler.submit(Request(None, 3, 1))
        told.append(batch.others_wait)
        assert told == [False, True]
        scheduler.complete(batch, again=[ticket])
        assert [row[0] for row in rows(await step(scheduler))] == [None]
        waiting = asyncio.create_task(scheduler.next_batch(MANY, MANY))
        source.allow("a", 1)
        await asyncio.sleep(0.01)
        assert not waiting.done()
        source.allow("a")
        batch = await asyncio.wait_for(waiting, 5)
        assert (rows(batch), batch.streaming) == ([("a", 0, 10, True)], ())
        scheduler.complete(batch)
        assert rows(await step(scheduler)) == [("a", 10, 1, True)]
        assert await ticket == 2


async def test_a_pass_is_told_of_others_that_did_not_fit(tmp_path: Path) -> None:
    """They were there before it; nothing that happens later would tell."""
    source = stocked(tmp_path, "a")
    source.hold("a")
    source.allow("a", 0)
    async with opened(source) as (_, scheduler):
        scheduler.submit(Request(None, 1, 1))
        batch = await scheduler.next_batch(MANY, MANY)
        await asyncio.sleep(0.2)
        scheduler.complete(batch)  # a pass is slow: whoever comes may join it
        streams = scheduler.submit(Request("a", 1, 1))
        handle = await streaming(scheduler, streams)
        await handle.layer_ready(0)
        scheduler.submit(Request(None, 1, 1))
        batch = await asyncio.wait_for(scheduler.next_batch(MANY, 1), 5)
        assert (rows(batch), batch.others_wait) == ([("a", 0, 1, True)], True)
        scheduler.complete(batch, again=[streams])
        assert rows(await step(scheduler)) == [(None, 0, 1, True)]
        source.allow("a")
        await step(scheduler)


async def test_who_may_not_begin_keeps_no_slot_from_who_has_begun(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    settings = {"max_slots": 1, "starvation_age": 1000.0, "timeout": 1000.0}
    async with opened(source, settings, max_begun=1) as (loader, scheduler):
        begun = scheduler.submit(Request("a", 1, 3))
        await step(scheduler)
        other = scheduler.submit(Request("b", 1, 1))
        lives = loader._machinery.driver.lifecycle.lives
        await until(lambda: any(life.waiters for life in lives.values()))
        await asyncio.wait_for(loader.unload("a"), 5)
        await until(lambda: is_resident(loader, "b"))
        while not other.done:
            await step(scheduler)
        assert (await begun, await other) == (3, 1)


async def test_what_was_lost_is_computed_again(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path, "a"), max_begun=1) as (_, scheduler):
        ticket = scheduler.submit(Request("a", 10, 4))
        await step(scheduler)
        await step(scheduler)
        assert rows(await step(scheduler, again=[ticket])) == [("a", 11, 1, True)]
        assert rows(await step(scheduler)) == [("a", 0, 12, True)]
        assert rows(await step(scheduler)) == [("a", 12, 1, True)]
        assert await ticket == 4
