"""How late an event loop is: the time that callbacks of others keep a timer waiting."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Upper ends of the histogram's buckets, in seconds."""


class Lags(NamedTuple):
    """A histogram: how many lags were up to each of `BOUNDS`, then all; and their sum, seconds."""

    counts: Sequence[int]
    total: float


class LoopLag:
    """Looks every `period` seconds, until `close`, or until `ended` says so at a look.

    Parameters
    ----------
    loop
        The running one.
    clock
        Seconds, as of `time.monotonic`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        period: float,
        ended: Callable[[], bool],
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._loop = loop
        self._period = period
        self._ended = ended
        self._clock = clock
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._set()

    @property
    def running(self) -> bool:
        return self._timer is not None

    def lags(self) -> Lags:
        """Since it began."""
        counts, below = [], 0
        for count in self._counts:
            below += count
            counts.append(below)
        return Lags(tuple(counts), self._total)

    def close(self) -> None:
        """Look no more. Idempotent; on the loop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self) -> None:
        self._due = self._clock() + self._period
        self._timer = self._loop.call_later(self._period, self._look)

    def _look(self) -> None:
        self._timer = None
        lag = max(0.0, self._clock() - self._due)
        self._counts[bisect_left(BOUNDS, lag)] += 1
        self._total += lag
        if not self._ended():
            self._set()
