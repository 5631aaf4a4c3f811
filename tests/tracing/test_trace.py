"""What a loader's trace has: rows, order, ends; and nothing at all while nobody records."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

import tiny
from common import until
from engines.variants import PEFT_WARNING, llama, logits_of, prompt, save, serving
from lorax_async import (
    AdapterNotFoundError,
    FetchError,
)
from lorax_async.config import LoaderConfig
from lorax_async.loader import AdapterLoader
from lorax_async.testing import FakeSource
from tiny_loaders import gated, loader
from tracing.chrome_format import of, require_trace, stop

pytestmark = [
    pytest.mark.filterwarnings(PEFT_WARNING),
    pytest.mark.usefixtures("nothing_left"),
]

LAYERS = 4


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lora = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
    folder = tmp_path_factory.mktemp("traced") / "cold"
    return save(llama(num_hidden_layers=LAYERS), lora, folder)


async def test_a_streamed_pass_lies_between_its_copies(adapter: Path) -> None:
    """The last layer's bytes come when all others are computed."""
    model, source = llama(num_hidden_layers=LAYERS), FakeSource()
    source.put("cold", *tiny.files(adapter))
    source.hold("cold")

    async def main() -> dict[str, object]:
        async with serving(model, source=source) as (there, attached):
            with there.trace() as trace:
                async with there.stream("cold") as cold:
                    with attached.batch([cold, None]):
                        passing = asyncio.create_task(
                            asyncio.to_thread(logits_of, model, prompt(2))
                        )
                        for group in range(LAYERS - 1):
                            source.allow("cold", group)
                        at_the_last = f"layer {LAYERS - 2}"
                        await cold.layer_ready(LAYERS - 2)
                        await until(lambda: at_the_last in names(trace.as_json()))
                        source.allow("cold")
                        await passing
            return trace.as_json()

    events = require_trace(await main())
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
    assert [each["name"] for each in of(computed, "compute") if each["args"].get("adapters")] == [
        "rows: 2"
    ]
    (request,) = of(events, "requests")
    assert (request["name"], request["args"]["outcome"]) == ("stream cold", "done")


def names(trace: dict[str, Any]) -> set[str]:
    """Of what is computed."""
    return {each["name"] for each in trace["traceEvents"] if each.get("cat") == "compute"}


async def test_each_layer_has_an_arrow_from_its_copy(adapter: Path) -> None:
    model = llama(num_hidden_layers=LAYERS)

    async def main() -> dict[str, Any]:
        async with serving(model) as (there, attached):
            with there.trace() as trace:
                async with there.stream(adapter) as cold:
                    with attached.batch([cold]):
                        for _ in range(2):  # one arrow, to the first pass
                            await asyncio.to_thread(logits_of, model, prompt(1))
            return trace.as_json()

    trace = await main()
    events = require_trace(trace)
    flows = [each for each in trace["traceEvents"] if each["ph"] in "sf"]
    assert [each["ph"] for each in flows].count("s") == LAYERS
    assert len(of(events, "compute", "layer 0")) == 2
    computed = of(events, "compute")
    first = {min(each["ts"] for each in computed if each["name"] == f"layer {n}") for n in range(4)}
    assert {each["ts"] for each in flows if each["ph"] == "f"} == first


async def test_staging_holds_a_buffer_until_its_copy_has_ended(tmp_path: Path) -> None:
    """On a device with a copy stream: it copies one layer after the other."""
    folder = tiny.write(tmp_path / "one")

    async def main() -> dict[str, object]:
        async with loader(device="simulated") as there:
            with there.trace() as trace:
                (await there.load(folder)).release()
            return trace.as_json()

    trace = await main()
    events = require_trace(trace)
    copies = of(events, "copies")
    assert {each["args"]["layer"] for each in copies} == set(range(tiny.LAYERS))
    assert len({(each["pid"], each["tid"]) for each in copies}) == 1
    for before, after in zip(copies, copies[1:], strict=False):
        assert stop(before) <= after["ts"] + 0.002
    for copy in copies:
        (held,) = of(events, "staging", copy["name"])
        fills = [each for each in of(events, "staging", "fill") if held["ts"] <= each["ts"]]
        assert stop(min(fills, key=stop)) <= stop(copy) <= stop(held)
        assert held["args"]["adapter"] == "one"


# -- ends -----------------------------------------------------------------------------------------


async def test_what_fails_or_is_cancelled_has_its_ends(tmp_path: Path) -> None:
    source = FakeSource()
    for id in ("broken", "held"):
        source.put(id, *tiny.files(tiny.write(tmp_path / id)))
    source.fail("bring", FetchError("the line is down"), id="broken", at=1)
    source.hold("held")

    async def main() -> dict[str, object]:
        config = LoaderConfig(device_bytes=1 << 20, max_slots=4, io_threads=2)
        async with AdapterLoader(tiny.layout(), config, source=source) as there:
            with there.trace() as trace:
                with pytest.raises(FetchError):
                    await there.load("broken")
                with pytest.raises(AdapterNotFoundError):
                    await there.load("nowhere")
                task = asyncio.create_task(there.load("held"))
                source.allow("held", 0)
                await until(lambda: any(each.slot for each in there.story("held")))
                task.cancel()
                await asyncio.wait([task])
                await until(lambda: not there.residency())
            return trace.as_json()

    events = require_trace(await main())
    ended = {each["name"]: each["args"]["outcome"] for each in of(events, "requests")}
    assert ended == {
        "load broken": "FetchError",
        "load nowhere": "AdapterNotFoundError",
        "load held": "cancelled",
    }
    outcomes = [each["args"]["outcome"] for each in of(events, "layers") if "bytes" in each["args"]]
    assert sorted(outcomes) == ["FetchError", "leaving"]
    assert not [each for each in events if each["args"].get("unfinished")]


async def test_what_is_evicted_has_its_ends(tmp_path: Path) -> None:
    folders = [tiny.write(tmp_path / name, seed) for seed, name in enumerate("ab")]

    async def main() -> dict[str, object]:
        async with loader(max_slots=1, min_residency=0.0) as there:
            with there.trace() as trace:
                for folder in folders:
                    (await there.load(folder)).release()
            return trace.as_json()

    events = require_trace(await main())
    first, second = (
        [each for each in of(events, "layers") if each["args"]["stay"] == stay] for stay in (1, 2)
    )
    bounds = [(each["name"], each["args"].get("outcome")) for each in first]
    assert ("a", "resident") in bounds
    assert ("resident", "leaving") in bounds
    assert ("leaving", "left") in bounds
    assert max(map(stop, first)) <= min(each["ts"] for each in second)
    assert [each["name"] for each in second if each["args"].get("unfinished")] == ["resident"]


async def test_what_goes_on_at_the_end_is_cut_there(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "one")

    async def main() -> dict[str, object]:
        there, device = gated()
        async with there:
            device.gate.clear()
            with there.trace() as trace:
                task = asyncio.create_task(there.load(folder))
                await until(lambda: device.copies)
            found = trace.as_json()
            device.gate.set()
            (await task).release()
            assert trace.as_json() == found
            return found

    events = require_trace(await main())
    cut = {each["name"] for each in events if each["args"].get("unfinished")}
    assert cut == {"load one", "one"}


# -- nothing while nobody records -----------------------------------------------------------------


async def test_nothing_is_recorded_or_held_when_off(tmp_path: Path) -> None:
    folders = [tiny.write(tmp_path / name, seed) for seed, name in enumerate("abc")]
    async with loader() as there:
        assert there.tracer.on is None
        (await there.load(folders[0])).release()
        with there.trace() as trace:
            recorder = weakref.ref(there.tracer.on)
            (await there.load(folders[1])).release()
        found = trace.as_json()
        assert there.tracer.on is None
        gc.collect()
        assert recorder() is None
        (await there.load(folders[2])).release()
        assert trace.as_json() == found
        names = {each["name"] for each in require_trace(found)}
        assert {"load b", "b"} <= names
        assert not names & {"load a", "load c", "a", "c"}
