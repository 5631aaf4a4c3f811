"""The check of the format notices what is wrong; examples are by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from lorax_async.tracing.chrome import microseconds
from tracing.chrome_format import require_trace


def whole() -> dict[str, Any]:
    place = {"pid": 1, "tid": 1}
    return {
        "displayTimeUnit": "ms",
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "copies"}},
            {"ph": "M", "name": "thread_name", **place, "args": {"name": "stream"}},
            {"ph": "X", "name": "a", "cat": "copies", **place, "ts": 0, "dur": 10.0},
            {"ph": "s", "name": "layer", "cat": "flow", "id": 1, **place, "ts": 1},
            {"ph": "X", "name": "b", "cat": "copies", **place, "ts": 2.5, "dur": 3},
            {"ph": "f", "bp": "e", "name": "layer", "cat": "flow", "id": 1, **place, "ts": 4},
            {"ph": "X", "name": "c", "cat": "copies", **place, "ts": 10.0, "dur": 0},
        ],
    }


def test_a_trace_by_hand_is_one() -> None:
    assert [event["name"] for event in require_trace(whole())] == ["a", "b", "c"]


def changed(number: int, **changes: object) -> Callable[[list[Any]], None]:
    return lambda events: events[number].update(changes)


@pytest.mark.parametrize(
    "break_it",
    [
        changed(2, ph="Q"),
        changed(2, ts=-1),
        changed(2, ts=True),
        changed(2, dur=float("nan")),
        changed(2, dur="10"),
        changed(2, pid="1"),
        changed(2, name=None),
        changed(2, cat=7),
        changed(4, dur=9),  # half inside
        changed(4, tid=2),  # a thread without a name
        changed(4, ts=0),  # not by time
        changed(1, args={"name": 3}),
        changed(1, args={"name": "x"}, name="process_name"),
        changed(3, id=2),
        changed(5, bp="s"),
        changed(5, ts=0.5),
        changed(3, tid=0),  # binds to nothing
        lambda events: events.pop(5),
        lambda events: events[2].pop("dur"),
    ],
)
def test_what_is_wrong_is_noticed(break_it: Callable[[list[Any]], None]) -> None:
    trace = copy.deepcopy(whole())
    break_it(trace["traceEvents"])
    with pytest.raises((AssertionError, KeyError, ValueError)):
        require_trace(trace)


@pytest.mark.parametrize("around", [1, 10**6, 10**10, 10**14])
def test_no_nanosecond_is_lost_where_fractions_are_cut_off(around: int) -> None:
    """Up to a day. Spans that touch must touch in whole nanoseconds: else one is thrown away."""
    for nanoseconds in range(around, around + 20_000, 7):
        value = json.loads(json.dumps(microseconds(nanoseconds)))
        assert int(value * 1000.0) == round(value * 1000.0) == nanoseconds
