"""Programs of others: where they are looked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tools
from tools import tool


@pytest.fixture(autouse=True)
def forgotten() -> None:
    tool.cache_clear()


def program(folder: Path, name: str = "a-server") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def test_the_folder_of_the_tools_comes_before_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "FOLDER", tmp_path / "tools")
    monkeypatch.setenv("PATH", str(tmp_path / "usual"))
    assert tool("a-server") is None
    for folder in ("usual", "tools"):
        made = program(tmp_path / folder)
        tool.cache_clear()
        assert tool("a-server") == made
    monkeypatch.setattr(tools, "INSTALLED_BY", {"json": "", "no_such_module": ""})
    assert tool("json") == Path(json.__file__)
    assert tool("no_such_module") is None
