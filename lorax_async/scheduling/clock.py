"""The scheduler's time, which is its loop's unless a test brings another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Alarm(Protocol):
    """What was put off, until it is cancelled."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Seconds, and calls at a moment. An event loop is one."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], object], /) -> Alarm: ...
