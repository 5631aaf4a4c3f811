"""A scheduler over tiny adapters, and an engine that computes in no time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from lorax_async import AdapterLoader, AdapterScheduler, Batch
from lorax_async.io.fakes import FakeSource
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


async def warm(loader: AdapterLoader, *ids: str) -> None:
    for id in ids:
        (await loader.load(id)).release()


def rows(batch: Batch) -> list[tuple[object, int, int, bool]]:
    return [(row.ticket.request.adapter_id, row.start, row.tokens, row.last) for row in batch.rows]
