"""From a trace file, also a stranger's or a damaged one, to a timeline or a refusal by name."""

import io
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from command_line import ADAPTERS, output
from core.refusals import refusals
from lorax_async.cli import main
from lorax_async.cli import timeline as drawings
from lorax_async.cli.command_line import Terminal
from lorax_async.cli.demo import run_remote_demo
from lorax_async.cli.timeline import SCRIPT, Drawing, as_html, drawing_of, read_trace
from lorax_async.errors import UsageError
from tools import tool
from tracing.chrome_format import of, require_trace

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
FAR = 10**400  # A whole number that no float reaches; JSON has it


def named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def span(**changes: Any) -> dict[str, Any]:
    """In microseconds."""
    plain = {"ph": "X", "cat": "x", "pid": 1, "tid": 1, "name": "a", "ts": 0, "dur": 1_000}
    return {**plain, **changes}


def layer(pid: int, ts: float, dur: float, number: int) -> dict[str, Any]:
    return span(pid=pid, name=f"layer {number}", ts=ts, dur=dur, args={"layer": number})


EVENTS = [
    *(named("process_name", 1, 0, "copies"), named("thread_name", 1, 1, "copy stream")),
    *(named("process_name", 2, 0, "compute"), named("thread_name", 2, 1, "thread 1")),
    # Copies until 40 ms, layers from 10 to 20 and from 30 to 60 ms.
    layer(1, 0, 10_000, 0),
    layer(1, 10_000, 30_000, 1),
    span(pid=2, name="wait for layer 0", dur=10_000, args={"layer": 0}),
    layer(2, 10_000, 10_000, 0),
    layer(2, 30_000, 30_000, 1),
    span(pid=2, name="<b>&\"'", ts=31_000),
]


def test_a_part_is_laid_out() -> None:
    drawing = drawing_of(EVENTS, 15, 25, dropped=1_200)
    lanes = [(lane.row, lane.title, [box.name for box in lane.boxes]) for lane in drawing.lanes]
    assert lanes == [("copies", "copy stream", ["layer 1"]), ("compute", "thread 1", ["layer 0"])]
    assert (drawing.start, drawing.stop, drawing.overlap()) == (15, 25, (5, 5))
    other = span(pid=2, tid=2, name="layer 1", ts=20_000, dur=20_000, args={"layer": 1})
    assert drawing_of([*EVENTS, other]).overlap() == (50, 30), "what two compute counts once"
    assert drawing.summary() == (
        "10.0 ms; layers were computed for 5.0 ms, of which 5.0 ms (100 %) before the last copy"
        " had ended; the oldest 1,200 spans are gone"
    )
    assert drawing_of([span()]).summary() == "1.0 ms; no layer was computed"


@pytest.mark.needs("node")
@pytest.mark.parametrize("part", [(None, None), (15, 25), (100, 200)])
def test_the_script_lays_out_the_same(part: tuple[Any, Any]) -> None:
    trace = {"traceEvents": [*EVENTS, span(ts="now")], "otherData": {"dropped": 3}}
    script = (
        f"import {{ layout, marks, moved, summary, zoomed }} from {json.dumps(SCRIPT.as_uri())};"
        f"const drawing = layout({json.dumps(trace)}, ...{json.dumps(part)}.map((n) => n ?? undefined));"
        "const view = [zoomed([0, 100], [0, 100], 0.5, 25), zoomed([0, 50], [0, 100], 4, 25),"
        " moved([0, 50], [0, 100], 70), marks(0, 2457.2)];"
        "console.log(JSON.stringify([drawing, summary(drawing), view]));"
    )
    command = [str(tool("node")), "--input-type=module", "--eval", script]
    node = subprocess.run(command, capture_output=True, check=True)
    found, summary, view = json.loads(node.stdout)
    assert view == [[12.5, 62.5], [0, 100], [50, 100], [0, 500, 1000, 1500, 2000]]
    if part[0] == 100:
        assert (found["lanes"], summary.split(";")[0]) == ([], "100.0 ms")
        return
    expected = drawing_of(EVENTS, *part, dropped=3)
    assert summary == expected.summary()
    keys = ("start", "stop", "name", "depth", "layer", "waits")
    for lane, same in zip(found["lanes"], expected.lanes, strict=True):
        assert (lane["row"], lane["title"]) == (same.row, same.title)
        boxes = [tuple(box[key] for key in keys) for box in lane["boxes"]]
        assert boxes == [tuple(getattr(box, key) for key in keys) for box in same.boxes]


BAD_SPANS: dict[str, list[dict[str, Any]]] = {
    "no ts": [*({"ts": ts} for ts in (None, "1", FAR, float("nan"))), {"ts": 1e308, "dur": 1e308}],
    "no dur": [{"dur": True}, {"dur": float("inf")}],
    "before it begins": [{"dur": -1}],
    "no pid and tid": [{"pid": [1]}, {"tid": {}}],
}
NOT_DRAWN: dict[str, list[tuple[Any, ...]]] = {
    "bound of the part": [([span()], float("nan")), ([span()], None, float("inf"))],
    "must end after": [([span()], 10, 5)],
    "nothing to draw": [([span()], 100, 200), ([],)],
    "4 spans are over the limit": [([span(ts=at * 2_000) for at in range(4)],)],
}


def test_what_cannot_be_drawn_is_refused(monkeypatch: Patch) -> None:
    files = (b"", b"{}", b"[1]", b'{"traceEvents": 3}', b"[" * 100_000, b"\xff")
    refusals(read_trace, UsageError, {"no trace": files})

    def drawn_beside_another(changes: dict[str, Any]) -> Drawing:
        return drawing_of(read_trace(json.dumps([span(), span(**changes)]).encode())[0])

    refusals(drawn_beside_another, UsageError, BAD_SPANS)
    monkeypatch.setattr(drawings, "MAX_BOXES", 3)
    refusals(lambda case: drawing_of(*case), UsageError, NOT_DRAWN)


@pytest.mark.parametrize(
    "event",
    [
        json.dumps({"ph": "M", "name": "process_sort_index", "pid": 1, "args": {"index": FAR}}),
        '{"ph":"M","name":"thread_sort_index","pid":1,"tid":1,"args":{"sort_index":NaN}}',
        '{"ph":"M","name":"thread_name","pid":[1],"tid":{},"args":{"name":"x"}}',
        '{"ph":"M","name":["thread_name"],"pid":1,"tid":1,"args":{"name":["x"]}}',
        '{"ph":"M","name":"thread_name","pid":1,"tid":1,"args":[]}',
        '{"ph":["X"],"ts":"now"}',
        json.dumps(span(args={"layer": FAR})),
        json.dumps(span(args={"layer": True, "groups": [{}]})),
        json.dumps(span(args=["layer"], name={"a": "<b>"})),
        json.dumps(span(pid="render", tid=None)),
        json.dumps(span()).replace('"dur"', '"args": {"x": 1e999, "y": NaN}, "dur"'),
    ],
)
def test_strange_events_beside_it_do_no_harm(event: str) -> None:
    events, _ = read_trace(f"[{json.dumps(span())},{event}]".encode())
    drawing = drawing_of(events)
    assert "a" in {box.name for lane in drawing.lanes for box in lane.boxes}
    assert embedded(as_html(drawing, "x"))["traceEvents"][-1]["ph"] == "X"


def embedded(page: str) -> Any:
    """The trace in an HTML file, as strict JSON."""
    found = re.search(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)
    assert found is not None

    return json.loads(found[1], parse_constant=pytest.fail)


def test_two_commands_draw_a_timeline(tmp_path: Path, capsys: Capture) -> None:
    trace = tmp_path / "demo.json"
    run_remote_demo(ADAPTERS, Terminal(io.StringIO(), io.StringIO()), rate=50e6, trace=trace)
    events = require_trace(json.loads(trace.read_bytes()))
    asked = {each["name"] for each in of(events, "requests")}
    assert asked == {"load pirate", "load shout", "load json"}
    ranges = [each for each in of(events, "connections") if "asked" in each["args"]]
    weights = sum(path.stat().st_size for path in ADAPTERS.glob("*/adapter_model.safetensors"))
    # All of the weights came, and perhaps a part again that came with the header.
    assert sum(each["args"]["bytes"] for each in ranges) >= weights
    assert all(each["args"]["bytes"] <= each["args"]["asked"] for each in ranges)
    layers = {(each["args"]["stay"], each["args"]["layer"]) for each in of(events, "copies")}
    assert len(layers) == 30 + 30 + 15
    assert "127.0.0.1" not in trace.read_text()
    for suffix in ("html", "png", "svg"):
        out = tmp_path / f"demo.{suffix}"
        assert main(["timeline", str(trace), "-o", str(out), "--from", "0", "--json"]) == 0
        rows = list(dict.fromkeys(lane["row"] for lane in output(capsys)["lanes"]))
        assert rows == ["requests", "files", "connections", "staging", "copies", "layers"]
    shown = embedded((tmp_path / "demo.html").read_text())["traceEvents"]
    assert sorted(map(str, events)) == sorted(str(each) for each in shown if each["ph"] == "X")
    png = (tmp_path / "demo.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    assert (width, 300 < height < 1_500) == (1_320, True)
    assert ET.parse(tmp_path / "demo.svg").getroot().tag.endswith("svg")


def test_a_page_needs_nothing_else() -> None:
    text = as_html(drawing_of(EVENTS), "<script>alert(1)</script>")
    assert text.count("<script") == 2, "the trace and timeline.js"
    assert not re.search(r"<b>|https?:|\b(src|href)=|url\(|@import", text)
    assert "width=device-width" in text


@pytest.mark.parametrize("suffix", ["html", "png", "svg"])
@pytest.mark.parametrize("name", ["$\\frac{$", "\udcff</script><script>"])
def test_names_are_no_markup(tmp_path: Path, capsys: Capture, suffix: str, name: str) -> None:
    trace, out = tmp_path / f"{name}.json".replace("/", ""), tmp_path / f"out.{suffix}"
    trace.write_text(json.dumps([named("thread_name", 1, 1, name), span(name=name)]))
    assert main(["timeline", str(trace), "-o", str(out)]) == 0
    assert "1 lane; " in capsys.readouterr().out
    assert out.read_bytes().count(b"<script") == (2 if suffix == "html" else 0)


def test_refused_commands(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(drawings, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr("lorax_async.cli.timeline.MAX_BYTES", 1 << 20)
    monkeypatch.setattr(drawings, "MAX_LANES", 1)
    trace = tmp_path / "a.json"
    trace.write_text(json.dumps(EVENTS))
    page = tmp_path / "a.html"
    for file, out, word in (
        (trace, tmp_path / "a.gif", "ConfigError"),
        (trace, tmp_path / "none" / "a.html", "No such file"),
        (tmp_path / "none.json", page, "No such file"),
        (ADAPTERS / "json" / "README.md", page, "no trace"),
        (Path("/dev/zero"), page, "larger than 1 MiB"),
        (trace, tmp_path / "a.png", "2 lanes are too many"),
    ):
        assert main(["timeline", str(file), "-o", str(out)]) == 1
        assert word in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["timeline", str(trace), "-o", str(tmp_path / "a.png")]) == 1
    assert "pip install '.[plot]'" in capsys.readouterr().err
