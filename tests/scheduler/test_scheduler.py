"""Requests become batches: what joins when, in which slot, and what is waited for."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import scheduler_world as serving
from event_loops import until
from scheduler_world import MANY, VirtualClock, finish, held, opened, rows, step, turns, wanted
from tiny_loaders import fails
from tiny_sources import is_at, is_resident, make_source, state

from lorax_async import AdapterScheduler, Batch, Request, Ticket, errors
from lorax_async.errors import ConfigError, FetchError, HandleClosedError, UsageError

pytestmark = pytest.mark.usefixtures("nothing_left")

PATIENT: dict[str, float] = {"timeout": 10_000.0, "starvation_age": 1000.0}
"""Seconds of a virtual clock; in real time nothing is too late."""
ONE_SLOT: dict[str, Any] = PATIENT | {"max_slots": 1}


async def test_a_request_is_computed_a_token_at_a_time(tmp_path: Path) -> None:
    async with opened(make_source(tmp_path, "a")) as (_, scheduler):
        ticket = scheduler.submit(Request("a", 10, 3))
        assert "'a' waiting" in repr(ticket)
        seen = [rows(await step(scheduler)) for _ in range(3)]
        assert seen == [[("a", 0, 10, True)], [("a", 10, 1, True)], [("a", 11, 1, True)]]
        assert await ticket == 3
        assert (ticket.done, ticket.cancelled, ticket.error) == (True, False, None)
        assert "finished after 3 tokens" in repr(ticket)
        assert not ticket.cancel()


async def test_an_engine_may_end_a_request_and_a_long_prompt_comes_in_parts(tmp_path: Path) -> None:
    async with opened(make_source(tmp_path)) as (_, scheduler):
        ticket = scheduler.submit(Request(None, 10, MANY))
        for start, tokens, last in ((0, 4, False), (4, 4, False), (8, 2, True)):
            assert rows(await step(scheduler, tokens=4)) == [(None, start, tokens, last)]
        assert rows(await step(scheduler, finished=[ticket])) == [(None, 10, 1, True)]
        assert await ticket == 2


async def test_several_batches_may_be_under_way(tmp_path: Path) -> None:
    async with opened(make_source(tmp_path, "a"), ready="a") as (_, scheduler):
        tickets = [scheduler.submit(Request("a", 1, 1)) for _ in range(2)]
        batches = [await scheduler.next_batch(MANY, 1) for _ in range(2)]
        assert [batch.rows[0].ticket for batch in batches] == tickets
        scheduler.complete(batches[1])
        batches[0].check()
        scheduler.complete(batches[0])
        assert [await each for each in tickets] == [1, 1]


async def test_wrong_requests_settings_and_sizes_are_refused(tmp_path: Path) -> None:
    requests: list[tuple[Any, ...]] = [("a", 0, 1), ("a", 1, 0), ("a", 1, 1, 0, 0.0)]
    requests += [("a", 1, 1, 0.5), (5, 1, 1)]
    kinds = [ConfigError] * 3 + [UsageError, errors.InvalidAdapterIdError]
    for request, error in zip(requests, kinds, strict=True):
        with pytest.raises(error):
            Request(*request)
    async with opened(make_source(tmp_path)) as (loader, scheduler):
        wrong: list[dict[str, Any]] = [{"loads": 0}, {"look_ahead": -1}, {"max_begun": 0}]
        wrong += [{"max_share": share} for share in (0, -0.5, 1.5, True, "1")]
        for given in wrong:
            with pytest.raises(ConfigError):
                AdapterScheduler(loader, **given)
        for sizes in ((0, 1), (1, 0)):
            with pytest.raises(ConfigError):
                await scheduler.next_batch(*sizes)


async def test_a_batch_is_completed_once_and_with_its_own_tickets(tmp_path: Path) -> None:
    async with opened(make_source(tmp_path)) as (_, scheduler):
        ticket, other = (scheduler.submit(Request(None, 1, 1)) for _ in range(2))
        batch = await scheduler.next_batch(MANY, 1)
        with pytest.raises(UsageError, match="no row"):
            scheduler.complete(batch, finished=[other])
        assert not batch.completed
        scheduler.complete(batch, finished=[ticket])
        with pytest.raises(UsageError, match="once"):
            scheduler.complete(batch)


async def test_a_stale_batch_is_caught(tmp_path: Path) -> None:
    async with opened(make_source(tmp_path, "a", "b"), {"max_slots": 1}) as (_, scheduler):
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
        with pytest.raises(HandleClosedError, match="has generation 2 by now"):
            batch.check()


async def test_the_loop_turns_before_a_batch_that_is_there(tmp_path: Path) -> None:
    """An engine may compute on the loop itself, and never wait."""
    async with opened(make_source(tmp_path)) as (_, scheduler):
        ticket, turn = scheduler.submit(Request(None, 1, MANY)), list[bool]()
        asyncio.get_running_loop().call_soon(turn.append, True)
        scheduler.complete(await scheduler.next_batch(MANY, MANY))
        assert turn
        ticket.cancel()


async def test_what_comes_next_is_brought_nearer(tmp_path: Path) -> None:
    """One is loaded, the next hinted onto the device, then into host memory; the last not."""
    source = make_source(tmp_path, *"abcdef", holdable=True)
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


async def test_an_adapter_is_given_back_after_the_last_of_its_batches(tmp_path: Path) -> None:
    async with opened(make_source(tmp_path, "a"), ready="a") as (loader, scheduler):
        tickets = [scheduler.submit(Request("a", 1, MANY)) for _ in range(2)]
        batches = [await scheduler.next_batch(MANY, 1) for _ in range(2)]
        for ticket in tickets:
            ticket.cancel()
        scheduler.complete(batches[1])
        batches[0].check()
        scheduler.complete(batches[0])
        assert not loader.placement().usage.leases


@pytest.mark.parametrize("is_wanted", [True, False])
async def test_a_leaving_adapter_is_in_no_further_batch(tmp_path: Path, is_wanted: bool) -> None:
    """Else it would never leave, if another engine wants one. It comes back for its requests."""
    async with opened(make_source(tmp_path, "a"), ready="a") as (loader, scheduler):
        tickets = [scheduler.submit(Request("a", 1, 1)) for _ in range(2)]
        first = await scheduler.next_batch(MANY, 1)
        unloading = asyncio.create_task(loader.unload("a"))
        await turns()
        waiting = await wanted(scheduler) if is_wanted else None
        assert not unloading.done()
        first.check()
        scheduler.complete(first)
        await asyncio.wait_for(unloading, 5)
        again = await asyncio.wait_for(waiting or scheduler.next_batch(MANY, MANY), 5)
        assert [row.ticket for row in again.rows] == tickets[1:]
        assert again.rows[0].place.generation > first.rows[0].place.generation
        scheduler.complete(again)


@pytest.mark.parametrize(("waited_before", "torn"), [(False, False), (True, False), (True, True)])
async def test_a_slot_in_which_nothing_comes_is_given_to_others(
    tmp_path: Path, waited_before: bool, torn: bool
) -> None:
    """Its adapter is behind all that may come, though it is the oldest, until its file is here."""
    source, clock = make_source(tmp_path, *"abc", "stalls"), VirtualClock()
    source.hold("stalls")
    others = "b" if waited_before else "bc"
    async with opened(source, ONE_SLOT, clock=clock) as (loader, scheduler):
        blocker = await loader.load("a") if waited_before else None
        stalled = scheduler.submit(Request("stalls", 1, 1))
        if blocker is None:
            await held(loader, "stalls")
        for id in others:
            scheduler.submit(Request(id, 1, 1))
        if blocker is not None:
            await turns()
            blocker.release()
            await held(loader, "stalls")
        clock.pass_until(1001.0)
        assert [rows(await step(scheduler))[0][0] for _ in others] == list(others)
        if torn:
            source.fail("fetch_groups", FetchError("torn"), id="stalls")
        source.allow("stalls")
        if torn:
            await fails(asyncio.wait_for(stalled, 5), FetchError, "torn")
        else:
            assert rows(await step(scheduler)) == [("stalls", 0, 1, True)]


LONG = 500


def submit(
    scheduler: AdapterScheduler, adapter: str | None, new: int, count: int = 1, **more: Any
) -> list[Ticket]:
    return [scheduler.submit(Request(adapter, 1, new, **more)) for _ in range(count)]


def counts(batch: Batch, *adapters: str | None) -> list[int]:
    ids = [row.ticket.request.adapter_id for row in batch.rows]
    return [ids.count(adapter) for adapter in adapters]


async def test_the_more_urgent_come_first(tmp_path: Path) -> None:
    async with opened(make_source(tmp_path)) as (_, scheduler):
        plain = scheduler.submit(Request(None, 1, 1))
        soon = scheduler.submit(Request(None, 1, 1, deadline=3.0))
        high = scheduler.submit(Request(None, 1, 1, priority=1))
        seen = [(await step(scheduler, sequences=1)).rows[0].ticket for _ in range(3)]
        assert seen == [high, soon, plain]


@pytest.mark.parametrize("age", [0.0, 10.0, 2000.0])
async def test_a_place_is_for_the_adapter_with_the_fewest_tokens_or_for_an_old_request(
    tmp_path: Path, age: float
) -> None:
    clock, given = VirtualClock(), (make_source(tmp_path, "a", "b", "c"), PATIENT, "abc")
    async with opened(*given, max_begun=2, clock=clock) as (_, scheduler):
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
    source = make_source(tmp_path, "a", "b")
    async with opened(source, max_begun=4, ready="a") as (loader, scheduler):
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
    source = make_source(tmp_path, "a", "b", "c")
    async with opened(source, max_begun=8, max_share=0.25, ready="abc") as (_, scheduler):
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
    async with opened(make_source(tmp_path, "a", "b"), max_begun=4, ready="ab") as (_, scheduler):
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


async def test_a_request_may_begin_when_another_is_cancelled_that_lost_its_slot(
    tmp_path: Path,
) -> None:
    async with opened(make_source(tmp_path, "a", "b"), ONE_SLOT, max_begun=1) as (
        loader,
        scheduler,
    ):
        begun = scheduler.submit(Request("a", 1, MANY))
        await step(scheduler)
        taking = asyncio.create_task(loader.load("b"))
        await until(lambda: loader.placement().usage.waiting)
        await loader.unload("a")
        taken = await taking  # it does not come back
        fresh = scheduler.submit(Request(None, 1, 1))
        waiting = await wanted(scheduler)
        begun.cancel()
        batch = await asyncio.wait_for(waiting, 5)
        assert [row.ticket for row in batch.rows] == [fresh]
        scheduler.complete(batch)
        taken.release()


async def test_a_request_that_may_not_begin_gives_its_slot_to_one_that_has_begun(
    tmp_path: Path,
) -> None:
    async with opened(make_source(tmp_path, "a", "b"), ONE_SLOT, max_begun=1) as (
        loader,
        scheduler,
    ):
        begun = scheduler.submit(Request("a", 1, 3))
        await step(scheduler)
        other = scheduler.submit(Request("b", 1, 1))
        await until(lambda: loader.placement().usage.waiting)
        await asyncio.wait_for(loader.unload("a"), 5)
        await until(lambda: is_resident(loader, "b"))
        while not other.done:
            await step(scheduler)
        assert (await begun, await other) == (3, 1)


@pytest.mark.parametrize(
    ("loads", "begun", "cancelled", "first"),
    [(1, False, False, "b"), (1, False, True, "a"), (1, True, False, "b"), (2, True, False, "b")],
)
async def test_an_adapter_of_an_urgent_request_is_loaded_first(
    tmp_path: Path, loads: int, begun: bool, cancelled: bool, first: str
) -> None:
    """a and b wait for c's slot, and then another request asks for b; `begun`: loads have begun."""
    settings = {"max_slots": 1, "starvation_age": 100.0, "timeout": 1000.0}
    given = make_source(tmp_path, "a", "b", "c"), settings
    async with opened(*given, loads=loads, look_ahead=0) as (loader, scheduler):
        async with await loader.load("c"):
            tickets = [scheduler.submit(Request(id, 1, 1)) for id in "ab"]
            if begun:
                await turns()
            urgent = scheduler.submit(Request("b", 1, 1, priority=3))
            if cancelled:
                urgent.cancel()
            await turns()
        assert rows(await step(scheduler))[0][0] == first
        await finish(scheduler, *tickets)


async def test_sources_that_do_not_answer_hold_up_the_next_for_a_while_only(tmp_path: Path) -> None:
    source, clock = make_source(tmp_path, "silent", "b"), VirtualClock()
    serving.silence(source, "silent")
    async with opened(source, ONE_SLOT, clock=clock, loads=1, look_ahead=0) as (loader, scheduler):
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
