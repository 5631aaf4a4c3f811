"""Spans of time that threads report without waiting for each other, in rings of bounded size.

recorder = tracer.on             # None while nobody records: that test is all it costs
if recorder is not None:
    start = now()
...
if recorder is not None:
    recorder.add("copies", "stream", "layer 3", start, now(), {"bytes": 4096})
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from itertools import count
from threading import Lock
from time import perf_counter_ns as now
from typing import Literal, NamedTuple

__all__ = ["Kept", "Record", "Recorder", "Ring", "Row", "Span", "Stay", "Tracer", "now"]

Row = Literal["requests", "files", "connections", "staging", "copies", "layers", "compute"]
Args = dict[str, object]


class Record(NamedTuple):
    """One span: in which row, and in which lane of it; nanoseconds of `now`."""

    row: Row
    lane: Hashable
    name: str
    start: int
    stop: int
    args: Mapping[str, object] | None


class Span:
    """One that has begun. Whoever began it ends it, in any thread."""

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
    """An adapter in a slot; no two have the same number.

    `span` is what it does now; of its layers `told` are in the trace, the last one up to `at`.
    """

    __slots__ = ("at", "name", "number", "span", "told")

    def __init__(self, number: int, name: str) -> None:
        self.number = number
        self.name = name
        self.span: Span | None = None
        self.told = 0
        self.at = 0


class Kept(NamedTuple):
    """What a ring had at one moment: records in the order of their coming, and how many are gone.

    Of each kind by itself, for these push out their own only.
    """

    kinds: tuple[tuple[Sequence[Record], int], ...]

    def since(self, time: int) -> tuple[list[Record], int]:
        """Records that ended then or later, and how many are gone, if any of these may have."""
        found, missing = [], 0
        for records, gone in self.kinds:
            found += [record for record in records if record.stop >= time]
            if gone and records[0].stop >= time:
                missing += gone
        return found, missing


class Ring:
    """The last `limit` records, and how many there were. From any thread: no call waits.

    Of "compute" there are as many beside them: each pass has some for each layer, which would soon
    push out those of a slow load.
    """

    def __init__(self, limit: int) -> None:
        self._computed = _Last(limit)
        self._others = _Last(limit)

    def add(self, record: Record) -> None:
        (self._computed if record.row == "compute" else self._others).add(record)

    def look(self) -> Kept:
        return Kept((self._others.look(), self._computed.look()))


class _Last:
    """Some records: threads that add do not wait, and those that look wait for each other only."""

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
            added = next(self._count) - self._looks  # to ask a counter is to count
            self._looks += 1
        records = self._records.copy()
        return records, max(0, added - len(records))


class Recorder:
    """Takes what is reported while somebody records; gone when nobody does."""

    def __init__(self) -> None:
        self.rings: tuple[Ring, ...] = ()
        self.stays: dict[int, Stay] = {}
        """By the slot's number: who is in it."""
        self._open: dict[int, Span] = {}
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
        """Of what has ended. From any thread."""
        record = Record(row, lane, name, start, stop, args)
        for ring in self.rings:
            ring.add(record)

    def begin(self, row: Row, lane: Hashable, name: str, **args: object) -> Span:
        """Of what may last long: it is in the trace before its end, too. From any thread."""
        span = Span(row, lane, name, args)
        self._open[id(span)] = span
        return span

    def end(self, span: Span, **more: object) -> None:
        """Idempotent."""
        if self._open.pop(id(span), None) is not None:
            record = span.until(now(), **more)
            for ring in self.rings:
                ring.add(record)

    def unfinished(self) -> list[Record]:
        """What has begun, as if it ended now."""
        spans = tuple(self._open.values())
        stop = now()
        return [span.until(stop, unfinished=True) for span in spans]

    def moved_in(self, slot: int, name: str) -> Stay:
        self.stays[slot] = stay = Stay(next(self._numbers), name)
        return stay

    def stay_in(self, slot: int) -> Stay:
        """Who is in the slot; number 0 if that was before the recording."""
        return self.stays.get(slot) or Stay(0, f"slot {slot}")


class Tracer:
    """One per loader. Its parts ask `on`, and report to it unless it is None."""

    def __init__(self) -> None:
        self.on: Recorder | None = None

    def begin(self, ring: Ring, tenants: Mapping[int, str]) -> Recorder:
        """Record into the ring, too. `tenants` are in their slots now, by number. On the loop."""
        recorder = self.on
        if recorder is None:
            recorder = Recorder()
            for slot, name in tenants.items():
                recorder.moved_in(slot, name)
        recorder.rings = (*recorder.rings, ring)
        self.on = recorder
        return recorder

    def end(self, ring: Ring) -> None:
        """On the loop. The last one takes the recorder away."""
        recorder = self.on
        if recorder is not None:
            recorder.rings = tuple(each for each in recorder.rings if each is not ring)
            if not recorder.rings:
                self.on = None
