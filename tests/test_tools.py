"""Programs of others: where they are looked for, and what is said of those that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tools
from tools import tool

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


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


TESTS = """
import pytest

@pytest.mark.needs("no-such-program")
@pytest.mark.needs("sh")
def test_against_both(): raise AssertionError

@pytest.mark.needs("no-such-program")
@pytest.mark.parametrize("n", [1, 2])
def test_against_one(n): raise AssertionError

@pytest.mark.needs("sh")
def test_against_a_shell(): pass

def test_against_nothing(): pass
"""


@pytest.mark.parametrize("workers", [[], ["--numprocesses", "2"]], ids=["here", "in workers"])
def test_a_run_ends_with_what_did_not_run(tmp_path: Path, workers: list[str]) -> None:
    file = tmp_path / "test_of_programs.py"
    file.write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    ended = subprocess.run(
        [*command, *workers, str(file)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for line in ("1 tests ran against sh", "3 tests did not run: no-such-program", "2 passed"):
        assert line in ended.stdout
