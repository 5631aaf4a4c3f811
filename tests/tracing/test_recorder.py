"""What a recording keeps while threads add to it, end spans and read it; times are by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from lorax_async.adapter import AdapterKey
from lorax_async.errors import FetchError
from lorax_async.tracing import copies, layers, recorder
from lorax_async.tracing import trace as traces
from lorax_async.tracing.chrome import as_events
from lorax_async.tracing.copies import CopyTimes
from lorax_async.tracing.layers import LayerTimes
from lorax_async.tracing.recorder import Kept, Record, Recorder, Ring, Row, Tracer, now
from lorax_async.tracing.stays import Stays
from lorax_async.tracing.trace import Trace
from tracing.chrome_format import of, require_trace

KEY = AdapterKey("org/a", ())


def record(start: int, stop: int, row: Row = "copies", name: str = "layer 0") -> Record:
    return Record(row, "stream" if row == "copies" else None, name, start, stop, {"layer": 0})


def recording() -> tuple[Tracer, Recorder, Ring]:
    tracer, ring = Tracer(), Ring(100)
    return tracer, tracer.begin(ring, {}), ring


def spans(ring: Ring) -> list[tuple[str, int, int]]:
    return [(each.name, each.start, each.stop) for each in ring.look().since(0)[0]]


# -- rings -----------------------------------------------------------------------------------------


def test_passes_do_not_push_out_a_load() -> None:
    """A decoding step has a span for each layer; a slow load outlives thousands of them."""
    ring = Ring(3)
    load = record(0, 1)
    ring.add(load)
    passes = [record(number, number + 1, "compute") for number in range(1, 1_001)]
    for each in passes:
        ring.add(each)
    assert ring.look().since(0) == ([load, *passes[-3:]], 997)


def test_a_look_counts_no_more_than_was_added_and_loses_nothing() -> None:
    """Whatever other threads add and look at meanwhile."""
    ring, done = Ring(50), Event()

    def look() -> list[int]:
        seen = [0]
        while not done.is_set():
            kept, dropped = ring.look().since(0)
            assert len(kept) <= 50
            seen.append(dropped)
        return seen

    def add() -> None:
        for number in range(5_000):
            ring.add(record(number, number + 1))

    with ThreadPoolExecutor(4) as threads:
        looks = [threads.submit(look) for _ in range(2)]
        for adding in [threads.submit(add) for _ in range(2)]:
            adding.result()
        done.set()
        assert max(max(each.result()) for each in looks) <= 9_950
    kept, dropped = ring.look().since(0)
    assert (len(kept), dropped) == (50, 9_950)


# -- parts -----------------------------------------------------------------------------------------


def test_a_part_is_cut_out(clock: list[int]) -> None:
    clock[0] = t = 1_000_000
    tracer = Tracer()
    trace = Trace(tracer, 100, dict).start()
    recorder = tracer.on
    assert recorder is not None
    for start, stop in ((1_000, 2_000), (2_000, 4_000), (4_500, 6_000), (7_000, 9_000)):
        recorder.add("files", "stream", str(start), t + start, t + stop)
    recorder.add("files", "stream", "9500", t + 9_500, t + 9_900)
    clock[0] = t + 10_000
    found: Any = trace.as_json(t + 3_000, t + 8_000)
    events = require_trace(found)
    assert {each["name"]: (each["ts"], each["dur"]) for each in of(events, "files")} == {
        "2000": (0, 1),
        "4500": (1.5, 1.5),
        "7000": (4, 1),
    }
    cut = [(each["args"].get("began_before"), each["args"].get("goes_on")) for each in events]
    assert cut == [(True, None), (None, None), (None, True)]
    assert [each["name"] for each in require_trace(trace.as_json(t + 9_200))] == ["9500"]
    trace.stop()
    again: Any = trace.as_json(t + 3_000, t + 8_000)
    assert again == found


# -- spans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
def test_a_span_that_ends_while_the_trace_is_read_is_there_once(
    monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Just before, or after, the ended ones were looked at."""
    tracer = Tracer()
    with Trace(tracer, 100, dict) as trace:
        recorder = tracer.on
        assert recorder is not None
        span = recorder.begin("requests", None, "load a")
        look = Ring.look

        def ending(ring: Ring) -> Kept:
            found = look(ring) if not before else None
            recorder.end(span, outcome="done")
            return found or look(ring)

        monkeypatch.setattr(Ring, "look", ending)
        (event,) = require_trace(trace.as_json())
        assert event["name"] == "load a"
        if before:
            assert event["args"] == {"outcome": "done"}


# -- rows ------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time, in nanoseconds, which a test sets."""
    time = [0]
    for module in (recorder, copies, layers, traces):
        monkeypatch.setattr(module, "now", lambda: time[0])
    return time


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


def test_no_arrow_leads_backwards_or_from_an_adapter_that_is_not_known() -> None:
    copy = of_layer("copies", 1_000, 2_000, stay=1)
    assert arrows(copy, of_layer("compute", 500, 900, stays=[1])) == []
    before = of_layer("copies", 1_000, 2_000, stay=0)  # it had its slot before the recording
    assert arrows(before, of_layer("compute", 3_000, 4_000, stays=[0])) == []
    assert arrows(copy, of_layer("compute", 3_000, 4_000, stays=[2])) == []


@pytest.mark.parametrize(
    ("in_stream", "start", "error", "outcome"),
    [
        (True, 5, None, "done"),
        (False, 1, None, "done"),
        (True, 5, FetchError("x"), "FetchError"),
    ],
)
def test_a_copy_in_a_stream_begins_when_it_was_asked_for(
    clock: list[int], in_stream: bool, start: int, error: Exception | None, outcome: str
) -> None:
    """What came before, in the thread, was staging; a thread that copies does both.

    It ends when its ticket is done.
    """
    _, recorder, ring = recording()
    clock[0] = 1
    times = CopyTimes(recorder, 0, 3)
    clock[0] = 5
    ticket = Future[None]()
    times.asked(ticket, 4_096, in_stream=in_stream)
    assert spans(ring) == []
    clock[0] = 9
    ticket.set_exception(error) if error is not None else ticket.set_result(None)
    assert spans(ring) == [("layer 3", start, 9)]
    ((found,), _) = ring.look().since(0)
    assert found.args is not None
    assert (found.args["outcome"], found.args["bytes"]) == (outcome, 4_096)


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


def test_an_adapter_that_fails_leaves_once(clock: list[int]) -> None:
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


# -- large traces ----------------------------------------------------------------------------------


def test_a_trace_is_written_event_by_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of json holds the GIL from its beginning to its end."""
    longest = 0
    dumps = json.dumps

    def watched(value: Any, **settings: Any) -> str:
        nonlocal longest
        text = dumps(value, **settings)
        longest = max(longest, len(text))
        return text

    tracer = Tracer()
    with Trace(tracer, 5_000, dict) as trace:
        recorder = tracer.on
        assert recorder is not None
        for _ in range(5_000):
            recorder.add("files", "x", "fetch", now(), now())
    monkeypatch.setattr(json, "dumps", watched)
    assert len(trace.encoded()) > 400_000
    assert 0 < longest < 1_000
