"""Record spans of time from any thread, without locks, into rings of bounded size.

recorder = tracer.on             # None while no trace is recorded: that test is the whole cost
if recorder is not None:
    start = now()
...
if recorder is not None:
    recorder.add("copies", "stream", "layer 3", start, now(), {"bytes": 4096})

`CopyTimes`, `LayerTimes` and `Stays` record the spans of one subject each.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from threading import Lock, current_thread, get_ident
from time import perf_counter_ns
from typing import Literal, NamedTuple

from lorax_async.types import AdapterKey, AdapterRef, Merge, MergedKey, Ref, TensorsKey

LONGEST = 64
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
    return _plain(plain.rstrip("/").rpartition("/")[2].rpartition("\\")[2])


def _plain(name: str) -> str:
    return _UNSAFE.sub("_", name)[:LONGEST] or "adapter"


now = perf_counter_ns

Row = Literal["requests", "files", "connections", "staging", "copies", "layers", "compute"]
Args = dict[str, object]

IMAGE = "image"
"""The staging lane of page-locked images, which are not buffers of the ring."""

STREAM = "stream"
"""The lane of copies that a device executes by itself, one after the other."""


class Record(NamedTuple):
    """One span; `start` and `stop` are nanoseconds of `now`."""

    row: Row
    lane: Hashable
    name: str
    start: int
    stop: int
    args: Mapping[str, object] | None


class OpenSpan:
    """A span that has not ended. Any thread may end it."""

    __slots__ = ("args", "lane", "name", "row", "start")

    def __init__(self, row: Row, lane: Hashable, name: str, args: Args) -> None:
        self.row: Row = row
        self.lane = lane
        self.name = name
        self.args = args
        self.start = now()

    def until(self, stop: int, **more: object) -> Record:
        return Record(self.row, self.lane, self.name, self.start, stop, {**self.args, **more})


class Stay:
    """An adapter's occupancy of a slot, with a unique number.

    `span` is its current state. The first `ready` layers are recorded, the last one up to `at`.
    """

    __slots__ = ("at", "name", "number", "ready", "span")

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name
        self.span: OpenSpan | None = None
        self.ready = 0
        self.at = 0


# -- rings -----------------------------------------------------------------------------------------


class RingContents(NamedTuple):
    """The records of a ring in order of arrival, and the count of evicted ones, per part."""

    parts: tuple[tuple[Sequence[Record], int], ...]

    def since(self, time: int) -> tuple[list[Record], int]:
        """Return records that ended at `time` or later, and how many of these may be missing."""
        found, missing = [], 0
        for records, evicted in self.parts:
            found += [record for record in records if record.stop >= time]
            if evicted and records[0].stop >= time:
                missing += evicted
        return found, missing


class Ring:
    """Keep the last `limit` records, and as many of "compute". Adding never waits.

    "compute" has a part of its own: every pass records each layer, which would soon evict the
    spans of a slow load.
    """

    def __init__(self, limit: int) -> None:
        self._computed = _RingPart(limit)
        self._others = _RingPart(limit)

    def add(self, record: Record) -> None:
        (self._computed if record.row == "compute" else self._others).add(record)

    def look(self) -> RingContents:
        return RingContents((self._others.look(), self._computed.look()))


class _RingPart:
    """The last records and a count of all. Only threads that look wait, for each other."""

    def __init__(self, limit: int) -> None:
        self._records: deque[Record] = deque(maxlen=limit)
        self._count = count()
        self._looks = 0
        self._looking = Lock()

    def add(self, record: Record) -> None:
        self._records.append(record)
        next(self._count)

    def look(self) -> tuple[Sequence[Record], int]:
        with self._looking:
            added = next(self._count) - self._looks  # reading the counter advances it
            self._looks += 1
        records = self._records.copy()
        return records, max(0, added - len(records))


# -- recording -------------------------------------------------------------------------------------


class Recorder:
    """Receive spans while at least one trace is recorded."""

    def __init__(self) -> None:
        self.rings: tuple[Ring, ...] = ()
        self.stays: dict[int, Stay] = {}
        """The current stay in each slot, by the slot's number."""
        self._open: dict[int, OpenSpan] = {}
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
        """Record a span that has ended. Call from any thread."""
        record = Record(row, lane, name, start, stop, args)
        for ring in self.rings:
            ring.add(record)

    def begin(self, row: Row, lane: Hashable, name: str, **args: object) -> OpenSpan:
        """Begin a span that may last long; traces show it before its end. Call from any thread."""
        span = OpenSpan(row, lane, name, args)
        self._open[id(span)] = span
        return span

    def end(self, span: OpenSpan, **more: object) -> None:
        """End a span. Idempotent."""
        if self._open.pop(id(span), None) is not None:
            record = span.until(now(), **more)
            for ring in self.rings:
                ring.add(record)

    def unfinished(self) -> list[Record]:
        """Return the open spans as if they ended now."""
        spans = tuple(self._open.values())
        stop = now()
        return [span.until(stop, unfinished=True) for span in spans]

    def moved_in(self, slot: int, name: str) -> Stay:
        self.stays[slot] = stay = Stay(next(self._numbers), name)
        return stay

    def stay_in(self, slot: int) -> Stay:
        """Return the slot's stay; number 0 if it began before the recording."""
        return self.stays.get(slot) or Stay(0, f"slot {slot}")


class Tracer:
    """The loader's switch: its parts record to `on` unless that is None."""

    def __init__(self) -> None:
        self.on: Recorder | None = None

    def begin(self, ring: Ring, occupants: Mapping[int, str]) -> Recorder:
        """Record into `ring`, too. `occupants` names the adapters in slots now. Call on
        the loop.
        """
        recorder = self.on
        if recorder is None:
            recorder = Recorder()
            for slot, name in occupants.items():
                recorder.moved_in(slot, name)
        recorder.rings = (*recorder.rings, ring)
        self.on = recorder
        return recorder

    def end(self, ring: Ring) -> None:
        """Stop recording into `ring`; the last ring switches the tracer off. Call on the loop."""
        recorder = self.on
        if recorder is not None:
            recorder.rings = tuple(each for each in recorder.rings if each is not ring)
            if not recorder.rings:
                self.on = None


# -- spans of one subject --------------------------------------------------------------------------


class CopyTimes:
    """Record a layer group's copy through staging and the device. Create when it begins.

    Call from any thread.
    """

    def __init__(self, recorder: Recorder, slot: int, layer: int) -> None:
        stay = recorder.stay_in(slot)
        self.start = now()
        self._recorder = recorder
        self._name = f"layer {layer}"
        self._args = {"stay": stay.number, "layer": layer, "adapter": stay.name}

    def staged(self, buffer: int | None, start: int, what: str) -> None:
        """Record that a buffer was filled from `start` until now; None is a pinned image."""
        lane = IMAGE if buffer is None else buffer
        self._recorder.add("staging", lane, what, start, now(), self._args)

    def until_free(self, buffer: int | None, start: int) -> Callable[[Future[None]], None]:
        """Return a callback for the copy's ticket that records how long its buffer was held."""

        def free(_: Future[None]) -> None:
            self.staged(buffer, start, self._name)

        return free

    def asked(self, ticket: Future[None], nbytes: int, *, in_stream: bool) -> None:
        """Record the copy behind `ticket`, executed by a copy stream or by this thread."""
        lane: Hashable = STREAM if in_stream else current_thread().name.removeprefix("lorax-")
        start = now() if in_stream else self.start

        def done(ticket: Future[None]) -> None:
            error = ticket.exception()
            outcome = "done" if error is None else type(error).__name__
            args = {**self._args, "bytes": nbytes, "outcome": outcome}
            self._recorder.add("copies", lane, self._name, start, now(), args)

        ticket.add_done_callback(done)


class _LayerPass:
    """A layer in one thread: when it was asked for, entered (0: not yet) and last computed."""

    __slots__ = ("asked", "entered", "last", "layer")

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.asked = now()
        self.entered = self.last = 0


class LayerTimes:
    """Record the layers of a batch in the threads that compute it; `slots` are its adapters'.

    A layer ends with the last module that `left` it, or else when the next layer is reached.
    """

    def __init__(self, recorder: Recorder, slots: Iterable[int]) -> None:
        self._recorder = recorder
        self._stays = [recorder.stay_in(slot).number for slot in slots]
        self._current: dict[int, _LayerPass] = {}

    def reached(self, layer: int) -> None:
        """Note that this thread is at the gate of `layer`: the one before it is computed."""
        thread = get_ident()
        current = self._current.get(thread)
        if current is not None and current.layer == layer and current.entered:
            return
        if current is not None:
            self._record(thread, current)
        self._current[thread] = _LayerPass(layer)

    def entered(self) -> None:
        """Note that the gate has opened."""
        thread = get_ident()
        current = self._current.get(thread)
        if current is None or current.entered:
            return
        current.entered = now()
        self._record_wait(thread, current, current.entered)

    def left(self) -> None:
        """Note that a module of the layer is computed."""
        current = self._current.get(get_ident())
        if current is not None and current.entered:
            current.last = now()

    def end(self) -> None:
        """Record the last layers."""
        for thread, current in tuple(self._current.items()):
            self._record(thread, current)
        self._current.clear()

    def _record(self, thread: int, current: _LayerPass) -> None:
        stop = current.last or now()
        if not current.entered:
            self._record_wait(thread, current, stop)
            return
        self._add(thread, f"layer {current.layer}", current.layer, current.entered, stop)

    def _record_wait(self, thread: int, current: _LayerPass, stop: int) -> None:
        self._add(thread, f"wait for layer {current.layer}", current.layer, current.asked, stop)

    def _add(self, thread: int, name: str, layer: int, start: int, stop: int) -> None:
        args = {"layer": layer, "stays": self._stays}
        self._recorder.add("compute", thread, name, start, stop, args)


class Stays:
    """Record adapters in slots: filling layer by layer, resident, leaving. On the loop.

    A stay that began before the recording is left out.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def granted(self, slot: int, key: AdapterKey, nbytes: int) -> None:
        recorder = self._tracer.on
        if recorder is None:
            return
        stay = recorder.moved_in(slot, name_of(key))
        stay.span = recorder.begin(
            "layers", slot, stay.name, stay=stay.number, adapter=stay.name, bytes=nbytes
        )
        stay.at = stay.span.start

    def ready(self, slot: int, layers: Sequence[int], watermark: int, *, last: bool) -> None:
        """Record that the first `watermark` layers are on the device."""
        recorder = self._tracer.on
        if recorder is None or (stay := recorder.stays.get(slot)) is None or stay.span is None:
            return
        stop = now()
        for layer in layers[stay.ready : watermark]:
            args = {"stay": stay.number, "layer": layer}
            recorder.add("layers", slot, f"layer {layer}", stay.at, stop, args)
            stay.at = stop
        stay.ready = watermark
        if last:
            _enter_state(recorder, stay, "resident", outcome="resident")

    def failed(self, slot: int, error: BaseException) -> None:
        self._leave(slot, type(error).__name__)

    def leaving(self, slot: int) -> None:
        self._leave(slot, "leaving")

    def left(self, slot: int) -> None:
        """Record that the slot is free."""
        recorder = self._tracer.on
        if recorder is None:
            return
        stay = recorder.stays.pop(slot, None)
        if stay is not None and stay.span is not None:
            recorder.end(stay.span, outcome="left")

    def _leave(self, slot: int, outcome: str) -> None:
        recorder = self._tracer.on
        if recorder is not None and (stay := recorder.stays.get(slot)) is not None:
            _enter_state(recorder, stay, "leaving", outcome=outcome)


def _enter_state(recorder: Recorder, stay: Stay, state: str, outcome: str) -> None:
    """End the span of the state before with `outcome`, and begin that of `state`."""
    before = stay.span
    if before is None or before.name == state:
        return
    recorder.end(before, outcome=outcome)
    stay.span = recorder.begin("layers", before.lane, state, stay=stay.number)
