"""Requests become batches: what joins when, in which order, and what is brought nearer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import tiny
from common import Run, until
from lorax_async import (
    AdapterRef,
    AdapterScheduler,
    ConfigError,
    HandleClosedError,
    InvalidAdapterIdError,
    Request,
    Ticket,
    UsageError,
)
from scheduling.serving import MANY, opened, rows, step, warm
from tiny_sources import is_at, is_resident, state, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")

# -- one request -----------------------------------------------------------------------------------


def test_a_request_is_computed_a_token_at_a_time(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path, "a")) as (_, scheduler):
            ticket = scheduler.submit(Request("a", 10, 3))
            assert "'a' waiting" in repr(ticket)
            seen = [rows(await step(scheduler)) for _ in range(3)]
            assert seen == [
                [("a", 0, 10, True)],
                [("a", 10, 1, True)],
                [("a", 11, 1, True)],
            ]
            assert await ticket == 3
            assert (ticket.done, ticket.cancelled, ticket.error) == (True, False, None)
            assert "finished after 3 tokens" in repr(ticket)
            assert not ticket.cancel()

    run(body())


def test_the_engine_may_say_that_it_is_finished(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path, "a")) as (_, scheduler):
            ticket = scheduler.submit(Request("a", 10, MANY))
            await step(scheduler)
            await step(scheduler, finished=[ticket])
            assert await ticket == 2

    run(body())


def test_a_long_prompt_comes_in_parts(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path)) as (_, scheduler):
            scheduler.submit(Request(None, 10, 2))
            seen = [rows(await step(scheduler, tokens=4)) for _ in range(4)]
            assert seen == [
                [(None, 0, 4, False)],
                [(None, 4, 4, False)],
                [(None, 8, 2, True)],
                [(None, 10, 1, True)],
            ]

    run(body())


def test_rows_of_one_adapter_are_neighbours(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path, "a", "b")) as (loader, scheduler):
            await warm(loader, "a", "b")
            for id in ("b", None, "a", "b", "a"):
                scheduler.submit(Request(id, 2, 1))
            batch = await step(scheduler)
            assert [row[0] for row in rows(batch)] == [None, "a", "a", "b", "b"]
            assert batch.plan.segments.bounds == (0, 2, 6, 10)
            assert batch.plan.segments.slots == (
                -1,
                *sorted({row.place.slot for row in batch.rows[1:]}),
            )
            assert batch.plan.groups == ((0, 0, 1), (4, 1, 3))
            assert batch.plan.order == (0, 1, 2, 3, 4)
            assert [handle and handle.id for handle in batch.handles] == [None, "a", "a", "b", "b"]
            assert batch.streaming == ()

    run(body())


# -- who is waited for -----------------------------------------------------------------------------


def test_nobody_waits_for_an_adapter_that_does_not_come(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
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

    run(body())


def test_next_batch_waits_until_there_is_something(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path)) as (_, scheduler):
            waiting = asyncio.create_task(scheduler.next_batch(MANY, MANY))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            ticket = scheduler.submit(Request(None, 1, 1))
            batch = await asyncio.wait_for(waiting, 5)
            scheduler.complete(batch)
            assert await ticket == 1

    run(body())


def test_alone_a_streaming_adapter_joins_when_its_first_layer_is_there(
    run: Run, tmp_path: Path
) -> None:
    async def body() -> None:
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

    run(body())


def test_it_does_not_join_others_before_their_pace_is_known(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        source = stocked(tmp_path, "cold")
        source.hold("cold")
        source.allow("cold", 0)
        async with opened(source) as (_, scheduler):
            cold = scheduler.submit(Request("cold", 10, 1))
            handle = await _streaming(scheduler, cold)
            await handle.layer_ready(0)
            scheduler.submit(Request(None, 10, 1))
            assert [row[0] for row in rows(await step(scheduler))] == [None]
            source.allow("cold")
            assert [row[0] for row in rows(await step(scheduler))] == ["cold"]

    run(body())


async def _streaming(scheduler: AdapterScheduler, ticket: Ticket) -> Any:
    """The handle that the scheduler has of an adapter on its way."""
    guest = scheduler._book.guest_of(ticket)
    await until(lambda: guest.handle is not None)
    return guest.handle


def test_who_waited_in_vain_joins_when_all_is_there(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
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

    run(body())


def test_a_pass_is_told_of_others_that_did_not_fit(run: Run, tmp_path: Path) -> None:
    """They were there before it; nothing that happens later would tell."""

    async def body() -> None:
        source = stocked(tmp_path, "a")
        source.hold("a")
        source.allow("a", 0)
        async with opened(source) as (_, scheduler):
            scheduler.submit(Request(None, 1, 1))
            batch = await scheduler.next_batch(MANY, MANY)
            await asyncio.sleep(0.2)
            scheduler.complete(batch)  # a pass is slow: whoever comes may join it
            streams = scheduler.submit(Request("a", 1, 1))
            handle = await _streaming(scheduler, streams)
            await handle.layer_ready(0)
            scheduler.submit(Request(None, 1, 1))
            batch = await asyncio.wait_for(scheduler.next_batch(MANY, 1), 5)
            assert (rows(batch), batch.others_wait) == ([("a", 0, 1, True)], True)
            scheduler.complete(batch, again=[streams])
            assert rows(await step(scheduler)) == [(None, 0, 1, True)]
            source.allow("a")
            await step(scheduler)

    run(body())


def test_who_may_not_begin_keeps_no_slot_from_who_has_begun(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
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

    run(body())


def test_what_was_lost_is_computed_again(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path, "a"), max_begun=1) as (_, scheduler):
            ticket = scheduler.submit(Request("a", 10, 4))
            await step(scheduler)
            await step(scheduler)
            assert rows(await step(scheduler, again=[ticket])) == [("a", 11, 1, True)]
            assert rows(await step(scheduler)) == [("a", 0, 12, True)]
            assert rows(await step(scheduler)) == [("a", 12, 1, True)]
            assert await ticket == 4

    run(body())


# -- order and shares ------------------------------------------------------------------------------


def test_a_hot_adapter_does_not_own_the_batch(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path, "hot", "b")) as (loader, scheduler):
            await warm(loader, "hot", "b")
            for _ in range(20):
                scheduler.submit(Request("hot", 1, 5))
            scheduler.submit(Request("b", 1, 5))
            batch = await step(scheduler, sequences=4)
            assert sorted(str(row[0]) for row in rows(batch)) == ["b", "hot", "hot", "hot"]

    run(body())


def test_the_more_urgent_come_first(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path)) as (_, scheduler):
            plain = scheduler.submit(Request(None, 1, 1))
            soon = scheduler.submit(Request(None, 1, 1, deadline=3.0))
            high = scheduler.submit(Request(None, 1, 1, priority=1))
            seen = [(await step(scheduler, sequences=1)).rows[0].ticket for _ in range(3)]
            assert seen == [high, soon, plain]

    run(body())


def test_no_more_begin_than_the_engine_has_room_for(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path), max_begun=2) as (_, scheduler):
            first, second, third = (scheduler.submit(Request(None, 1, n)) for n in (2, 1, 1))
            assert {row.ticket for row in (await step(scheduler)).rows} == {first, second}
            assert {row.ticket for row in (await step(scheduler)).rows} == {first, third}

    run(body())


def test_several_batches_may_be_under_way(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path, "a")) as (loader, scheduler):
            await warm(loader, "a")
            tickets = [scheduler.submit(Request("a", 1, 1)) for _ in range(2)]
            batches = [await scheduler.next_batch(MANY, 1) for _ in range(2)]
            assert [batch.rows[0].ticket for batch in batches] == tickets
            scheduler.complete(batches[1])
            batches[0].check()
            scheduler.complete(batches[0])
            assert [await each for each in tickets] == [1, 1]

    run(body())


# -- slots -----------------------------------------------------------------------------------------


def test_more_adapters_than_slots_take_turns(run: Run, tmp_path: Path) -> None:
    """Also while requests of all of them go on: the loader's ageing tells who is to go."""

    async def body() -> None:
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

    run(body())


def test_a_slot_in_which_nothing_comes_is_given_to_others(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        source = stocked(tmp_path, "stalls", "b")
        source.hold("stalls")
        settings = {"max_slots": 1, "starvation_age": 0.02}
        async with opened(source, settings) as (_, scheduler):
            stalls = scheduler.submit(Request("stalls", 1, 1))
            await _streaming(scheduler, stalls)
            other = scheduler.submit(Request("b", 1, 1))
            assert rows(await step(scheduler)) == [("b", 0, 1, True)]
            assert await other == 1
            source.allow("stalls")
            assert rows(await step(scheduler)) == [("stalls", 0, 1, True)]

    run(body())


def test_an_unloaded_adapter_comes_back_for_its_requests(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path, "a")) as (loader, scheduler):
            ticket = scheduler.submit(Request("a", 1, 3))
            (place,) = {row.place for row in (await step(scheduler)).rows}
            await loader.unload("a")
            (again,) = {row.place for row in (await step(scheduler)).rows}
            assert again.generation > place.generation
            await step(scheduler)
            assert await ticket == 3

    run(body())


def test_a_stale_batch_is_caught(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
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

    run(body())


# -- looking ahead ---------------------------------------------------------------------------------


def test_what_comes_next_is_brought_nearer(run: Run, tmp_path: Path) -> None:
    """One is loaded, the next hinted onto the device, then into host memory; the last not."""

    async def body() -> None:
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

    run(body())


def test_the_more_urgent_adapter_is_loaded_first(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        source = stocked(tmp_path, "a", "b", "c")
        async with opened(source, {"max_slots": 1}, loads=1, look_ahead=0) as (_, scheduler):
            for id, priority in (("a", 0), ("b", 0), ("c", 2)):
                scheduler.submit(Request(id, 1, 1, priority=priority))
            seen = [rows(await step(scheduler))[0][0] for _ in range(3)]
            assert seen == ["c", "a", "b"]

    run(body())


def test_sources_that_do_not_answer_hold_up_nobody(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        source = stocked(tmp_path, *"abcd")
        for id in "abc":
            source.hold(id)
        settings = {"starvation_age": 0.02, "max_slots": 4}
        async with opened(source, settings, loads=1, look_ahead=0) as (_, scheduler):
            for id in "abcd":
                scheduler.submit(Request(id, 1, 1))
            assert rows(await step(scheduler)) == [("d", 0, 1, True)]

    run(body())


def test_an_adapter_that_is_there_is_used_at_once(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        source = stocked(tmp_path, "a")
        async with opened(source) as (loader, scheduler):
            await warm(loader, "a")
            assert is_resident(loader, "a")
            scheduler.submit(Request(AdapterRef("a"), 1, 1))
            scheduler.submit(Request("a", 1, 1))
            assert len((await step(scheduler)).rows) == 2
            assert source.counts.opens == 1

    run(body())


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (("a", 0, 1), ConfigError),
        (("a", 1, 0), ConfigError),
        (("a", 1, 1, 0.5), UsageError),
        (("a", 1, 1, 0, 0.0), ConfigError),
        ((5, 1, 1), InvalidAdapterIdError),
    ],
)
def test_requests_that_are_none(given: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        Request(*given)


def test_settings_and_batches_that_are_none(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path)) as (loader, scheduler):
            wrong: list[dict[str, Any]] = [{"loads": 0}, {"look_ahead": -1}, {"max_begun": 0}]
            for given in wrong:
                with pytest.raises(ConfigError):
                    AdapterScheduler(loader, **given)
            for sizes in ((0, 1), (1, 0)):
                with pytest.raises(ConfigError):
                    await scheduler.next_batch(*sizes)

    run(body())


def test_a_batch_is_completed_once_and_with_its_own_tickets(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path)) as (_, scheduler):
            ticket, other = (scheduler.submit(Request(None, 1, 1)) for _ in range(2))
            batch = await scheduler.next_batch(MANY, 1)
            with pytest.raises(UsageError, match="no row"):
                scheduler.complete(batch, finished=[other])
            assert not batch.completed
            scheduler.complete(batch, finished=[ticket])
            with pytest.raises(UsageError, match="once"):
                scheduler.complete(batch)

    run(body())
