"""A clock that stands still until it is told to go on to the next thing that is due."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count


class VirtualAlarm:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class VirtualClock:
    """As the scheduler wants one. On one loop."""

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
        """When the next alarm rings, if there is one."""
        while self._heap and self._heap[0][2].callback is None:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def step(self) -> None:
        """Go on to the next alarm, and let all ring that are due then."""
        due = self.due
        assert due is not None
        self.now = max(self.now, due)
        while self.due is not None and self.due <= self.now:
            _, _, alarm = heappop(self._heap)
            if alarm.callback is not None:
                alarm.callback()

    def pass_until(self, moment: float) -> None:
        """Let all ring that are due by then, each in its time."""
        while self.due is not None and self.due <= moment:
            self.step()
        self.now = moment
