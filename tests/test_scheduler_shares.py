"""Who gets the engine's places while several wait for them, by rows of batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorax_async import AdapterScheduler, Batch, Request, Ticket
from scheduling.clock import VirtualClock
from scheduling.serving import MANY, opened, step, warm
from tiny_sources import stocked

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


async def test_a_place_is_for_the_adapter_that_got_the_fewest_tokens(tmp_path: Path) -> None:
    """Though others asked earlier."""
    clock = VirtualClock()
    source = stocked(tmp_path, "a", "b", "c")
    async with opened(source, PATIENT, max_begun=2, clock=clock) as (loader, scheduler):
        await warm(loader, "a", "b", "c")
        submit(scheduler, "a", LONG)
        (short,) = submit(scheduler, "b", 20)
        (earlier,) = submit(scheduler, "b", 1)
        (later,) = submit(scheduler, "c", 1)
        while not short.done:
            assert counts(await step(scheduler), "a", "b", "c") == [1, 1, 0]
        assert later in {row.ticket for row in (await step(scheduler)).rows}
        assert earlier in {row.ticket for row in (await step(scheduler)).rows}


@pytest.mark.parametrize("age", [10.0, 2000.0])
async def test_nobody_waits_for_ever(tmp_path: Path, age: float) -> None:
    """A request that is old comes before those whose adapters got less."""
    clock = VirtualClock()
    source = stocked(tmp_path, "a", "b", "c")
    async with opened(source, PATIENT, max_begun=2, clock=clock) as (loader, scheduler):
        await warm(loader, "a", "b", "c")
        submit(scheduler, "a", LONG)
        (short,) = submit(scheduler, "b", 20)
        (older,) = submit(scheduler, "b", 1)
        (later,) = submit(scheduler, "c", 1)
        while not short.done:
            await step(scheduler)
        clock.pass_until(age)
        rows = {row.ticket for row in (await step(scheduler)).rows}
        assert rows & {older, later} == {older if age > PATIENT["starvation_age"] else later}


async def test_others_that_are_not_there_yet_take_nothing(tmp_path: Path) -> None:
    """A request whose adapter has not come preempts nobody."""
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
        preempted = list[Ticket]()
        while not short.done:
            preempted += (await step(scheduler)).preempted
        assert len(preempted) == 1
        assert not (await step(scheduler)).preempted


async def test_what_is_computed_is_not_preempted(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with opened(source, max_begun=4) as (loader, scheduler):
        await warm(loader, "a", "b")
        submit(scheduler, "a", LONG, 4)
        flying = await scheduler.next_batch(MANY, 3)
        assert not flying.preempted
        submit(scheduler, "b", 1, 2)
        beside = await step(scheduler)
        assert not {row.ticket for row in flying.rows} & set(beside.preempted)
        scheduler.complete(flying)
        assert counts(await step(scheduler), "a") != [4]


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


async def test_a_batch_without_room_for_all_that_may_begin(tmp_path: Path) -> None:
    """Those begin that find room: here one of two long prompts, and the other one after it."""
    source = stocked(tmp_path, "a", "b")
    async with opened(source, max_begun=4) as (loader, scheduler):
        await warm(loader, "a", "b")
        submit(scheduler, "a", LONG, 4)
        await step(scheduler)
        for _ in range(2):
            scheduler.submit(Request("b", 200, LONG))
        batches = [await step(scheduler, 100) for _ in range(5)]
        assert counts(batches[0], "a", "b") == [3, 1]
        assert counts(batches[-1], "a", "b") == [2, 2]
        assert [len(batch.preempted) for batch in batches if batch.preempted] == [1, 1]
