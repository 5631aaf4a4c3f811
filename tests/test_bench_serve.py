"""`lorax-async bench-serve` against the real server, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from command_line import output
from common import Run
from lorax_async.cli import main
from server.world import FakeEngine, saying, serving

Capture = pytest.CaptureFixture[str]


def ask_real(run: Run, engine: FakeEngine, *arguments: str, **settings: Any) -> int:
    """The exit status. The command has a loop of its own, in a thread."""

    async def body() -> int:
        async with serving(engine, **settings) as world:
            url = f"http://127.0.0.1:{world.port}"
            return await asyncio.to_thread(main, ["bench-serve", url, *arguments])

    status = run(body())
    assert isinstance(status, int)
    return status


def test_the_server_is_asked(run: Run, tmp_path: Path, capsys: Capture) -> None:
    names = {name: tmp_path / name for name in ("one", "two", "three")}
    (tmp_path / "models").write_text("base\none\n\ntwo\nthree\n")
    engine = FakeEngine(saying("hello you"))
    status = ask_real(
        *(run, engine, "--models", str(tmp_path / "models"), "--rate", "60", "--seconds", "0.5"),
        *("--new-tokens", "5", "--prompt-tokens", "3", "--seed", "4", "--json"),
        *("--lines", str(tmp_path / "lines")),
        adapters=names,
    )
    told = output(capsys)
    assert status == 0
    every = told["all"]
    assert every["requests"] == every["whole"] == len(engine.submitted) > 10
    assert every["errors"] == {}
    assert told["warm"]["requests"] + told["cold"]["requests"] == every["requests"]
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert len(lines) == every["requests"]
    assert told["cold"]["requests"] >= len({line["model"] for line in lines})
    # A token is a byte: "hello" of "hello you".
    assert {line["tokens"] for line in lines} == {5}
    assert every["tokens"] == 5 * len(lines)
    for line in lines:
        assert line["due_s"] <= line["sent_s"]
        assert line["sent_s"] < line["chunks_s"][0] <= line["ended_s"]
        assert line["ttft_s"] == line["chunks_s"][0] - line["due_s"]
    asked = engine.submitted[0].generation
    assert asked.max_new_tokens == 5
    assert asked.sampling.temperature == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("localhost", "--models", "a"), "no URL"),
        (("http://localhost", "--models", "a", "a"), "'a' twice"),
        (("http://localhost", "--models", " "), "without a name"),
        (("http://localhost", "--models", "a", "--plot", "out.nonsense"), "out.nonsense"),
        (("http://localhost", "--models", "a", "--plot", "/nowhere/out.png"), "/nowhere/out.png"),
        (("http://localhost", "--models", "a", "--timeout", "0"), "--timeout"),
        (("http://localhost", "--models", "a", "--cold-share", "0.5"), "too few"),
        (("http://localhost", "--models", "a", "--rate", "-1"), "more than 0"),
        (("http://localhost", "--models", "a", "--lines", "/nowhere/lines"), "/nowhere/lines"),
    ],
)
def test_what_cannot_be_asked_is_said(
    capsys: Capture, arguments: tuple[str, ...], text: str
) -> None:
    assert main(["bench-serve", *arguments, "--json"]) == 1
    assert text in capsys.readouterr().err
