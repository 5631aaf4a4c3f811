"""Record spans of time from any thread, without locks, into rings of bounded size.

    recorder = tracer.on             # None while no trace is recorded: this test is the whole cost
    if recorder is not None:
        start = now()
    ...
    if recorder is not None:
        recorder.add("copies", "stream", "layer 3", start, now(), {"bytes": 4096})

`CopyTimes` and `LayerTimes` record the spans of one subject each; `Recorder.note` makes the spans
of slots out of the loader's events.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from threading import current_thread, get_ident
from time import perf_counter_ns
from typing import Literal, NamedTuple

from lorax_async.events import Event, Failed, Leaving, Resident, SlotGranted
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
