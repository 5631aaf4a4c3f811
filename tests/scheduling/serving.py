"""A scheduler over tiny adapters, and an engine that computes in no time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from common import until
from lorax_async import AdapterLoader, AdapterRef, AdapterScheduler, Batch, Ticket
from lorax_async.adapter import AdapterKey
from lorax_async.testing import FakeSource
from tiny_sources import over

MANY = 1000


@asynccontextmanager
async def opened(
    source: FakeSource, settings: dict[str, Any] | None = None, **given: Any
) -> AsyncIterator[tuple[AdapterLoader, AdapterScheduler]]:
    """Close it at the end; then nothing is leased or waited for any more."""
    async with over(source, **(settings or {})) as loader:
        async with AdapterScheduler(loader, **given) as scheduler:
            yield loader, scheduler
        assert (loader.usage().leases, loader.usage().waiting) == (0, 0)
        assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("lorax wish")]


async def step(
    scheduler: AdapterScheduler, tokens: int = MANY, sequences: int = MANY, **results: Any
) -> Batch:
    """One batch, computed in no time."""
    batch = await next_batch(scheduler, tokens, sequences)
    batch.check()
    scheduler.complete(batch, **results)
    return batch


async def next_batch(
    scheduler: AdapterScheduler, tokens: int = MANY, sequences: int = MANY
) -> Batch:
    return await asyncio.wait_for(scheduler.next_batch(tokens, sequences), 5)


def silence(source: FakeSource, id: str) -> None:
    """Let the source answer no question for `id` from now on."""
    resolve = source.resolve

    async def silent(ref: AdapterRef) -> AdapterKey:
        if ref.text == id:
            await asyncio.Event().wait()
        return await resolve(ref)

    source.resolve = silent  # type: ignore[method-assign]


def leases(loader: AdapterLoader, id: str) -> int:
    found = loader.whereabouts(id)
    return 0 if found is None else found.leases


async def held(loader: AdapterLoader, id: str) -> None:
    """Wait until the scheduler has a slot for the adapter, whose layers may still come."""
    await until(lambda: leases(loader, id))
    await turns()


async def turns(count: int = 20) -> None:
    """Let the loop turn, so that all has happened that waits for nothing else."""
    for _ in range(count):
        await asyncio.sleep(0)


async def wanted(scheduler: AdapterScheduler) -> asyncio.Task[Batch]:
    """Ask for a batch that is not there yet."""
    waiting = asyncio.create_task(scheduler.next_batch(MANY, MANY))
    await turns()
    assert not waiting.done()
    return waiting


async def warm(loader: AdapterLoader, *ids: str) -> None:
    for id in ids:
        (await loader.load(id)).release()


def ids(batch: Batch) -> list[object]:
    return [row.ticket.request.adapter_id for row in batch.rows]


def rows(batch: Batch) -> list[tuple[object, int, int, bool]]:
    return [(row.ticket.request.adapter_id, row.start, row.tokens, row.last) for row in batch.rows]


async def finish(scheduler: AdapterScheduler, *tickets: Ticket) -> None:
    """Serve until all are done."""
    while not all(ticket.done for ticket in tickets):
        await step(scheduler)
