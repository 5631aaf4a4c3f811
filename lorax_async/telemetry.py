"""What a store or loader reports of its work: events, statistics, budgets and spans.

`Telemetry` counts, and calls the subscribers of events. Every part records spans through the
`Tracer`, in any thread, without locks, into rings of bounded size (docs/tracing.md):

    with tracer.span("connections", 3, "connect") as span:
        ...
        span.set(outcome="open")

A span that outlives its block is ended by `Span.end` or `Span.end_with`. `Recorder.note` makes the
spans of slots out of the loader's events.
"""

from __future__ import annotations

import logging
import re
from asyncio import CancelledError
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from time import monotonic, perf_counter, perf_counter_ns
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self, get_args

from lorax_async.errors import LoraxError, Stage, class_name
from lorax_async.events import (
    BytesMoved,
    CallBegan,
    CallEnded,
    CallEvent,
    CallWaits,
    Event,
    Failed,
    HeaderChecked,
    Hit,
    LayerReady,
    Leaving,
    Resident,
    SlotFreed,
    SlotGranted,
)
from lorax_async.types import AdapterKey, AdapterRef, Ref, TensorsKey

_logger = logging.getLogger("lorax_async")

STORY_LENGTH = 16
"""Events kept per adapter; `_DETAILS` are published but not kept."""

_DETAILS = HeaderChecked | BytesMoved | LayerReady | SlotFreed | CallEvent
"""Events that are made only if there are subscribers, and calls."""

REST_LENGTH = 3
"""Events kept per adapter that is not on the device: its last occupancy with its end."""

_call: ContextVar[int | None] = ContextVar("number of a loader's call", default=None)
_call_numbers = count(1)


class LoadCall:
    """The `with` block of a call: publish its beginning and end, and count its error.

    A class, because a generator would add a microsecond to every hit.
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
    return error.stage or "none", class_name(error)


class Telemetry:
    """Collects totals; publishes events on the loop, to a trace and then to other subscribers."""

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
        """Pass an event to the trace only, ahead of `publish`, which passes it again."""
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


# -- spans -----------------------------------------------------------------------------------------

MAX_NAME_LENGTH = 64
_REVISED = re.compile(r"(\w[\w.-]*/\w[\w.-]*)@.+")
_UNSAFE = re.compile(r"[^\w.@:+ -]")


def name_of(ref: Ref) -> str:
    """Return the last part of an id or a location, without folders, host, query and token.

    A hub id loses its revision, as its key does, so that an adapter has one name in all rows.
    """
    if isinstance(ref, TensorsKey):
        return f"tensors {ref.digest[:8]}"
    if isinstance(ref, AdapterRef) and isinstance(ref.id, str) and ref.source in {None, "hub"}:
        revised = _REVISED.fullmatch(ref.id)
        if revised is not None:
            return last_part(revised[1])
    return last_part(ref.location if isinstance(ref, AdapterKey) else ref.text)


def last_part(text: str) -> str:
    """Return the last part of a path, a URL or an id."""
    plain = re.split("[?#]", text, maxsplit=1)[0]
    _, elsewhere, rest = plain.partition("://")
    if elsewhere:
        plain = rest.partition("/")[2]  # drops the host or bucket
    name = plain.rstrip("/").rpartition("/")[2].rpartition("\\")[2]
    return _UNSAFE.sub("_", name)[:MAX_NAME_LENGTH] or "adapter"


now = perf_counter_ns

Row = Literal["requests", "files", "connections", "staging", "copies", "layers", "compute"]

IMAGE = "image"
"""The staging lane of page-locked images, which are not buffers of the ring."""

STREAM = "stream"
"""The lane of copies that a device executes by itself, one after the other."""

PASSES = "passes"
"""The lane of whole passes, beside those of the threads that compute layers."""


class Record(NamedTuple):
    """A span; `start` and `stop` are nanoseconds of `now`. `stop` is 0 while it is open."""

    row: Row
    lane: Hashable
    name: str
    start: int
    stop: int
    args: dict[str, object]


class Ring:
    """Keep the last `limit` records, and as many of "compute". Adding never waits.

    "compute" has a part of its own: every pass records each layer, which would soon evict the
    spans of a slow load.
    """

    def __init__(self, limit: int) -> None:
        self._parts: list[deque[tuple[int, Record]]] = [deque(maxlen=limit), deque(maxlen=limit)]
        self._numbers = count(), count()

    def add(self, record: Record) -> None:
        part = record.row == "compute"
        self._parts[part].append((next(self._numbers[part]), record))

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def look(self, since: int = 0) -> tuple[list[Record], int]:
        """Return records that ended at `since` or later, and how many of these may be missing."""
        found, missing = list[Record](), 0
        for part in self._parts:
            kept = part.copy()
            found += [record for _, record in kept if record.stop >= since]
            if kept and kept[0][1].stop >= since:
                missing += kept[0][0]  # as many are older
        return found, missing


class Span:
    """Work that is recorded when its block ends, however it ends, or by `end`; once at most.

    It may end in another thread than it began in. A span that never ends is not recorded.
    """

    __slots__ = ("_record", "_recorder")

    def __init__(self, recorder: Recorder | None, record: Record) -> None:
        self._recorder, self._record = recorder, record

    @property
    def recording(self) -> bool:
        """Whether the span's args are worth looking up."""
        return self._recorder is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        if self._recorder is not None:
            if kind is not None:
                self._record.args.setdefault("outcome", kind.__name__)
            self.end()

    def set(self, **args: object) -> None:
        """Add to the span's args."""
        if self._recorder is not None:
            self._record.args.update(args)

    def set_slot(self, slot: int) -> None:
        """Add the number of the occupancy of `slot`."""
        if self._recorder is not None:
            self._record.args["stay"] = self._recorder.occupancy_in(slot).number

    def end(self, stop: int = 0, /, **args: object) -> None:
        """End the span, now or at `stop`, in nanoseconds of `now`. Idempotent."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.record(self.as_record(stop or now(), **args), self)

    def end_with(self, future: Future[None], **args: object) -> None:
        """End the span when `future` is done, with its outcome."""

        def end(future: Future[None]) -> None:
            error = future.exception()
            self.end(outcome="done" if error is None else class_name(error), **args)

        if self._recorder is not None:
            future.add_done_callback(end)

    def as_record(self, stop: int, **args: object) -> Record:
        return self._record._replace(stop=stop, args=self._record.args | args)


NO_SPAN = Span(None, Record("files", None, "", 0, 0, {}))
"""The span of all work while nothing is recorded."""


@dataclass(slots=True, eq=False)
class TracedOccupancy:
    """An adapter's occupancy of a slot, whose `number` is "stay" in args.

    `span` is that of its phase. `layers` are not ready yet; `at` is when the one before them was.
    """

    number: int
    name: str
    phase: str = ""
    span: Span = NO_SPAN
    layers: Sequence[int] = ()
    at: int = 0


class Recorder:
    """Receive spans from any thread while at least one trace is recorded.

    `occupants` names the adapters in slots.
    """

    def __init__(self, occupants: Mapping[int, str]) -> None:
        self.rings: tuple[Ring, ...] = ()
        self._open: dict[int, Span] = {}
        self._numbers = count(1)
        self._occupancies: dict[int, TracedOccupancy] = {}
        for slot, name in occupants.items():
            self._occupy(slot, name)

    def begin(self, record: Record) -> Span:
        """Begin a span. Traces show it before its end if it may last long."""
        span = Span(self, record)
        if record.row in {"requests", "layers"} or record[:2] == ("compute", PASSES):
            self._open[id(span)] = span
        return span

    def record(self, record: Record, span: Span | None = None) -> None:
        """Record a span that has ended, then close it. Traces look at open ones first."""
        for ring in self.rings:
            ring.add(record)
        self._open.pop(id(span), None)

    def unfinished(self) -> list[Record]:
        """Return the open spans as if they ended now."""
        spans, stop = tuple(self._open.values()), now()
        return [span.as_record(stop, unfinished=True) for span in spans]

    def occupancy_in(self, slot: int) -> TracedOccupancy:
        """Return the slot's occupancy; number 0 if it is not known."""
        return self._occupancies.get(slot) or TracedOccupancy(0, f"slot {slot}")

    def note(self, event: Event) -> None:
        """Record phases and layers of a slot. Call on the loop; noting an event twice is harmless.

        An occupancy that began before the recording is left out.
        """
        if event.slot is None:
            return
        slot, time = event.slot.index, now()
        occupancy = self.occupancy_in(slot)
        match event:
            case SlotGranted():
                occupancy = self._occupy(slot, name_of(event.key))
                args = {"stay": occupancy.number, "bytes": event.nbytes, "adapter": occupancy.name}
                occupancy.span = self.begin(Record("layers", slot, occupancy.name, time, 0, args))
                occupancy.layers, occupancy.at = event.layers, time
            case LayerReady():
                while occupancy.layers and occupancy.layers[0] <= event.layer:
                    layer, *occupancy.layers = occupancy.layers
                    args = {"stay": occupancy.number, "layer": layer}
                    name = f"layer {layer}"
                    self.record(Record("layers", slot, name, occupancy.at, time, args))
                    occupancy.at = time
            case Resident():
                self._enter(slot, "resident", "resident")
            case Leaving():
                self._enter(slot, "leaving", "leaving")
            case Failed():
                self._enter(slot, "leaving", class_name(event.error))
            case SlotFreed():
                self._occupancies.pop(slot, None)
                occupancy.span.end(outcome="left")

    def _occupy(self, slot: int, name: str) -> TracedOccupancy:
        self._occupancies[slot] = occupancy = TracedOccupancy(next(self._numbers), name)
        return occupancy

    def _enter(self, slot: int, phase: str, outcome: str) -> None:
        """End the phase before with `outcome`, and begin `phase`."""
        occupancy = self.occupancy_in(slot)
        if occupancy.span.recording and occupancy.phase != phase:
            occupancy.span.end(outcome=outcome)
            record = Record("layers", slot, phase, now(), 0, {"stay": occupancy.number})
            occupancy.phase, occupancy.span = phase, self.begin(record)


class Tracer:
    """Begins all spans of a loader. `on` is None while nothing is recorded."""

    def __init__(self) -> None:
        self.on: Recorder | None = None

    def span(
        self,
        row: Row,
        lane: Hashable,
        name: str,
        adapter: Ref | None = None,
        *,
        slot: int | None = None,
        start: int | None = None,
        **args: object,
    ) -> Span:
        """Begin a span, in any thread. While nothing is recorded, return `NO_SPAN`.

        An `adapter` is the lane in "files", and completes the name elsewhere. `slot` stands for the
        adapter in it. `start`, in nanoseconds of `now`, is for spans that began before.
        """
        recorder = self.on
        if recorder is None:
            return NO_SPAN
        if slot is not None:
            occupancy = recorder.occupancy_in(slot)
            args |= {"stay": occupancy.number, "adapter": occupancy.name}
        if adapter is not None:
            args["adapter"] = adapter_name = name_of(adapter)
            if row == "files":
                lane = adapter_name
            else:
                name = f"{name} {adapter_name}"
        time = now() if start is None else min(start, now())  # a float may be rounded up
        return recorder.begin(Record(row, lane, name, time, 0, args))

    def occupancies_in(self, slots: Iterable[int]) -> list[int]:
        """Return the numbers of the occupancies of slots, which are "stays" in args."""
        recorder = self.on
        return [] if recorder is None else [recorder.occupancy_in(slot).number for slot in slots]

    def begin(self, ring: Ring, occupants: Mapping[int, str]) -> Recorder:
        """Record into `ring` as well. `occupants` names the adapters in slots. Call on the loop."""
        recorder = self.on or Recorder(occupants)
        recorder.rings = (*recorder.rings, ring)
        self.on = recorder
        return recorder

    def end(self, ring: Ring) -> None:
        """Stop recording into `ring`; the last ring switches the tracer off. Call on the loop."""
        recorder = self.on
        if recorder is not None:
            recorder.rings = tuple(other for other in recorder.rings if other is not ring)
            self.on = recorder if recorder.rings else None
