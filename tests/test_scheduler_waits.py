"""Whoever waits for the scheduler is woken, and what must not come too early does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from common import until
from lorax_async import (
    AdapterHandle,
    AdapterLoader,
    AdapterRef,
    AdapterScheduler,
    FetchError,
    LoaderClosedError,
    Request,
)
from lorax_async.adapter import AdapterKey
from scheduling.serving import MANY, held, opened, rows, silence, step, turns, wanted, warm
from tiny_sources import over, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


# -- who wants a batch -----------------------------------------------------------------------------


async def test_others_have_their_turn_before_a_batch_that_is_there(tmp_path: Path) -> None:
    """An engine may compute on the loop itself, and never wait."""
    async with opened(stocked(tmp_path)) as (_, scheduler):
        ticket, turn = scheduler.submit(Request(None, 1, MANY)), list[bool]()
        asyncio.get_running_loop().call_soon(turn.append, True)
        scheduler.complete(await scheduler.next_batch(MANY, MANY))
        assert turn
        ticket.cancel()


async def test_who_wants_a_batch_when_it_closes_wants_none(tmp_path: Path) -> None:
    """Though there is no request whose end could tell."""
    async with over(stocked(tmp_path)) as loader:
        scheduler = AdapterScheduler(loader)
        several = [await wanted(scheduler) for _ in range(2)]
        await scheduler.close()
        for waiting in several:
            with pytest.raises(LoaderClosedError):
                await asyncio.wait_for(waiting, 5)


async def test_what_one_completes_another_goes_on_with(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path)) as (_, scheduler):
        ticket = scheduler.submit(Request(None, 1, 2))
        batch = await scheduler.next_batch(MANY, MANY)
        waiting = await wanted(scheduler)
        scheduler.complete(batch)
        batch = await asyncio.wait_for(waiting, 5)
        assert rows(batch) == [(None, 1, 1, True)]
        scheduler.complete(batch)
        assert await ticket == 2


async def test_who_has_a_slot_is_computed_though_all_of_it_came_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler hears of its slot after the last layer: no event follows."""
    stream = AdapterLoader.stream

    @asynccontextmanager
    async def slow(loader: AdapterLoader, *args: Any, **more: Any) -> AsyncIterator[AdapterHandle]:
        async with stream(loader, *args, **more) as handle:
            await until(lambda: handle.resident)
            await turns()
            yield handle

    monkeypatch.setattr(AdapterLoader, "stream", slow)
    async with opened(stocked(tmp_path, "a")) as (_, scheduler):
        ticket = scheduler.submit(Request("a", 1, 1))
        waiting = await wanted(scheduler)
        scheduler.complete(await asyncio.wait_for(waiting, 5))
        assert await ticket == 1


async def test_a_layer_that_comes_is_computed(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    source.hold("a")
    async with opened(source) as (_, scheduler):
        ticket = scheduler.submit(Request("a", 1, 1))
        handle = await held(scheduler, ticket)
        waiting = await wanted(scheduler)
        source.allow("a", 0)
        batch = await asyncio.wait_for(waiting, 5)
        assert batch.streaming == (handle,)
        scheduler.complete(batch)
        source.allow("a")


async def test_who_may_not_begin_does_when_another_is_cancelled(tmp_path: Path) -> None:
    """That one had begun, and lost its slot."""
    source = stocked(tmp_path, "a")
    async with opened(source, max_begun=1) as (loader, scheduler):
        begun = scheduler.submit(Request("a", 1, MANY))
        await step(scheduler)
        silence(source, "a")
        await loader.unload("a")
        fresh = scheduler.submit(Request(None, 1, 1))
        waiting = await wanted(scheduler)
        begun.cancel()
        batch = await asyncio.wait_for(waiting, 5)
        assert [row.ticket for row in batch.rows] == [fresh]
        scheduler.complete(batch)


async def test_who_may_not_begin_does_when_another_has_failed(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with opened(source, max_begun=1) as (loader, scheduler):
        begun = scheduler.submit(Request("a", 1, MANY))
        await step(scheduler)
        go = asyncio.Event()

        async def failing(ref: AdapterRef) -> AdapterKey:
            await go.wait()
            raise FetchError("as told")

        source.resolve = failing  # type: ignore[method-assign]
        await loader.unload("a")
        fresh = scheduler.submit(Request(None, 1, 1))
        waiting = await wanted(scheduler)
        go.set()
        batch = await asyncio.wait_for(waiting, 5)
        assert [row.ticket for row in batch.rows] == [fresh]
        assert isinstance(begun.error, FetchError)
        scheduler.complete(batch)


async def test_who_may_not_begin_keeps_its_slot_while_others_are_computed(tmp_path: Path) -> None:
    """These may be through with it soon."""
    async with opened(stocked(tmp_path, "a"), max_begun=1) as (loader, scheduler):
        await warm(loader, "a")
        scheduler.submit(Request(None, 1, 1))
        batch = await scheduler.next_batch(MANY, MANY)
        fresh = scheduler.submit(Request("a", 1, 1))
        handle = await held(scheduler, fresh)
        waiting = await wanted(scheduler)
        assert not handle.released
        scheduler.complete(batch)
        batch = await asyncio.wait_for(waiting, 5)
        assert [row.handle for row in batch.rows] == [handle]
        scheduler.complete(batch)


async def test_who_gave_way_in_vain_keeps_what_it_gets_next(tmp_path: Path) -> None:
    """The one that has begun, and waits for a slot, cannot take it yet."""
    source = stocked(tmp_path, "a", "b")
    async with opened(source, max_begun=1) as (loader, scheduler):
        begun = scheduler.submit(Request("a", 1, MANY))
        await step(scheduler)
        silence(source, "a")
        await loader.unload("a")
        fresh = scheduler.submit(Request("b", 1, MANY))
        first = await held(scheduler, fresh)
        waiting = await wanted(scheduler)
        assert first.released
        second = await held(scheduler, fresh)
        await turns(100)
        assert not second.released
        for ticket in (begun, fresh):
            ticket.cancel()
        waiting.cancel()
