"""What single rows of a trace are made of; records and their times are by hand."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from lorax_async.adapter import AdapterKey
from lorax_async.errors import FetchError
from lorax_async.tracing import copies, layers, recorder
from lorax_async.tracing.chrome import as_events
from lorax_async.tracing.copies import CopyTimes
from lorax_async.tracing.layers import LayerTimes
from lorax_async.tracing.recorder import Record, Recorder, Ring, Row, Tracer
from lorax_async.tracing.stays import Stays
from tracing.chrome_format import require_trace

KEY = AdapterKey("org/a", ())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time, in nanoseconds, which a test sets."""
    time = [0]
    for module in (recorder, copies, layers):
        monkeypatch.setattr(module, "now", lambda: time[0])
    return time


def recording() -> tuple[Tracer, Recorder, Ring]:
    tracer, ring = Tracer(), Ring(100)
    return tracer, tracer.begin(ring, {}), ring


def spans(ring: Ring) -> list[tuple[str, int, int]]:
    return [(each.name, each.start, each.stop) for each in ring.look().since(0)[0]]


def of_layer(row: Row, start: int, stop: int, **args: Any) -> Record:
    lane = "stream" if row == "copies" else 7
    return Record(row, lane, "layer 3", start, stop, {"layer": 3, **args})


def arrows(*records: Record) -> list[tuple[float, float]]:
    """From and to which microseconds."""
    events = as_events(records, 0)
    require_trace({"traceEvents": events, "displayTimeUnit": "ms"})
    ends: list[list[Any]] = [[each["ts"] for each in events if each["ph"] == ph] for ph in "sf"]
    return list(zip(*ends, strict=True))


def test_an_arrow_leads_from_the_last_copy_to_the_first_computation() -> None:
    two = (of_layer("copies", 1_000, 2_000, stay=1), of_layer("copies", 2_000, 3_000, stay=1))
    computed = [of_layer("compute", at, at + 500, stays=[1]) for at in (6_000, 5_000)]
    assert arrows(*two, *computed) == [(2.0, 5.0)]


def test_no_arrow_leads_backwards_or_from_who_is_not_known() -> None:
    copy = of_layer("copies", 1_000, 2_000, stay=1)
    assert arrows(copy, of_layer("compute", 500, 900, stays=[1])) == []
    before = of_layer("copies", 1_000, 2_000, stay=0)  # it had its slot before the recording
    assert arrows(before, of_layer("compute", 3_000, 4_000, stays=[0])) == []
    assert arrows(copy, of_layer("compute", 3_000, 4_000, stays=[2])) == []


def test_a_request_is_never_drawn_inside_another() -> None:
    records = [
        Record("requests", None, name, *at, None)
        for name, at in (("load a", (0, 9)), ("load b", (2, 5)), ("load c", (6, 12)))
    ]
    events = require_trace({"traceEvents": as_events(records, 0), "displayTimeUnit": "ms"})
    assert {each["name"]: each["tid"] for each in events} == {"load a": 1, "load b": 2, "load c": 2}


# -- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_stream", "start"), [(True, 5), (False, 1)])
def test_a_copy_in_a_stream_begins_when_it_was_asked_for(
    clock: list[int], in_stream: bool, start: int
) -> None:
    """What came before, in the thread, was staging; a thread that copies does both."""
    _, recorder, ring = recording()
    clock[0] = 1
    times = CopyTimes(recorder, 0, 3)
    clock[0] = 5
    ticket = Future[None]()
    times.asked(ticket, 4_096, in_stream=in_stream)
    clock[0] = 9
    ticket.set_result(None)
    assert spans(ring) == [("layer 3", start, 9)]


@pytest.mark.parametrize(("error", "outcome"), [(None, "done"), (FetchError("x"), "FetchError")])
def test_a_copy_says_what_came_of_it(error: Exception | None, outcome: str) -> None:
    _, recorder, ring = recording()
    ticket = Future[None]()
    CopyTimes(recorder, 0, 3).asked(ticket, 4_096, in_stream=True)
    ticket.set_exception(error) if error is not None else ticket.set_result(None)
    ((record,), _) = ring.look().since(0)
    assert record.args is not None
    assert (record.args["outcome"], record.args["bytes"]) == (outcome, 4_096)


# -- layers ---------------------------------------------------------------------------------------


def test_a_layer_lasts_until_its_last_module(clock: list[int]) -> None:
    _, recorder, ring = recording()
    times = LayerTimes(recorder, [0])
    steps: list[Callable[[], None]] = [
        *(lambda: times.reached(0), times.entered),  # at 10, 20
        *(times.left, times.left),  # 30, 40: two modules
        *(lambda: times.reached(0), times.entered),  # of the same layer
        *(lambda: times.reached(1), times.entered),  # 70, 80
        times.end,  # 90: no module of it was left
    ]
    for step in steps:
        clock[0] += 10
        step()
    assert spans(ring) == [
        ("wait for layer 0", 10, 20),
        ("layer 0", 20, 40),
        ("wait for layer 1", 70, 80),
        ("layer 1", 80, 90),
    ]


# -- slots ----------------------------------------------------------------------------------------


def test_who_fails_leaves_once(clock: list[int]) -> None:
    """It is told that it fails, and then that it leaves, and again that it fails."""
    tracer, _, ring = recording()
    stays = Stays(tracer)
    stays.granted(0, KEY, 4_096)
    clock[0] = 10
    stays.failed(0, FetchError("x"))
    for time, tell in (
        (20, stays.leaving),
        (30, lambda slot: stays.failed(slot, FetchError("x"))),
        (40, stays.left),
        (50, stays.left),
    ):
        clock[0] = time
        tell(0)
    assert spans(ring) == [("a", 0, 10), ("leaving", 10, 40)]
    outcomes = [(each.args or {})["outcome"] for each in ring.look().since(0)[0]]
    assert outcomes == ["FetchError", "left"]
