"""What the scheduler does because time has passed, on a clock that passes when it is told to."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from common import until
from lorax_async import AdapterScheduler, AdapterTimeoutError, FetchError, Request
from scheduling.clock import VirtualClock
from scheduling.serving import MANY, held, opened, rows, silence, step, turns, wanted
from tiny_sources import over, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")

PATIENT = {"timeout": 60.0, "starvation_age": 1000.0}


async def test_who_loses_its_slot_has_all_its_time_again(tmp_path: Path) -> None:
    """Each time; the engine keeps what it has of it."""
    clock = VirtualClock()
    async with opened(stocked(tmp_path, "a"), PATIENT, clock=clock) as (loader, scheduler):
        ticket = scheduler.submit(Request("a", 1, MANY))
        await step(scheduler)
        for moment in (0.0, 40.0):
            clock.pass_until(moment)
            await loader.unload("a")
            await held(scheduler, ticket)
        clock.pass_until(99.0)
        assert not ticket.done
        clock.pass_until(101.0)
        assert isinstance(ticket.error, AdapterTimeoutError)


async def test_who_has_not_begun_has_its_own_time_only(tmp_path: Path) -> None:
    clock = VirtualClock()
    async with opened(stocked(tmp_path, "a"), PATIENT, clock=clock) as (loader, scheduler):
        ticket = scheduler.submit(Request("a", 1, 1, deadline=5.0))
        await held(scheduler, ticket)
        clock.pass_until(3.0)
        await loader.unload("a")
        await held(scheduler, ticket)
        clock.pass_until(4.0)
        assert not ticket.done
        clock.pass_until(6.0)
        assert isinstance(ticket.error, AdapterTimeoutError)


async def test_who_streams_joins_when_it_is_time_though_nothing_tells(tmp_path: Path) -> None:
    """A pass of four layers takes 12 s. The first one took 4 s to come, so that the last one is
    here after 16: the pass, which needs it after 9, may begin after 7.
    """
    source, clock = stocked(tmp_path, "a"), VirtualClock()
    source.hold("a")
    async with opened(source, PATIENT, clock=clock) as (_, scheduler):
        scheduler.submit(Request(None, 10, 1))
        batch = await scheduler.next_batch(MANY, MANY)
        clock.pass_until(12.0)
        scheduler.complete(batch)
        ticket = scheduler.submit(Request("a", 10, 1))
        handle = await held(scheduler, ticket)
        clock.pass_until(16.0)
        source.allow("a", 0)
        guest = scheduler._book.guest_of(ticket)
        await until(lambda: guest.arrival is not None and guest.arrival.arrived)
        given_up = await wanted(scheduler)
        assert clock.due == pytest.approx(19.0)
        given_up.cancel()
        await asyncio.wait([given_up])
        assert clock.due == 72.0, "but for the request's deadline"
        waiting = await wanted(scheduler)
        clock.step()
        batch = await asyncio.wait_for(waiting, 5)
        assert not scheduler._news._idle
        assert batch.streaming == (handle,)
        source.allow("a")
        await handle.layer_ready(handle.layers[-1])
        scheduler.complete(batch)
        assert await ticket == 1


async def test_a_slot_in_which_nothing_comes_is_given_away_with_its_batch(tmp_path: Path) -> None:
    """Whose pass is told that others wait."""
    source, clock = stocked(tmp_path, "stalls", "b"), VirtualClock()
    source.hold("stalls")
    source.allow("stalls", 0)
    settings = {"max_slots": 1, "timeout": 10_000.0, "starvation_age": 1000.0}
    async with opened(source, settings, clock=clock) as (_, scheduler):
        stalls = scheduler.submit(Request("stalls", 1, 1))
        batch = await asyncio.wait_for(scheduler.next_batch(MANY, MANY), 5)
        other = scheduler.submit(Request("b", 1, 1))
        told = []
        for moment in (999.0, 1001.0):
            clock.pass_until(moment)
            told.append(batch.others_wait)
        assert told == [False, True]
        scheduler.complete(batch, again=[stalls])
        assert rows(await step(scheduler)) == [("b", 0, 1, True)]
        assert await other == 1
        source.allow("stalls")
        assert rows(await step(scheduler)) == [("stalls", 0, 1, True)]


async def test_a_source_that_does_not_answer_holds_up_the_next_for_a_while_only(
    tmp_path: Path,
) -> None:
    source, clock = stocked(tmp_path, "silent", "b"), VirtualClock()
    silence(source, "silent")
    settings = {"max_slots": 1, "timeout": 10_000.0, "starvation_age": 1000.0}
    async with opened(source, settings, clock=clock, loads=1, look_ahead=0) as (_, scheduler):
        silent, other = (scheduler.submit(Request(id, 1, 1)) for id in ("silent", "b"))
        waiting = await wanted(scheduler)
        clock.pass_until(500.0)
        urgent = scheduler.submit(Request("silent", 1, 1, priority=1))
        await turns()
        clock.pass_until(999.0)
        await turns()
        assert scheduler._book.guest_of(other).handle is None
        clock.pass_until(1001.0)
        batch = await asyncio.wait_for(waiting, 5)
        assert rows(batch) == [("b", 0, 1, True)]
        scheduler.complete(batch)
        for ticket in (silent, urgent):
            ticket.cancel()


async def test_no_alarm_outlives_what_it_was_for(tmp_path: Path) -> None:
    """Nor the scheduler, which hears of nothing any more; some requests are cancelled, fail, or are finished before."""
    source, clock = stocked(tmp_path, "stalls", "b", "bad"), VirtualClock()
    source.hold("stalls")
    source.fail("resolve", FetchError("as told"), id="bad")
    settings = {"max_slots": 1, "timeout": 10_000.0, "starvation_age": 1000.0}
    async with over(source, **settings) as loader:
        async with AdapterScheduler(loader, clock=clock) as scheduler:
            scheduler.submit(Request(None, 1, 2))
            await step(scheduler)
            assert clock.due is None, "it is in time"
            await step(scheduler)
            scheduler.submit(Request(None, 1, 1)).cancel()
            assert clock.due is None
            stalls = scheduler.submit(Request("stalls", 1, 1))
            await held(scheduler, stalls)
            bad = scheduler.submit(Request("bad", 1, 1))
            with pytest.raises(FetchError):
                await bad
            others = [scheduler.submit(Request("b", 1, 1)) for _ in range(2)]
            others[0].cancel()
            await turns()
        assert clock.due is None
        assert not loader._machinery.driver.journal.has_subscribers
