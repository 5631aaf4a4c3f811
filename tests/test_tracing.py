"""What a loader's trace has: rows, order, ends, and no secrets."""

import asyncio
import gc
import json
import weakref
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tiny
from chrome_format import of, require_trace, stop
from event_loops import until
from peft_adapters import PEFT_WARNING, llama, logits_of, prompt, save, serving
from tiny_loaders import fails, gated, loader
from tiny_sources import make_source, over

from lorax_async import errors
from lorax_async.cli.load import record_trace
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.leases import SlotOccupancy
from lorax_async.telemetry import Record, Ring, Row, Tracer, last_part, name_of, now
from lorax_async.testing import FakeSource
from lorax_async.tracing import Trace, as_events, microseconds
from lorax_async.types import AdapterKey, AdapterRef, Ref, RemoteKey, TensorsKey

Patch = pytest.MonkeyPatch

pytestmark = [pytest.mark.filterwarnings(PEFT_WARNING), pytest.mark.usefixtures("nothing_left")]

LAYERS = 4


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    folder = tmp_path_factory.mktemp("traced") / "cold"
    return save(llama(num_hidden_layers=LAYERS), lora, folder)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [tiny.write(tmp_path / name, seed) for seed, name in enumerate("abc")]


def names(trace: dict[str, Any], row: str) -> list[str]:
    """Of a row's spans, by time."""
    return [each["name"] for each in of(require_trace(trace), row)]


async def load(there: AdapterLoader, *folders: Path) -> None:
    for folder in folders:
        (await there.load(folder)).release()


async def test_a_streamed_pass_lies_between_its_copies(adapter: Path) -> None:
    model, source = llama(num_hidden_layers=LAYERS), FakeSource()
    source.put("cold", *tiny.files(adapter))
    source.hold("cold")
    async with serving(model, source=source) as (there, attached):
        with there.trace() as trace:
            async with there.stream("cold") as cold:
                with attached.batch([cold, None]):
                    passing = asyncio.create_task(asyncio.to_thread(logits_of, model, prompt(2)))
                    for group in range(LAYERS - 1):
                        source.allow("cold", group)
                    at_the_last = f"layer {LAYERS - 2}"
                    await cold.layer_ready(LAYERS - 2)
                    await until(lambda: at_the_last in names(trace.as_json(), "compute"))
                    source.allow("cold")
                    await passing
                    first = trace.as_json()
                    await asyncio.to_thread(logits_of, model, prompt(2))  # gets no arrows
    found: dict[str, Any] = trace.as_json()
    assert len(of(require_trace(found), "compute", "layer 0")) == 2
    events = require_trace(first)
    copies, computed = of(events, "copies"), of(events, "compute")
    layers = [f"layer {layer}" for layer in range(LAYERS)]
    assert sorted({each["name"] for each in copies}) == layers
    assert [each["name"] for each in computed if each["name"] in layers] == layers
    last_copy = max(copies, key=stop)
    assert last_copy["name"] == layers[-1]
    for name in layers:
        (copy,), (layer,) = of(copies, "copies", name), of(computed, "compute", name)
        (ready,) = of(events, "layers", name)
        assert stop(copy) <= stop(ready) <= layer["ts"]
        if name != layers[-1]:
            assert stop(layer) <= last_copy["ts"]
    waits = [each["name"] for each in computed if each["name"].startswith("wait")]
    # The embedding is before the layers, and the head after them; the adapter has neither.
    assert waits == [f"wait for layer {layer}" for layer in range(-1, LAYERS + 1)]
    assert [each["name"] for each in computed if each["args"].get("adapters")] == ["rows: 2"]
    (request,) = of(require_trace(found), "requests")
    assert (request["name"], request["args"]["outcome"]) == ("stream cold", "done")
    starts, ends = ([e for e in found["traceEvents"] if e["ph"] == kind] for kind in "sf")
    assert len(starts) == LAYERS, "an arrow from each copy to the first pass"
    assert {each["ts"] for each in ends} == {e["ts"] for e in computed if e["name"] in layers}


async def test_staging_holds_a_buffer_until_its_copy_has_ended(folders: list[Path]) -> None:
    async with loader(device="simulated") as there:
        with there.trace() as trace:
            await load(there, folders[0])
    events = require_trace(trace.as_json())
    copies = of(events, "copies")
    assert {each["args"]["layer"] for each in copies} == set(range(tiny.LAYERS))
    assert len({(each["pid"], each["tid"]) for each in copies}) == 1
    for before, after in zip(copies, copies[1:], strict=False):
        assert stop(before) <= after["ts"] + 0.002
    for copy in copies:
        (held,) = of(events, "staging", copy["name"])
        fills = [each for each in of(events, "staging", "fill") if held["ts"] <= each["ts"]]
        assert stop(min(fills, key=stop)) <= stop(copy) <= stop(held)
        assert held["args"]["adapter"] == "a"


async def test_a_layer_is_recorded_before_a_pass_sees_it(
    folders: list[Path], monkeypatch: Patch
) -> None:
    advance, seen = SlotOccupancy.advance, list[int]()

    def advancing(occupancy: SlotOccupancy, watermark: int) -> None:
        recorded = names(trace.as_json(), "layers")
        seen.extend(recorded.count(f"layer {layer}") for layer in range(watermark))
        advance(occupancy, watermark)

    monkeypatch.setattr(SlotOccupancy, "advance", advancing)
    async with loader() as there:
        with there.trace() as trace:
            await load(there, folders[0])
    assert set(seen) == {1}


async def test_other_engines_report_their_layers(folders: list[Path]) -> None:
    async with loader(max_slots=1, min_residency=0.0) as there:
        with there.trace() as trace:
            async with there.stream(folders[0]) as handle:
                for layer in range(tiny.LAYERS):
                    await handle.layer_ready(layer)
                    with trace.compute(layer, handle):
                        pass
            handle = await there.load(folders[0])
            three = cast(Any, np.int64(3))
            with trace.compute(three, handle, name="attention"):
                handle.release()
                await load(there, folders[1])
            with pytest.raises(errors.UsageError, match="integer"), trace.compute("3"):  # type: ignore[arg-type]
                raise AssertionError("not to be entered")
            with pytest.raises(ZeroDivisionError), trace.compute(4):
                raise ZeroDivisionError
        with trace.compute(9):  # nothing is recorded
            pass
    found: Any = trace.as_json()
    computed = of(require_trace(found), "compute")
    layers = [f"layer {n}" for n in range(tiny.LAYERS)]
    assert [each["name"] for each in computed] == [*layers, "attention", "layer 4"]
    assert [each["ph"] for each in found["traceEvents"]].count("f") == tiny.LAYERS
    assert computed[-2]["args"] == {"layer": 3, "stays": [1]}


async def test_a_slot_leaves_also_after_its_last_layer(tmp_path: Path) -> None:
    source = make_source(tmp_path, "held")
    source.hold("held")
    async with over(source) as there:
        with there.trace() as trace:
            async with there.stream("held") as handle:
                unloading = asyncio.create_task(there.unload("held"))
                await until(lambda: "leaving" in names(trace.as_json(), "layers"))
                source.allow("held")
                await handle.layer_ready(tiny.LAYERS - 1)
            await unloading
    states = [name for name in names(trace.as_json(), "layers") if not name.startswith("layer ")]
    assert states[1:] == ["leaving", "resident", "leaving"]


async def test_a_load_that_fails_or_is_cancelled_has_its_ends(tmp_path: Path) -> None:
    source = make_source(tmp_path, "broken", "closed", "torn", "held")
    source.fail("fetch_groups", errors.FetchError("the line is down"), id="broken", at=1)
    source.fail("open", errors.FetchError("the source is down"), id="closed")
    source.fail("read", errors.FetchError("the file is torn"), id="torn", at=5_000)
    source.hold("held")
    async with over(source) as there:
        with there.trace() as trace:
            await fails(there.load("broken"), errors.FetchError)
            await fails(there.load("closed"), errors.FetchError)
            await fails(there.load("torn"), errors.FetchError)
            await fails(there.load("nowhere"), errors.AdapterNotFoundError)
            task = asyncio.create_task(there.load("held"))
            source.allow("held", 0)
            await until(lambda: any(each.slot for each in there.placement().story("held")))
            task.cancel()
            await asyncio.wait([task])
            await until(lambda: not there.placement().adapters)
    events = require_trace(trace.as_json())
    ended = {each["name"]: each["args"]["outcome"] for each in of(events, "requests")}
    failed = dict.fromkeys(("load broken", "load closed", "load torn"), "FetchError")
    failed |= {"load held": "cancelled", "load nowhere": "AdapterNotFoundError"}
    assert ended == failed
    assert "FetchError" in {each["args"]["outcome"] for each in of(events, "copies")}
    assert len(of(events, "files", "fetch header")) == 4, "also the one that failed"
    outcomes = [each["args"]["outcome"] for each in of(events, "layers") if "bytes" in each["args"]]
    assert sorted(outcomes) == ["FetchError", "FetchError", "leaving"]
    assert not [each for each in events if each["args"].get("unfinished")]


async def test_what_goes_on_at_the_end_is_cut_there(folders: list[Path]) -> None:
    there, device = gated()
    async with there:
        device.gate.clear()
        with there.trace() as trace:
            task = asyncio.create_task(there.load(folders[0]))
            await until(lambda: device.copies)
        found = trace.as_json()
        device.gate.set()
        (await task).release()
        assert trace.as_json() == found
    events = require_trace(found)
    assert {each["name"] for each in events if each["args"].get("unfinished")} == {"load a", "a"}


async def test_only_the_block_is_recorded(folders: list[Path]) -> None:
    async with loader() as there:
        assert there.tracer.on is None
        with there.trace() as outer:
            recorder = weakref.ref(there.tracer.on)
            await load(there, folders[0])
            with there.trace() as inner:
                await load(there, folders[1])
        found = outer.as_json()
        assert there.tracer.on is None
        gc.collect()
        assert recorder() is None
        await load(there, folders[2])
        assert outer.as_json() == found
    assert names(outer.as_json(), "requests") == ["load a", "load b"]
    assert names(inner.as_json(), "requests") == ["load b"]


async def test_a_small_trace_says_how_much_is_gone(folders: list[Path], tmp_path: Path) -> None:
    async with loader() as there:
        with there.trace() as whole, there.trace(limit=5) as small:
            await load(there, folders[0])
            await there.unload(folders[0])
    all, left = (require_trace(each.as_json()) for each in (whole, small))
    assert (whole.dropped, small.dropped, len(left)) == (0, len(all) - 5, 5)
    data: Any = small.as_json()
    assert data["otherData"]["dropped"] == len(all) - 5
    small.write(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text()) == data
    with pytest.raises(errors.UsageError, match="once"), small:
        pass
    for limit in (0, -1, True, 1.5, None):
        with pytest.raises(errors.UsageError, match="limit"):
            Trace(Tracer(), cast(Any, limit), dict)


def test_passes_do_not_push_out_a_load() -> None:
    """A decoding step has a span for each layer; a slow load outlives thousands of them."""
    ring = Ring(3)

    def record(start: int, row: Row) -> Record:
        return Record(row, "lane", "layer 0", start, start + 1, {"layer": 0})

    copy = record(0, "copies")
    passes = [record(number, "compute") for number in range(1, 1_001)]
    for each in (copy, *passes):
        ring.add(each)
    assert ring.look() == ([copy, *passes[-3:]], 997)


async def test_no_token_and_no_path_is_in_it(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "tenant-seven" / "sql")
    source = FakeSource()
    source.put("https://host.example/secret-part/chat", *tiny.files(folder))
    async with loader(local_roots=(tmp_path,)) as there:
        with there.trace() as trace:
            (await there.load(AdapterRef(folder))).release()
            with pytest.raises(errors.AdapterNotFoundError):
                await there.load(str(tmp_path / "tenant-seven" / "none"), token="hf_abcdef")
    async with over(source) as there:
        with there.trace() as other:
            ref = AdapterRef("https://host.example/secret-part/chat", token="hf_abcdef")
            (await there.load(ref)).release()
    text = json.dumps([trace.as_json(), other.as_json()])
    assert "load sql" in text
    assert "load chat" in text
    for secret in ("hf_abcdef", "tenant-seven", str(tmp_path), "secret-part", "host.example"):
        assert secret not in text


async def test_only_what_is_shown_has_its_name(tmp_path: Path) -> None:
    async with over(make_source(tmp_path, "org/mine", "org/theirs", "org/1")) as loader:
        with loader.trace() as trace:
            for name in ("org/mine", "org/theirs", "org/1"):
                await loader.prefetch([name], tier="disk")
                (await loader.load(name)).release()
        plain, hidden = trace.as_json(), trace.as_json(called={"mine": "ours"})
        for found in (plain, hidden, trace.as_json(called={})):
            require_trace(found)
        assert "theirs" in json.dumps(plain)
        text = json.dumps(hidden)
        assert "theirs" not in text
        assert names(hidden, "copies") == names(plain, "copies")
        for name in ("ours", "another adapter"):
            assert f'"load {name}"' in text
            assert f'"prefetch to disk {name}"' in text
        for found in (hidden, trace.as_json(called={})):
            assert "mine" not in json.dumps(found)


NAMES: list[tuple[str, tuple[str | Ref, ...]]] = [
    ("name@main", ("org/name@main",)),
    ("b", ("https://host/a/b/?sig=secret", "https://host/a/b#x")),
    ("sql", ("/home/tenant/sql", "C:\\tenant\\sql", "file:///home/tenant/sql")),
    ("sql", (AdapterRef("./tenant@x/sql"), AdapterKey("/home/tenant@x/sql", ()))),
    ("a_b_c_", ("a\nb<c>",)),
    ("x" * 64, ("x" * 100,)),
    ("adapter", ("///", "https://host.example:8443/", "s3://bucket")),
    ("adapter", (AdapterRef("https://host.example", token="hf_secret"),)),
    ("chat", ("s3://bucket/chat",)),
    ("name", (AdapterRef("org/name"), AdapterRef("org/name@refs/pr/1"))),
    ("name", (AdapterRef("org/name@feature/x", source="hub"),)),
    ("name", (RemoteKey("org/name", (), version="0"),)),
    ("1", (AdapterRef("tenant/sql@v/1", source="local"), AdapterRef(Path("tenant/sql@v/1")))),
    ("tensors 01234567", (TensorsKey.of("0123456789abcdef" * 4),)),
]


def test_a_name_is_the_last_part_of_an_id() -> None:
    for name, ids in NAMES:
        for id in ids:
            assert (last_part(id) if isinstance(id, str) else name_of(id)) == name


@pytest.mark.parametrize("full", [False, True])
async def test_a_command_writes_its_trace(folders: list[Path], tmp_path: Path, full: bool) -> None:
    path = tmp_path / "trace.json"
    if full:
        path.symlink_to("/dev/full")
    async with loader() as there:
        for nowhere in (tmp_path, tmp_path / "none" / "trace.json"):
            with pytest.raises(OSError, match="directory"), record_trace(there, nowhere):
                raise AssertionError("not to be entered")
        with pytest.raises(errors.AdapterNotFoundError), record_trace(there, path):
            await load(there, folders[0])
            await there.load(tmp_path / "none")
        if full:
            with pytest.raises(OSError, match="No space"), record_trace(there, path):
                pass
        assert there.tracer.on is None
    if not full:
        assert names(json.loads(path.read_text()), "requests") == ["load a", "load none"]


def test_a_part_is_cut_out() -> None:
    tracer = Tracer()
    trace = Trace(tracer, 100, dict).start()
    t, recorder = now(), cast(Any, tracer.on)
    for start, end in ((1_000, 2_000), (2_000, 4_000), (4_500, 6_000), (7_000, 9_000)):
        recorder.record(Record("files", "stream", str(start), t + start, t + end, {}))
    recorder.record(Record("files", "stream", "9500", t + 9_500, t + 9_900, {}))
    while now() < t + 10_000:  # it is not read in the future
        pass
    found: Any = trace.as_json(t + 3_000, t + 8_000)
    events = require_trace(found)
    spans = {each["name"]: (each["ts"], each["dur"]) for each in of(events, "files")}
    assert spans == {"2000": (0, 1), "4500": (1.5, 1.5), "7000": (4, 1)}
    cut = [(each["args"].get("began_before"), each["args"].get("goes_on")) for each in events]
    assert cut == [(True, None), (None, None), (None, True)]
    assert names(trace.as_json(t + 9_200), "files") == ["9500"]
    for _ in range(2):
        trace.stop()
        assert trace.as_json(t + 3_000, t + 8_000) == found


def test_only_spans_beside_others_are_asynchronous() -> None:
    """A thread's complete events cannot overlap by half; requests may, whatever they do today."""
    row: list[tuple[Row, str, int, int, str]] = [
        *(("connections", "outer", 0, 10, "X"), ("connections", "inner", 2, 10, "X")),
        *(("connections", "next", 10, 14, "X"), ("connections", "by half", 12, 20, "b")),
        *(("connections", "after", 14, 16, "X"), ("connections", "last", 16, 22, "X")),
        *(("requests", "load a", 0, 10, "b"), ("requests", "load b", 20, 30, "b")),
    ]
    records = [Record(row, None, name, start, stop, {}) for row, name, start, stop, _ in row]
    found = as_events(reversed(records), 0)
    assert require_trace({"traceEvents": found, "displayTimeUnit": "ms"})
    phases = {(e["cat"], e["name"]): e["ph"] for e in found if e["ph"] in {"X", "b"}}
    assert phases == {(row, name): phase for row, name, _, _, phase in row}
    lanes = {(event["pid"], event["tid"]) for event in found if event["ph"] != "M"}
    assert len(lanes) == 2, "viewers make lanes, a row says only whose they are"


@pytest.mark.parametrize("before", [True, False])
def test_a_span_ends_while_it_is_read(monkeypatch: Patch, before: bool) -> None:
    tracer = Tracer()
    with Trace(tracer, 100, dict) as trace:
        span = tracer.span("requests", None, "load", AdapterRef("a"))
        look = Ring.look

        def ending(ring: Ring, since: int) -> tuple[list[Record], int]:
            found = look(ring, since) if not before else None
            span.end(outcome="done")
            return found or look(ring, since)

        monkeypatch.setattr(Ring, "look", ending)
        (event,) = require_trace(trace.as_json())
        assert event["name"] == "load a"
        if before:
            assert event["args"] == {"adapter": "a", "outcome": "done"}


def test_no_nanosecond_is_lost_where_fractions_are_cut_off() -> None:
    """Up to a day. Spans that touch must touch in whole nanoseconds: else one is thrown away."""
    for nanoseconds in (at + n for at in (1, 10**6, 10**10, 10**14) for n in range(0, 20_000, 7)):
        value = json.loads(json.dumps(microseconds(nanoseconds)))
        assert int(value * 1000.0) == round(value * 1000.0) == nanoseconds


def test_a_trace_is_written_event_by_event(monkeypatch: Patch) -> None:
    """One call of json holds the GIL from its beginning to its end."""
    lengths = [0]
    dumps = json.dumps

    def watched(value: Any, **settings: Any) -> str:
        text = dumps(value, **settings)
        lengths.append(len(text))
        return text

    tracer = Tracer()
    with Trace(tracer, 5_000, dict) as trace:
        for _ in range(5_000):
            tracer.span("files", "x", "fetch").end()
    monkeypatch.setattr(json, "dumps", watched)
    assert len(trace.encoded()) > 400_000
    assert 0 < max(lengths) < 1_000
