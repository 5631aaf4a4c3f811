"""The scheduler's time, which is its loop's unless a test brings another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Protocol


class Alarm(Protocol):
    """What was put off, until it is cancelled."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Seconds, and calls at a moment."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], object], /) -> Alarm: ...


class LoopClock:
    """The machine's time, and a loop's calls: a loop may count whole milliseconds only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def time(self) -> float:
        return monotonic()

    def call_at(self, when: float, callback: Callable[[], object], /) -> Alarm:
        return self._loop.call_later(max(0.0, when - monotonic()), callback)
