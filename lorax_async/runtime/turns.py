"""Who may go on: of many in the background a few at a time; of several with one name in order."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator
from contextlib import asynccontextmanager, contextmanager
from heapq import heappop, heappush
from itertools import count
from math import inf


class Turns:
    """Let `most` callers go on at a time: the highest priority first, then the longest wait.

    A turn that lasts longer than `seconds` is lent: the next caller begins beside it, if its origin
    has fewer than `most` turns.
    """

    def __init__(self, most: int, seconds: float = inf) -> None:
        self._most = most
        self._seconds = seconds
        self._free = most
        self._order = count()
        self._held: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, list[tuple[int, int, asyncio.Future[None]]]] = {}

    @asynccontextmanager
    async def turn(self, priority: int, origin: Hashable = None) -> AsyncIterator[None]:
        await self._take(priority, origin)
        timer: asyncio.TimerHandle | None = None
        overdue = False

        def lend() -> None:
            nonlocal overdue
            overdue = True
            self._free += 1
            self._pass_on()

        try:
            if self._seconds != inf:
                timer = asyncio.get_running_loop().call_later(self._seconds, lend)
            yield
        finally:
            if timer is not None:
                timer.cancel()
            self._end(origin, freed=not overdue)

    async def _take(self, priority: int, origin: Hashable) -> None:
        if self._free and self._held[origin] < self._most:
            self._begin(origin)
            return
        mine = asyncio.get_running_loop().create_future()
        heappush(self._waiting.setdefault(origin, []), (-priority, next(self._order), mine))
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # it came in the same turn of the loop
                self._end(origin, freed=True)
            raise

    def _begin(self, origin: Hashable) -> None:
        self._free -= 1
        self._held[origin] += 1

    def _end(self, origin: Hashable, *, freed: bool) -> None:
        self._free += freed
        self._held[origin] -= 1
        if not self._held[origin]:
            del self._held[origin]
        self._pass_on()

    def _pass_on(self) -> None:
        while self._free > 0:
            for origin in list(self._waiting):
                self._drop_gone(origin)
            able = [each for each in self._waiting if self._held[each] < self._most]
            if not able:
                return
            origin = min(able, key=lambda each: self._waiting[each][0][:2])
            _, _, following = heappop(self._waiting[origin])
            self._begin(origin)
            following.set_result(None)

    def _drop_gone(self, origin: Hashable) -> None:
        waiting = self._waiting[origin]
        while waiting and waiting[0][2].done():
            heappop(waiting)
        if not waiting:
            del self._waiting[origin]


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
