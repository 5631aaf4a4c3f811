"""What the documents show runs: examples, settings, commands and their options; the diagrams."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from lorax_async import (
    AccessDeniedError,
    AdapterNotFoundError,
    AdapterScheduler,
    Allow,
    Batch,
    LoaderConfig,
    LocalRoot,
    Ticket,
    errors,
    parse_adapter_id,
)
from lorax_async.cli import main
from scheduling.page import functions
from tiny_loaders import ONE, loader
from tiny_sources import over, stocked

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


# -- README.md ------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Where cores are shared, two OpenMP threads wait for each other several times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("nothing_left")
async def test_the_lines_about_room_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, lines, _ = python_blocks(README)
    scope: dict[str, Any] = {}
    exec("async def play(loader):\n" + textwrap.indent(lines, "    "), scope)
    for name in ("sql", "chat"):
        tiny.write(tmp_path / name)
    async with loader(local_roots=(LocalRoot(tmp_path, immutable=True),)) as there:
        await scope["play"](there)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "sql" in line]
    file_bytes = os.path.getsize(tmp_path / "sql" / "adapter_model.safetensors")
    assert line.split()[1:] == ["device", str(ONE), str(file_bytes)]


@pytest.mark.usefixtures("nothing_left")
async def test_the_lines_about_tensors_run(capsys: pytest.CaptureFixture[str]) -> None:
    *_, lines = python_blocks(README)
    steps = iter((1, 2))
    scope: dict[str, Any] = {
        "model": SimpleNamespace(peft_config={"default": tiny.config()}),
        "get_peft_model_state_dict": lambda _: tiny.tensors(next(steps)),
    }
    exec("async def play(loader):\n" + textwrap.indent(lines, "    "), scope)
    async with loader() as there:
        await scope["play"](there)
    assert capsys.readouterr().out.splitlines() == ["policy 4", "True"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "nothing_left")
def test_the_readmes_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example, *_ = python_blocks(README)
    monkeypatch.chdir(ROOT)
    exec(compile(example, str(README), "exec"), {"__name__": "__main__"})
    shape, base, pirate, shout = capsys.readouterr().out.splitlines()
    assert shape == "torch.Size([8, 576])"
    assert not base.startswith("Arr")
    assert pirate.startswith("Arr")
    assert shout.isupper()
    assert not base.isupper()


# -- pages ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_left")
async def test_the_schedulers_example_serves(tmp_path: Path) -> None:
    page = functions()

    def compute(batch: Batch) -> set[Ticket]:
        """ "b" ends with its third token, "a" when it is long enough."""
        ends = [row for row in batch.rows if row.ticket.generated == 2]
        return {row.ticket for row in ends if row.handle is not None and row.handle.id == "b"}

    async with over(stocked(tmp_path, "a", "b")) as loader:
        async with AdapterScheduler(loader) as scheduler:
            serving = asyncio.create_task(page["serve"](scheduler, compute))
            answers = [page["answer"](scheduler, id, 5) for id in ("a", "b", "none")]
            found = await asyncio.gather(*answers, return_exceptions=True)
            assert found[:2] == [32, 3]
            assert isinstance(found[2], AdapterNotFoundError)
        await asyncio.wait_for(serving, 5)


def allowed(text: str, allow: tuple[Allow, ...]) -> bool:
    try:
        parse_adapter_id(text, allow)
    except AccessDeniedError:
        return False
    return True


def test_the_sources_examples_allow_what_they_say() -> None:
    (block,) = python_blocks(DOCS / "sources.md")
    config = eval(block, {"LoaderConfig": LoaderConfig, "Allow": Allow})
    for text in (
        *("my-org/sql", "s3://my-bucket/loras/sql", "https://files.example.com/adapters/sql"),
        *("http://localhost:8080/sql", "https://files.internal/sql"),
    ):
        assert allowed(text, config.allow)
    for text in (
        *("org/sql", "s3://my-bucket/sql", "http://files.internal/sql", "http://localhost/x"),
    ):
        assert not allowed(text, config.allow)
    (entries,) = re.findall(r"`allow=(\(.*?\))`", (DOCS / "sources.md").read_text())
    allow = eval(entries, {"Allow": Allow})
    for text in ("org/name@refs/pr/1", "org/name", "other/name"):
        assert allowed(text, allow)
    assert not allowed("other/name@refs/pr/1", allow)


def test_settings_have_the_defaults_that_the_page_says() -> None:
    section = (DOCS / "sources.md").read_text().partition("\n## Settings\n")[2]
    rows = re.findall(r"^\| `([a-z_]+)` \| `?(.+?)`? \|", section, re.MULTILINE)
    assert len(rows) > 5
    config = LoaderConfig()
    for name, text in rows:
        assert getattr(config, name) == (16 << 30 if text == "16 GiB" else eval(text)), name


def test_every_error_has_a_section() -> None:
    named = re.findall(r"^### (\w+)$", (DOCS / "errors.md").read_text(), re.MULTILINE)
    kinds = {name for name, kind in vars(errors).items() if name.endswith("Error") and kind}
    assert set(named) == kinds


@pytest.mark.slow
def test_the_diagrams_are_drawn_from_the_tables() -> None:
    command = [sys.executable, str(DOCS / "draw_states.py")]
    drawn = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    page = (DOCS / "architecture.md").read_text()
    assert drawn.strip() in page, "run: python docs/draw_states.py --write"


# -- the command line -----------------------------------------------------------------------------


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_every_command_and_option_that_is_named_is_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (DOCS / "cli.md").read_text()
    named = {"cache ls", "cache verify", "cache rm", "cache gc"}
    named |= set(re.findall(r"^\| `lorax-async ([a-z-]+)", page, re.MULTILINE)) - {"cache"}
    named |= set(re.findall(r"lorax-async ([a-z][a-z-]+)", README.read_text())) - {"cache"}
    assert {"inspect", "load", "fetch", "serve", "plan", "demo-remote"} <= named
    options = {
        option
        for command in named
        for option in re.findall(r"--[a-z][a-z-]+", help_of(capsys, *command.split()))
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page)) <= options
