"""What was measured of the connections to each origin."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

from lorax_async.core.ranges import Link
from lorax_async.io.http.urls import Origin

UNKNOWN = Link(delay=0.02, rate=5e6)
"""Guessed low: a first wave too many costs one delay, one too few makes layer 0 as late as all."""

_KEPT = 256
_NEW = 0.3
"""How much the newest measurement counts."""


class Links:
    """Remembers the origins used last. From any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._seen: OrderedDict[Origin, tuple[float | None, float | None]] = OrderedDict()

    def of(self, origin: Origin) -> Link:
        """What is not known yet is guessed."""
        with self._lock:
            delay, rate = self._seen.get(origin, (None, None))
        return Link(
            UNKNOWN.delay if delay is None else delay, UNKNOWN.rate if rate is None else rate
        )

    def answered(self, origin: Origin, seconds: float) -> None:
        """So long it took from a request to the head of its response."""
        with self._lock:
            delay, rate = self._seen.get(origin, (None, None))
            self._keep(origin, (_mixed(delay, seconds), rate))

    def moved(self, origin: Origin, rate: float) -> None:
        """So many bytes per second came on one connection."""
        with self._lock:
            delay, before = self._seen.get(origin, (None, None))
            self._keep(origin, (delay, _mixed(before, rate)))

    def _keep(self, origin: Origin, seen: tuple[float | None, float | None]) -> None:
        self._seen[origin] = seen
        self._seen.move_to_end(origin)
        if len(self._seen) > _KEPT:
            self._seen.popitem(last=False)


def _mixed(before: float | None, new: float) -> float:
    return new if before is None else before + _NEW * (new - before)
