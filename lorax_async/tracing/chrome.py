"""Records as events of Chrome's trace event format.

The format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
(complete events, metadata events, flow events). A row is a process there, and a lane a thread.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf, nextafter

from lorax_async.tracing.copies import STREAM
from lorax_async.tracing.recorder import Record, Row

Event = dict[str, object]

ROWS: tuple[Row, ...] = (
    *("requests", "files", "connections", "staging", "copies", "layers", "compute"),
)
"""In the way of a byte."""

_LANES = {"connections": "connection", "staging": "buffer", "layers": "slot", "compute": "thread"}
_SIDE_BY_SIDE = {"requests", "files"}
"""Spans of these have nothing to do with each other: none is drawn inside another."""


@dataclass(slots=True)
class _Lane:
    """Spans of which any two are apart, or one inside the other."""

    title: str
    records: list[Record] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def takes(self, record: Record, *, inside: bool) -> bool:
        """Whether it fits behind those that are there, which began no later."""
        while self.ends and self.ends[-1] <= record.start:
            self.ends.pop()
        return not self.ends or (inside and record.stop <= self.ends[-1])

    def put(self, record: Record) -> None:
        self.records.append(record)
        self.ends.append(record.stop)


def as_events(records: Iterable[Record], began: int, ended: int | None = None) -> list[Event]:
    """Metadata first, then by time; microseconds since `began`; both bounds are nanoseconds.

    What has ended before, or begins after, is not in it.
    """
    by_row: dict[Row, list[Record]] = {row: [] for row in ROWS}
    for record in records:
        if record.stop >= began and (ended is None or record.start <= ended):
            by_row[record.row].append(_cut(record, began, ended))
    rows = {row: _lanes(row, its) for row, its in by_row.items()}
    names: list[Event] = []
    spans: list[Event] = []
    flows = _Flows()
    for pid, row in enumerate(ROWS, 1):
        if rows[row]:
            names += _named("process", row, pid, 0)
        for tid, lane in enumerate(rows[row], 1):
            names += _named("thread", lane.title, pid, tid)
            for record in lane.records:
                event = _complete(record, pid, tid, began)
                spans.append(event)
                flows.see(record, event)
    spans += flows.events()
    return names + sorted(spans, key=lambda event: event["ts"])  # type: ignore[arg-type, return-value]


def _cut(record: Record, began: int, ended: int | None) -> Record:
    """What lies across a bound is told of up to there."""
    if record.start < began:
        args = {**(record.args or {}), "began_before": True}
        record = record._replace(start=began, args=args)
    if ended is not None and record.stop > ended:
        record = record._replace(stop=ended, args={**(record.args or {}), "goes_on": True})
    return record


def _lanes(row: Row, records: Sequence[Record]) -> list[_Lane]:
    by_lane: dict[Hashable, list[Record]] = {}
    for record in sorted(records, key=lambda each: (each.start, -each.stop)):
        by_lane.setdefault(record.lane, []).append(record)
    found: list[_Lane] = []
    # The system's numbers of threads say nothing: these stay in the order of their first spans.
    lanes = by_lane.items() if row == "compute" else sorted(by_lane.items(), key=_by_number)
    threads = count(1)
    for lane, its in lanes:
        title = _title(row, lane, threads)
        several: list[_Lane] = []
        for record in _one_after_the_other(its) if lane == STREAM else its:
            inside = row not in _SIDE_BY_SIDE
            place = next((each for each in several if each.takes(record, inside=inside)), None)
            if place is None:
                more = f" ({len(several) + 1})" if several else ""
                place = _Lane(title + more)
                several.append(place)
            place.put(record)
        found += several
    return found


def _by_number(item: tuple[Hashable, object]) -> tuple[int, str]:
    """Numbers in their order, and before texts; texts stay in the order of their first span."""
    lane = item[0]
    return (lane, "") if isinstance(lane, int) else (1 << 63, "")


def _title(row: Row, lane: Hashable, threads: Iterator[int]) -> str:
    if row == "compute" and isinstance(lane, int):
        return f"thread {next(threads)}"
    if isinstance(lane, int):
        return f"{_LANES[row]} {lane}"
    if lane == STREAM:
        return "copy stream"
    return row if lane is None else str(lane)


def _one_after_the_other(records: Iterable[Record]) -> Iterator[Record]:
    """Copies of one stream: however early one was asked for, it begins after the one before."""
    free = 0
    for record in sorted(records, key=lambda each: (each.stop, each.start)):
        start = max(record.start, free)
        free = max(free, record.stop)
        args = {**(record.args or {}), "queued_us": (start - record.start) / 1e3}
        yield record._replace(start=min(start, record.stop), args=args)


def _named(what: str, name: str, pid: int, tid: int) -> list[Event]:
    place: Event = {"ph": "M", "pid": pid, "tid": tid, "ts": 0}
    order = pid if what == "process" else tid
    return [
        {**place, "name": f"{what}_name", "args": {"name": name}},
        {**place, "name": f"{what}_sort_index", "args": {"sort_index": order}},
    ]


def _complete(record: Record, pid: int, tid: int, began: int) -> Event:
    return {
        "ph": "X",
        "name": record.name,
        "cat": record.row,
        "ts": microseconds(record.start - began),
        "dur": microseconds(record.stop - record.start),
        "pid": pid,
        "tid": tid,
        "args": dict(record.args or {}),
    }


def microseconds(nanoseconds: int) -> float:
    """Also for who cuts off what is left of a nanosecond, as older releases of Perfetto do.

    Spans that touch would overlap then, and one of them is thrown away.
    """
    value = nanoseconds / 1e3
    return value if int(value * 1e3) == nanoseconds else nextafter(value, inf)


@dataclass(slots=True)
class _Flows:
    """Arrows from each layer's last copy to its first computation."""

    copies: dict[tuple[object, object], Event] = field(default_factory=dict)
    computed: dict[tuple[object, object], Event] = field(default_factory=dict)

    def see(self, record: Record, event: Event) -> None:
        args: Mapping[str, object] = record.args or {}
        if record.row == "copies":
            key = args.get("stay"), args.get("layer")
            before = self.copies.get(key)
            if before is None or _end(before) < _end(event):
                self.copies[key] = event
        elif record.row == "compute" and not record.name.startswith("wait "):
            stays = args.get("stays")
            for stay in stays if isinstance(stays, list) else ():
                key = stay, args.get("layer")
                first = self.computed.get(key)
                if first is None or event["ts"] < first["ts"]:  # type: ignore[operator]
                    self.computed[key] = event

    def events(self) -> Iterator[Event]:
        number = 0
        for key, copy in self.copies.items():
            first = self.computed.get(key)
            if key[0] == 0 or first is None or first["ts"] < copy["ts"]:  # type: ignore[operator]
                continue
            number += 1
            arrow: Event = {"name": "layer", "cat": "flow", "id": number}
            yield {**arrow, "ph": "s", **_at(copy)}
            yield {**arrow, "ph": "f", "bp": "e", **_at(first)}


def _at(event: Event) -> Event:
    return {"pid": event["pid"], "tid": event["tid"], "ts": event["ts"]}


def _end(event: Event) -> float:
    return float(event["ts"]) + float(event["dur"])  # type: ignore[arg-type]
