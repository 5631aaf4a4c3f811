"""The command line: `load`, `inspect`, wrong usage, exit statuses, and what a terminal gets."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from command_line import ADAPTERS, adapter, base, on_a_terminal, output, query, read_until
from lorax_async.cli import main
from lorax_async.commands import load, terminal
from lorax_async.commands.arguments import as_size

CONTROL = re.compile(r"[^\n\x20-\x7e–─→…]")
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
PIRATE, JSON = str(ADAPTERS / "pirate"), str(ADAPTERS / "json")
SECRET = "hf_AbcDefGhi5ecre7"

# -- load -----------------------------------------------------------------------------------------


def test_load_reports_each_adapter(tmp_path: Path, capsys: Capture) -> None:
    refused = adapter(tmp_path / "refused", query(0), use_bdlora={})
    (tmp_path / "pirate").symlink_to(PIRATE)
    paths = [PIRATE, refused, str(tmp_path / "absent"), JSON, str(tmp_path / "pirate")]
    options = ["--base", base(tmp_path / "base"), "--dtype", "float32", "--json"]
    assert main(["load", *paths, *options]) == 1
    captured = capsys.readouterr()
    pirate, bad, absent, other, twin = json.loads(captured.out)["adapters"]
    assert (pirate["name"], pirate["state"], pirate["error"]) == (PIRATE, "resident", None)
    assert pirate["layers"] == list(range(30))
    assert pirate["file_bytes"] == (ADAPTERS / "pirate/adapter_model.safetensors").stat().st_size
    assert pirate["device_bytes"] == 30 * 8 * (576 + 576 + 576 + 192) * 4
    assert 0 < pirate["first_layer_ms"] <= pirate["resident_ms"]
    assert (other["name"], other["layers"]) == ("json", list(range(15, 30)))
    assert (twin["name"], twin["state"]) == (paths[-1], "resident")
    assert (bad["state"], bad["error"]["type"]) == ("failed", "UnsupportedAdapterError")
    assert bad["error"]["stage"] == "verify"
    assert (absent["error"]["type"], absent["resident_ms"]) == ("AdapterNotFoundError", None)
    assert captured.err.count("\n") == 2
    assert "UnsupportedAdapterError: adapter" in captured.err


def test_load_takes_turns_where_room_is_short(tmp_path: Path, capsys: Capture) -> None:
    names = ("pirate", "shout", "json")
    options = ["--base", base(tmp_path / "base"), "--device-bytes"]
    assert main(["load", *(str(ADAPTERS / name) for name in names), *options, "1MiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "resident " in line] == [*names]
    assert main(["load", PIRATE, *options, "100000"]) == 1
    assert "CapacityError: " in capsys.readouterr().err


def test_ctrl_c_closes_the_loader(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    async def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    monkeypatch.setattr(load, "load_at_once", interrupted)
    assert main(["load", PIRATE, "--base", base(tmp_path / "base")]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert not [t for t in threading.enumerate() if t.name.startswith("lorax")]


# -- inspect --------------------------------------------------------------------------------------


def test_inspect_tells_what_the_adapter_is(tmp_path: Path, capsys: Capture) -> None:
    options = ["--base", base(tmp_path / "base")]
    assert main(["inspect", JSON, "--json"]) == 0
    found = output(capsys)
    assert (found["loadable"], found["problems"], found["tensors"]) == (True, [], 2 * 2 * 15)
    assert found["config"]["rank_pattern"] == {"down_proj": 4}
    assert found["file_bytes"] == (ADAPTERS / "json/adapter_model.safetensors").stat().st_size
    down, value = found["targets"]
    layers = list(range(15, 30))
    assert down == {
        "name": "down_proj",
        "modules": 15,
        "layers": layers,
        "ranks": [4],
        "scales": [1.0],
        "shapes": [[1536, 576]],
        "dtypes": ["F32"],
        "nbytes": 15 * 4 * (1536 + 576) * 4,
    }
    assert (value["ranks"], value["scales"], value["layers"]) == ([12], [2.0], layers)
    assert found["device_bytes"] == down["nbytes"] + value["nbytes"]
    assert main(["inspect", PIRATE, *options, "--json"]) == 0
    assert output(capsys)["device_dtype"] == "BF16"
    options = ["--base", base(tmp_path / "wide", hidden_size=1152, head_dim=64)]
    assert main(["inspect", PIRATE, *options, "--json"]) == 2
    found = output(capsys)
    (problem,) = found["problems"]
    assert problem["error"] == "IncompatibleAdapterError"
    assert "60 modules in all" in problem["text"]
    assert len(found["targets"]) == 2


def test_inspect_goes_on_after_each_problem(tmp_path: Path, capsys: Capture) -> None:
    tensors = query(0) | {
        "model.layers.0.self_attn.q_proj.lora_diag": torch.ones(8),
        "model.embed_tokens.weight": torch.ones(2, 2),
        "model.layers.99999999.q_proj.lora_A.weight": torch.ones(8, 4),
    }
    path = adapter(tmp_path / "bad", tensors, use_bdlora={}, bias="all", r="eight")
    assert main(["inspect", path, "--json"]) == 2
    found = output(capsys)
    texts = [problem["text"] for problem in found["problems"]]
    needles = ("'use_bdlora'", "'bias'", "r must be a", "lora_diag", "embed", "99999999")
    assert [sum(needle in text for text in texts) for needle in needles] == [1] * 6
    assert len(texts) == 6
    # Even so: what the file holds is shown.
    assert [(t["name"], t["ranks"], t["scales"]) for t in found["targets"]] == [("q_proj", [8], [])]
    path = adapter(tmp_path / "also bad", query(0, rank=4), use_bdlora={})
    assert main(["inspect", path, "--base", base(tmp_path / "base"), "--json"]) == 2
    errors = [problem["error"] for problem in output(capsys)["problems"]]
    assert errors == ["UnsupportedAdapterError", "AdapterFormatError"]  # and rank 4 is not 8


def test_inspect_knows_magnitudes_and_their_absence(tmp_path: Path, capsys: Capture) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    whole = adapter(tmp_path / "whole", query(0) | {name: torch.ones(576)}, use_dora=True)
    assert main(["inspect", whole, "--base", base(tmp_path / "base"), "--json"]) == 0
    found = output(capsys)
    assert (found["config"]["use_dora"], found["tensors"]) == (True, 3)
    # A and B are cast to bf16; the magnitude stays as it is.
    assert found["device_bytes"] == 2 * 8 * 1152 + 4 * 576
    assert found["targets"][0]["nbytes"] == 4 * 8 * 1152 + 4 * 576
    assert main(["inspect", adapter(tmp_path / "flag", query(0), use_dora=True), "--json"]) == 2
    (problem,) = output(capsys)["problems"]
    assert "use_dora is set" in problem["text"]


def test_inspect_leaves_out_what_repeats(tmp_path: Path, capsys: Capture) -> None:
    tensors = {f"model.layers.{n}.norm.weight": torch.ones(2) for n in range(25)}
    assert main(["inspect", adapter(tmp_path / "bad", tensors)]) == 2
    text = capsys.readouterr().out
    assert text.count("UnsupportedAdapterError") == 20
    # 25 tensors, and the module layout that cannot be made of them repeats the first one's text.
    assert "… and 5 more" in text


@pytest.mark.parametrize(
    ("kind", "says"),
    [("absent", "no such folder"), ("empty", "has no"), ("fifo", "a FIFO"), ("pickle", "a pickle")],
)
def test_inspect_of_what_is_no_adapter(
    kind: str, says: str, tmp_path: Path, capsys: Capture
) -> None:
    if kind != "absent":
        (tmp_path / kind).mkdir()
    if kind == "fifo":
        os.mkfifo(tmp_path / kind / "adapter_config.json")
        os.mkfifo(tmp_path / kind / "adapter_model.safetensors")
    if kind == "pickle":
        (tmp_path / kind / "adapter_config.json").write_text("{}")
        (tmp_path / kind / "adapter_model.bin").write_bytes(b"x")
    assert main(["inspect", str(tmp_path / kind)]) == 2
    assert says in capsys.readouterr().out


def test_a_strangers_text_reaches_no_terminal_as_it_is(tmp_path: Path, capsys: Capture) -> None:
    hostile = "\x1b[31m\x9b31m\u202e[bold]:bomb:"
    path = adapter(tmp_path / "x", query(0), base_model_name_or_path=hostile, unknown=hostile)
    assert main(["inspect", path]) == 2
    text = capsys.readouterr().out
    assert not {"\x1b", "\x9b", "\u202e"} & set(text)
    assert "[bold]:bomb:" in text


# -- the program ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1", 1), ("64KiB", 65_536), ("3MiB", 3_145_728), ("1GiB", 1_073_741_824)]
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert as_size(text) == nbytes


PLAN = ["plan", "--base", ".", "--adapters", "1x1", "--device-bytes", "1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *(
            (["load", "x", "--base", "y", f"--device-bytes={text}"], "is no size")
            for text in ("", "MiB", "1.5MiB", "-1", "1MB", "1KiBMiB", "²")
        ),
        *((["cache", *more], "usage: lorax-async ") for more in ([], ["rm"], ["ls", "more"])),
        (["cache", "gc", "--bytes", "much"], "is no size"),
        ([*PLAN, "--requests", "0"], "--requests"),
        ([*PLAN, "--requests", "100000001"], "--requests"),
        ([*PLAN, "--max-slots", "65537"], "--max-slots"),
        ([*PLAN, "--zipf", "x"], "--zipf"),
        (["fetch"], "required: ID"),
        (["fetch", "./adapter"], "is a local folder"),
        (["fetch", "name"], "'name': it is neither org/name"),
        (["fetch", "ftp://host/x"], "there is no such source"),
        (["fetch", f"https://me:{SECRET}@host.example/x"], "no user name and no password"),
        (["fetch", "org/name", "--allow", f"https://host.example/x?key={SECRET}"], "no '?'"),
        (["fetch", "org/name", "--allow", "s3://bucket/x"], "a URL is http(s)://host"),
        (["fetch", "org/name", "--hub-cache", "maybe"], "invalid choice"),
        (["fetch", "org/name", "--cache-bytes", "1TB"], "is no size"),
        (["fetch", "org/name", "--token", SECRET], "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], said: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    text = capsys.readouterr().err
    assert said in text
    assert SECRET not in text or "--token" in arguments


def test_a_base_that_is_none(capsys: Capture, tmp_path: Path) -> None:
    assert main(["load", "x", "--base", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("ConfigError: ")


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        (["--version"], ["lorax-async 0."]),
        (["--help"], ["exit status:"]),
        (["fetch", "--help"], ["HF_TOKEN", "No token is taken on the command line"]),
    ],
)
def test_version_and_help(arguments: list[str], needles: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(needle in text for needle in needles)


def test_without_rich_only_json(monkeypatch: Patch, capsys: Capture) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["inspect", PIRATE, "--json"]) == 0
    assert output(capsys)["loadable"] is True
    assert main(["inspect", PIRATE]) == 1
    assert "pip install 'lorax-async[cli]'" in capsys.readouterr().err


def test_people_read_sizes_spans_and_ages() -> None:
    sizes = [terminal.size(n) for n in (0, 1023, 1024, 1536, 5 << 20, 3 << 30, 2 << 40)]
    assert sizes == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.0 GiB", "2048.0 GiB"]
    assert [terminal.spans(n) for n in ((), (4,), (-1, 0, 1, 5, 7, 8))] == ["", "4", "-1–1, 5, 7–8"]
    ages = [terminal.age(each) for each in (0.4, 59, 61, 3_599, 3_600, 86_399, 86_400 * 3)]
    assert ages == ["0 s", "59 s", "1 min", "59 min", "1 h", "23 h", "3 d"]


@pytest.mark.slow
def test_a_pipe_gets_plain_text_and_a_terminal_bars(tmp_path: Path) -> None:
    arguments = ["load", JSON, "--base", base(tmp_path / "base")]
    done = subprocess.run(
        [sys.executable, "-m", "lorax_async", *arguments],
        capture_output=True,
        check=True,
        env=os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "20"},
    )
    text = done.stdout.decode()
    assert done.stderr == b""
    assert CONTROL.search(text) is None
    assert re.search(r"^ json +resident +15–29 .* ms$", text, re.MULTILINE)
    process, fd = on_a_terminal(arguments)
    text = read_until(fd).decode()
    os.close(fd)
    assert process.wait(60) == 0
    assert all(needle in text for needle in ("\x1b[", "━", "15/15 layers"))
    assert text.rstrip().endswith("ms")
