"""A scheduler, or its loader, is closed beside whoever waits, loads or computes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from lorax_async import (
    AdapterLoader,
    AdapterScheduler,
    HandleClosedError,
    LoaderClosedError,
    Request,
)
from scheduling.serving import MANY, turns
from tiny_sources import over, stocked

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


async def test_it_is_closed_when_its_loads_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them takes its time to end."""
    begun, ended = asyncio.Event(), list[bool]()

    @asynccontextmanager
    async def slow(*_: object, **__: object) -> AsyncIterator[None]:
        begun.set()
        try:
            await asyncio.Event().wait()
            yield
        finally:
            await turns()
            ended.append(True)

    async with over(stocked(tmp_path, "a")) as loader:
        monkeypatch.setattr(AdapterLoader, "stream", slow)
        scheduler = AdapterScheduler(loader)
        ticket = scheduler.submit(Request("a", 1, 1))
        await begun.wait()
        await scheduler.close()
        assert ended
        with pytest.raises(LoaderClosedError):
            await ticket


async def test_who_is_computed_hears_that_the_loader_was_closed(tmp_path: Path) -> None:
    """As soon as somebody wants another batch; that one may never be completed."""
    async with over(stocked(tmp_path, "a")) as loader:
        scheduler = AdapterScheduler(loader)
        ticket = scheduler.submit(Request("a", 1, 1))
        batch = await asyncio.wait_for(scheduler.next_batch(MANY, MANY), 5)
        await loader.close(timeout=0.01)
        waiting = asyncio.create_task(scheduler.next_batch(MANY, MANY))
        with pytest.raises(LoaderClosedError):
            await asyncio.wait_for(ticket._wait(), 5)
        with pytest.raises(HandleClosedError):
            batch.check()
        scheduler.complete(batch)
        await scheduler.close()
        with pytest.raises(LoaderClosedError):
            await waiting
