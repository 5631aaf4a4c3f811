"""From a trace file, also a stranger's or a damaged one, to a page, or a refusal by name."""

import json
import re
import subprocess
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
from chrome_format import of, require_trace
from command_line import ADAPTERS, output
from refusals import refusals
from tools import tool

from lorax_async.cli import main
from lorax_async.cli import timeline as drawings
from lorax_async.cli.timeline import SCRIPT, as_html, read_trace
from lorax_async.errors import UsageError

Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
EXAMPLE = ADAPTERS.parent / "slow_link.py"
FAR = 10**400  # A whole number that no float reaches; JSON has it


def named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def span(**changes: Any) -> dict[str, Any]:
    """In microseconds."""
    plain = {"ph": "X", "cat": "x", "pid": 1, "tid": 1, "name": "a", "ts": 0, "dur": 1_000}
    return {**plain, **changes}


def pair(**changes: Any) -> list[dict[str, Any]]:
    """The same, as asynchronous events."""
    begin = span(**changes) | {"ph": "b"}
    length = begin.pop("dur")
    return [begin, begin | {"ph": "e", "ts": begin["ts"] + length}]


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


def drawn(trace: Any, *part: float | None) -> tuple[dict[str, Any], str]:
    """What the script makes of it: lanes of boxes, and the summary."""
    script = (
        f"import {{ layout, summary }} from {json.dumps(SCRIPT.as_uri())};"
        f"const drawing = layout({json.dumps(trace)}, ...{json.dumps(part)});"
        "console.log(JSON.stringify([drawing, summary(drawing)]));"
    )
    drawing, text = evaluated(script)
    return drawing, text


def evaluated(script: str) -> Any:
    command = [str(tool("node")), "--input-type=module", "--eval", script]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def names(drawing: dict[str, Any]) -> list[tuple[str, str, list[str]]]:
    return [
        (lane["row"], lane["title"], [box["name"] for box in lane["boxes"]])
        for lane in drawing["lanes"]
    ]


@pytest.mark.needs("node")
def test_a_trace_is_laid_out() -> None:
    drawing, summary = drawn(EVENTS)
    assert names(drawing) == [
        ("copies", "copy stream", ["layer 0", "layer 1"]),
        ("compute", "thread 1", ["wait for layer 0", "layer 0", "layer 1", "<b>&\"'"]),
    ]
    boxes = drawing["lanes"][1]["boxes"]
    keys = ("start", "stop", "depth", "layer", "waits")
    assert [[box[key] for key in keys] for box in boxes] == [
        *([0, 10, 0, 0, True], [10, 20, 0, 0, False], [30, 60, 0, 1, False]),
        [31, 32, 1, None, False],
    ]
    assert [drawing[key] for key in ("start", "stop", "first", "last")] == [0, 60, 0, 1]
    assert summary == (
        "60.0 ms; layers were computed for 40.0 ms, of which 20.0 ms (50 %) before the last copy"
        " had ended"
    )
    other = span(pid=2, tid=2, name="layer 1", ts=20_000, dur=20_000, args={"layer": 1})
    _, summary = drawn([*EVENTS, other])
    assert "computed for 50.0 ms, of which 30.0 ms" in summary, "what two compute counts once"
    assert drawn([span()])[1] == "1.0 ms; no layer was computed"


@pytest.mark.needs("node")
def test_a_part_is_laid_out() -> None:
    trace = {"traceEvents": [*EVENTS, span(ts="now")], "otherData": {"dropped": 1_200}}
    drawing, summary = drawn(trace, 15, 25)
    assert names(drawing) == [
        ("copies", "copy stream", ["layer 1"]),
        ("compute", "thread 1", ["layer 0"]),
    ]
    assert (drawing["start"], drawing["stop"]) == (15, 25)
    assert summary == (
        "10.0 ms; layers were computed for 5.0 ms, of which 5.0 ms (100 %) before the last copy"
        " had ended; the oldest 1,200 spans are gone"
    )
    assert names(drawn(trace, None, 5)[0])[0] == ("copies", "copy stream", ["layer 0"])
    drawing, summary = drawn(trace, 100, 200)
    assert (drawing["lanes"], summary.split(";")[0]) == ([], "100.0 ms")


@pytest.mark.needs("node")
def test_what_overlaps_gets_lanes_of_its_own() -> None:
    """A thread's complete events lie in each other, asynchronous ones only where the id is the same."""
    events = [
        *(span(name="a", dur=10_000), span(name="b", ts=5_000, dur=10_000)),
        *(span(name="in a", ts=1_000, dur=9_000), span(name="after a", ts=10_000, dur=1_000)),
        *pair(name="c", id="0x1", dur=10_000),
        *pair(name="d", id="0x2", ts=2_000, dur=2_000),
        *sorted(
            [*pair(name="e", id="0x3", ts=20_000, dur=9_000), *pair(name="f", id="0x3", ts=21_000)],
            key=lambda event: event["ts"],
        ),
        *(pair(name="never begun", id="0x4")[1:] + pair(name="never ended", id="0x5")[:1]),
    ]
    drawing, _ = drawn(events)
    assert [
        (lane["title"], [(b["name"], b["depth"]) for b in lane["boxes"]])
        for lane in drawing["lanes"]
    ] == [
        ("thread 1", [("a", 0), ("in a", 1), ("after a", 0), ("e", 0), ("f", 1)]),
        ("thread 1 (2)", [("c", 0)]),
        ("thread 1 (3)", [("d", 0), ("b", 0)]),
    ]


@pytest.mark.needs("node")
def test_the_view_is_zoomed_and_moved() -> None:
    script = (
        f"import {{ marks, moved, zoomed }} from {json.dumps(SCRIPT.as_uri())};"
        "console.log(JSON.stringify([zoomed([0, 100], [0, 100], 0.5, 25),"
        " zoomed([0, 50], [0, 100], 4, 25), moved([0, 50], [0, 100], 70), marks(0, 2457.2)]));"
    )
    expected = [[12.5, 62.5], [0, 100], [50, 100], [0, 500, 1000, 1500, 2000]]
    assert evaluated(script) == expected


STRANGE: list[str] = [
    json.dumps({"ph": "M", "name": "process_sort_index", "pid": 1, "args": {"index": FAR}}),
    '{"ph":"M","name":"thread_sort_index","pid":1,"tid":1,"args":{"sort_index":NaN}}',
    '{"ph":"M","name":"thread_name","pid":[1],"tid":{},"args":{"name":"x"}}',
    '{"ph":"M","name":["thread_name"],"pid":1,"tid":1,"args":{"name":["x"]}}',
    '{"ph":"M","name":"thread_name","pid":1,"tid":1,"args":[]}',
    '{"ph":["X"],"ts":"now"}',
    *(json.dumps(span(ts=ts)) for ts in (None, "1", FAR, float("nan"))),
    *(json.dumps(span(dur=dur)) for dur in (None, "1", -1, float("inf"))),
    json.dumps(span(ts=1e308, dur=1e308)),
    json.dumps(span(args={"layer": FAR})),
    json.dumps(span(args={"layer": True, "groups": [{}]})),
    json.dumps(span(args=["layer"], name={"a": "<b>"})),
    json.dumps(span(pid="render", tid=None)),
    json.dumps(span(pid=[1], tid={})),
    json.dumps(span()).replace('"dur"', '"args": {"x": 1e999, "y": NaN}, "dur"'),
    json.dumps(pair(id={"x": 1}, name=None)[0]),
    json.dumps(pair(id=None)[1]),
    ",".join(json.dumps(each | {"ts": "now"}) for each in pair(id=[])),
]


@pytest.mark.needs("node")
def test_strange_events_beside_it_do_no_harm() -> None:
    for event in STRANGE:
        trace = read_trace(f"[{json.dumps(span())},{event}]".encode())
        assert embedded(as_html(trace, "x", None, None)) == trace
        drawing, summary = drawn(trace)
        boxes = [box for lane in drawing["lanes"] for box in lane["boxes"]]
        assert ("a", 0, 1) in {(box["name"], box["start"], box["stop"]) for box in boxes}, event
        assert summary.endswith(" ms; no layer was computed"), event


def test_what_is_no_trace_is_refused() -> None:
    files = (b"", b"{}", b"[1]", b'{"traceEvents": 3}', b"[" * 100_000, b"\xff", b"3")
    refusals(read_trace, UsageError, {"not a trace": files})


def embedded(page: str) -> Any:
    """The trace in an HTML file, as strict JSON."""
    found = re.search(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1], parse_constant=pytest.fail)


def test_a_trace_of_the_example_is_drawn(tmp_path: Path, capsys: Capture) -> None:
    trace, page = tmp_path / "demo.json", tmp_path / "demo.html"
    run_path(str(EXAMPLE))["run"](trace=trace, rate=50e6)
    written = json.loads(trace.read_bytes())
    events = require_trace(written)
    asked = {each["name"] for each in of(events, "requests")}
    assert asked == {"stream pirate", "stream shout", "stream json"}
    ranges = [each for each in of(events, "connections") if "asked" in each["args"]]
    weights = sum(path.stat().st_size for path in ADAPTERS.glob("*/adapter_model.safetensors"))
    # All of the weights came, and perhaps a part again that came with the header.
    assert sum(each["args"]["bytes"] for each in ranges) >= weights
    assert all(each["args"]["bytes"] <= each["args"]["asked"] for each in ranges)
    layers = {(each["args"]["stay"], each["args"]["layer"]) for each in of(events, "copies")}
    assert len(layers) == 30 + 30 + 15
    assert "127.0.0.1" not in trace.read_text()
    assert main(["timeline", str(trace), "-o", str(page), "--json"]) == 0
    assert output(capsys) == {"picture": str(page), "spans": len(events)}
    assert embedded(page.read_text()) == written
    if tool("node") is not None:
        drawing, summary = drawn(written)
        rows = list(dict.fromkeys(lane["row"] for lane in drawing["lanes"]))
        assert rows == ["requests", "files", "connections", "staging", "copies", "layers"]
        boxes = [box for lane in drawing["lanes"] for box in lane["boxes"]]
        assert sorted(box["name"] for box in boxes) == sorted(each["name"] for each in events)
        assert summary.endswith(" ms; no layer was computed")


def test_a_page_needs_nothing_else() -> None:
    text = as_html({"traceEvents": EVENTS}, "<script>alert(1)</script>", 1.5, None)
    assert text.count("<script") == 2, "the trace and timeline.js"
    assert not re.search(r"<b>|https?:|\b(src|href)=|url\(|@import", text)
    assert "width=device-width" in text


@pytest.mark.parametrize("name", ["$\\frac{$", "\udcff</script><script>"])
def test_names_are_no_markup(tmp_path: Path, capsys: Capture, name: str) -> None:
    trace, out = tmp_path / f"{name}.json".replace("/", ""), tmp_path / "out.html"
    trace.write_text(json.dumps([named("thread_name", 1, 1, name), span(name=name)]))
    assert main(["timeline", str(trace), "-o", str(out)]) == 0
    assert "1 span; open it" in capsys.readouterr().out
    assert out.read_bytes().count(b"<script") == 2


def test_refused_commands(tmp_path: Path, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(drawings, "MAX_BYTES", 1 << 20)
    trace = tmp_path / "a.json"
    trace.write_text(json.dumps(EVENTS))
    page = str(tmp_path / "a.html")
    none = tmp_path / "none"
    for file, words, complaint in (
        (trace, [str(none / "a.html")], "No such file"),
        (none, [page], "No such file"),
        (ADAPTERS / "json" / "README.md", [page], "not a trace"),
        (Path("/dev/zero"), [page], "larger than 1 MiB"),
        *(
            (trace, [f"a.{it}"], f"ConfigError: a.{it} does not end in .html")
            for it in ("png", "SVG")
        ),
        *((trace, [page, "--from", *it], "UsageError") for it in (["10", "--until", "5"], ["nan"])),
        *((trace, [page, "--until", it], "UsageError") for it in ("inf", "0", "-1")),
    ):
        assert main(["timeline", str(file), "-o", *words]) == 1
        assert complaint in capsys.readouterr().err
    assert not Path(page).exists()
