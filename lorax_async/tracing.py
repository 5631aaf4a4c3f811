"""Traces in Chrome's trace event format, which `AdapterLoader.trace` returns."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import count
from math import inf, nextafter
from operator import index
from os import PathLike
from pathlib import Path
from threading import get_ident
from typing import Any, Protocol, Self, get_args

from lorax_async.errors import UsageError
from lorax_async.events import SlotId
from lorax_async.telemetry import NO_SPAN, STREAM, Record, Recorder, Ring, Row, Tracer, now

TRACE_LIMIT = 32_768
"""Spans, of which a load of 32 layers has about 150; and as many of "compute"."""

ANOTHER = "another adapter"
"""The name of adapters whose names the viewer may not see."""

ChromeEvent = dict[str, Any]

_LANES = {"connections": "connection", "staging": "buffer", "layers": "slot", "compute": "thread"}
_CONCURRENT = {"requests", "files"}
"""Rows whose spans are independent, so that none lies inside another."""


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
        self._tracer, self._occupants, self._ring = tracer, occupants, Ring(limit)
        self._began = now()
        self._recorder: Recorder | None = None
        self._unfinished: list[Record] | None = None  # when it was stopped

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
        if self._recorder is not None:
            self._unfinished = self._recorder.unfinished()
            self._tracer.end(self._ring)
            self._recorder = None

    @property
    def kept(self) -> int:
        """How many spans are in it."""
        return len(self._ring)

    @property
    def dropped(self) -> int:
        """How many recorded spans are gone because of the limit."""
        return self._ring.look()[1]

    def compute(
        self, layer: int, *handles: _TraceHandle, name: str | None = None
    ) -> AbstractContextManager[object]:
        """Record that the block computes `layer` with these adapters, for engines of your own.

        Works in any thread and has no effect when nothing is recorded. `attach` reports its layers
        by itself. Raises `UsageError`, before the block, if `layer` is not an integer.
        """
        try:
            number = index(layer)
        except TypeError:
            raise UsageError(f"a layer must be an integer, not {layer!r}") from None
        if self._recorder is None:
            return NO_SPAN
        # Look the slots up now: the block may release the handles.
        stays = self._tracer.occupancies_in(handle.slot.index for handle in handles)
        text = f"layer {number}" if name is None else str(name)[:200]
        return self._tracer.span("compute", get_ident(), text, layer=number, stays=stays)

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
        unfinished = recorder.unfinished() if recorder is not None else self._unfinished or []
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
    if record.row == "files":  # a span may have no adapter but its lane
        record = record._replace(lane=called.get(str(record.lane), ANOTHER))
    adapter = record.args.get("adapter")
    if not isinstance(adapter, str):
        return record
    given, name = called.get(adapter, ANOTHER), record.name
    if record.row in {"requests", "layers"}:  # "load pirate", not "layer 1" of an adapter "1"
        name = name.removesuffix(adapter) + given
    return record._replace(name=name, args=record.args | {"adapter": given})


# -- Chrome's events -------------------------------------------------------------------------------


def as_events(records: Iterable[Record], began: int, ended: int | None = None) -> list[ChromeEvent]:
    """Return the events of records between `began` and `ended`, in nanoseconds.

    Rows are processes, and lanes their threads. Metadata comes first, then everything by time, in
    microseconds since `began`.
    """
    by_row: dict[Row, dict[Hashable, list[Record]]] = {row: {} for row in get_args(Row)}
    for record in sorted(records, key=lambda each: (each.start, -each.stop)):
        if record.stop >= began and (ended is None or record.start <= ended):
            lane = by_row[record.row].setdefault(record.lane, [])
            lane.append(_shorten(record, began, ended))
    names, spans, ids = list[ChromeEvent](), list[ChromeEvent](), count(1)
    for pid, (row, lanes) in enumerate(by_row.items(), 1):
        if lanes:
            names += _metadata("process", row, pid, 0, order=pid)
        for tid, (title, in_lane) in enumerate(_titled(row, lanes), 1):
            names += _metadata("thread", title, pid, tid, order=tid)
            place = {"cat": row, "pid": pid, "tid": tid}
            spans += (event | place for event in _span_events(in_lane, began, ids))
    # An arrow can only lead from and to complete events.
    arrows = _arrows(event for event in spans if event["ph"] == "X")
    return names + sorted([*spans, *arrows], key=lambda event: event["ts"])


def _span_events(
    records: Iterable[Record], began: int, ids: Iterator[int]
) -> Iterator[ChromeEvent]:
    """Yield the events of a lane's spans, which are sorted by start, the longest first.

    Spans after or inside of each other are complete events. One beside them is a pair of
    asynchronous events, which a thread cannot nest; a viewer finds room for it.
    """
    ends: list[int] = []  # of the complete events around the next
    for row, _, name, start, stop, args in records:
        while ends and ends[-1] <= start:
            ends.pop()
        event = {"name": name, "ts": microseconds(start - began), "args": dict(args)}
        if row not in _CONCURRENT and (not ends or stop <= ends[-1]):
            ends.append(stop)
            yield event | {"ph": "X", "dur": microseconds(stop - start)}
        else:
            pair = {"name": name, "id": f"{next(ids):#x}"}
            yield event | pair | {"ph": "b"}
            yield pair | {"ph": "e", "ts": microseconds(stop - began)}


def microseconds(nanoseconds: int) -> float:
    """Return a float that truncates to the same nanosecond.

    Older releases of Perfetto truncate, and drop one of two touching spans if they overlap then.
    """
    value = nanoseconds / 1e3
    return value if int(value * 1e3) == nanoseconds else nextafter(value, inf)


def _shorten(record: Record, began: int, ended: int | None) -> Record:
    """Cut a span at the bounds, and say so in its args."""
    if record.start < began:
        record = record._replace(start=began, args=record.args | {"began_before": True})
    if ended is not None and record.stop > ended:
        record = record._replace(stop=ended, args=record.args | {"goes_on": True})
    return record


def _titled(row: Row, lanes: Mapping[Hashable, list[Record]]) -> Iterator[tuple[str, list[Record]]]:
    """Yield lanes with their titles: numbers first, texts and threads by their first spans."""
    keys, threads = list(lanes), count(1)
    if row != "compute":
        keys.sort(key=lambda lane: lane if isinstance(lane, int) else 1 << 63)
    for lane in keys:
        if isinstance(lane, int):  # thread ids mean nothing to a reader
            number = next(threads) if row == "compute" else lane
            yield f"{_LANES[row]} {number}", lanes[lane]
        elif lane == STREAM:
            yield "copy stream", _in_sequence(lanes[lane])
        else:
            yield row if lane is None else str(lane), lanes[lane]


def _in_sequence(records: Iterable[Record]) -> list[Record]:
    """Begin each copy of a stream when the one before has ended; it was queued until then."""
    found, free = list[Record](), 0
    for record in sorted(records, key=lambda each: (each.stop, each.start)):
        start = max(record.start, free)
        free = max(free, record.stop)
        args = record.args | {"queued_us": (start - record.start) / 1e3}
        found.append(record._replace(start=min(start, record.stop), args=args))
    return found


def _metadata(what: str, name: str, pid: int, tid: int, *, order: int) -> list[ChromeEvent]:
    place = {"ph": "M", "pid": pid, "tid": tid, "ts": 0}
    return [
        {**place, "name": f"{what}_name", "args": {"name": name}},
        {**place, "name": f"{what}_sort_index", "args": {"sort_index": order}},
    ]


def _arrows(spans: Iterable[ChromeEvent]) -> Iterator[ChromeEvent]:
    """Yield an arrow from each layer's last copy to its first computation."""
    copies: dict[tuple[int, int], ChromeEvent] = {}
    computed: dict[tuple[int, int], ChromeEvent] = {}
    for span in spans:
        args = span["args"]
        if span["cat"] == "copies":
            last = copies.setdefault((args["stay"], args["layer"]), span)
            if last["ts"] + last["dur"] < span["ts"] + span["dur"]:
                copies[args["stay"], args["layer"]] = span
        elif span["cat"] == "compute" and not span["name"].startswith("wait "):
            for stay in args.get("stays", ()):
                first = computed.setdefault((stay, args["layer"]), span)
                if span["ts"] < first["ts"]:
                    computed[stay, args["layer"]] = span
    number = count(1)
    for key, copy in copies.items():
        first = computed.get(key, copy)
        if key[0] != 0 and first is not copy and first["ts"] >= copy["ts"]:
            arrow = {"name": "layer", "cat": "flow", "id": next(number)}
            for event, more in ((copy, {"ph": "s"}), (first, {"ph": "f", "bp": "e"})):
                yield arrow | more | {name: event[name] for name in ("pid", "tid", "ts")}
