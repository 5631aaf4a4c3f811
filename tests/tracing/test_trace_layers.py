"""What engines of one's own report with `trace.compute`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import tiny
from lorax_async import UsageError
from tiny_loaders import loader
from tracing.chrome_format import of, require_trace

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_engines_of_ones_own_report_layers(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "one")
    async with loader() as there:
        with there.trace() as trace:
            async with there.stream(folder) as handle:
                for layer in range(tiny.LAYERS):
                    await handle.layer_ready(layer)
                    with trace.compute(layer, handle):
                        pass
        with trace.compute(9):  # nobody records
            pass
        found: Any = trace.as_json()
        names = [each["name"] for each in of(require_trace(found), "compute")]
        assert names == [f"layer {layer}" for layer in range(tiny.LAYERS)]
        assert [each["ph"] for each in found["traceEvents"]].count("f") == tiny.LAYERS


async def test_a_layer_is_of_who_was_there_when_it_began(tmp_path: Path) -> None:
    folders = [tiny.write(tmp_path / name, seed) for seed, name in enumerate("ab")]
    async with loader(max_slots=1, min_residency=0.0) as there:
        with there.trace() as trace:
            handle, three = await there.load(folders[0]), cast(Any, np.int64(3))
            with trace.compute(three, handle, name="attention"):
                handle.release()
                (await there.load(folders[1])).release()
            with pytest.raises(UsageError, match="whole number"), trace.compute("3"):  # type: ignore[arg-type]
                raise AssertionError("not to be entered")
        trace.write(tmp_path / "trace.json")
        found = json.loads((tmp_path / "trace.json").read_text())
        (layer,) = of(require_trace(found), "compute")
        assert (layer["name"], layer["args"]) == ("attention", {"layer": 3, "stays": [1]})
