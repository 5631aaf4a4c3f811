"""Whether something is a trace by the published description of Chrome's trace event format.

"Trace Event Format" (Duan, Sunny and others): the JSON object format, complete, metadata and flow
events. Complete events of one thread are apart, or one lies in the other.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

Event = dict[str, Any]

ROUNDING = 0.002
"""Microseconds: times are whole nanoseconds, written as floats."""

_METADATA = {"process_name": str, "thread_name": str}
_SORTING = {"process_sort_index", "thread_sort_index"}


def require_trace(found: dict[str, Any]) -> list[Event]:
    """Its complete events, by time. Fails with what is wrong."""
    trace = json.loads(json.dumps(found, allow_nan=False))
    assert isinstance(trace["traceEvents"], list)
    assert trace.get("displayTimeUnit") in {"ms", "ns"}
    assert isinstance(trace.get("otherData", {}), dict)
    events: list[Event] = trace["traceEvents"]
    kinds = defaultdict[str, list[Event]](list)
    for event in events:
        assert isinstance(event["ph"], str)
        assert _whole(event["pid"])
        assert _whole(event["tid"])
        assert isinstance(event["name"], str)
        assert isinstance(event.get("args", {}), dict)
        kinds[event["ph"]].append(event)
    assert kinds.keys() <= {"M", "X", "s", "f"}
    _require_metadata(kinds["M"], kinds["X"])
    _require_complete(kinds["X"])
    _require_flows(kinds["s"], kinds["f"], kinds["X"])
    timed = [event["ts"] for event in events if event["ph"] != "M"]
    assert timed == sorted(timed), "by time"
    return kinds["X"]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _require_metadata(metadata: list[Event], complete: list[Event]) -> None:
    named = set()
    for event in metadata:
        kind = _METADATA.get(event["name"])
        if kind is not None:
            assert isinstance(event["args"]["name"], kind)
            place = event["pid"], event["tid"] if event["name"] == "thread_name" else None
            assert place not in named, "named twice"
            named.add(place)
        else:
            assert event["name"] in _SORTING
            assert _whole(event["args"]["sort_index"])
    for event in complete:
        assert {(event["pid"], None), (event["pid"], event["tid"])} <= named, "has no name"


def _require_complete(complete: list[Event]) -> None:
    threads = defaultdict[tuple[int, int], list[Event]](list)
    for event in complete:
        assert _time(event["ts"])
        assert _time(event["dur"])
        assert isinstance(event["cat"], str)
        threads[event["pid"], event["tid"]].append(event)
    for events in threads.values():
        open_until: list[float] = []
        for event in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
            stop = event["ts"] + event["dur"]
            while open_until and open_until[-1] <= event["ts"] + ROUNDING:
                open_until.pop()
            assert not open_until or stop <= open_until[-1] + ROUNDING, f"half inside: {event}"
            open_until.append(stop)


def _require_flows(starts: list[Event], ends: list[Event], complete: list[Event]) -> None:
    begun = {(event["cat"], event["name"], event["id"]): event for event in starts}
    assert len(begun) == len(starts) == len(ends)
    for event in ends:
        assert event["bp"] == "e"
        assert event["ts"] >= begun[event["cat"], event["name"], event["id"]]["ts"]
    for event in [*starts, *ends]:
        assert any(
            (each["pid"], each["tid"]) == (event["pid"], event["tid"])
            and each["ts"] <= event["ts"] <= each["ts"] + each["dur"] + ROUNDING
            for each in complete
        ), "binds to no span"


def stop(event: Event) -> float:
    """In microseconds."""
    return float(event["ts"] + event["dur"])


def of(events: list[Event], row: str, name: str | None = None) -> list[Event]:
    """Those of a row, and with a name."""
    return [each for each in events if each["cat"] == row and name in {None, each["name"]}]
