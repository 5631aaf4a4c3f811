"""Trace files of others, and damaged ones: drawn or refused by name, and never a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from command_line import output
from lorax_async.cli import main
from lorax_async.errors import UsageError
from lorax_async.tracing import picture as pictures
from lorax_async.tracing import png
from lorax_async.tracing.picture import picture_of, read_trace
from lorax_async.tracing.svg import as_html, as_svg
from lorax_async.tracing.words import summary

Capture = pytest.CaptureFixture[str]

FAR = 10**400
"""A whole number that no float reaches; JSON has it."""

SORT = {"ph": "M", "name": "process_sort_index", "pid": 1}


def span(**changes: Any) -> dict[str, Any]:
    return {"ph": "X", "pid": 1, "tid": 1, "name": "a", "ts": 0, "dur": 1_000, **changes}


def drawn(text: str) -> str:
    """As SVG that is well-formed."""
    events, _ = read_trace(text.encode())
    svg = as_svg(picture_of(events))
    ET.fromstring(svg)
    return svg


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ts": FAR}, "no ts"),
        ({"ts": 1e308, "dur": 1e308}, "no ts"),
        ({"ts": float("nan")}, "no ts"),
        ({"dur": FAR}, "no dur"),
        ({"dur": -1}, "before it begins"),
        ({"pid": [1]}, "no pid"),
        ({"tid": {}}, "no pid and tid"),
    ],
)
def test_a_span_that_cannot_be_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        drawn(json.dumps([span(), span(**changes)]))


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
    assert "1.000 ms from 0.000" in drawn(f"[{json.dumps(span())},{event}]")


@pytest.mark.parametrize(
    ("start", "stop"),
    [(float("nan"), None), (None, float("inf")), (10, 5), (5, 5), (float("-inf"), None)],
)
def test_a_part_is_from_a_moment_until_a_later_one(start: Any, stop: Any) -> None:
    with pytest.raises(UsageError, match="a part goes from"):
        picture_of([span()], start, stop)


def test_what_is_said_of_a_part_is_said_of_what_is_shown() -> None:
    named = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        for pid, name in ((1, "copies"), (2, "compute"))
    ]
    copy = span(dur=22_000, args={"layer": 0})
    layer = span(pid=2, ts=10_000, dur=90_000, args={"layer": 0})
    picture = picture_of([*named, copy, layer], 20, 30)
    assert picture.overlap() == (10, 2)
    assert summary(picture).startswith("10.0 ms; layers were computed for 10.0 ms, of which 2.0 ms")


def test_colours_span_the_layers_that_there_are() -> None:
    events = [span(ts=at, args={"layer": at}) for at in (7, 3, 5)]
    assert picture_of([*events, span(ts=9)]).layers == (3, 7)
    assert picture_of([span()]).layers == (0, 0)


def test_more_than_a_browser_takes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_BOXES", 3)
    events = [span(ts=at * 2_000) for at in range(4)]
    with pytest.raises(UsageError, match="4 spans are more than can be drawn"):
        picture_of(events)
    assert len(picture_of(events, 2).lanes[0].boxes) == 3


# -- spans that are gone --------------------------------------------------------------------------


def test_that_spans_are_gone_is_said() -> None:
    trace = {"traceEvents": [span()], "otherData": {"dropped": 1_200}}
    events, dropped = read_trace(json.dumps(trace).encode())
    picture = picture_of(events, dropped=dropped)
    said = "1.0 ms; no layer was computed; the oldest 1,200 spans are gone"
    assert summary(picture) == said
    assert said in as_html(picture, "trace")
    texts = {
        each.text for each in ET.fromstring(as_svg(picture)).iter() if each.tag.endswith("text")
    }
    assert "1,200 spans gone" in texts
    assert "gone" not in as_html(picture_of(events), "trace")


@pytest.mark.parametrize(
    "about", [None, [], {"dropped": "<b>"}, {"dropped": True}, {"dropped": 0.5}, {}]
)
def test_others_say_nothing_of_it(about: Any) -> None:
    trace = {"traceEvents": [span()], "otherData": about}
    assert read_trace(json.dumps(trace).encode()) == ([span()], 0)


# -- the command line -----------------------------------------------------------------------------


def test_an_endless_file_is_not_read_to_its_end(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr("lorax_async.commands.timeline.MOST_BYTES", 1 << 20)
    assert main(["timeline", "/dev/zero", "-o", str(tmp_path / "a.svg")]) == 1
    assert "larger than 1 MiB" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".html", ".svg", ".PNG"])
@pytest.mark.parametrize("name", ["$\\frac{$", "\udcff<script>"])
def test_names_are_no_formulas_and_no_markup(
    tmp_path: Path, capsys: Capture, suffix: str, name: str
) -> None:
    """As a name of a file, of a span, and of a lane; one has bytes that are no UTF-8."""
    pytest.importorskip("matplotlib")
    trace, out = tmp_path / f"{name}.json".replace("/", ""), tmp_path / f"out{suffix}"
    lane = {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": name}}
    trace.write_text(json.dumps([lane, span(name=name)]))
    assert main(["timeline", str(trace), "-o", str(out)]) == 0
    assert "1 lane; " in capsys.readouterr().out
    assert b"<script" not in out.read_bytes()


def test_a_png_has_room_for_some_lanes(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(png, "MOST_LANES", 2)
    trace = tmp_path / "a.json"
    trace.write_text(json.dumps([span(tid=tid) for tid in range(3)]))
    assert main(["timeline", str(trace), "-o", str(tmp_path / "a.png")]) == 1
    assert "3 lanes are too many for a PNG" in capsys.readouterr().err
    assert main(["timeline", str(trace), "-o", str(tmp_path / "a.svg"), "--json"]) == 0
    told = output(capsys)
    assert (len(told["lanes"]), told["dropped"]) == (3, 0)
