"""Events, statistics and budgets of one loader."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from time import monotonic, perf_counter
from types import MappingProxyType
from typing import Any, NamedTuple, get_args

from lorax_async.errors import LoraxError, Stage
from lorax_async.events import (
    BytesMoved,
    CallBegan,
    CallEnded,
    CallEvent,
    CallWaits,
    Event,
    HeaderChecked,
    Hit,
    LayerReady,
    SlotFreed,
)
from lorax_async.tracing import Tracer
from lorax_async.types import AdapterKey, Ref

STORY_LENGTH = 16
"""Events kept per adapter; `_DETAILS` are published but not kept."""

_DETAILS = HeaderChecked | BytesMoved | LayerReady | SlotFreed | CallEvent
"""Events that are made only if there are subscribers, and calls."""

REST_LENGTH = 3
"""Events kept per adapter that is not on the device: its last occupancy with its end."""

_call: ContextVar[int | None] = ContextVar("number of a loader's call", default=None)
_call_numbers = count(1)

_logger = logging.getLogger("lorax_async")


class Call:
    """The block of a waiting caller's call: publishes its beginning and end, counts its error.

    No generator, which would take a µs more of every hit.
    """

    __slots__ = ("_method", "_number", "_ref", "_telemetry", "_token")

    def __init__(self, telemetry: Telemetry, method: str, ref: Ref) -> None:
        self._telemetry = telemetry
        self._method = method
        self._ref = ref
        self._number = next(_call_numbers)

    def __enter__(self) -> None:
        self._token = _call.set(self._number)
        if self._telemetry.has_subscribers:
            began = CallBegan(self._number, monotonic(), self._method, self._ref)
            self._telemetry.publish(began)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self._telemetry.call_ended(self._number, error)
        finally:
            _call.reset(self._token)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Totals since the loader was opened.

    `seconds` are summed over adapters that are in a stage at the same time, and so can exceed the
    elapsed time. `nbytes` are those of configs and headers ("fetch"), of the file's parts that were
    cast or padded ("stage"), and of bytes on the device ("copy"), which `bytes_moved` counts too.
    `hits` counts loads by the nearest tier of their adapter ("device", "host", "disk", "source"),
    `evictions` evicted adapters by tier ("device", "host", "pinned"). `failures_by` counts failed
    loads, and `errors_by` the calls of `load`, `stream` and `pin` that raised, by the error's stage
    (or "none") and class.
    """

    fetches: int = 0
    loads: int = 0
    failures: int = 0
    departures: int = 0
    bytes_moved: int = 0
    seconds: Mapping[Stage, float] = field(default_factory=dict)
    nbytes: Mapping[Stage, int] = field(default_factory=dict)
    hits: Mapping[str, int] = field(default_factory=dict)
    evictions: Mapping[str, int] = field(default_factory=dict)
    failures_by: Mapping[tuple[str, str], int] = field(default_factory=dict)
    errors_by: Mapping[tuple[str, str], int] = field(default_factory=dict)


def kind_of(error: LoraxError) -> tuple[str, str]:
    """Return the stage, or "none", and the class of an error."""
    return error.stage or "none", type(error).__name__


class Telemetry:
    """Collects totals, and publishes events to subscribers on the loop; a trace is the first."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.tracer = tracer or Tracer()
        self._stories: dict[AdapterKey, tuple[Event, ...]] = {}
        self._subscribers: dict[object, tuple[type, Callable[[Any], None]]] = {}
        self.hits: Counter[Hit] = Counter(dict.fromkeys(get_args(Hit), 0))
        self._errors: Counter[tuple[str, str]] = Counter()
        self._counts: dict[str, Any] = dict.fromkeys(
            ("fetches", "loads", "failures", "departures"), 0
        )
        self._seconds: dict[Stage, float] = {}
        self._nbytes: dict[Stage, int] = {}
        self._checked: dict[AdapterKey, float] = {}
        self._failures: Counter[tuple[str, str]] = Counter()

    def subscribe(self, callback: Callable[[Any], None], kind: type) -> Callable[[], None]:
        token = object()
        self._subscribers[token] = kind, callback
        return lambda: self._subscribers.pop(token, None) and None

    @property
    def has_subscribers(self) -> bool:
        return self.tracer.on is not None or bool(self._subscribers)

    def publish(self, event: Event | CallEvent) -> None:
        """Add an event to its adapter's story and call the subscribers; log their exceptions."""
        if not isinstance(event, _DETAILS):
            story = self._stories.get(event.key, ())
            self._stories[event.key] = (*story[1 - STORY_LENGTH :], event)
        if isinstance(event, Event):
            self.note(event)
        for kind, callback in tuple(self._subscribers.values()):
            if not isinstance(event, kind):
                continue
            try:
                callback(event)
            except (Exception, CancelledError):
                _logger.exception("a subscriber failed on %s", type(event).__name__)

    def note(self, event: Event) -> None:
        """Show an event to the trace alone, which `publish` does again."""
        if self.tracer.on is not None:
            self.tracer.on.note(event)

    def call_ended(self, number: int, error: BaseException | None) -> None:
        if isinstance(error, LoraxError):
            self._errors[kind_of(error)] += 1
        if self._subscribers:
            self.publish(CallEnded(number, monotonic(), error))

    def count_hit(self, key: AdapterKey, hit: Hit, stage: Stage) -> None:
        """Count the tier at which a call found its adapter, which is in `stage` now."""
        self.hits[hit] += 1
        number = _call.get()
        if number is not None and self._subscribers:
            self.publish(CallWaits(number, monotonic(), key, hit, stage))

    def story(self, key: AdapterKey) -> tuple[Event, ...]:
        return self._stories.get(key, ())

    def shorten(self, key: AdapterKey) -> None:
        """Keep the last `REST_LENGTH` events of an adapter that left the device."""
        self._stories[key] = self._stories.get(key, ())[-REST_LENGTH:]

    def forget(self, key: AdapterKey) -> None:
        self._stories.pop(key, None)
        self._checked.pop(key, None)

    def count(self, what: str) -> None:
        self._counts[what] += 1

    def count_failure(self, error: LoraxError) -> None:
        """Count a load that ended with this error."""
        self.count("failures")
        self._failures[kind_of(error)] += 1

    def checked(self, key: AdapterKey, time: float) -> None:
        """Record the time from which the adapter can get a slot."""
        self._checked[key] = time

    def granted(self, key: AdapterKey, since: float, time: float) -> None:
        """Add the time in the queue of an adapter that was wanted at `since` and has its slot."""
        started = max(since, self._checked.pop(key, since))
        self.add_time("queue", max(0.0, time - started))
        self.tracer.span("files", None, "queue", key, start=int(started * 1e9)).end()

    def add_time(self, stage: Stage, seconds: float) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    def add_bytes(self, stage: Stage, nbytes: int) -> None:
        if nbytes:
            self._nbytes[stage] = self._nbytes.get(stage, 0) + nbytes

    @contextmanager
    def timed(self, stage: Stage, ref: Ref, name: str) -> Iterator[None]:
        """Add the time of the block to a stage's total, and a span to the trace."""
        started = perf_counter()
        with self.tracer.span("files", None, name, ref):
            try:
                yield
            finally:
                self.add_time(stage, perf_counter() - started)

    def statistics(self) -> Statistics:
        return Statistics(
            **self._counts,
            bytes_moved=self._nbytes.get("copy", 0),
            seconds=MappingProxyType(dict(self._seconds)),
            nbytes=MappingProxyType(dict(self._nbytes)),
            hits=MappingProxyType({str(hit): times for hit, times in self.hits.items()}),
            failures_by=MappingProxyType(dict(self._failures)),
            errors_by=MappingProxyType(dict(self._errors)),
        )


class Budget(NamedTuple):
    """The used part and the limit of a budget."""

    used: int
    limit: int


@dataclass(frozen=True, slots=True)
class Usage:
    """The use of each budget now; in bytes, except for `slots`.

    Attributes
    ----------
    slots
        Slots of the device's tables, including those being filled or drained.
    device_bytes
        The arena, in aligned extents.
    host_bytes
        Held file pages; pages that were only read ahead do not count.
    pinned_bytes
        Page-locked memory, in aligned extents.
    memory_bytes
        Copies of adapters from tensors.
    cache_bytes
        The disk cache's folder, shared by its processes, at this loader's last look; None before.
    leases
        Handles that are not released.
    waiting
        Waiters, of calls and of prefetches.
    """

    slots: Budget
    device_bytes: Budget
    host_bytes: Budget
    pinned_bytes: Budget
    memory_bytes: Budget
    cache_bytes: Budget | None
    leases: int
    waiting: int
