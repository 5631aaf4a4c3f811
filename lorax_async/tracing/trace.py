"""`Trace`: a recording in Chrome's trace event format."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from math import inf, nextafter
from operator import index
from os import PathLike
from pathlib import Path
from threading import get_ident
from typing import Any, Protocol, Self, get_args

from lorax_async.errors import UsageError
from lorax_async.events import SlotId
from lorax_async.tracing.recorder import STREAM, Record, Recorder, Ring, Row, Tracer, now

TRACE_LIMIT = 32_768
"""Spans, of which a load of 32 layers has about 150; and as many of "compute"."""

ANOTHER = "another adapter"
"""The name of adapters whose names the viewer may not see."""

Event = dict[str, object]

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


def as_events(records: Iterable[Record], began: int, ended: int | None = None) -> list[Event]:
    """Return the events of records between `began` and `ended`, in nanoseconds.

    Metadata comes first, then everything by time, in microseconds since `began`.
    """
    by_row: dict[Row, list[Record]] = {row: [] for row in get_args(Row)}
    for record in records:
        if record.stop >= began and (ended is None or record.start <= ended):
            by_row[record.row].append(_shorten(record, began, ended))
    names, spans = list[Event](), list[Event]()
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


def _metadata(what: str, name: str, pid: int, tid: int) -> list[Event]:
    place: Event = {"ph": "M", "pid": pid, "tid": tid, "ts": 0}
    order = pid if what == "process" else tid
    return [
        {**place, "name": f"{what}_name", "args": {"name": name}},
        {**place, "name": f"{what}_sort_index", "args": {"sort_index": order}},
    ]


def _arrows(spans: Iterable[Event]) -> Iterator[Event]:
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
            arrow: Event = {"name": "layer", "cat": "flow", "id": next(number)}
            for event, more in ((copy, {"ph": "s"}), (first, {"ph": "f", "bp": "e"})):
                yield arrow | more | {name: event[name] for name in ("pid", "tid", "ts")}
