"""A scheduler over tiny adapters, and an engine that computes in no time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from common import until
from lorax_async import (
    AdapterHandle,
    AdapterLoader,
    AdapterRef,
    AdapterScheduler,
    Batch,
    Ticket,
)
from lorax_async.adapter import AdapterKey
from lorax_async.testing import FakeSource
from tiny_sources import over

MANY = 1000


@asynccontextmanager
async def opened(
    source: FakeSource, settings: dict[str, Any] | None = None, **given: Any
) -> AsyncIterator[tuple[AdapterLoader, AdapterScheduler]]:
    """And closed; then nobody holds or wants anything."""
    async with over(source, **(settings or {})) as loader:
        async with AdapterScheduler(loader, **given) as scheduler:
            yield loader, scheduler
        tenants = loader._machinery.driver.tenants
        assert not tenants.leases
        assert not tenants._waiters
        assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("lorax wish")]


async def step(
    scheduler: AdapterScheduler, tokens: int = MANY, sequences: int = MANY, **results: Any
) -> Batch:
    """One batch, computed in no time."""
    batch = await asyncio.wait_for(scheduler.next_batch(tokens, sequences), 5)
    batch.check()
    scheduler.complete(batch, **results)
    return batch


def silence(source: FakeSource, id: str) -> None:
    """Whoever asks for it from now on has no answer."""
    resolve = source.resolve

    async def silent(ref: AdapterRef) -> AdapterKey:
        if ref.text == id:
            await asyncio.Event().wait()
        return await resolve(ref)

    source.resolve = silent  # type: ignore[method-assign]


async def held(scheduler: AdapterScheduler, ticket: Ticket) -> AdapterHandle:
    """Its adapter has a slot, and may be on its way."""
    guest = scheduler._book.guest_of(ticket)
    await until(lambda: guest.handle is not None)
    assert guest.handle is not None
    return guest.handle


async def turns(count: int = 20) -> None:
    """So many of the loop: whatever waits for nothing else has happened."""
    for _ in range(count):
        await asyncio.sleep(0)


async def wanted(scheduler: AdapterScheduler) -> asyncio.Task[Batch]:
    """A batch that is not there yet."""
    waiting = asyncio.create_task(scheduler.next_batch(MANY, MANY))
    await turns()
    assert not waiting.done()
    return waiting


async def warm(loader: AdapterLoader, *ids: str) -> None:
    for id in ids:
        (await loader.load(id)).release()


def rows(batch: Batch) -> list[tuple[object, int, int, bool]]:
    return [(row.ticket.request.adapter_id, row.start, row.tokens, row.last) for row in batch.rows]


async def finish(scheduler: AdapterScheduler, *tickets: Ticket) -> None:
    """Serve until all are done."""
    while not all(ticket.done for ticket in tickets):
        await step(scheduler)


async def streaming(scheduler: AdapterScheduler, ticket: Ticket) -> Any:
    """The handle that the scheduler has of an adapter on its way."""
    guest = scheduler._book.guest_of(ticket)
    await until(lambda: guest.handle is not None)
    return guest.handle
