"""How commands record a trace: where it cannot be written, and where they fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from lorax_async import AdapterNotFoundError
from lorax_async.commands.timeline import traced
from lorax_async.tracing.trace import Trace
from tiny_loaders import loader
from tracing.chrome_format import of, require_trace

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_what_cannot_be_written_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    entered: list[Path] = []
    async with loader() as there:
        for path in (tmp_path, tmp_path / "none" / "trace.json"):
            with pytest.raises(OSError, match="directory"), traced(there, path):
                entered.append(path)
        assert there.tracer.on is None
        assert not entered


@pytest.mark.parametrize("full", [False, True])
async def test_an_error_of_the_command_is_told_whatever_becomes_of_the_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    path, folder = tmp_path / "trace.json", tiny.write(tmp_path / "one")

    def write(*_: object) -> None:
        raise OSError("No space left on device")

    if full:
        monkeypatch.setattr(Trace, "write", write)
    async with loader() as there:
        with pytest.raises(AdapterNotFoundError), traced(there, path):
            (await there.load(folder)).release()
            await there.load(tmp_path / "none")
        if full:
            with pytest.raises(OSError, match="No space"), traced(there, path):
                pass
        assert there.tracer.on is None
    if not full:
        asked = of(require_trace(json.loads(path.read_text())), "requests")
        assert [each["name"] for each in asked] == ["load one", "load none"]
