"""The engine's jobs, cancelled when no caller waits for them any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self

from lorax_async.errors import FetchError
from lorax_async.io.http.download_scheduler import Job
from lorax_async.io.http.downloads import NeededBytes, ProbeRequest
from lorax_async.io.http.engine import FOREGROUND, RangeEngine
from lorax_async.io.http.target import ProbeResult, Target
from lorax_async.io.ports import Demand
from lorax_async.io.remote.workers import ended

LONGEST = 86_400.0
"""Seconds. Callers have deadlines of their own, and what no caller waits for is cancelled."""


@asynccontextmanager
async def followed(demand: Demand, *jobs: Job[Any]) -> AsyncIterator[None]:
    """Give jobs the demand's urgency, and cancel them when it ends.

    On an error or a cancellation, cancel them and wait until their threads have left.
    """

    def follow() -> None:
        for job in jobs:
            if demand.ended:
                job.cancel(nobody_waits())
            elif demand.urgent:
                job.raise_priority(FOREGROUND)

    try:
        with demand.watched(follow):
            yield
    except BaseException:
        for job in jobs:
            job.cancel(nobody_waits())
        for job in jobs:
            await ended(job.done)
        raise


@asynccontextmanager
async def bound_to(demand: Demand) -> AsyncIterator[None]:
    """Cancel what is awaited in here when the demand ends, and raise `FetchError`."""
    loop = asyncio.get_running_loop()
    limit = asyncio.timeout(None)

    def follow() -> None:
        if demand.ended and not limit.expired():
            limit.reschedule(loop.time())

    try:
        async with limit:
            with demand.watched(follow):
                yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise nobody_waits() from None


def nobody_waits() -> FetchError:
    return FetchError("nobody waits for the adapter any more")


class CancelScope:
    """Probe requests for several files at once. Leaving it cancels those without an answer.

    It waits for nothing: the engine's threads leave their sockets by themselves.
    """

    def __init__(self, engine: RangeEngine) -> None:
        self._engine = engine
        self._asked: list[ProbeRequest] = []

    def beginning(self, target: Target, nbytes: int, enough: NeededBytes) -> ProbeRequest:
        """Ask for the first bytes of a file; see `RangeEngine.probe`."""
        return self._followed(self._engine.probe(target, nbytes, needed_bytes=enough))

    def whole(self, target: Target, most: int) -> ProbeRequest:
        """Request all of a file, which may have `most` bytes."""
        return self._followed(self._engine.probe(target, most, ranged=False))

    def _followed(self, job: ProbeRequest) -> ProbeRequest:
        self._asked.append(job)
        return job

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._asked:
            if not job.done.done():
                job.cancel(FetchError("nobody waits for the answer any more"))


async def answered(job: ProbeRequest) -> ProbeResult:
    """Return the answer, or raise the engine's error. Cancelling leaves the job to its scope."""
    return await asyncio.wrap_future(job.done)
