"""Record spans of the loader's work, and write them as a trace (docs/tracing.md).

All parts of a loader record into its `Tracer`, from any thread, without locks, into rings of
bounded size. It costs one test while no trace is recorded:

    recorder = tracer.on
    if recorder is not None:
        start = now()
    ...
    if recorder is not None:
        recorder.add("copies", "stream", "layer 3", start, now(), {"bytes": 4096})

`CopyTimes` and `LayerTimes` record the spans of one subject each; `Recorder.note` makes the spans
of slots out of the loader's events. `Trace`, which `AdapterLoader.trace` returns, is a recording in
Chrome's trace event format.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from math import inf, nextafter
from operator import index
from os import PathLike
from pathlib import Path
from threading import current_thread, get_ident
from time import perf_counter_ns
from typing import Any, Literal, NamedTuple, Protocol, Self, get_args

from lorax_async.errors import UsageError
from lorax_async.events import Event, Failed, Leaving, Resident, SlotGranted, SlotId
from lorax_async.types import AdapterKey, AdapterRef, Merge, MergedKey, Ref, TensorsKey

MAX_NAME_LENGTH = 64
_REVISED = re.compile(r"(\w[\w.-]*/\w[\w.-]*)@.+")
_UNSAFE = re.compile(r"[^\w.@:+ -]")


def name_of(ref: Ref) -> str:
    """Return the last part of an id or a location, without folders, host, query and token.

    A hub id loses its revision, as its key does, so that an adapter has one name in all rows.
    """
    if isinstance(ref, Merge | MergedKey):
        return "merge"
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


class Record(NamedTuple):
    """One span; `start` and `stop` are nanoseconds of `now`. `stop` is 0 while it is open."""

    row: Row
    lane: Hashable
    name: str
    start: int
    stop: int
    args: Mapping[str, object] | None


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

    def look(self, since: int = 0) -> tuple[list[Record], int]:
        """Return records that ended at `since` or later, and how many of these may be missing."""
        found, missing = list[Record](), 0
        for part in self._parts:
            kept = part.copy()
            found += [record for _, record in kept if record.stop >= since]
            if kept and kept[0][1].stop >= since:
                missing += kept[0][0]  # as many are older
        return found, missing

    def copy(self) -> Ring:
        """Return a ring with the same records, to which nothing is added."""
        ring = Ring(1)
        ring._parts = [part.copy() for part in self._parts]
        return ring


class TracedOccupancy:
    """An adapter's occupancy of a slot, with a unique number.

    `span` is its current state. The first `ready` layers are recorded, the last one up to `at`.
    """

    def __init__(self, number: int, name: str) -> None:
        self.number, self.name = number, name
        self.span: Record | None = None
        self.ready = self.at = 0


class Recorder:
    """Receive spans while at least one trace is recorded. Any thread may begin and end them."""

    def __init__(self) -> None:
        self.rings: tuple[Ring, ...] = ()
        self.occupancies: dict[int, TracedOccupancy] = {}
        """The current occupancy in each slot, by the slot's number."""
        self._open: dict[int, Record] = {}
        self._numbers = count(1)

    def add(
        self,
        row: Row,
        lane: Hashable,
        name: str,
        start: int,
        stop: int,
        args: Mapping[str, object] | None = None,
    ) -> None:
        """Record a span that has ended."""
        record = Record(row, lane, name, start, stop, args)
        for ring in self.rings:
            ring.add(record)

    def begin(self, row: Row, lane: Hashable, name: str, **args: object) -> Record:
        """Begin a span that may last long; traces show it before its end."""
        span = Record(row, lane, name, now(), 0, args)
        self._open[id(span)] = span
        return span

    def end(self, span: Record, **more: object) -> None:
        """End a span. Idempotent."""
        if self._open.pop(id(span), None) is not None:
            self.add(*span[:4], now(), {**(span.args or {}), **more})

    def unfinished(self) -> list[Record]:
        """Return the open spans as if they ended now."""
        spans, stop = tuple(self._open.values()), now()
        return [
            span._replace(stop=stop, args={**(span.args or {}), "unfinished": True})
            for span in spans
        ]

    def begin_occupancy(self, slot: int, name: str) -> TracedOccupancy:
        self.occupancies[slot] = occupancy = TracedOccupancy(next(self._numbers), name)
        return occupancy

    def occupancy_in(self, slot: int) -> TracedOccupancy:
        """Return the slot's occupancy; number 0 if it began before the recording."""
        return self.occupancies.get(slot) or TracedOccupancy(0, f"slot {slot}")

    def note(self, event: Event) -> None:
        """Record the state of a slot: filling, resident, leaving. Call on the loop.

        An occupancy that began before the recording is left out.
        """
        if event.slot is None:
            return
        slot = event.slot.index
        match event:
            case SlotGranted(nbytes=nbytes):
                occupancy = self.begin_occupancy(slot, name_of(event.key))
                name, args = occupancy.name, {"stay": occupancy.number, "bytes": nbytes}
                occupancy.span = self.begin("layers", slot, name, adapter=name, **args)
                occupancy.at = occupancy.span.start
            case Resident():
                self._enter(slot, "resident", outcome="resident")
            case Leaving():
                self._enter(slot, "leaving", outcome="leaving")
            case Failed(error=error):
                self._enter(slot, "leaving", outcome=type(error).__name__)

    def _enter(self, slot: int, state: str, outcome: str) -> None:
        """End the span of the state before with `outcome`, and begin that of `state`."""
        occupancy = self.occupancies.get(slot)
        if occupancy is not None and occupancy.span is not None and occupancy.span.name != state:
            self.end(occupancy.span, outcome=outcome)
            occupancy.span = self.begin("layers", slot, state, stay=occupancy.number)

    def record_ready(self, slot: int, layers: Sequence[int], watermark: int) -> None:
        """Record that the first `watermark` layers are on the device, before a pass sees them."""
        occupancy = self.occupancies.get(slot)
        if occupancy is None or occupancy.span is None:
            return
        stop = now()
        for layer in layers[occupancy.ready : watermark]:
            args = {"stay": occupancy.number, "layer": layer}
            self.add("layers", slot, f"layer {layer}", occupancy.at, stop, args)
            occupancy.at = stop
        occupancy.ready = watermark

    def end_occupancy(self, slot: int) -> None:
        """Record that the slot is free."""
        occupancy = self.occupancies.pop(slot, None)
        if occupancy is not None and occupancy.span is not None:
            self.end(occupancy.span, outcome="left")


class Tracer:
    """The loader's switch: its parts record to `on` unless that is None."""

    def __init__(self) -> None:
        self.on: Recorder | None = None

    def begin(self, ring: Ring, occupants: Mapping[int, str]) -> Recorder:
        """Record into `ring` as well. `occupants` names the adapters in slots. Call on the loop."""
        recorder = self.on
        if recorder is None:
            recorder = Recorder()
            for slot, name in occupants.items():
                recorder.begin_occupancy(slot, name)
        recorder.rings = (*recorder.rings, ring)
        self.on = recorder
        return recorder

    def end(self, ring: Ring) -> None:
        """Stop recording into `ring`; the last ring switches the tracer off. Call on the loop."""
        recorder = self.on
        if recorder is not None:
            recorder.rings = tuple(other for other in recorder.rings if other is not ring)
            if not recorder.rings:
                self.on = None


# -- spans of one subject --------------------------------------------------------------------------


class CopyTimes:
    """Record a layer group's copy through staging and the device. Create when it begins.

    Call from any thread.
    """

    def __init__(self, recorder: Recorder, slot: int, layer: int) -> None:
        occupancy = recorder.occupancy_in(slot)
        self.start = now()
        self._recorder = recorder
        self._name = f"layer {layer}"
        self._args = {"stay": occupancy.number, "layer": layer, "adapter": occupancy.name}

    def record_staging(self, buffer: int | None, start: int, what: str) -> None:
        """Record that a buffer was filled from `start` until now; None is a pinned image."""
        lane = IMAGE if buffer is None else buffer
        self._recorder.add("staging", lane, what, start, now(), self._args)

    def record_until_free(self, buffer: int | None, start: int) -> Callable[[Future[None]], None]:
        """Return a callback for the copy's ticket that records how long its buffer was held."""
        return lambda _: self.record_staging(buffer, start, self._name)

    def record_copy(self, ticket: Future[None], nbytes: int, *, in_stream: bool) -> None:
        """Record the copy behind `ticket`, executed by a copy stream or by this thread."""
        lane: Hashable = STREAM if in_stream else current_thread().name.removeprefix("lorax-")
        start = now() if in_stream else self.start

        def done(ticket: Future[None]) -> None:
            error = ticket.exception()
            outcome = "done" if error is None else type(error).__name__
            args = {**self._args, "bytes": nbytes, "outcome": outcome}
            self._recorder.add("copies", lane, self._name, start, now(), args)

        ticket.add_done_callback(done)


@dataclass(slots=True)
class _LayerPass:
    """A layer in one thread: when it was reached, entered (0: not yet) and last computed."""

    layer: int
    reached: int
    entered: int = 0
    last: int = 0


class LayerTimes:
    """Record the layers of a batch in the threads that compute it; `slots` are its adapters'.

    A layer ends with the last call of `leave` in it, or else when the next layer is reached.
    """

    def __init__(self, recorder: Recorder, slots: Iterable[int]) -> None:
        self._recorder = recorder
        self._numbers = [recorder.occupancy_in(slot).number for slot in slots]
        self._current: dict[int, _LayerPass] = {}

    def reach(self, layer: int) -> None:
        """Note that this thread is at the gate of `layer`: the one before it is computed."""
        thread = get_ident()
        current = self._current.get(thread)
        if current is not None:
            if current.layer == layer and current.entered:
                return
            self._record(thread, current, current.last or now())
        self._current[thread] = _LayerPass(layer, now())

    def enter(self) -> None:
        """Note that the gate has opened."""
        thread = get_ident()
        current = self._current.get(thread)
        if current is not None and not current.entered:
            time = now()
            self._record(thread, current, time)
            current.entered = time

    def leave(self) -> None:
        """Note that a module of the layer is computed."""
        current = self._current.get(get_ident())
        if current is not None and current.entered:
            current.last = now()

    def end(self) -> None:
        """Record the last layers."""
        for thread, current in tuple(self._current.items()):
            self._record(thread, current, current.last or now())
        self._current.clear()

    def _record(self, thread: int, current: _LayerPass, stop: int) -> None:
        """Record the layer once it was entered, before that the wait for it."""
        args = {"layer": current.layer, "stays": self._numbers}
        name = f"layer {current.layer}" if current.entered else f"wait for layer {current.layer}"
        self._recorder.add("compute", thread, name, current.entered or current.reached, stop, args)


# -- the trace -------------------------------------------------------------------------------------

TRACE_LIMIT = 32_768
"""Spans, of which a load of 32 layers has about 150; and as many of "compute"."""

ANOTHER = "another adapter"
"""The name of adapters whose names the viewer may not see."""

ChromeEvent = dict[str, object]

_LANES = {"connections": "connection", "staging": "buffer", "layers": "slot", "compute": "thread"}
_CONCURRENT = {"requests", "files"}
"""Rows whose spans are independent: none is drawn inside another."""


class _TraceHandle(Protocol):
    @property
    def slot(self) -> SlotId: ...


class Trace:
    """A recording of a `with` block. `as_json` and `write` work inside the block and after it.

    Raises `UsageError` unless `limit` is a positive integer.
    """

    def __init__(
        self, tracer: Tracer, limit: int, occupants: Callable[[], Mapping[int, str]]
    ) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise UsageError(f"limit must be a positive integer, not {limit!r}")
        self._tracer = tracer
        self._occupants = occupants
        self._ring = Ring(limit)
        self._recorder: Recorder | None = None
        self._began = now()
        self._unfinished: list[Record] | None = None
        """The spans that had not ended when the recording did."""

    def __enter__(self) -> Self:
        return self.start()

    def start(self) -> Self:
        """Record until `stop`. Raises `UsageError` if called twice."""
        if self._recorder is not None or self._unfinished is not None:
            raise UsageError("a trace can be recorded only once; get another one from the loader")
        self._began = now()
        self._recorder = self._tracer.begin(self._ring, self._occupants())
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop recording; cut what has not ended. Idempotent."""
        if self._recorder is None:
            return
        self._unfinished = self._recorder.unfinished()
        self._tracer.end(self._ring)
        self._ring = self._ring.copy()  # a thread may still add to the old one
        self._recorder = None

    @property
    def dropped(self) -> int:
        """How many recorded spans are gone because of the limit."""
        return self._ring.look()[1]

    @contextmanager
    def compute(
        self, layer: int, *handles: _TraceHandle, name: str | None = None
    ) -> Iterator[None]:
        """Record that the block computes `layer` with these adapters, for engines of your own.

        Works in any thread and has no effect when nothing is recorded. `attach` reports its layers
        by itself. Raises `UsageError`, before the block, if `layer` is not an integer.
        """
        try:
            number = index(layer)
        except TypeError:
            raise UsageError(f"a layer must be an integer, not {layer!r}") from None
        recorder = self._recorder
        if recorder is None:
            yield
            return
        # Look the slots up now: the block may release the handles.
        stays = [recorder.occupancy_in(handle.slot.index).number for handle in handles]
        args = {"layer": number, "stays": stays}
        text = f"layer {number}" if name is None else str(name)[:200]
        start = now()
        try:
            yield
        finally:
            recorder.add("compute", get_ident(), text, start, now(), args)

    def as_json(
        self,
        since: int | None = None,
        until: int | None = None,
        *,
        called: Mapping[str, str] | None = None,
    ) -> dict[str, object]:
        """Return the trace as an object of Chrome's trace event format, which json can write.

        `since` and `until`, in nanoseconds of `time.perf_counter_ns`, select a part: spans across
        a bound are cut there, and times count from `since`. Takes some milliseconds, in any
        thread. `called` maps the trace's names of adapters to others; adapters that are not in it
        become "another adapter".
        """
        began = self._began if since is None else max(since, self._began)
        # First the open ones: those that end meanwhile are among the records, too.
        recorder = self._recorder
        unfinished = (self._unfinished or []) if recorder is None else recorder.unfinished()
        records, dropped = self._ring.look(began)
        starts = {each.start for each in unfinished}
        ended = {record[:4] for record in records if record.start in starts}
        records += [each for each in unfinished if each[:4] not in ended]
        if called is not None:
            records = [_rename(record, called) for record in records]
        return {
            "traceEvents": as_events(records, began, until),
            "displayTimeUnit": "ms",
            "otherData": {"producer": "lorax_async", "dropped": dropped},
        }

    def encoded(self, called: Mapping[str, str] | None = None) -> bytes:
        """Return `as_json` as the bytes of a file. Blocks, but never holds the GIL for long."""
        found = self.as_json(called=called)
        events = found.pop("traceEvents")
        assert isinstance(events, list)
        # One call of json for thousands of events would stall an event loop beside it.
        each = ",".join(map(_as_text, events))
        return f'{{"traceEvents":[{each}],{_as_text(found)[1:]}'.encode()

    def write(self, path: str | PathLike[str]) -> None:
        """Write a JSON file. Blocks; raises `OSError`."""
        Path(path).write_bytes(self.encoded())


def _as_text(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _rename(record: Record, called: Mapping[str, str]) -> Record:
    if record.row == "files":
        return record._replace(lane=called.get(str(record.lane), ANOTHER))
    args = record.args or {}
    adapter = args.get("adapter")
    if not isinstance(adapter, str):
        return record
    given = called.get(adapter, ANOTHER)
    verb = record.name.removesuffix(adapter)  # "load pirate"
    name = record.name if verb == record.name else verb + given
    return record._replace(name=name, args={**args, "adapter": given})


# -- Chrome's events -------------------------------------------------------------------------------


def as_events(records: Iterable[Record], began: int, ended: int | None = None) -> list[ChromeEvent]:
    """Return the events of records between `began` and `ended`, in nanoseconds.

    Metadata comes first, then everything by time, in microseconds since `began`.
    """
    by_row: dict[Row, list[Record]] = {row: [] for row in get_args(Row)}
    for record in records:
        if record.stop >= began and (ended is None or record.start <= ended):
            by_row[record.row].append(_shorten(record, began, ended))
    names, spans = list[ChromeEvent](), list[ChromeEvent]()
    for pid, (row, its) in enumerate(by_row.items(), 1):
        if its:
            names += _metadata("process", row, pid, 0)
        for tid, (title, in_lane) in enumerate(_lanes(row, its), 1):
            names += _metadata("thread", title, pid, tid)
            for record in in_lane:
                start, length = record.start - began, record.stop - record.start
                times = {"ts": microseconds(start), "dur": microseconds(length)}
                event = {"ph": "X", "name": record.name, "cat": row, **times}
                spans.append(event | {"pid": pid, "tid": tid, "args": dict(record.args or {})})
    spans += _arrows(spans)
    return names + sorted(spans, key=lambda event: event["ts"])  # type: ignore[arg-type, return-value]


def microseconds(nanoseconds: int) -> float:
    """Return a float that truncates to the same nanosecond.

    Older releases of Perfetto truncate, and drop one of two touching spans if they overlap then.
    """
    value = nanoseconds / 1e3
    return value if int(value * 1e3) == nanoseconds else nextafter(value, inf)


def _shorten(record: Record, began: int, ended: int | None) -> Record:
    """Cut a span at the bounds, and say so in its args."""
    if record.start < began:
        args = {**(record.args or {}), "began_before": True}
        record = record._replace(start=began, args=args)
    if ended is not None and record.stop > ended:
        record = record._replace(stop=ended, args={**(record.args or {}), "goes_on": True})
    return record


def _lanes(row: Row, records: Iterable[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Yield titles and spans of which any two are disjoint, or one lies inside the other."""
    by_lane: dict[Hashable, list[Record]] = {}
    for record in sorted(records, key=lambda each: (each.start, -each.stop)):
        by_lane.setdefault(record.lane, []).append(record)
    lanes, threads = list(by_lane), count(1)
    if row != "compute":  # numbers first; texts keep the order of their first spans
        lanes.sort(key=lambda lane: lane if isinstance(lane, int) else 1 << 63)
    for lane in lanes:
        title = row if lane is None else str(lane)
        if isinstance(lane, int):
            # Thread ids mean nothing to a reader: number threads in the order of their first spans.
            title = f"{_LANES[row]} {next(threads) if row == 'compute' else lane}"
        elif lane == STREAM:
            title = "copy stream"
        its = _in_sequence(by_lane[lane]) if lane == STREAM else by_lane[lane]
        for number, parallel in enumerate(_side_by_side(its, nested=row not in _CONCURRENT), 1):
            yield f"{title} ({number})" if number > 1 else title, parallel


def _side_by_side(records: Iterable[Record], *, nested: bool) -> list[list[Record]]:
    """Deal spans, by their starts, to as few lanes as needed; `nested` ones may be in others."""
    found: list[tuple[list[Record], list[int]]] = []  # with the ends of the spans around the next
    for record in records:
        for _, ends in found:
            while ends and ends[-1] <= record.start:
                ends.pop()
        fitting = (lane for lane in found if not lane[1] or (nested and record.stop <= lane[1][-1]))
        its, ends = next(fitting, ([], []))
        if not its:
            found.append((its, ends))
        its.append(record)
        ends.append(record.stop)
    return [its for its, _ in found]


def _in_sequence(records: Iterable[Record]) -> Iterator[Record]:
    """Begin each copy of a stream when the one before has ended; it was queued until then."""
    free = 0
    for record in sorted(records, key=lambda each: (each.stop, each.start)):
        start = max(record.start, free)
        free = max(free, record.stop)
        args = {**(record.args or {}), "queued_us": (start - record.start) / 1e3}
        yield record._replace(start=min(start, record.stop), args=args)


def _metadata(what: str, name: str, pid: int, tid: int) -> list[ChromeEvent]:
    place: ChromeEvent = {"ph": "M", "pid": pid, "tid": tid, "ts": 0}
    order = pid if what == "process" else tid
    return [
        {**place, "name": f"{what}_name", "args": {"name": name}},
        {**place, "name": f"{what}_sort_index", "args": {"sort_index": order}},
    ]


def _arrows(spans: Iterable[ChromeEvent]) -> Iterator[ChromeEvent]:
    """Yield an arrow from each layer's last copy to its first computation."""
    copies: dict[tuple[object, object], Any] = {}
    computed: dict[tuple[object, object], Any] = {}
    for span in spans:
        event: Any = span
        args = event["args"]
        if event["cat"] == "copies":
            key = args.get("stay"), args.get("layer")
            last = copies.get(key)
            if last is None or last["ts"] + last["dur"] < event["ts"] + event["dur"]:
                copies[key] = event
        elif event["cat"] == "compute" and not event["name"].startswith("wait "):
            for stay in args.get("stays", ()):
                first = computed.setdefault((stay, args.get("layer")), event)
                if event["ts"] < first["ts"]:
                    computed[stay, args.get("layer")] = event
    number = count(1)
    for key, copy in copies.items():
        first = computed.get(key)
        if key[0] != 0 and first is not None and first["ts"] >= copy["ts"]:
            arrow: ChromeEvent = {"name": "layer", "cat": "flow", "id": next(number)}
            for event, more in ((copy, {"ph": "s"}), (first, {"ph": "f", "bp": "e"})):
                yield arrow | more | {name: event[name] for name in ("pid", "tid", "ts")}
