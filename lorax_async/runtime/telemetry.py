"""Events, statistics and budgets of one loader."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from lorax_async.errors import Stage
from lorax_async.events import BytesMoved, Event, LayerReady
from lorax_async.lifecycle.lifecycle import Budgets
from lorax_async.runtime.leases import LeaseTable
from lorax_async.sources.host_copies import HostCopies
from lorax_async.tracing.recorder import Tracer, name_of, now
from lorax_async.types import AdapterKey, Ref

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


class Telemetry:
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


class Budget(NamedTuple):
    """How much of a budget is taken, and all of it."""

    used: int
    limit: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What is taken of each budget now; bytes, but for `slots`.

    Attributes
    ----------
    slots
        Of the device's tables; what is being filled or drained counts.
    device_bytes
        Of the arena, in aligned extents.
    host_bytes
        Of file pages that are held; what was only read ahead counts nothing.
    pinned_bytes
        Of page-locked memory, in aligned extents.
    memory_bytes
        Of adapters that were given as tensors, and of merges.
    cache_bytes
        Of the disk cache's folder, whoever of its processes put them there, as this loader saw it
        last; None before it did.
    leases
        Handles that are out.
    waiting
        Wishes that have not come true: of callers who wait, and of prefetches.
    """

    slots: Budget
    device_bytes: Budget
    host_bytes: Budget
    pinned_bytes: Budget
    memory_bytes: Budget
    cache_bytes: Budget | None
    leases: int
    waiting: int


def usage_of(
    budgets: Budgets, lease_table: LeaseTable, copies: HostCopies, cache: tuple[int | None, int]
) -> Usage:
    """Of the disk cache, `cache` has the bytes that were seen last, if any were, and the limit."""
    device, host, pinned = budgets.device, budgets.host, budgets.images.arena
    arena, (seen, most) = device.arena, cache
    return Usage(
        slots=Budget(device.slots_used, device.max_slots),
        device_bytes=Budget(arena.nbytes - arena.free_bytes, arena.nbytes),
        host_bytes=Budget(host.nbytes - host.free, host.nbytes),
        pinned_bytes=Budget(pinned.nbytes - pinned.free_bytes, pinned.nbytes),
        memory_bytes=Budget(copies.used, copies.nbytes),
        cache_bytes=None if seen is None else Budget(seen, most),
        leases=sum(len(held) for held in lease_table.leases.values()),
        waiting=lease_table.waiting,
    )
