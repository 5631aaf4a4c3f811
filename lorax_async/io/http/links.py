"""What was measured of the connections to each origin."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from threading import Lock

from lorax_async.core.ranges import Link
from lorax_async.io.http.urls import Origin

UNKNOWN = Link(delay=0.02, rate=20e6)
_KEPT = 256
_NEW = 0.3
"""How much the newest measurement counts."""


class Links:
    """Remembers the origins used last. From any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._links: OrderedDict[Origin, Link] = OrderedDict()

    def of(self, origin: Origin) -> Link:
        with self._lock:
            return self._links.get(origin, UNKNOWN)

    def answered(self, origin: Origin, seconds: float) -> None:
        """So long it took from a request to the head of its response."""
        with self._lock:
            before = self._links.get(origin)
            delay = seconds if before is None else _mixed(before.delay, seconds)
            self._keep(origin, replace(before or UNKNOWN, delay=delay))

    def moved(self, origin: Origin, rate: float) -> None:
        """So many bytes per second came on one connection."""
        with self._lock:
            before = self._links.get(origin, UNKNOWN)
            self._keep(origin, replace(before, rate=_mixed(before.rate, rate)))

    def _keep(self, origin: Origin, link: Link) -> None:
        self._links[origin] = link
        self._links.move_to_end(origin)
        if len(self._links) > _KEPT:
            self._links.popitem(last=False)


def _mixed(before: float, new: float) -> float:
    return before + _NEW * (new - before)
