"""Requests, and whoever serves them, cancelled at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import until
from lorax_async import (
    AdapterScheduler,
    Batch,
    Request,
    Ticket,
)
from scheduling.serving import MANY, finish, opened, rows
from sweeping import count_steps, stepwise
from tiny_sources import stocked

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


# -- cancelled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["waiting", "streaming", "computing", "between"])
async def test_a_cancelled_request_leaves_the_others_alone(tmp_path: Path, when: str) -> None:
    source = stocked(tmp_path, "a", "b")
    source.hold("a")
    async with opened(source) as (_, scheduler):
        ticket, other, base = (scheduler.submit(Request(id, 4, 3)) for id in ("a", "a", None))
        batch: Batch | None = None
        if when != "waiting":
            guest = scheduler._book.guest_of(ticket)
            await until(lambda: guest.handle is not None)
        if when in ("computing", "between"):
            source.allow("a")
            handle = guest.handle
            assert handle is not None
            await until(lambda: handle.resident)
            batch = await scheduler.next_batch(MANY, MANY)
            if when == "between":
                scheduler.complete(batch)
        assert ticket.cancel()
        assert not ticket.cancel()
        if when == "computing":
            assert batch is not None
            scheduler.complete(batch)
        source.allow("a")
        await finish(scheduler, other, base)
        assert [await other, await base] == [3, 3]
        assert ticket.cancelled
        assert "cancelled" in repr(ticket)
        with pytest.raises(asyncio.CancelledError):
            await ticket


async def test_the_last_request_takes_its_load_with_it(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    source.hold("a")
    async with opened(source) as (loader, scheduler):
        ticket = scheduler.submit(Request("a", 1, 1))
        guest = scheduler._book.guest_of(ticket)
        await until(lambda: guest.handle is not None)
        ticket.cancel()
        assert guest.handle is None
        await until(lambda: not loader._machinery.driver.tenants.leases)
        # And a new one is a new one.
        source.allow("a")
        again = scheduler.submit(Request("a", 1, 1))
        await finish(scheduler, again)
        assert await again == 1


async def test_who_awaits_may_be_cancelled_without_the_request(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path)) as (_, scheduler):
        ticket = scheduler.submit(Request(None, 1, 1))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ticket._wait(), 0.001)
        assert not ticket.done
        await finish(scheduler, ticket)
        assert await ticket == 1


async def _serve(scheduler: AdapterScheduler, ticket: Ticket) -> None:
    """Until it is done; a batch that is not there by then is not waited for."""
    while not ticket.done:
        wanted = asyncio.ensure_future(scheduler.next_batch(MANY, MANY))
        either: set[asyncio.Future[Any]] = {wanted, ticket._future}
        await asyncio.wait(either, return_when="FIRST_COMPLETED")
        if wanted.done():
            await asyncio.sleep(0)  # it is computed
            scheduler.complete(wanted.result())
        else:
            wanted.cancel()
            await asyncio.wait([wanted])


async def test_cancelled_at_every_await_of_who_serves(tmp_path: Path) -> None:
    steps, number = 1, 0
    while number < steps:
        async with opened(stocked(tmp_path, "a")) as (loader, scheduler):
            if number == 0:
                ticket = scheduler.submit(Request("a", 4, 2))
                steps = await count_steps(_serve(scheduler, ticket))
                assert steps >= 4
                await loader.unload("a")
            number += 1
            ticket = scheduler.submit(Request("a", 4, 2))

            def cancel(current: int, wanted: int = number, ticket: Ticket = ticket) -> None:
                if current == wanted:
                    ticket.cancel()

            await asyncio.wait_for(stepwise(_serve(scheduler, ticket), cancel), 5)
            assert ticket.done
            assert not scheduler._book._guests
            assert not scheduler._book.places.taken
            await finish(scheduler, scheduler.submit(Request("a", 1, 1)))


async def test_cancelled_after_any_turn_of_the_loop(tmp_path: Path) -> None:
    """From before its load begins until after its last token."""
    turns, finished = 0, False
    while not finished:
        async with opened(stocked(tmp_path, "a")) as (_, scheduler):
            ticket = scheduler.submit(Request("a", 4, 2))
            serving = asyncio.create_task(_serve(scheduler, ticket))
            for _ in range(turns):
                await asyncio.sleep(0)
            finished = not ticket.cancel()
            await asyncio.wait_for(serving, 5)
            assert not scheduler._book._guests
            assert not scheduler._book.places.taken
            await finish(scheduler, scheduler.submit(Request("a", 1, 1)))
        turns += 1 if turns < 40 else turns // 8
    assert turns > 5


async def test_next_batch_cancelled_at_every_await_loses_nothing(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path, "a")) as (loader, scheduler):
        number, cancelled = 0, True
        while cancelled:
            number += 1
            ticket = scheduler.submit(Request("a", 1, 1))

            def cancel(current: int, wanted: int = number) -> None:
                task = asyncio.current_task()
                if current == wanted and task is not None:
                    task.cancel()

            async def wanting(cancel: Callable[[int], None] = cancel) -> Batch:
                return await stepwise(scheduler.next_batch(MANY, MANY), cancel)  # type: ignore[no-any-return]

            task = asyncio.create_task(wanting())
            await asyncio.wait([task])
            cancelled = task.cancelled()
            batch = task.result() if not cancelled else await scheduler.next_batch(MANY, MANY)
            assert rows(batch) == [("a", 0, 1, True)]
            scheduler.complete(batch)
            assert await ticket == 1
            await loader.unload("a")
        assert number >= 2
