"""A trace file as rows of boxes, whatever they are drawn with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorax_async.errors import UsageError

COPIES, COMPUTE = "copies", "compute"
LONGEST_NAME = 120
MOST_BYTES = 256 << 20
MOST_BOXES = 200_000
"""A page of 50 MB; no browser likes more."""

_FARTHEST = 1e18
"""Microseconds, and what an order is counted in: sums of such numbers are still numbers."""

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

    dropped: int = 0
    """Spans that the recording had no more room for: the picture may lack some of them."""

    def overlap(self) -> tuple[float, float]:
        """Milliseconds of computing, and of these, those in which copies were still to end.

        Of what is shown.
        """
        boxes = [(lane.row, box) for lane in self.lanes for box in lane.boxes]
        computed = _union(
            (max(box.start, self.start), min(box.stop, self.stop))
            for row, box in boxes
            if row == COMPUTE and box.layer is not None and not box.waits
        )
        last = max((box.stop for row, box in boxes if row == COPIES), default=self.start)
        return (
            sum(stop - start for start, stop in computed),
            sum(max(0.0, min(stop, last) - start) for start, stop in computed),
        )


def read_trace(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The events of a file in Chrome's format, and how many it says are gone.

    Raises `UsageError` for what is none, and for more than `MOST_BYTES`.
    """
    if len(data) > MOST_BYTES:
        raise UsageError(f"it is larger than {MOST_BYTES >> 20} MiB; record less, or a part")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"it is no trace: {error}") from None
    events, about = found, None
    if isinstance(found, dict):
        events, about = found.get("traceEvents"), found.get("otherData")
    if not isinstance(events, list) or not all(isinstance(each, dict) for each in events):
        raise UsageError("it is no trace: there are no traceEvents in it")
    gone = about.get("dropped") if isinstance(about, dict) else 0
    return events, gone if _is_number(gone) and isinstance(gone, int) else 0


def picture_of(
    events: Sequence[Mapping[str, Any]],
    start: float | None = None,
    stop: float | None = None,
    *,
    dropped: int = 0,
) -> Picture:
    """Of complete events, those that touch the milliseconds from `start` to `stop`.

    Raises `UsageError` where there are none, or more than `MOST_BOXES`, or one is malformed.
    """
    _require_part(start, stop)
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
    all = [box for lane in lanes for box in lane.boxes]
    if not all:
        raise UsageError("there is nothing to draw in the trace")
    if len(all) > MOST_BOXES:
        raise UsageError(
            f"{len(all):,} spans are more than can be drawn; draw a part, from a millisecond until"
            " another"
        )
    numbers = [box.layer for box in all if box.layer is not None] or [0]
    return Picture(
        tuple(lanes),
        min(box.start for box in all) if start is None else start,
        max(box.stop for box in all) if stop is None else stop,
        (min(numbers), max(numbers)),
        dropped,
    )


def _require_part(start: float | None, stop: float | None) -> None:
    for bound in (start, stop):
        if bound is not None and not _is_number(bound):
            raise UsageError(f"a part goes from a millisecond until another, not {bound!r}")
    if start is not None and stop is not None and not start < stop:
        raise UsageError(
            f"a part goes from a millisecond until a later one, not {start:g}-{stop:g}"
        )


def _require_complete(event: Mapping[str, Any]) -> None:
    for name in ("ts", "dur"):
        if not _is_number(event.get(name)):
            raise UsageError(f"an event of the trace has no {name}")
    if event["dur"] < 0:
        raise UsageError("an event of the trace ends before it begins")
    if not _has_place(event):
        raise UsageError("an event of the trace has no pid and tid")


def _has_place(event: Mapping[str, Any]) -> bool:
    """Whether it says where it belongs, with numbers or names, or does not say it at all."""
    return all(isinstance(event.get(name), int | float | str | None) for name in ("pid", "tid"))


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= _FARTHEST  # also no NaN is


def _boxes(events: Iterable[Mapping[str, Any]]) -> Iterable[Box]:
    """In the order of their beginning; an outer one comes before those in it."""
    ends: list[float] = []
    for event in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
        start, stop = event["ts"] / 1e3, (event["ts"] + event["dur"]) / 1e3
        while ends and ends[-1] <= start + 1e-9:
            ends.pop()
        args = event.get("args")
        args = args if isinstance(args, dict) else {}
        name = plain_text(event.get("name", ""), LONGEST_NAME)
        yield Box(start, stop, name, len(ends), _layer(args), _details(args))
        ends.append(stop)


def plain_text(value: Any, longest: int) -> str:
    """A text that may stand in any document."""
    return _NO_TEXT.sub("�", str(value)[:longest])


def _layer(args: Mapping[str, Any]) -> int | None:
    groups = args.get("groups")
    first = groups[0] if isinstance(groups, list) and groups else None
    layer = args.get("layer", first)
    return layer if isinstance(layer, int) and _is_number(layer) else None


def _details(args: Mapping[str, Any]) -> str:
    return plain_text(", ".join(f"{n} {value}" for n, value in args.items() if n != "layer"), 300)


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
            if event.get("ph") == "M" and isinstance(args, dict) and _has_place(event):
                what = str(event.get("name"))
                tid = None if what.startswith("process") else event.get("tid")
                value = next(iter(args.values()), None)
                self._said[what, event.get("pid"), tid] = value

    def row(self, pid: Any) -> str:
        return plain_text(
            self._said.get(("process_name", pid, None), f"process {pid}"), LONGEST_NAME
        )

    def lane(self, pid: Any, tid: Any) -> str:
        name = self._said.get(("thread_name", pid, tid), f"thread {tid}")
        return plain_text(name, LONGEST_NAME)

    def order(self, place: tuple[Any, Any]) -> tuple[float, str, float, str]:
        pid, tid = place
        process = self._said.get(("process_sort_index", pid, None))
        thread = self._said.get(("thread_sort_index", pid, tid))
        return _number(process), str(pid), _number(thread), str(tid)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else 0.0


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found
