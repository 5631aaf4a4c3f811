"""From a trace file to a picture: rows and boxes of a trace that is made by hand."""

from __future__ import annotations

import io
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from command_line import ADAPTERS, output
from lorax_async.cli import main
from lorax_async.commands.demo_remote import run_remote_demo
from lorax_async.commands.terminal import Screen
from lorax_async.errors import ConfigError, UsageError
from lorax_async.tracing.picture import picture_of, read_trace
from lorax_async.tracing.svg import LEFT, WIDTH, as_html, as_svg
from lorax_async.tracing.words import marks, summary
from tracing.chrome_format import of, require_trace

Capture = pytest.CaptureFixture[str]
SVG = "{http://www.w3.org/2000/svg}"


def named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def span(pid: int, tid: int, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    place = {"ph": "X", "cat": "x", "pid": pid, "tid": tid}
    return {**place, "name": name, "ts": ts, "dur": dur, "args": args}


EVENTS = [
    named("process_name", 1, 0, "copies"),
    named("thread_name", 1, 1, "copy stream"),
    named("process_name", 2, 0, "compute"),
    named("thread_name", 2, 1, "thread 1"),
    # In microseconds: copies until 40 ms, layers from 10 to 20 and from 30 to 60 ms.
    span(1, 1, "layer 0", 0, 10_000, layer=0),
    span(1, 1, "layer 1", 10_000, 30_000, layer=1),
    span(2, 1, "wait for layer 0", 0, 10_000, layer=0),
    span(2, 1, "layer 0", 10_000, 10_000, layer=0),
    span(2, 1, "layer 1", 30_000, 30_000, layer=1),
    span(2, 1, "<b>&\"'", 31_000, 1_000),
]


def test_rows_and_boxes_are_those_of_the_file() -> None:
    picture = picture_of(EVENTS)
    assert [(lane.row, lane.title) for lane in picture.lanes] == [
        ("copies", "copy stream"),
        ("compute", "thread 1"),
    ]
    copies, computed = (list(lane.boxes) for lane in picture.lanes)
    assert [(box.start, box.stop, box.layer) for box in copies] == [(0, 10, 0), (10, 40, 1)]
    assert [(box.name, box.depth) for box in computed] == [
        ("wait for layer 0", 0),
        ("layer 0", 0),
        ("layer 1", 0),
        ("<b>&\"'", 1),
    ]
    assert (picture.start, picture.stop, picture.layers) == (0, 60, (0, 1))
    # 10 ms of layer 0 and 30 of layer 1 are computed; 10 and 10 of these before 40 ms.
    assert picture.overlap() == (40, 20)
    assert "40.0 ms, of which 20.0 ms (50 %)" in summary(picture)


def test_a_part_of_it() -> None:
    picture = picture_of(EVENTS, 15, 25)
    assert [[box.name for box in lane.boxes] for lane in picture.lanes] == [
        ["layer 1"],
        ["layer 0"],
    ]
    assert (picture.start, picture.stop) == (15, 25)
    with pytest.raises(UsageError, match="nothing to draw"):
        picture_of(EVENTS, 100, 200)


def test_boxes_are_drawn_where_they_belong() -> None:
    root = ET.fromstring(as_svg(picture_of(EVENTS)))
    boxes = [each for each in root.iter(f"{SVG}rect") if each.find(f"{SVG}title") is not None]
    assert len(boxes) == 6
    wide = WIDTH - LEFT - 8
    drawn = {each.findtext(f"{SVG}title"): each for each in boxes}
    second = drawn["layer 1: 30.000 ms from 10.000"]
    assert float(second.attrib["x"]) == pytest.approx(LEFT + wide / 6, abs=0.01)
    assert float(second.attrib["width"]) == pytest.approx(wide / 2, abs=0.01)
    same = drawn["layer 1: 30.000 ms from 30.000"]
    assert (
        same.attrib["fill"]
        == second.attrib["fill"]
        != drawn["layer 0: 10.000 ms from 0.000"].attrib["fill"]
    )
    tops = [float(each.attrib["y"]) for each in boxes]
    assert tops[0] == tops[1] < tops[2] == tops[3] == tops[4] < tops[5]
    texts = {"".join(each.itertext()) for each in root.iter(f"{SVG}text")}
    assert {"copies", "compute", "copy stream", "thread 1", "20 ms"} <= texts


class Page(HTMLParser):
    """What tags there are, and whether any leads elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [str(value) for name, value in attrs if name in {"src", "href"}]


def test_a_page_needs_nothing_else() -> None:
    text = as_html(picture_of(EVENTS), "<script>alert(1)</script>")
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert not page.outside
    assert not re.search(r"url\(|@import", text)
    assert "width=device-width" in text
    assert set(re.findall(r"https?://[^\s\"<]+", text)) == {"http://www.w3.org/2000/svg"}


def test_a_strangers_names_leave_the_document_whole() -> None:
    events = [span(1, 1, "\x00]]>&\ud800", 0, 9e4, **{"\x1b": "\x01"})]
    (text,) = [each.text for each in ET.fromstring(as_svg(picture_of(events))).iter(f"{SVG}title")]
    assert text == "�]]>&�: 90.000 ms from 0.000; � �"


def test_marks_are_round() -> None:
    assert marks(0, 60) == [0, 10, 20, 30, 40, 50, 60]
    assert marks(15, 25) == [16, 18, 20, 22, 24]
    assert marks(0, 0.4) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4])
    assert marks(7, 7) == [7]


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
    "broken", [{"ts": None}, {"ts": "1"}, {"dur": True}, {"dur": float("inf")}]
)
def test_an_event_without_its_times_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no (ts|dur)"):
        picture_of([{**span(1, 1, "a", 0, 1), **broken}])


# -- the command line -----------------------------------------------------------------------------


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
    assert main(["timeline", str(trace), "-o", str(page), "--json"]) == 0
    told = output(capsys)
    rows = list(dict.fromkeys(lane["row"] for lane in told["lanes"]))
    assert rows == ["requests", "files", "connections", "staging", "copies", "layers"]
    assert "connection 1" in page.read_text()


def test_a_png_is_one(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("matplotlib")
    trace, picture = tmp_path / "a.json", tmp_path / "a.png"
    trace.write_text(json.dumps(EVENTS))  # the format's other form: an array
    assert (
        main(["timeline", str(trace), "--out", str(picture), "--from", "5", "--until", "50"]) == 0
    )
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000
    assert height > 100
    assert "2 lanes" in capsys.readouterr().out


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    (tmp_path / "a.json").write_text(json.dumps(EVENTS))
    assert main(["timeline", str(tmp_path / "a.json"), "-o", str(tmp_path / "a.png")]) == 1
    text = capsys.readouterr().err
    assert text.startswith(ConfigError.__name__)
    assert "pip install" in text


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
