"""From a trace file, also a stranger's or a damaged one, to a picture or a refusal by name."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from command_line import ADAPTERS, output
from lorax_async.cli import main
from lorax_async.commands.demo_remote import run_remote_demo
from lorax_async.commands.terminal import Screen
from lorax_async.errors import UsageError
from lorax_async.tracing import picture as pictures
from lorax_async.tracing.chrome import microseconds
from lorax_async.tracing.picture import picture_of, read_trace
from lorax_async.tracing.svg import as_html, as_svg
from lorax_async.tracing.words import summary
from tracing.chrome_format import of, require_trace

FAR = 10**400
"""A whole number that no float reaches; JSON has it."""


def named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def span(**changes: Any) -> dict[str, Any]:
    """In microseconds."""
    plain = {"ph": "X", "cat": "x", "pid": 1, "tid": 1, "name": "a", "ts": 0, "dur": 1_000}
    return {**plain, **changes}


def layer(pid: int, ts: float, dur: float, number: int) -> dict[str, Any]:
    return span(pid=pid, name=f"layer {number}", ts=ts, dur=dur, args={"layer": number})


EVENTS = [
    named("process_name", 1, 0, "copies"),
    named("thread_name", 1, 1, "copy stream"),
    named("process_name", 2, 0, "compute"),
    named("thread_name", 2, 1, "thread 1"),
    # Copies until 40 ms, layers from 10 to 20 and from 30 to 60 ms.
    layer(1, 0, 10_000, 0),
    layer(1, 10_000, 30_000, 1),
    span(pid=2, name="wait for layer 0", dur=10_000, args={"layer": 0}),
    layer(2, 10_000, 10_000, 0),
    layer(2, 30_000, 30_000, 1),
    span(pid=2, name="<b>&\"'", ts=31_000),
]


# -- pictures --------------------------------------------------------------------------------------


def test_a_part_of_it() -> None:
    picture = picture_of(EVENTS, 15, 25)
    assert [[box.name for box in lane.boxes] for lane in picture.lanes] == [
        ["layer 1"],
        ["layer 0"],
    ]
    assert (picture.start, picture.stop) == (15, 25)
    assert picture.overlap() == (5, 5)
    assert summary(picture).startswith("10.0 ms; layers were computed for 5.0 ms, of which 5.0 ms")
    with pytest.raises(UsageError, match="nothing to draw"):
        picture_of(EVENTS, 100, 200)


@pytest.mark.parametrize(
    ("start", "stop"),
    [(float("nan"), None), (None, float("inf")), (10, 5), (5, 5), (float("-inf"), None)],
)
def test_a_part_is_from_a_moment_until_a_later_one(start: Any, stop: Any) -> None:
    with pytest.raises(UsageError, match="a part goes from"):
        picture_of([span()], start, stop)


def test_a_page_needs_nothing_else() -> None:
    text = as_html(picture_of(EVENTS), "<script>alert(1)</script>")
    assert not re.search(r"<script|<b>|\b(src|href)=|url\(|@import", text)
    assert "width=device-width" in text
    assert set(re.findall(r"https?://[^\s\"<]+", text)) == {"http://www.w3.org/2000/svg"}


# -- strange and damaged files ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"traceEvents": 3}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_what_is_no_trace_is_refused(data: bytes) -> None:
    with pytest.raises(UsageError, match="no trace"):
        read_trace(data)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ts": None}, "no ts"),
        ({"ts": "1"}, "no ts"),
        ({"ts": FAR}, "no ts"),
        ({"ts": 1e308, "dur": 1e308}, "no ts"),
        ({"ts": float("nan")}, "no ts"),
        ({"dur": FAR}, "no dur"),
        ({"dur": True}, "no dur"),
        ({"dur": float("inf")}, "no dur"),
        ({"dur": -1}, "before it begins"),
        ({"pid": [1]}, "no pid"),
        ({"tid": {}}, "no pid and tid"),
    ],
)
def test_a_span_that_cannot_be_is_refused(changes: dict[str, Any], problem: str) -> None:
    events, _ = read_trace(json.dumps([span(), span(**changes)]).encode())
    with pytest.raises(UsageError, match=problem):
        picture_of(events)


SORT = {"ph": "M", "name": "process_sort_index", "pid": 1}


@pytest.mark.parametrize(
    "event",
    [
        json.dumps({**SORT, "args": {"sort_index": FAR}}),
        '{"ph":"M","name":"thread_sort_index","pid":1,"tid":1,"args":{"sort_index":NaN}}',
        '{"ph":"M","name":"thread_name","pid":[1],"tid":{},"args":{"name":"x"}}',
        '{"ph":"M","name":["thread_name"],"pid":1,"tid":1,"args":{"name":["x"]}}',
        '{"ph":"M","name":"thread_name","pid":1,"tid":1,"args":[]}',
        '{"ph":["X"],"ts":"now"}',
        json.dumps(span(args={"layer": FAR})),
        json.dumps(span(args={"layer": True, "groups": [{}]})),
        json.dumps(span(args=["layer"], name={"a": "<b>"})),
        json.dumps(span(pid="render", tid=None)),
    ],
)
def test_what_is_strange_beside_it_is_no_matter(event: str) -> None:
    events, _ = read_trace(f"[{json.dumps(span())},{event}]".encode())
    assert "1.000 ms from 0.000" in ET.tostring(ET.fromstring(as_svg(picture_of(events)))).decode()


def test_more_than_a_browser_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_BOXES", 3)
    events = [span(ts=at * 2_000) for at in range(4)]
    with pytest.raises(UsageError, match="4 spans are more than can be drawn"):
        picture_of(events)
    assert len(picture_of(events, 2).lanes[0].boxes) == 3


def test_that_spans_are_gone_is_said() -> None:
    trace = {"traceEvents": [span()], "otherData": {"dropped": 1_200}}
    events, dropped = read_trace(json.dumps(trace).encode())
    picture = picture_of(events, dropped=dropped)
    said = "1.0 ms; no layer was computed; the oldest 1,200 spans are gone"
    assert summary(picture) == said
    assert said in as_html(picture, "trace")
    assert "gone" not in as_html(picture_of(events), "trace")


# -- the check of the format -----------------------------------------------------------------------


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


def changed(number: int, **changes: object) -> Callable[[list[Any]], None]:
    return lambda events: events[number].update(changes)


@pytest.mark.parametrize(
    "break_it",
    [
        changed(2, ph="Q"),
        changed(2, ts=-1),
        changed(2, dur=float("nan")),
        changed(2, pid="1"),
        changed(2, name=None),
        changed(4, dur=9),  # half inside
        changed(4, tid=2),  # a thread without a name
        changed(4, ts=0),  # not by time
        changed(1, args={"name": "x"}, name="process_name"),
        changed(3, id=2),
        changed(5, ts=0.5),
        changed(3, tid=0),  # binds to nothing
        lambda events: events.pop(5),
    ],
)
def test_what_is_wrong_is_noticed(break_it: Callable[[list[Any]], None]) -> None:
    assert [event["name"] for event in require_trace(whole())] == ["a", "b", "c"]
    trace = whole()
    break_it(trace["traceEvents"])
    with pytest.raises((AssertionError, KeyError, ValueError)):
        require_trace(trace)


@pytest.mark.parametrize("around", [1, 10**6, 10**10, 10**14])
def test_no_nanosecond_is_lost_where_fractions_are_cut_off(around: int) -> None:
    """Up to a day. Spans that touch must touch in whole nanoseconds: else one is thrown away."""
    for nanoseconds in range(around, around + 20_000, 7):
        value = json.loads(json.dumps(microseconds(nanoseconds)))
        assert int(value * 1000.0) == round(value * 1000.0) == nanoseconds


# -- the command line ------------------------------------------------------------------------------


Capture = pytest.CaptureFixture[str]


def test_two_commands_make_a_picture(tmp_path: Path, capsys: Capture) -> None:
    trace, page = tmp_path / "demo.json", tmp_path / "demo.html"
    run_remote_demo(ADAPTERS, Screen(io.StringIO(), io.StringIO()), rate=50e6, trace=trace)
    found = json.loads(trace.read_bytes())
    events = require_trace(found)
    asked = {each["name"] for each in of(events, "requests")}
    assert asked == {"load pirate", "load shout", "load json"}
    ranges = [each for each in of(events, "connections") if "asked" in each["args"]]
    weights = sum(
        (ADAPTERS / name / "adapter_model.safetensors").stat().st_size
        for name in ("pirate", "shout", "json")
    )
    # All of the weights came, and perhaps a part again that came with the header.
    assert sum(each["args"]["bytes"] for each in ranges) >= weights
    assert all(each["args"]["bytes"] <= each["args"]["asked"] for each in ranges)
    layers = {(each["args"]["stay"], each["args"]["layer"]) for each in of(events, "copies")}
    assert len(layers) == 30 + 30 + 15
    assert "127.0.0.1" not in trace.read_text()
    assert main(["timeline", str(trace), "-o", str(page), "--from", "0", "--json"]) == 0
    told = output(capsys)
    rows = list(dict.fromkeys(lane["row"] for lane in told["lanes"]))
    assert rows == ["requests", "files", "connections", "staging", "copies", "layers"]
    assert "connection 1" in page.read_text()


def test_what_cannot_be_drawn_is_told(tmp_path: Path, capsys: Capture) -> None:
    trace = tmp_path / "a.json"
    trace.write_text(json.dumps(EVENTS))
    for file, out, word in (
        (trace, tmp_path / "a.gif", "ConfigError"),
        (trace, tmp_path / "none" / "a.svg", "No such file"),
        (tmp_path / "none.json", tmp_path / "a.svg", "No such file"),
        (ADAPTERS / "json" / "README.md", tmp_path / "a.svg", "no trace"),
    ):
        assert main(["timeline", str(file), "-o", str(out)]) == 1
        assert word in capsys.readouterr().err


def test_an_endless_file_is_not_read_to_its_end(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr("lorax_async.commands.timeline.MOST_BYTES", 1 << 20)
    assert main(["timeline", "/dev/zero", "-o", str(tmp_path / "a.svg")]) == 1
    assert "larger than 1 MiB" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".html", ".svg"])
@pytest.mark.parametrize("name", ["$\\frac{$", "\udcff<script>"])
def test_names_are_no_formulas_and_no_markup(
    tmp_path: Path, capsys: Capture, suffix: str, name: str
) -> None:
    """As a name of a file, of a span, and of a lane; one has bytes that are no UTF-8."""
    trace, out = tmp_path / f"{name}.json".replace("/", ""), tmp_path / f"out{suffix}"
    lane = {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": name}}
    trace.write_text(json.dumps([lane, span(name=name)]))
    assert main(["timeline", str(trace), "-o", str(out)]) == 0
    assert "1 lane; " in capsys.readouterr().out
    assert b"<script" not in out.read_bytes()
