"""What ends a request: cancelled at any moment, failing adapters, deadlines, and close."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lorax_async import (
    AdapterScheduler,
    AdapterTimeoutError,
    Batch,
    HandleClosedError,
    LoaderClosedError,
    Request,
    UsageError,
)
from scheduling.serving import MANY, finish, opened, step, warm
from tiny_sources import over, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


# -- deadlines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "id", "stage"),
    [("resolve", "a", "queue"), ("bytes", "a", "copy"), ("engine", None, "ready")],
)
async def test_a_deadline_ends_the_waiting(
    tmp_path: Path, held: str, id: str | None, stage: str
) -> None:
    source = stocked(tmp_path, "a", "b")
    source.hold("a")
    async with opened(source, {"max_slots": 1}) as (loader, scheduler):
        blocker = await loader.load("b") if held == "resolve" else None
        late = scheduler.submit(Request(id, 1, 1, deadline=0.05))
        patient = scheduler.submit(Request(id, 1, 1))
        with pytest.raises(AdapterTimeoutError, match=r"within 0\.05 s") as raised:
            await asyncio.wait_for(late._wait(), 5)
        assert (raised.value.id, raised.value.stage) == (id, stage)
        if blocker is not None:
            blocker.release()
        source.allow("a")
        await finish(scheduler, patient)
        assert await patient == 1


async def test_a_request_that_has_begun_is_not_late(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path)) as (_, scheduler):
        ticket = scheduler.submit(Request(None, 1, 2, deadline=0.02))
        batch = await scheduler.next_batch(MANY, MANY)
        await asyncio.sleep(0.04)
        scheduler.complete(batch)
        await finish(scheduler, ticket)
        assert await ticket == 2


async def test_without_a_deadline_it_is_the_configs(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    source.hold("a")
    async with opened(source, {"timeout": 0.05}) as (_, scheduler):
        with pytest.raises(AdapterTimeoutError, match=r"within 0\.05 s"):
            await asyncio.wait_for(scheduler.submit(Request("a", 1, 1))._wait(), 5)


# -- close -----------------------------------------------------------------------------------------


async def test_close_answers_everybody(tmp_path: Path) -> None:
    """Who waits, who streams, who is computed, who wants a batch; and twice."""
    source = stocked(tmp_path, *"abcde", holdable=True)
    source.hold("a")
    source.hold("b")
    async with over(source, max_slots=3, host_bytes=1 << 20) as loader:
        scheduler = AdapterScheduler(loader, loads=2)
        await warm(loader, "c")
        tickets = [scheduler.submit(Request(id, 4, 2)) for id in (*"abcde", "c", None)]
        batch = await scheduler.next_batch(MANY, 1)
        other = await asyncio.wait_for(scheduler.next_batch(MANY, MANY), 5)
        waits = asyncio.create_task(scheduler.next_batch(MANY, MANY))
        iterated = asyncio.create_task(_all(scheduler))
        await asyncio.sleep(0)
        await asyncio.gather(scheduler.close(), scheduler.close())
        for ticket in tickets:
            with pytest.raises(LoaderClosedError, match="scheduler was closed"):
                await ticket
        with pytest.raises(LoaderClosedError):
            await waits
        assert len(await iterated) <= 1
        with pytest.raises(LoaderClosedError):
            scheduler.submit(Request(None, 1, 1))
        scheduler.complete(batch)
        scheduler.complete(other)
        with pytest.raises(HandleClosedError):
            other.check()
        assert not loader._machinery.driver.tenants.leases
        await scheduler.close()


async def _all(scheduler: AdapterScheduler) -> list[Batch]:
    return [batch async for batch in scheduler.batches(MANY, MANY)]


async def test_cancelling_who_closes_does_not_stop_it(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    source.hold("a")
    async with over(source) as loader:
        scheduler = AdapterScheduler(loader)
        ticket = scheduler.submit(Request("a", 1, 1))
        await asyncio.sleep(0.005)
        closing = asyncio.create_task(scheduler.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(LoaderClosedError):
            await asyncio.wait_for(ticket._wait(), 5)
        await scheduler.close()
        assert not loader._machinery.driver.tenants.leases


async def test_a_loader_that_is_closed_first_fails_the_requests(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    source.hold("b")
    async with over(source) as loader:
        scheduler = AdapterScheduler(loader)
        await warm(loader, "a")
        held, cold = scheduler.submit(Request("a", 1, 2)), scheduler.submit(Request("b", 1, 1))
        await step(scheduler)
        await loader.close(timeout=0.01)
        waiting = asyncio.create_task(scheduler.next_batch(MANY, MANY))
        for ticket in (held, cold):
            with pytest.raises(LoaderClosedError):
                await asyncio.wait_for(ticket._wait(), 5)
        with pytest.raises(LoaderClosedError):
            scheduler.submit(Request("a", 1, 1))
        await scheduler.close()
        with pytest.raises(LoaderClosedError):
            await waiting


def test_it_belongs_to_its_loop(tmp_path: Path) -> None:
    source = stocked(tmp_path)

    async def elsewhere(scheduler: AdapterScheduler) -> None:
        for call in (
            lambda: scheduler.submit(Request(None, 1, 1)),
            lambda: scheduler.complete(None),  # type: ignore[arg-type]
        ):
            with pytest.raises(UsageError, match="event loop"):
                call()
        for work in (scheduler.close, lambda: scheduler.next_batch(1, 1)):
            with pytest.raises(UsageError, match="event loop"):
                await work()

    async def body() -> None:
        async with over(source) as loader, AdapterScheduler(loader) as scheduler:
            await asyncio.to_thread(asyncio.run, elsewhere(scheduler))

    asyncio.run(body())
