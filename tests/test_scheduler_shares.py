"""Who gets rows, places, slots and loads first, while several wait for them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from common import until
from lorax_async import (
    AdapterLoader,
    AdapterScheduler,
    Batch,
    Request,
    Ticket,
)
from lorax_async.testing import FakeSource
from scheduling.clock import VirtualClock
from scheduling.serving import (
    MANY,
    finish,
    ids,
    opened,
    rows,
    silence,
    step,
    turns,
    wanted,
    warm,
)
from tiny_sources import is_resident, state, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


LONG = 500


PATIENT: dict[str, float] = {"timeout": 5000.0, "starvation_age": 1000.0}


def submit(
    scheduler: AdapterScheduler, adapter: str | None, new: int, count: int = 1, **more: Any
) -> list[Ticket]:
    return [scheduler.submit(Request(adapter, 1, new, **more)) for _ in range(count)]


def counts(batch: Batch, *adapters: str | None) -> list[int]:
    ids = [row.ticket.request.adapter_id for row in batch.rows]
    return [ids.count(adapter) for adapter in adapters]


# -- rows ------------------------------------------------------------------------------------------


async def test_a_hot_adapter_does_not_own_the_batch(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path, "hot", "b")) as (loader, scheduler):
        await warm(loader, "hot", "b")
        for _ in range(20):
            scheduler.submit(Request("hot", 1, 5))
        scheduler.submit(Request("b", 1, 5))
        batch = await step(scheduler, sequences=4)
        assert sorted(str(row[0]) for row in rows(batch)) == ["b", "hot", "hot", "hot"]


async def test_the_more_urgent_come_first(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path)) as (_, scheduler):
        plain = scheduler.submit(Request(None, 1, 1))
        soon = scheduler.submit(Request(None, 1, 1, deadline=3.0))
        high = scheduler.submit(Request(None, 1, 1, priority=1))
        seen = [(await step(scheduler, sequences=1)).rows[0].ticket for _ in range(3)]
        assert seen == [high, soon, plain]


async def test_no_more_requests_begin_than_the_engine_has_places(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path), max_begun=2) as (_, scheduler):
        first, second, third = (scheduler.submit(Request(None, 1, n)) for n in (2, 1, 1))
        assert {row.ticket for row in (await step(scheduler)).rows} == {first, second}
        assert {row.ticket for row in (await step(scheduler)).rows} == {first, third}


async def test_a_request_that_may_not_begin_takes_no_row_from_one_that_has_begun(
    tmp_path: Path,
) -> None:
    """Though it is the more urgent one."""
    async with opened(stocked(tmp_path), max_begun=1) as (_, scheduler):
        begun = scheduler.submit(Request(None, 1, 2))
        await step(scheduler)
        urgent = scheduler.submit(Request(None, 1, 1, priority=5))
        for ticket in (begun, urgent):
            assert (await step(scheduler, sequences=1)).rows[0].ticket is ticket


# -- places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("age", [0.0, 10.0, 2000.0])
async def test_a_place_is_for_the_adapter_with_the_fewest_tokens_or_for_an_old_request(
    tmp_path: Path, age: float
) -> None:
    clock = VirtualClock()
    source = stocked(tmp_path, "a", "b", "c")
    async with opened(source, PATIENT, max_begun=2, clock=clock) as (loader, scheduler):
        await warm(loader, "a", "b", "c")
        submit(scheduler, "a", LONG)
        (short,) = submit(scheduler, "b", 20)
        (older,) = submit(scheduler, "b", 1)
        (later,) = submit(scheduler, "c", 1)
        while not short.done:
            assert counts(await step(scheduler), "a", "b", "c") == [1, 1, 0]
        clock.pass_until(age)
        old = age > PATIENT["starvation_age"]
        for first in (older, later) if old else (later, older):
            others = {row.ticket for row in (await step(scheduler)).rows} & {older, later}
            assert others == {first}


async def test_a_request_whose_adapter_has_not_come_preempts_none(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with opened(source, max_begun=4) as (loader, scheduler):
        await warm(loader, "a")
        source.hold("b")
        submit(scheduler, "a", LONG, 4)
        await step(scheduler)
        (short,) = submit(scheduler, "b", 1)
        for _ in range(5):
            assert not (await step(scheduler)).preempted
        source.allow("b")
        await until(lambda: is_resident(loader, "b"))
        preempted = list[Ticket]()
        while not short.done:
            preempted += (await step(scheduler)).preempted
        assert len(preempted) == 1
        assert not (await step(scheduler)).preempted


async def test_preempting_ends(tmp_path: Path) -> None:
    """Of several adapters and clients that want all, each keeps what it got."""
    source = stocked(tmp_path, "a", "b", "c")
    async with opened(source, max_begun=8, max_share=0.25) as (loader, scheduler):
        await warm(loader, "a", "b", "c")
        for adapter in ("a", "b", "c"):
            for client in ("x", "y", None):
                submit(scheduler, adapter, LONG, 8, client=client)
                await step(scheduler)
        for _ in range(8):
            await step(scheduler)
        for _ in range(50):
            batch = await step(scheduler)
            assert not batch.preempted
            assert len(batch.rows) == 8
            assert min(counts(batch, "a", "b", "c")) >= 2


async def test_alone_an_adapter_gets_all_back(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with opened(source, max_begun=4) as (loader, scheduler):
        await warm(loader, "a", "b")
        tickets = submit(scheduler, "a", LONG, 4)
        await step(scheduler)
        others = submit(scheduler, "b", LONG, 9)
        batch = await step(scheduler)
        assert counts(batch, "a", "b") == [2, 2]
        assert list(batch.preempted) == [tickets[3], tickets[2]]
        for other in others:
            other.cancel()
        batch = await step(scheduler)
        assert counts(batch, "a", "b") == [4, 0]
        starts = {row.ticket: (row.start, row.tokens) for row in batch.rows}
        assert starts[tickets[0]] == (2, 1)
        assert starts[tickets[3]] == (0, 2)  # the prompt, and the token that came out


async def _begun_without_its_slot(
    loader: AdapterLoader, scheduler: AdapterScheduler, source: FakeSource
) -> Ticket:
    """A request of `a` that has begun, and whose adapter does not come back."""
    begun = scheduler.submit(Request("a", 1, MANY))
    await step(scheduler)
    silence(source, "a")
    await loader.unload("a")
    return begun


async def test_a_request_may_begin_when_another_is_cancelled_that_lost_its_slot(
    tmp_path: Path,
) -> None:
    source = stocked(tmp_path, "a")
    async with opened(source, max_begun=1) as (loader, scheduler):
        begun = await _begun_without_its_slot(loader, scheduler, source)
        fresh = scheduler.submit(Request(None, 1, 1))
        waiting = await wanted(scheduler)
        begun.cancel()
        batch = await asyncio.wait_for(waiting, 5)
        assert [row.ticket for row in batch.rows] == [fresh]
        scheduler.complete(batch)


# -- slots -----------------------------------------------------------------------------------------


async def test_a_request_that_may_not_begin_gives_its_slot_to_one_that_has_begun(
    tmp_path: Path,
) -> None:
    source = stocked(tmp_path, "a", "b")
    settings = {"max_slots": 1, "starvation_age": 1000.0, "timeout": 1000.0}
    async with opened(source, settings, max_begun=1) as (loader, scheduler):
        begun = scheduler.submit(Request("a", 1, 3))
        await step(scheduler)
        other = scheduler.submit(Request("b", 1, 1))
        await until(lambda: loader.usage().waiting)
        await asyncio.wait_for(loader.unload("a"), 5)
        await until(lambda: is_resident(loader, "b"))
        while not other.done:
            await step(scheduler)
        assert (await begun, await other) == (3, 1)


# -- loads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loads", "begun", "cancelled", "first"),
    [(1, False, False, "b"), (1, False, True, "a"), (1, True, False, "b"), (2, True, False, "b")],
)
async def test_an_adapter_of_an_urgent_request_is_loaded_first(
    tmp_path: Path, loads: int, begun: bool, cancelled: bool, first: str
) -> None:
    """a and b wait for c's slot, and then another request asks for b; `begun`: loads have begun."""
    settings = {"max_slots": 1, "starvation_age": 100.0, "timeout": 1000.0}
    source = stocked(tmp_path, "a", "b", "c")
    async with opened(source, settings, loads=loads, look_ahead=0) as (loader, scheduler):
        async with await loader.load("c"):
            tickets = [scheduler.submit(Request(id, 1, 1)) for id in "ab"]
            if begun:
                await turns()
            urgent = scheduler.submit(Request("b", 1, 1, priority=3))
            if cancelled:
                urgent.cancel()
            await turns()
        assert ids(await step(scheduler))[0] == first
        await finish(scheduler, *tickets)


async def test_sources_that_do_not_answer_hold_up_the_next_for_a_while_only(
    tmp_path: Path,
) -> None:
    source, clock = stocked(tmp_path, "silent", "b"), VirtualClock()
    silence(source, "silent")
    settings = {"max_slots": 1, "timeout": 10_000.0, "starvation_age": 1000.0}
    async with opened(source, settings, clock=clock, loads=1, look_ahead=0) as (loader, scheduler):
        silent, _ = (scheduler.submit(Request(id, 1, 1)) for id in ("silent", "b"))
        waiting = await wanted(scheduler)
        clock.pass_until(500.0)
        urgent = scheduler.submit(Request("silent", 1, 1, priority=1))
        await turns()
        clock.pass_until(999.0)
        await turns()
        assert state(loader, "b") == "nowhere"
        clock.pass_until(1001.0)
        batch = await asyncio.wait_for(waiting, 5)
        assert rows(batch) == [("b", 0, 1, True)]
        scheduler.complete(batch)
        for ticket in (silent, urgent):
            ticket.cancel()


async def test_adapters_whose_bytes_do_not_come_hold_up_no_other(tmp_path: Path) -> None:
    source = stocked(tmp_path, *"abcd")
    for id in "abc":
        source.hold(id)
    settings = {"starvation_age": 0.02, "max_slots": 4}
    async with opened(source, settings, loads=1, look_ahead=0) as (_, scheduler):
        for id in "abcd":
            scheduler.submit(Request(id, 1, 1))
        assert rows(await step(scheduler)) == [("d", 0, 1, True)]


async def test_a_cancelled_requests_load_makes_way_for_the_next(tmp_path: Path) -> None:
    source = stocked(tmp_path, "silent", "b")
    silence(source, "silent")
    settings = {"max_slots": 1, "starvation_age": 1000.0, "timeout": 1000.0}
    async with opened(source, settings, loads=1, look_ahead=0) as (_, scheduler):
        tickets = [scheduler.submit(Request(id, 1, 1)) for id in ("silent", "b")]
        await turns()
        tickets[0].cancel()
        assert rows(await step(scheduler)) == [("b", 0, 1, True)]
