"""The engine's jobs, for as long as somebody wants what they bring."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from lorax_async.errors import FetchError
from lorax_async.io.http.download_scheduler import Job
from lorax_async.io.http.engine import FOREGROUND
from lorax_async.io.ports import Demand
from lorax_async.io.remote.workers import ended

LONGEST = 86_400.0
"""Seconds. Who waits has a deadline of his own, and what nobody waits for ends."""


@asynccontextmanager
async def followed(demand: Demand, *jobs: Job[Any]) -> AsyncIterator[None]:
    """While this is entered they are as urgent as the demand, and end with it.

    On an error or a cancellation they are ended, and their threads have left when it is raised.
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
