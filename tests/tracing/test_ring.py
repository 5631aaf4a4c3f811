"""What a recording keeps, and what is cut out of it; records and times are by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import tiny
from lorax_async.tracing import recorder as recorders
from lorax_async.tracing.chrome import as_events
from lorax_async.tracing.recorder import Kept, Record, Recorder, Ring, Row, Tracer, now
from lorax_async.tracing.trace import Trace
from tiny_loaders import loader
from tracing.chrome_format import of, require_trace, stop


def record(start: int, stop: int, row: Row = "copies", name: str = "layer 0") -> Record:
    return Record(row, "stream" if row == "copies" else None, name, start, stop, {"layer": 0})


def test_the_oldest_go_and_are_counted() -> None:
    ring = Ring(3)
    records = [record(number, number + 1) for number in range(5)]
    for each in records:
        ring.add(each)
    for _ in range(2):
        assert ring.look().since(0) == (records[2:], 2)


def test_passes_do_not_push_out_a_load() -> None:
    """A decoding step has a span for each layer; a slow load outlives thousands of them."""
    ring = Ring(3)
    load = record(0, 1)
    ring.add(load)
    passes = [record(number, number + 1, "compute") for number in range(1, 1_001)]
    for each in passes:
        ring.add(each)
    assert ring.look().since(0) == ([load, *passes[-3:]], 997)


def test_what_is_gone_is_missing_only_where_it_was() -> None:
    ring = Ring(3)
    for number in range(5):
        ring.add(record(number * 10, number * 10 + 5))
    assert ring.look().since(0)[1] == ring.look().since(25)[1] == 2
    assert ring.look().since(26) == ([record(30, 35), record(40, 45)], 0)


def test_a_look_counts_nothing_that_comes_meanwhile() -> None:
    """Other threads go on adding between the look at the counter and that at the records."""
    ring = Ring(10)
    ring.add(record(0, 1))
    lane = ring._others

    class Busy:
        def __next__(self) -> int:
            for number in range(3):
                lane._records.append(record(number, number + 1))
            return 1

    lane._count = Busy()  # type: ignore[assignment]
    assert ring.look().since(0)[1] == 0


# -- a part of a trace ----------------------------------------------------------------------------


def recorded(*records: Record, limit: int = 100) -> Trace:
    """One that goes on."""
    trace = Trace(Tracer(), limit, dict)
    trace.__enter__()
    for each in records:
        trace._ring.add(each)
    return trace


def test_a_part_is_cut_out() -> None:
    trace = recorded()
    t = trace._began
    for bounds in ((1_000, 2_000), (2_000, 4_000), (4_500, 6_000), (7_000, 9_000), (9_500, 9_900)):
        trace._ring.add(record(t + bounds[0], t + bounds[1], "files", str(bounds[0])))
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


def test_a_part_tells_of_what_is_missing_in_it() -> None:
    trace = recorded(limit=2)
    t = trace._began
    for number in range(4):
        trace._ring.add(record(t + 1_000 * number, t + 1_000 * number + 500))
    gone = [trace.as_json(t + since)["otherData"] for since in (2_400, 2_600)]
    assert gone == [{"producer": "lorax_async", "dropped": number} for number in (2, 0)]
    trace.stop()
    assert [trace.as_json(t + since)["otherData"] for since in (2_400, 2_600)] == gone


async def test_the_last_load_of_many(tmp_path: Path) -> None:
    folders = [tiny.write(tmp_path / name, seed) for seed, name in enumerate("abc")]
    async with loader() as there:
        with there.trace(limit=200) as trace:
            for number in range(60):
                (await there.load(folders[number % 2])).release()
                await there.unload(folders[number % 2])
            since = now()
            (await there.load(folders[2])).release()
            until = now()
            await there.unload(folders[2])
        part: Any = await asyncio.to_thread(trace.as_json, since, until)
    events = require_trace(part)
    assert trace.dropped
    assert part["otherData"]["dropped"] == 0
    assert [each["name"] for each in of(events, "requests")] == ["load c"]
    assert {each["args"]["layer"] for each in of(events, "copies")} == set(range(tiny.LAYERS))
    assert max(map(stop, events)) <= (until - since) / 1e3 + 0.001


async def test_to_begin_one_looks_at_slots_and_not_at_all_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server begins one for each cold request, and may know a million adapters."""
    folders = [tiny.write(tmp_path / name, seed) for seed, name in enumerate("ab")]
    async with loader(max_slots=1, min_residency=0.0) as there:
        for folder in folders:
            (await there.load(folder)).release()
        with monkeypatch.context() as patch:
            patch.setattr(there._driver.lifecycle, "lives", None)
            trace = there.trace().start()
        recorder = there.tracer.on
        assert recorder is not None
        assert {slot: stay.name for slot, stay in recorder.stays.items()} == {0: "b"}
        trace.stop()


# -- two threads ----------------------------------------------------------------------------------


def test_what_ends_while_it_is_read_is_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = recorded()
    recorder = trace._recorder
    assert recorder is not None
    span = recorder.begin("requests", None, "load a")
    look = trace._ring.look

    def ending() -> Kept:
        recorder.end(span, outcome="done")
        return look()

    monkeypatch.setattr(trace._ring, "look", ending)
    (event,) = require_trace(trace.as_json())
    assert event["args"] == {"outcome": "done"}

    def ended() -> Kept:
        found = look()
        recorder.end(other, outcome="done")
        return found

    other = recorder.begin("requests", None, "load b")
    monkeypatch.setattr(trace._ring, "look", ended)
    assert [each["name"] for each in require_trace(trace.as_json())] == ["load a", "load b"]


def test_what_begins_while_it_is_read_has_no_negative_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder()

    def late() -> int:
        monkeypatch.undo()
        time = now()
        recorder.begin("requests", None, "load b")
        return time

    recorder.begin("requests", None, "load a")
    monkeypatch.setattr(recorders, "now", late)
    assert all(each.start <= each.stop for each in recorder.unfinished())


def test_a_trace_that_is_stopped_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = recorded(record(now(), now()))
    unfinished = Recorder.unfinished

    def stopping(recorder: Recorder) -> list[Record]:
        monkeypatch.undo()
        trace.stop()
        return unfinished(recorder)

    monkeypatch.setattr(Recorder, "unfinished", stopping)
    assert trace.as_json() == trace.as_json()


def test_what_was_before_is_left_out() -> None:
    """A layer is reported with the next one: it may have ended before the trace began."""
    assert as_events([record(1, 2)], 3) == []
