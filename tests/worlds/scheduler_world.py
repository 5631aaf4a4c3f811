"""A scheduler over tiny adapters, an engine without latency, and a virtual clock."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from heapq import heappop, heappush
from itertools import count
from typing import Any

from event_loops import until
from tiny_sources import over

from lorax_async import AdapterKey, AdapterLoader, AdapterRef, AdapterScheduler, Batch, Ticket
from lorax_async.testing import FakeSource


class VirtualAlarm:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class VirtualClock:
    """A `Clock` for the scheduler that tests move. On one loop."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, VirtualAlarm]] = []
        self._numbers = count()

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object], /) -> VirtualAlarm:
        alarm = VirtualAlarm(callback)
        heappush(self._heap, (when, next(self._numbers), alarm))
        return alarm

    async def sleep(self, seconds: float) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        alarm = self.call_at(self.now + seconds, lambda: done.set_result(None))
        try:
            await done
        finally:
            alarm.cancel()

    @property
    def due(self) -> float | None:
        """The time of the next alarm, if there is one."""
        while self._heap and self._heap[0][2].callback is None:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def step(self) -> None:
        """Advance to the next alarm, and call all that are due then."""
        due = self.due
        assert due is not None
        self.now = max(self.now, due)
        while self.due is not None and self.due <= self.now:
            _, _, alarm = heappop(self._heap)
            if alarm.callback is not None:
                alarm.callback()

    def pass_until(self, moment: float) -> None:
        """Call all alarms that are due by then, each at its time."""
        while self.due is not None and self.due <= moment:
            self.step()
        self.now = moment


MANY = 1000


@asynccontextmanager
async def opened(
    source: FakeSource, settings: dict[str, Any] | None = None, ready: str = "", **given: Any
) -> AsyncIterator[tuple[AdapterLoader, AdapterScheduler]]:
    """Load `ready` first. At the end, assert that there are no leases and no waiters."""
    async with over(source, **(settings or {})) as loader:
        await warm(loader, *ready)
        async with AdapterScheduler(loader, **given) as scheduler:
            yield loader, scheduler
        assert (loader.placement().usage.leases, loader.placement().usage.waiting) == (0, 0)
        assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("lorax load")]


async def step(
    scheduler: AdapterScheduler, tokens: int = MANY, sequences: int = MANY, **results: Any
) -> Batch:
    """Compute one batch, in no time."""
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


async def held(loader: AdapterLoader, id: str) -> None:
    """Wait until the scheduler has a slot for the adapter, whose layers may still come."""
    await until(lambda: (found := loader.placement().find(id)) and found.leases)
    await turns()


async def turns(count: int = 20) -> None:
    """Let the loop turn until all callbacks that are due have run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def wanted(scheduler: AdapterScheduler) -> asyncio.Task[Batch]:
    """Ask for a batch that is not ready yet."""
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
    """Serve until all requests are done."""
    while not all(ticket.done for ticket in tickets):
        await step(scheduler)
