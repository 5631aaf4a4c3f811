"""The demo: real adapters on a real base, in one batch; and the clock beside the loads."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path

import pytest

from command_line import ADAPTERS, on_a_terminal, read_until
from lorax_async.cli import main
from lorax_async.commands.measure import loads_of, run_on_uvloop, with_ticker

Capture = pytest.CaptureFixture[str]


def test_each_row_answers_in_its_style(capsys: Capture) -> None:
    begin = time.perf_counter()
    assert main(["demo", "--json", "--adapters", str(ADAPTERS)]) == 0
    assert time.perf_counter() - begin < 60
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    answers = {answer["by"]: answer for answer in result["answers"]}
    assert list(answers) == ["base", "pirate", "shout", "json"]
    assert answers["pirate"]["text"].startswith("Arr")
    assert answers["shout"]["text"].isupper()
    assert list(json.loads(answers["json"]["text"])) == ["answer"]
    base = answers["base"]["text"]
    assert not base.startswith(("Arr", "{"))
    assert not base.isupper()
    assert not any(answers[name]["cut"] for name in ("pirate", "shout", "json"))
    for row in result["adapters"]:
        assert 0 < row["first_layer_ms"] <= row["resident_ms"] < 5_000
        assert row["device_bytes"] > 0
    assert result["again_resident_ms"] > 0
    assert result["stall_ms"]["loading"] > 0
    assert result["ticks"]["idle"] > 100
    assert min(result["prepare_s"], result["generate_s"]) > 0


def test_without_the_adapters_it_says_where_they_belong(tmp_path: Path, capsys: Capture) -> None:
    assert main(["demo", "--adapters", str(tmp_path)]) == 1
    text = capsys.readouterr().err
    assert text.startswith("ConfigError: ")
    assert "--adapters" in text


def test_ctrl_c_while_it_generates() -> None:
    process, terminal = on_a_terminal(["demo", "--adapters", str(ADAPTERS)])
    seen = read_until(terminal, b"four rows, one batch")
    begin = time.perf_counter()
    process.send_signal(signal.SIGINT)
    seen += read_until(terminal)
    os.close(terminal)
    assert process.wait(60) == 130
    assert time.perf_counter() - begin < 15
    assert b"30/30 layers resident" in seen
    assert b"Traceback" not in seen
    assert seen.endswith(b"interrupted\r\n")


@pytest.mark.parametrize("run", [asyncio.run, run_on_uvloop])
def test_the_ticker_sees_who_holds_the_loop(run: object) -> None:
    async def hold() -> str:
        await asyncio.sleep(0.02)
        time.sleep(0.1)  # noqa: ASYNC251 (the fault that is measured)
        return "held"

    assert callable(run)
    result, stall = run(with_ticker(hold()))
    assert result == "held"
    assert 0.095 < stall.longest < stall.seconds
    assert stall.ticks >= 2


def test_the_ticker_lets_errors_through() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("from within")

    async def main() -> int:
        with pytest.raises(LookupError, match="from within"):
            await with_ticker(fail())
        return len(asyncio.all_tasks())

    assert run_on_uvloop(main()) == 1


def test_names_tell_adapters_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "one" / "sql", tmp_path / "two" / "sql", tmp_path / "three" / "chat"]
    names = [load.name for load in loads_of(paths)]
    assert names == [str(paths[0]), str(paths[1]), "chat"]
