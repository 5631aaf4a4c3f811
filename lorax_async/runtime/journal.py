"""What a loader remembers and tells: the events of each adapter, and totals by stage."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lorax_async.adapter import AdapterKey, Ref
from lorax_async.errors import Stage
from lorax_async.events import BytesMoved, Event, LayerReady
from lorax_async.tracing.names import name_of
from lorax_async.tracing.recorder import Tracer, now

STORY_LENGTH = 16
"""Events remembered of one adapter; those of single layers are told, not remembered."""

REST_LENGTH = 3
"""And of one that is not on the device: a stay with its end."""

_logger = logging.getLogger("lorax_async")


@dataclass(frozen=True, slots=True)
class Statistics:
    """Totals since the loader was opened.

    `seconds` are summed over adapters that were in a stage at the same time, so that they can
    exceed the time that passed. `nbytes` are those of configs and headers ("fetch"), of the file
    where it was cast or padded ("stage"), and on the device ("copy"), which `bytes_moved` are too.
    `spills` counts adapters that were given as tensors and went from host memory to the disk cache.
    `hits` counts loads by where they found their adapter ("device", "host", "disk", or "source"),
    `evictions` who made room for others, by tier ("device", "host", "pinned"). `failures_by` counts
    failures, and `errors_by` the calls of `load`, `stream` and `pin` that ended with an error, by
    its stage (or "none") and class.
    """

    fetches: int = 0
    loads: int = 0
    failures: int = 0
    departures: int = 0
    bytes_moved: int = 0
    spills: int = 0
    seconds: Mapping[Stage, float] = field(default_factory=dict)
    nbytes: Mapping[Stage, int] = field(default_factory=dict)
    hits: Mapping[str, int] = field(default_factory=dict)
    evictions: Mapping[str, int] = field(default_factory=dict)
    failures_by: Mapping[tuple[str, str], int] = field(default_factory=dict)
    errors_by: Mapping[tuple[str, str], int] = field(default_factory=dict)


class Journal:
    """Collects events and totals; calls subscribers on the loop.

    What is not an adapter's alone goes to whoever records `tracer`.
    """

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.tracer = tracer or Tracer()
        self._stories: dict[AdapterKey, tuple[Event, ...]] = {}
        self._subscribers: dict[object, Callable[[Event], None]] = {}
        self._counts: dict[str, Any] = dict.fromkeys(
            ("fetches", "loads", "failures", "departures", "bytes_moved"), 0
        )
        self._seconds: dict[Stage, float] = {}
        self._nbytes: dict[Stage, int] = {}
        self._checked: dict[AdapterKey, float] = {}
        self._failures: Counter[tuple[str, str]] = Counter()

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        token = object()
        self._subscribers[token] = callback
        return lambda: self._subscribers.pop(token, None) and None

    @property
    def has_subscribers(self) -> bool:
        return bool(self._subscribers)

    def tell(self, event: Event) -> None:
        """Remember an event and call the subscribers; their exceptions are theirs."""
        if not isinstance(event, BytesMoved | LayerReady):
            story = self._stories.get(event.key, ())
            self._stories[event.key] = (*story[1 - STORY_LENGTH :], event)
        for callback in tuple(self._subscribers.values()):
            try:
                callback(event)
            except (Exception, CancelledError):
                _logger.exception("a subscriber failed on %s", type(event).__name__)

    def story(self, key: AdapterKey) -> tuple[Event, ...]:
        return self._stories.get(key, ())

    def shorten(self, key: AdapterKey) -> None:
        """It has left the device: its last events are enough to know what it was like."""
        self._stories[key] = self._stories.get(key, ())[-REST_LENGTH:]

    def forget(self, key: AdapterKey) -> None:
        self._stories.pop(key, None)
        self._checked.pop(key, None)

    def count(self, what: str, amount: int = 1) -> None:
        self._counts[what] += amount

    def failed(self, kind: tuple[str, str]) -> None:
        """A load ended with an error of this stage and class."""
        self.count("failures")
        self._failures[kind] += 1

    def checked(self, key: AdapterKey, time: float) -> None:
        """From here on the adapter can be given a slot."""
        self._checked[key] = time

    def granted(self, key: AdapterKey, since: float, time: float) -> None:
        """It has the slot that was wanted since then: what lies between was spent in the queue."""
        started = max(since, self._checked.pop(key, since))
        self.spent("queue", max(0.0, time - started))
        self.took(key, "queue", started)

    def spent(self, stage: Stage, seconds: float, nbytes: int = 0) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        if nbytes:
            self._nbytes[stage] = self._nbytes.get(stage, 0) + nbytes

    def took(self, ref: Ref, what: str, started: float) -> None:
        """From `started`, on the monotonic clock, until now. For whoever records it."""
        recorder = self.tracer.on
        if recorder is not None:
            stop = now()
            recorder.add("files", name_of(ref), what, min(stop, int(started * 1e9)), stop)

    def statistics(self) -> Statistics:
        return Statistics(
            **self._counts,
            seconds=MappingProxyType(dict(self._seconds)),
            nbytes=MappingProxyType(dict(self._nbytes)),
            failures_by=MappingProxyType(dict(self._failures)),
        )
