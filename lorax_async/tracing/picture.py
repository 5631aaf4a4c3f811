"""A trace file as rows of boxes, whatever they are drawn with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from lorax_async.errors import UsageError

COPIES, COMPUTE = "copies", "compute"
LONGEST_NAME = 120
_NO_TEXT = re.compile("[^\t -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Box:
    """One span, in milliseconds. `depth` others of its lane contain it.

    `layer` is the number by which it is coloured; None where it is about no layer.
    """

    start: float
    stop: float
    name: str
    depth: int
    layer: int | None
    details: str

    @property
    def waits(self) -> bool:
        return self.name.startswith("wait")


@dataclass(frozen=True, slots=True)
class Lane:
    """Boxes beside each other, or one inside the other."""

    row: str
    title: str
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """Lanes from top to bottom, and which milliseconds of the trace they show."""

    lanes: tuple[Lane, ...]
    start: float
    stop: float
    layers: tuple[int, int]
    """The first layer that there is a box of, and the last one."""

    def overlap(self) -> tuple[float, float]:
        """Milliseconds of computing, and of these, those in which copies were still to end."""
        boxes = [(lane.row, box) for lane in self.lanes for box in lane.boxes]
        computed = _union(
            (box.start, box.stop)
            for row, box in boxes
            if row == COMPUTE and box.layer is not None and not box.waits
        )
        last = max((box.stop for row, box in boxes if row == COPIES), default=self.start)
        return (
            sum(stop - start for start, stop in computed),
            sum(max(0.0, min(stop, last) - start) for start, stop in computed),
        )


def read_trace(data: bytes) -> list[dict[str, Any]]:
    """The events of a file in Chrome's format. Raises `UsageError` for what is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"it is no trace: {error}") from None
    events = found.get("traceEvents") if isinstance(found, dict) else found
    if not isinstance(events, list) or not all(isinstance(each, dict) for each in events):
        raise UsageError("it is no trace: there are no traceEvents in it")
    return events


def picture_of(
    events: Sequence[Mapping[str, Any]], start: float | None = None, stop: float | None = None
) -> Picture:
    """Of complete events, those that touch the milliseconds from `start` to `stop`.

    Raises `UsageError` where there are none.
    """
    places: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("ph") == "X":
            _require_complete(event)
            places.setdefault((event.get("pid"), event.get("tid")), []).append(event)
    names = _Names(events)
    lanes = [
        Lane(names.row(pid), names.lane(pid, tid), boxes)
        for pid, tid in sorted(places, key=names.order)
        if (boxes := _shown(_boxes(places[pid, tid]), start, stop))
    ]
    if not lanes:
        raise UsageError("there is nothing to draw in the trace")
    all = [box for lane in lanes for box in lane.boxes]
    numbers = [box.layer for box in all if box.layer is not None] or [0]
    return Picture(
        tuple(lanes),
        min(box.start for box in all) if start is None else start,
        max(box.stop for box in all) if stop is None else stop,
        (min(numbers), max(numbers)),
    )


def _require_complete(event: Mapping[str, Any]) -> None:
    for name in ("ts", "dur"):
        value = event.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise UsageError(f"an event of the trace has no {name}")


def _boxes(events: Iterable[Mapping[str, Any]]) -> Iterable[Box]:
    """In the order of their beginning; an outer one comes before those in it."""
    ends: list[float] = []
    for event in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
        start, stop = event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3
        while ends and ends[-1] <= start + 1e-9:
            ends.pop()
        args = event.get("args")
        args = args if isinstance(args, dict) else {}
        name = _plain(event.get("name", ""), LONGEST_NAME)
        yield Box(start, stop, name, len(ends), _layer(args), _details(args))
        ends.append(stop)


def _plain(value: Any, longest: int) -> str:
    """A text that may stand in any document."""
    return _NO_TEXT.sub("�", str(value)[:longest])


def _layer(args: Mapping[str, Any]) -> int | None:
    groups = args.get("groups")
    first = groups[0] if isinstance(groups, list) and groups else None
    layer = args.get("layer", first)
    return layer if isinstance(layer, int) and not isinstance(layer, bool) else None


def _details(args: Mapping[str, Any]) -> str:
    return _plain(", ".join(f"{n} {value}" for n, value in args.items() if n != "layer"), 300)


def _shown(boxes: Iterable[Box], start: float | None, stop: float | None) -> tuple[Box, ...]:
    return tuple(
        box
        for box in boxes
        if (start is None or box.stop >= start) and (stop is None or box.start <= stop)
    )


@dataclass(slots=True)
class _Names:
    """What metadata events say of processes and threads."""

    events: Iterable[Mapping[str, Any]]
    _said: dict[tuple[str, Any, Any], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for event in self.events:
            args = event.get("args")
            if event.get("ph") == "M" and isinstance(args, dict):
                what = str(event.get("name"))
                tid = None if what.startswith("process") else event.get("tid")
                value = next(iter(args.values()), None)
                self._said[what, event.get("pid"), tid] = value

    def row(self, pid: Any) -> str:
        return _plain(self._said.get(("process_name", pid, None), f"process {pid}"), LONGEST_NAME)

    def lane(self, pid: Any, tid: Any) -> str:
        return _plain(self._said.get(("thread_name", pid, tid), f"thread {tid}"), LONGEST_NAME)

    def order(self, place: tuple[Any, Any]) -> tuple[float, str, float, str]:
        pid, tid = place
        process = self._said.get(("process_sort_index", pid, None))
        thread = self._said.get(("thread_sort_index", pid, tid))
        return _number(process), str(pid), _number(thread), str(tid)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found
