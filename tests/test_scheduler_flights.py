"""What happens to adapters while batches that they are in are under way, and after."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import tiny
from lorax_async import (
    FetchError,
    Request,
)
from scheduling.serving import MANY, opened, turns, wanted, warm
from tiny_sources import stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_an_adapter_is_given_back_after_the_last_of_its_batches(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path, "a")) as (loader, scheduler):
        await warm(loader, "a")
        tickets = [scheduler.submit(Request("a", 1, MANY)) for _ in range(2)]
        batches = [await scheduler.next_batch(MANY, 1) for _ in range(2)]
        for ticket in tickets:
            ticket.cancel()
        scheduler.complete(batches[1])
        batches[0].check()
        scheduler.complete(batches[0])
        assert not loader._machinery.driver.tenants.leases


async def test_who_is_to_leave_leaves_with_its_batch(tmp_path: Path) -> None:
    """Whether or not its engine wants another one."""
    async with opened(stocked(tmp_path, "a")) as (loader, scheduler):
        ticket = scheduler.submit(Request("a", 1, MANY))
        batch = await asyncio.wait_for(scheduler.next_batch(MANY, MANY), 5)
        unloading = asyncio.create_task(loader.unload("a"))
        await turns()
        assert not unloading.done()
        batch.check()
        scheduler.complete(batch)
        await asyncio.wait_for(unloading, 5)
        ticket.cancel()


async def test_who_is_to_leave_is_in_no_further_batch(tmp_path: Path) -> None:
    """Of another engine, say; else it would never leave."""
    async with opened(stocked(tmp_path, "a")) as (loader, scheduler):
        await warm(loader, "a")
        tickets = [scheduler.submit(Request("a", 1, 1)) for _ in range(2)]
        batch = await scheduler.next_batch(MANY, 1)
        unloading = asyncio.create_task(loader.unload("a"))
        await turns()
        waiting = await wanted(scheduler)
        scheduler.complete(batch)
        await asyncio.wait_for(unloading, 5)
        batch = await asyncio.wait_for(waiting, 5)
        assert [row.ticket for row in batch.rows] == tickets[1:]
        scheduler.complete(batch)


async def test_a_failure_is_told_beside_a_batch_that_goes_on(tmp_path: Path) -> None:
    """Though its adapter is leaving already, so that no other event follows."""
    source = stocked(tmp_path, "a")
    source.hold("a")
    source.allow("a", 0)
    source.fail("bring", FetchError("as told"), id="a", at=2)
    async with opened(source) as (loader, scheduler):
        tickets = [scheduler.submit(Request("a", 1, 1)) for _ in range(2)]
        batch = await asyncio.wait_for(scheduler.next_batch(MANY, 1), 5)
        unloading = asyncio.create_task(loader.unload("a"))
        await turns()
        source.allow("a")
        for ticket in tickets:
            with pytest.raises(FetchError, match="as told"):
                await asyncio.wait_for(ticket._wait(), 5)
        scheduler.complete(batch)
        await unloading


async def test_who_waited_in_vain_is_trusted_in_its_next_slot(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    source.hold("a")
    source.allow("a", 0)
    async with opened(source) as (loader, scheduler):
        ticket = scheduler.submit(Request("a", 1, 1))
        batch = await asyncio.wait_for(scheduler.next_batch(MANY, MANY), 5)
        scheduler.complete(batch, again=[ticket])
        await loader.unload("a")
        batch = await asyncio.wait_for(scheduler.next_batch(MANY, MANY), 5)
        assert batch.streaming
        source.allow("a")
        await batch.streaming[0].layer_ready(tiny.LAYERS - 1)
        scheduler.complete(batch)
        assert await ticket == 1
