"""`lorax-async bench-serve` against the real server, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benching.stand_in import Asked, standing_in
from command_line import output
from common import Run
from lorax_async import AdapterNotFoundError
from lorax_async.cli import main
from lorax_async.commands.bench_serve import WORDS
from server.world import FakeEngine, FakeTokens, saying, serving

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
        *("--lines", str(tmp_path / "lines"), "--plot", str(tmp_path / "out.png")),
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
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    asked = engine.submitted[0].generation
    assert asked.max_new_tokens == 5
    assert asked.sampling.temperature == 0


def test_errors_are_counted_by_status(run: Run, capsys: Capture) -> None:
    def rule(tokens: FakeTokens) -> None:
        if tokens.generation.adapter is None:
            saying("x")(tokens)
        else:
            tokens.fail(AdapterNotFoundError("there is none", id="gone"))

    status = ask_real(
        *(run, FakeEngine(rule), "--models", "base", "gone", "--zipf", "0", "--rate", "60"),
        *("--seconds", "0.4", "--call", "completions"),
        adapters={"gone": Path("/nowhere")},
    )
    assert status == 1
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert "× 404" in rows["all"]
    assert rows.keys() >= {"warm", "cold"}


async def test_what_is_posted(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from the environment")
    found: list[Asked] = []

    async def script(asked: Asked) -> None:
        found.append(asked)
        await asked.begin()
        await asked.done()

    async def body() -> int:
        async with standing_in(script) as there:
            arguments = ["--models", "m", "--rate", "60", "--seconds", "0.2", "--json"]
            arguments += ["--call", "completions", "--ignore-eos", "--prompt-tokens", "12"]
            return await asyncio.to_thread(main, ["bench-serve", f"{there.url}/v1", *arguments])

    assert await body() == 0
    assert found
    for asked in found:
        prompt = asked.body.pop("prompt").split(" ")
        assert len(prompt) == 12
        assert set(prompt) <= set(WORDS)
        assert asked.path == "/v1/completions"
        assert "Bearer from the environment" in asked.headers
        assert asked.body == {
            "model": "m",
            "max_tokens": 32,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }


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


def test_models_that_are_no_text_are_refused(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "models").write_bytes(b"a\n\xff\n")
    arguments = ["bench-serve", "http://localhost", "--models", str(tmp_path / "models"), "--json"]
    assert main(arguments) == 1
    assert "no text in UTF-8" in capsys.readouterr().err


def test_what_was_measured_is_told_although_no_picture_can_be_written(
    run: Run, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "out.png").symlink_to("/dev/full")
    arguments = ("--models", "base", "--rate", "60", "--seconds", "0.2", "--json")
    plot = ("--plot", str(tmp_path / "out.png"))
    assert ask_real(run, FakeEngine(saying("x")), *arguments, *plot, adapters={}) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["all"]["whole"] > 0
    assert "No space left" in captured.err


def test_without_matplotlib_nothing_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plot = ("--plot", str(tmp_path / "out.png"))
    assert main(["bench-serve", "http://localhost", "--models", "a", *plot, "--json"]) == 1
    assert "lorax-async[measure]" in capsys.readouterr().err
