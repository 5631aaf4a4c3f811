"""Who may go on: of many in the background a few at a time; of several with one name in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager
from heapq import heappop, heappush
from itertools import count


class Turns:
    """`most` have theirs at a time; of those who wait, the highest priority, then the first."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._order = count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def turn(self, priority: int) -> AsyncIterator[None]:
        await self._take(priority)
        try:
            yield
        finally:
            self._pass_on()

    async def _take(self, priority: int) -> None:
        if self._free:
            self._free -= 1
            return
        mine = asyncio.get_running_loop().create_future()
        heappush(self._waiting, (-priority, next(self._order), mine))
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # it came in the same turn of the loop
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            _, _, following = heappop(self._waiting)
            if not following.done():
                following.set_result(None)
                return
        self._free += 1


class InOrder:
    """Calls with one name come to pass in the order in which they began."""

    def __init__(self) -> None:
        self._last: dict[Hashable, asyncio.Future[None]] = {}

    @contextmanager
    def place(self, name: Hashable) -> Iterator[Callable[[], Awaitable[None]]]:
        """Stand behind those who came before; what it gives waits until they are through.

        Who leaves early leaves a gap: those behind still wait for those before.
        """
        before = self._last.get(name)
        mine = self._last[name] = asyncio.get_running_loop().create_future()

        async def come_first() -> None:
            if before is not None:
                await asyncio.wait([before])

        def end(_: object) -> None:
            mine.set_result(None)
            if self._last.get(name) is mine:
                del self._last[name]

        try:
            yield come_first
        finally:
            if before is None or before.done():
                end(None)
            else:
                before.add_done_callback(end)
