"""Programs of others: where they are looked for, and what is said of those that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tools
from tools import FOLDER, main, tool

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
    assert FOLDER == ROOT / ".tools" / "bin"
    monkeypatch.setattr(tools, "FOLDER", tmp_path / "tools")
    monkeypatch.setenv("PATH", str(tmp_path / "usual"))
    assert tool("a-server") is None
    usual = program(tmp_path / "usual")
    tool.cache_clear()
    assert tool("a-server") == usual
    ours = program(tmp_path / "tools")
    tool.cache_clear()
    assert tool("a-server") == ours


def test_what_is_missing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sh", "no-such-program"])
    assert ended.value.code == 1
    found, missing = capsys.readouterr().out.splitlines()
    assert found.startswith("sh: /")
    assert missing == "no-such-program: not installed"
    with pytest.raises(SystemExit) as ended:
        main(["sh"])
    assert ended.value.code == 0


def test_a_module_of_python_is_looked_for_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (
            "",
            [
                "1 tests ran against sh",
                "3 tests did not run: no-such-program is not installed",
                "2 passed",
            ],
        ),
        ("needs", ["1 tests ran against sh", "3 tests did not run", "1 passed"]),
        ("not needs", ["1 passed"]),
    ],
)
@pytest.mark.parametrize("workers", [[], ["--numprocesses", "2"]], ids=["here", "in workers"])
def test_a_run_ends_with_what_did_not_run(
    tmp_path: Path, chosen: str, told: list[str], workers: list[str]
) -> None:
    file = tmp_path / "test_of_programs.py"
    file.write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-m", chosen]
    ended = subprocess.run(
        [*command, *workers, str(file)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for line in told:
        assert line in ended.stdout
    assert ("did not run" in ended.stdout) == any("did not run" in line for line in told)


def test_the_script_knows_every_server_of_the_makefile() -> None:
    """And says so of what it does not know, before anything is fetched."""
    script = (ROOT / ".ci" / "servers").read_text()
    makefile = (ROOT / "Makefile").read_text()
    names = makefile.partition("SERVERS := ")[2].partition("\n")[0].split()
    assert len(names) == 5
    assert all(f"\n        {name}) " in script for name in names)
    ended = subprocess.run(
        [str(ROOT / ".ci" / "servers"), "no-such-program"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "no-such-program" in ended.stderr


def test_ci_insists_on_two_of_them() -> None:
    assert "\n.ci/servers nginx weed\n" in (ROOT / ".ci" / "run").read_text()
