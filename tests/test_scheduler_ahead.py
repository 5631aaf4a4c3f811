"""Adapters take turns in slots, and what comes next is brought nearer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from common import until
from lorax_async import (
    AdapterRef,
    HandleClosedError,
    Request,
)
from scheduling.serving import MANY, opened, rows, step, streaming, warm
from tiny_sources import is_at, is_resident, state, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


# -- slots -----------------------------------------------------------------------------------------


async def test_more_adapters_than_slots_take_turns(tmp_path: Path) -> None:
    """Also while requests of all of them go on: the loader's ageing tells who is to go."""
    source = stocked(tmp_path, "a", "b", "c")
    settings = {"max_slots": 2, "starvation_age": 0.02}
    async with opened(source, settings) as (_, scheduler):
        tickets = {id: scheduler.submit(Request(id, 4, MANY)) for id in "abc"}
        done = dict.fromkeys("abc", 0)
        slots: dict[str, set[tuple[int, int]]] = {id: set() for id in "abc"}
        while min(done.values()) < 20:
            batch = await step(scheduler)
            await asyncio.sleep(0.001)
            for row in batch.rows:
                assert row.handle is not None
                done[row.handle.id] += 1
                slots[row.handle.id].add(row.place)
                assert row.handle.key.location == f"memory:{row.ticket.request.adapter_id}"
        assert sum(map(len, slots.values())) > 3, "somebody was evicted and came back"
        for id, ticket in tickets.items():
            assert ticket.generated == done[id]
            ticket.cancel()


async def test_a_slot_in_which_nothing_comes_is_given_to_others(tmp_path: Path) -> None:
    source = stocked(tmp_path, "stalls", "b")
    source.hold("stalls")
    settings = {"max_slots": 1, "starvation_age": 0.02}
    async with opened(source, settings) as (_, scheduler):
        stalls = scheduler.submit(Request("stalls", 1, 1))
        await streaming(scheduler, stalls)
        other = scheduler.submit(Request("b", 1, 1))
        assert rows(await step(scheduler)) == [("b", 0, 1, True)]
        assert await other == 1
        source.allow("stalls")
        assert rows(await step(scheduler)) == [("stalls", 0, 1, True)]


async def test_an_unloaded_adapter_comes_back_for_its_requests(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path, "a")) as (loader, scheduler):
        ticket = scheduler.submit(Request("a", 1, 3))
        (place,) = {row.place for row in (await step(scheduler)).rows}
        await loader.unload("a")
        (again,) = {row.place for row in (await step(scheduler)).rows}
        assert again.generation > place.generation
        await step(scheduler)
        assert await ticket == 3


async def test_a_stale_batch_is_caught(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path, "a", "b"), {"max_slots": 1}) as (_, scheduler):
        scheduler.submit(Request("a", 1, 1))
        batch = await scheduler.next_batch(MANY, MANY)
        batch.check()
        scheduler.complete(batch)
        with pytest.raises(HandleClosedError, match="completed"):
            batch.check()
        scheduler.submit(Request("b", 1, 1))
        await step(scheduler)
        batch.completed = False  # whatever an engine keeps of it
        with pytest.raises(HandleClosedError):
            batch.check()
        batch.rows = tuple(row._replace(handle=None) for row in batch.rows)
        with pytest.raises(HandleClosedError, match="generation 2 has by now"):
            batch.check()


# -- looking ahead ---------------------------------------------------------------------------------


async def test_what_comes_next_is_brought_nearer(tmp_path: Path) -> None:
    """One is loaded, the next hinted onto the device, then into host memory; the last not."""
    source = stocked(tmp_path, *"abcdef", holdable=True)
    source.hold("a")
    settings = {"max_slots": 2, "host_bytes": 1 << 20}
    async with opened(source, settings, loads=1, look_ahead=2) as (loader, scheduler):
        tickets = [scheduler.submit(Request(id, 1, 1)) for id in "abcdef"]
        await until(lambda: all(is_at(loader, id, "host") for id in "cd"))
        await until(lambda: is_resident(loader, "b"))
        assert state(loader, "f") == "nowhere"
        assert rows(await step(scheduler)) == [("b", 0, 1, True)]
        source.allow("a")
        while not all(ticket.done for ticket in tickets):
            await step(scheduler)
        assert [await ticket for ticket in tickets] == [1] * 6


async def test_the_more_urgent_adapter_is_loaded_first(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b", "c")
    async with opened(source, {"max_slots": 1}, loads=1, look_ahead=0) as (_, scheduler):
        for id, priority in (("a", 0), ("b", 0), ("c", 2)):
            scheduler.submit(Request(id, 1, 1, priority=priority))
        seen = [rows(await step(scheduler))[0][0] for _ in range(3)]
        assert seen == ["c", "a", "b"]


async def test_sources_that_do_not_answer_hold_up_nobody(tmp_path: Path) -> None:
    source = stocked(tmp_path, *"abcd")
    for id in "abc":
        source.hold(id)
    settings = {"starvation_age": 0.02, "max_slots": 4}
    async with opened(source, settings, loads=1, look_ahead=0) as (_, scheduler):
        for id in "abcd":
            scheduler.submit(Request(id, 1, 1))
        assert rows(await step(scheduler)) == [("d", 0, 1, True)]


async def test_an_adapter_that_is_there_is_used_at_once(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with opened(source) as (loader, scheduler):
        await warm(loader, "a")
        assert is_resident(loader, "a")
        scheduler.submit(Request(AdapterRef("a"), 1, 1))
        scheduler.submit(Request("a", 1, 1))
        assert len((await step(scheduler)).rows) == 2
        assert source.counts.opens == 1
