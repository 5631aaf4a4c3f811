"""Waiting for something to change."""

from __future__ import annotations

import asyncio
from math import inf

from lorax_async.scheduling.clock import Clock


class News:
    """Wakes whoever waits, all at once; they look for themselves."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Clock) -> None:
        self._loop = loop
        self._clock = clock
        self._idle: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        for future in self._idle:
            if not future.done():
                future.set_result(None)

    async def wait(self, due: float) -> None:
        """Until something has changed, or until then."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._idle.add(future)
        alarm = None if due == inf else self._clock.call_at(due, self.tell)
        try:
            await future
        finally:
            self._idle.discard(future)
            if alarm is not None:
                alarm.cancel()
