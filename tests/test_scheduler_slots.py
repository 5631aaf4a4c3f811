"""The scheduler hears of slots: who is to leave one, who need not, and who waits for one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from common import until
from lorax_async import AdapterHandle, AdapterLoader, Event, Leaving, Request
from scheduling.clock import VirtualClock
from scheduling.serving import MANY, held, opened, rows, silence, step, turns, warm
from tiny_sources import stocked

pytestmark = pytest.mark.usefixtures("nothing_left")

VIRTUAL = {"timeout": 10_000.0, "starvation_age": 1000.0}
"""Seconds of a virtual clock; in real ones nothing is too late."""


async def test_who_is_told_to_leave_while_it_comes_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its load is there, and the scheduler has not heard that yet. No engine wants a batch."""
    stream, unloading = AdapterLoader.stream, list[asyncio.Task[Any]]()

    @asynccontextmanager
    async def slow(loader: AdapterLoader, *args: Any, **more: Any) -> AsyncIterator[AdapterHandle]:
        async with stream(loader, *args, **more) as handle:
            if not unloading:
                left = list[Event]()
                await until(lambda: handle.resident)
                loader.subscribe(left.append)
                unloading.append(asyncio.create_task(loader.unload("a")))
                await until(lambda: left)
            yield handle

    monkeypatch.setattr(AdapterLoader, "stream", slow)
    unloading.clear()
    async with opened(stocked(tmp_path, "a")) as (_, scheduler):
        ticket = scheduler.submit(Request("a", 1, 1))
        await until(lambda: unloading)
        await asyncio.wait_for(unloading[0], 5)
        assert rows(await step(scheduler)) == [("a", 0, 1, True)]
        assert await ticket == 1


async def test_who_is_told_to_leave_while_layers_come_leaves_when_they_are_there(
    tmp_path: Path,
) -> None:
    source = stocked(tmp_path, "a")
    source.hold("a")
    source.allow("a", 0)
    async with opened(source) as (loader, scheduler):
        ticket = scheduler.submit(Request("a", 1, MANY))
        batch = await asyncio.wait_for(scheduler.next_batch(MANY, MANY), 5)
        (handle,) = batch.streaming
        unloading = asyncio.create_task(loader.unload("a"))
        await turns()
        source.allow("a")
        await until(lambda: handle.resident)
        scheduler.complete(batch)
        await asyncio.wait_for(unloading, 5)
        ticket.cancel()


async def test_who_need_not_leave_any_more_stays(tmp_path: Path) -> None:
    """Whoever waited for its slot has gone, while it was computed."""
    settings = {"max_slots": 1, "starvation_age": 0.02}
    async with opened(stocked(tmp_path, "a", "b"), settings) as (loader, scheduler):
        left = list[Leaving]()
        loader.subscribe(lambda event: left.append(event) if isinstance(event, Leaving) else None)
        ticket = scheduler.submit(Request("a", 1, MANY))
        handle = await held(scheduler, ticket)
        batch = await asyncio.wait_for(scheduler.next_batch(MANY, MANY), 5)
        waits = asyncio.create_task(loader.load("b"))
        await until(lambda: left)
        waits.cancel()
        await asyncio.wait([waits])
        scheduler.complete(batch)
        batch = await asyncio.wait_for(scheduler.next_batch(MANY, MANY), 5)
        assert [row.handle for row in batch.rows] == [handle]
        ticket.cancel()
        scheduler.complete(batch)


async def test_a_slot_is_not_for_who_gets_nothing_in_it_when_others_waited_before(
    tmp_path: Path,
) -> None:
    source, clock = stocked(tmp_path, "stalls", "b", "c"), VirtualClock()
    source.hold("stalls")
    async with opened(source, VIRTUAL | {"max_slots": 1}, clock=clock) as (loader, scheduler):
        async with await loader.load("c"):
            tickets = [scheduler.submit(Request(id, 1, 1)) for id in ("stalls", "b")]
            await turns()
        await held(scheduler, tickets[0])
        clock.pass_until(1001.0)
        assert rows(await step(scheduler)) == [("b", 0, 1, True)]
        source.allow("stalls")
        assert rows(await step(scheduler)) == [("stalls", 0, 1, True)]


async def test_nor_when_another_has_lost_its_own(tmp_path: Path) -> None:
    source, clock = stocked(tmp_path, "a", "stalls"), VirtualClock()
    source.hold("stalls")
    async with opened(source, VIRTUAL | {"max_slots": 2}, clock=clock) as (loader, scheduler):
        await warm(loader, "a")
        tickets = [scheduler.submit(Request(id, 1, MANY)) for id in ("a", "stalls")]
        handle = await held(scheduler, tickets[1])
        silence(source, "a")
        await loader.unload("a")
        released = []
        for moment in (999.0, 1001.0):
            clock.pass_until(moment)
            released.append(handle.released)
        assert released == [False, True]
        for ticket in tickets:
            ticket.cancel()


async def test_every_slot_is_waited_for_since_something_came_into_it(tmp_path: Path) -> None:
    """The first one gets a layer, the other one nothing; each is later than the alarm before it."""
    source, clock = stocked(tmp_path, "one", "two", "b"), VirtualClock()
    for id in ("one", "two"):
        source.hold(id)
    silence(source, "b")
    async with opened(source, VIRTUAL | {"max_slots": 2}, clock=clock) as (_, scheduler):
        one = scheduler.submit(Request("one", 1, 1))
        first = await held(scheduler, one)
        clock.pass_until(100.0)
        two = scheduler.submit(Request("two", 1, 1))
        second = await held(scheduler, two)
        waits = scheduler.submit(Request("b", 1, 1))
        clock.pass_until(500.0)
        source.allow("one", 0)
        arrival = scheduler._book.guest_of(one).arrival
        assert arrival is not None
        await until(lambda: arrival.arrived)
        released = []
        for moment in (1001.0, 1099.0, 1101.0, 1499.0, 1501.0):
            clock.pass_until(moment)
            released.append((first.released, second.released))
        assert released == [(False, False)] * 2 + [(False, True)] * 2 + [(True, True)]
        for ticket in (one, two, waits):
            ticket.cancel()


async def test_a_slot_in_which_nothing_comes_is_kept_while_nobody_waits(tmp_path: Path) -> None:
    """Somebody has waited for a while."""
    source, clock = stocked(tmp_path, "stalls", "b"), VirtualClock()
    source.hold("stalls")
    settings = VIRTUAL | {"max_slots": 1}
    async with opened(source, settings, clock=clock) as (_, scheduler):
        ticket = scheduler.submit(Request("stalls", 1, 1))
        handle = await held(scheduler, ticket)
        other = scheduler.submit(Request("b", 1, 1))
        clock.pass_until(500.0)
        other.cancel()
        clock.pass_until(1001.0)
        assert not handle.released
        ticket.cancel()


async def test_who_got_nothing_in_its_slot_is_behind_those_who_may(tmp_path: Path) -> None:
    """Until its file is here; though it is the oldest."""
    source, clock = stocked(tmp_path, "stalls", "b", "c"), VirtualClock()
    source.hold("stalls")
    settings = VIRTUAL | {"max_slots": 1}
    async with opened(source, settings, clock=clock, loads=1) as (_, scheduler):
        ticket = scheduler.submit(Request("stalls", 1, 1))
        await held(scheduler, ticket)
        for id in "bc":
            scheduler.submit(Request(id, 1, 1))
        clock.pass_until(1001.0)
        assert [rows(await step(scheduler))[0][0] for _ in range(2)] == ["b", "c"]
        source.allow("stalls")
        assert rows(await step(scheduler)) == [("stalls", 0, 1, True)]
