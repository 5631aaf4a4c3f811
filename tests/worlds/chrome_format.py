"""Whether something is a trace by "Trace Event Format" (Duan, Sunny and others): its JSON object
format; complete, asynchronous, metadata and flow events. Complete ones of one thread are disjoint
or nested.
"""

import json
from collections import defaultdict
from typing import Any

Event = dict[str, Any]

ROUNDING = 0.002  # Microseconds: times are whole nanoseconds, written as floats


def require_trace(found: dict[str, Any]) -> list[Event]:
    """Return the trace's spans as complete events, by time; assert that the format is right."""
    trace = json.loads(json.dumps(found, allow_nan=False))
    assert trace["displayTimeUnit"] in {"ms", "ns"}
    assert isinstance(trace.get("otherData", {}), dict)
    kinds: dict[str, list[Event]] = {kind: [] for kind in "MXbesf"}
    for event in trace["traceEvents"]:
        assert type(event["pid"]) is type(event["tid"]) is int
        assert isinstance(event["name"], str)
        assert isinstance(event.get("args", {}), dict)
        kinds[event["ph"]].append(event)
    timed = [event["ts"] for event in trace["traceEvents"] if event["ph"] != "M"]
    assert timed == sorted(timed), "by time"
    _require_complete(kinds["X"])
    _require_flows(kinds["s"], kinds["f"], kinds["X"])
    spans = [*kinds["X"], *_pairs(kinds["b"], kinds["e"])]
    _require_metadata(kinds["M"], spans)
    return sorted(spans, key=lambda each: (each["ts"], -each["dur"]))


def _pairs(begun: list[Event], ended: list[Event]) -> list[Event]:
    """Pair asynchronous events by category and id; each pair must have its own id."""
    ends = {(event["cat"], event["id"]): event for event in ended}
    pairs = []
    for begin in begun:
        end = ends.pop((begin["cat"], begin["id"]))
        assert all(begin[key] == end[key] for key in ("name", "pid", "tid"))
        assert type(begin["ts"]) in {int, float}
        assert type(end["ts"]) in {int, float}
        assert 0 <= begin["ts"] <= end["ts"]
        pairs.append(begin | {"dur": end["ts"] - begin["ts"]})
    assert not ends, "ended, and not begun"
    return pairs


def _require_metadata(metadata: list[Event], complete: list[Event]) -> None:
    named = list[tuple[int, int | None]]()
    for event in metadata:
        what, _, kind = event["name"].partition("_")
        assert what in {"process", "thread"}
        if kind == "name":
            assert isinstance(event["args"]["name"], str)
            named.append((event["pid"], event["tid"] if what == "thread" else None))
        else:
            assert kind == "sort_index"
            assert type(event["args"]["sort_index"]) is int
    assert len(set(named)) == len(named), "named twice"
    for event in complete:
        assert {(event["pid"], None), (event["pid"], event["tid"])} <= set(named), "has no name"


def _require_complete(complete: list[Event]) -> None:
    threads = defaultdict[tuple[int, int], list[Event]](list)
    for event in complete:
        assert type(event["ts"]) in {int, float}
        assert type(event["dur"]) in {int, float}
        assert min(event["ts"], event["dur"]) >= 0
        assert isinstance(event["cat"], str)
        threads[event["pid"], event["tid"]].append(event)
    for events in threads.values():
        open_until: list[float] = []
        for event in sorted(events, key=lambda each: (each["ts"], -each["dur"])):
            while open_until and open_until[-1] <= event["ts"] + ROUNDING:
                open_until.pop()
            assert not open_until or stop(event) <= open_until[-1] + ROUNDING, f"half in: {event}"
            open_until.append(stop(event))


def _require_flows(starts: list[Event], ends: list[Event], complete: list[Event]) -> None:
    begun = {(event["cat"], event["name"], event["id"]): event for event in starts}
    assert len(begun) == len(starts) == len(ends)
    for event in ends:
        assert event["bp"] == "e"
        assert event["ts"] >= begun[event["cat"], event["name"], event["id"]]["ts"]
    for event in [*starts, *ends]:
        assert any(
            (each["pid"], each["tid"]) == (event["pid"], event["tid"])
            and each["ts"] <= event["ts"] <= stop(each) + ROUNDING
            for each in complete
        ), "binds to no span"


def stop(event: Event) -> float:
    """The end, in microseconds."""
    return float(event["ts"] + event["dur"])


def of(events: list[Event], row: str, name: str | None = None) -> list[Event]:
    """Return the spans of a row, and of one name if it is given."""
    return [each for each in events if each["cat"] == row and name in {None, each["name"]}]
