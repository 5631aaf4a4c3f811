"""How much a trace keeps, and what is in none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from lorax_async import (
    AdapterNotFoundError,
    AdapterRef,
    UsageError,
)
from lorax_async.config import LoaderConfig
from lorax_async.loader import AdapterLoader
from lorax_async.testing import FakeSource
from tiny_loaders import loader
from tracing.chrome_format import of, require_trace

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_two_may_record_at_once(tmp_path: Path) -> None:
    folders = [tiny.write(tmp_path / name, seed) for seed, name in enumerate("abc")]
    async with loader() as there:
        with there.trace() as outer:
            (await there.load(folders[0])).release()
            with there.trace() as inner:
                (await there.load(folders[1])).release()
            (await there.load(folders[2])).release()
        asked = [
            [each["name"] for each in of(require_trace(trace.as_json()), "requests")]
            for trace in (outer, inner)
        ]
        assert asked == [["load a", "load b", "load c"], ["load b"]]


async def test_a_small_trace_says_how_much_is_gone(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "one")
    async with loader() as there:
        with there.trace() as whole, there.trace(limit=5) as small:
            (await there.load(folder)).release()
            await there.unload(folder)
        all, left = (require_trace(each.as_json()) for each in (whole, small))
        assert (whole.dropped, small.dropped, len(left)) == (0, len(all) - 5, 5)
        data: Any = small.as_json()
        assert data["otherData"]["dropped"] == len(all) - 5
        small.write(tmp_path / "trace.json")
        assert json.loads((tmp_path / "trace.json").read_text()) == data


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, None])
async def test_a_limit_is_a_number(limit: Any) -> None:
    async with loader() as there:
        with pytest.raises(UsageError, match="limit"):
            there.trace(limit=limit)
        trace = there.trace()
        with trace:
            pass
        with pytest.raises(UsageError, match="once"), trace:
            pass


# -- nothing that is nobody's business --------------------------------------------------------------


async def test_no_token_and_no_path_is_in_it(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "tenant-seven" / "sql")
    source = FakeSource()
    source.put("https://host.example/secret-part/chat", *tiny.files(folder))
    async with loader(local_roots=(tmp_path,)) as there:
        with there.trace() as trace:
            (await there.load(AdapterRef(folder))).release()
            with pytest.raises(AdapterNotFoundError):
                await there.load(str(tmp_path / "tenant-seven" / "none"), token="hf_abcdef")
    config = LoaderConfig(device_bytes=1 << 20)
    async with AdapterLoader(tiny.layout(), config, source=source) as there:
        with there.trace() as other:
            ref = AdapterRef("https://host.example/secret-part/chat", token="hf_abcdef")
            (await there.load(ref)).release()
    text = json.dumps([trace.as_json(), other.as_json()])
    assert "load sql" in text
    assert "load chat" in text
    for secret in ("hf_abcdef", "tenant-seven", str(tmp_path), "secret-part", "host.example"):
        assert secret not in text
