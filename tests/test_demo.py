"""The demos: real adapters on a real base, and layers over a slow link."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

import pytest

from command_line import ADAPTERS, base, on_a_terminal, output, read_until
from lorax_async import layouts
from lorax_async.cli import main
from lorax_async.commands.demo_remote import COLUMNS, RATE, picture, smollm2_layout
from lorax_async.commands.measure import run_on_uvloop, with_ticker
from lorax_async.commands.slow_server import SlowServer
from lorax_async.core.layout import Module

Capture = pytest.CaptureFixture[str]


@pytest.mark.slow
def test_each_row_answers_in_its_style(capsys: Capture) -> None:
    begin = time.perf_counter()
    assert main(["demo", "--json", "--adapters", str(ADAPTERS)]) == 0
    assert time.perf_counter() - begin < 60
    result = output(capsys)
    answers = {answer["by"]: answer for answer in result["answers"]}
    assert list(answers) == ["base", "pirate", "shout", "json"]
    assert answers["pirate"]["text"].startswith("Arr")
    assert answers["shout"]["text"].isupper()
    assert list(json.loads(answers["json"]["text"])) == ["answer"]
    plain = answers["base"]["text"]
    assert not plain.startswith(("Arr", "{"))
    assert not plain.isupper()
    assert not any(answers[name]["cut"] for name in ("pirate", "shout", "json"))
    for row in result["adapters"]:
        assert 0 < row["first_layer_ms"] <= row["resident_ms"] < 5_000
        assert row["device_bytes"] > 0
    assert min(result["again_resident_ms"], result["stall_ms"]["loading"]) > 0
    assert result["ticks"]["idle"] > 100
    assert min(result["prepare_s"], result["generate_s"]) > 0


@pytest.mark.parametrize("demo", ["demo", "demo-remote"])
def test_without_the_adapters_it_says_where_they_belong(
    demo: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main([demo, "--adapters", str(tmp_path)]) == 1
    text = capsys.readouterr().err
    assert text.startswith("ConfigError: ")
    assert "--adapters" in text


@pytest.mark.slow
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

    async def fail() -> None:
        raise LookupError("from within")

    assert callable(run)
    result, stall = run(with_ticker(hold()))
    assert result == "held"
    assert 0.095 < stall.longest < stall.seconds
    assert stall.ticks >= 2
    with pytest.raises(LookupError, match="from within"):
        run(with_ticker(fail()))


# -- demo-remote ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("no_socket_left", "nothing_left")
def test_layers_come_one_after_the_other(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A person sees a picture of it; a program reads when each layer came."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["demo-remote", "--adapters", str(ADAPTERS)]) == 0
    shown = capsys.readouterr()
    for name in ("pirate", "shout", "json"):
        rows = [line for line in shown.out.splitlines() if line.split()[:1] == [name]]
        assert len(rows) == 2
        drawn = rows[1].split()[1]
        assert len(drawn) == COLUMNS
        assert drawn.lstrip("·") == "".join(sorted(drawn.lstrip("·"))), "layers stay"
    assert "MB/s for all three" in shown.out
    assert shown.err == ""

    assert main(["demo-remote", "--json", "--adapters", str(ADAPTERS)]) == 0
    result = output(capsys)
    assert [row["name"] for row in result["adapters"]] == ["pirate", "shout", "json"]
    for row in result["adapters"]:
        assert (row["state"], row["error"]) == ("resident", None)
        times = row["layers_ms"]
        assert len(times) == len(row["layers"]) == (15 if row["name"] == "json" else 30)
        assert times == sorted(times)
        weights = (ADAPTERS / row["name"] / "adapter_model.safetensors").read_bytes()
        assert row["checked"] == {"kind": "sha256", "digest": hashlib.sha256(weights).hexdigest()}
        assert row["first_layer_ms"] == times[0] < times[-1] <= row["resident_ms"]
    files = [path for path in ADAPTERS.glob("*/adapter_*") if path.suffix != ".md"]
    assert result["bytes"] == sum(path.stat().st_size for path in files)
    # A link lets nothing through faster than its rate.
    longest = max(row["resident_ms"] for row in result["adapters"])
    assert longest > result["bytes"] / RATE * 1e3
    assert not list(tmp_path.iterdir()), "the cache is gone"


def test_a_picture_by_hand() -> None:
    # Column 25 of 50 ends at 0.5, column 37 at 0.74, column 38 at 0.76.
    drawn = "·" * 24 + "▄" * 13 + "▆" * 12 + "█"
    assert picture([0.5, 0.5, 0.75, 1.0], 1.0) == drawn
    assert picture([0.0] * 3, 2.0) == "█" * COLUMNS


def test_the_shapes_are_the_bases(tmp_path: Path) -> None:
    """As transformers builds it from the model's config."""
    real = layouts.from_pretrained(base(tmp_path / "base"))
    ours = smollm2_layout()
    assert {_shape(module) for module in ours.modules} == {
        _shape(module) for module in real.modules if ".layers." in module.name
    }
    assert replace(real, modules=ours.modules) == ours


def _shape(module: Module) -> tuple[object, ...]:
    return module.name, module.in_features, module.out_features, module.layer, module.parallel


@pytest.mark.usefixtures("no_socket_left", "nothing_left")
def test_the_slow_server_serves_ranges_of_its_files_and_nothing_else() -> None:
    data = bytes(range(256)) * 100

    def ask(method: str, target: str, **fields: str) -> tuple[int, bytes]:
        client = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        with closing(client):
            client.request(method, target, headers=fields)
            answer = client.getresponse()
            return answer.status, answer.read()

    with SlowServer({"/a/file": data}, 1e9) as server:
        assert ask("GET", "/a/file") == (200, data)
        assert ask("GET", "/a/file", Range="bytes=25590-99999") == (206, data[-10:])
        assert ask("GET", "/a/file", Range="bytes=25600-25601") == (416, b"")
        assert ask("GET", "/a/other") == (404, b"")
        assert ask("POST", "/a/file")[0] == 501
