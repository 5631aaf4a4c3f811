"""Names of adapters that are not to be told are in no part of a trace."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_sources import over, stocked
from tracing.chrome_format import require_trace


async def test_only_what_is_shown_has_its_name(tmp_path: Path) -> None:
    source = stocked(tmp_path, "org/mine", "org/theirs")
    async with over(source) as loader:
        with loader.trace() as trace:
            for name in ("org/mine", "org/theirs"):
                await loader.prefetch([name], tier="disk")
                (await loader.load(name)).release()
        plain, hidden = trace.as_json(), trace.as_json(called={"mine": "ours"})
        for found in (plain, hidden, trace.as_json(called={})):
            require_trace(found)
        assert "theirs" in json.dumps(plain)
        said = json.dumps(hidden)
        assert "theirs" not in said
        for name in ("ours", "another adapter"):
            assert f'"load {name}"' in said
            assert f'"prefetch to disk {name}"' in said
        for found in (hidden, trace.as_json(called={})):
            assert "mine" not in json.dumps(found)


async def test_as_a_file_it_is_the_same(tmp_path: Path) -> None:
    async with over(stocked(tmp_path, "org/mine")) as loader:
        with loader.trace() as trace:
            (await loader.load("org/mine")).release()
        trace.write(tmp_path / "trace.json")
        assert json.loads((tmp_path / "trace.json").read_bytes()) == trace.as_json()
        called = {"mine": "unsers, größer"}
        assert json.loads(trace.encoded(called)) == trace.as_json(called=called)
