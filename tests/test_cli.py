"""The command line: what it prints, to whom, and its exit status."""

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

from command_line import ADAPTERS, adapter, base, on_a_terminal, output, query, read_until
from lorax_async.cli import main
from lorax_async.commands import load, terminal
from lorax_async.commands.arguments import as_size

CONTROL = re.compile(r"[^\n\x20-\x7e–─→…]")
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


def test_load_reports_each_adapter(tmp_path: Path, capsys: Capture) -> None:
    refused = adapter(tmp_path / "refused", query(0), use_bdlora={})
    paths = [str(ADAPTERS / "pirate"), refused, str(tmp_path / "absent"), str(ADAPTERS / "json")]
    assert (
        main(["load", *paths, "--base", base(tmp_path / "base"), "--dtype", "float32", "--json"])
        == 1
    )
    captured = capsys.readouterr()
    pirate, bad, absent, other = json.loads(captured.out)["adapters"]
    assert (pirate["name"], pirate["state"], pirate["error"]) == ("pirate", "resident", None)
    assert pirate["layers"] == list(range(30))
    assert pirate["file_bytes"] == (ADAPTERS / "pirate/adapter_model.safetensors").stat().st_size
    assert pirate["device_bytes"] == 30 * 8 * (576 + 576 + 576 + 192) * 4
    assert 0 < pirate["first_layer_ms"] <= pirate["resident_ms"]
    assert other["layers"] == list(range(15, 30))
    assert (bad["state"], bad["error"]["type"]) == ("failed", "UnsupportedAdapterError")
    assert bad["error"]["stage"] == "verify"
    assert (absent["error"]["type"], absent["resident_ms"]) == ("AdapterNotFoundError", None)
    assert captured.err.count("\n") == 2
    assert "UnsupportedAdapterError: adapter" in captured.err


def test_load_takes_turns_where_room_is_short(tmp_path: Path, capsys: Capture) -> None:
    paths = [str(ADAPTERS / name) for name in ("pirate", "shout", "json")]
    assert main(["load", *paths, "--base", base(tmp_path / "base"), "--device-bytes", "1MiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if "resident " in line] == [
        [name, "resident"] for name in ("pirate", "shout", "json")
    ]


def test_load_says_what_does_not_fit(tmp_path: Path, capsys: Capture) -> None:
    arguments = [
        "load",
        str(ADAPTERS / "pirate"),
        "--base",
        base(tmp_path / "base"),
        "--device-bytes",
        "100000",
    ]
    assert main(arguments) == 1
    assert "CapacityError: " in capsys.readouterr().err


def test_one_adapter_by_two_names(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "pirate").symlink_to(ADAPTERS / "pirate")
    paths = [str(ADAPTERS / "pirate"), str(tmp_path / "pirate")]
    assert main(["load", *paths, "--base", base(tmp_path / "base"), "--json"]) == 0
    rows = output(capsys)["adapters"]
    assert [row["name"] for row in rows] == paths
    assert all(row["first_layer_ms"] > 0 for row in rows)


def test_ctrl_c_closes_the_loader(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    async def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    monkeypatch.setattr(load, "load_at_once", interrupted)
    assert main(["load", str(ADAPTERS / "pirate"), "--base", base(tmp_path / "base")]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert not [t for t in threading.enumerate() if t.name.startswith("lorax")]


# -- the program ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1", 1), ("64KiB", 65_536), ("3MiB", 3_145_728), ("1GiB", 1_073_741_824)]
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert as_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MiB", "1.5MiB", "-1", "1MB", "1KiBMiB", "²"])
def test_other_sizes_are_wrong_usage(text: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["load", "x", "--base", "y", f"--device-bytes={text}"])
    assert exit.value.code == 2
    assert "is no size" in capsys.readouterr().err


def test_a_base_that_is_none(capsys: Capture, tmp_path: Path) -> None:
    assert main(["load", "x", "--base", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("ConfigError: ")


def test_version_and_help(capsys: Capture) -> None:
    for arguments, needle in ((["--version"], "lorax-async 0."), (["--help"], "exit status:")):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 0
        assert needle in capsys.readouterr().out


def test_without_rich_only_json(monkeypatch: Patch, capsys: Capture) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["inspect", str(ADAPTERS / "pirate"), "--json"]) == 0
    assert output(capsys)["loadable"] is True
    assert main(["inspect", str(ADAPTERS / "pirate")]) == 1
    assert "pip install 'lorax-async[cli]'" in capsys.readouterr().err


def test_people_read_sizes_and_spans() -> None:
    sizes = [terminal.size(n) for n in (0, 1023, 1024, 1536, 5 << 20, 3 << 30, 2 << 40)]
    assert sizes == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.0 GiB", "2048.0 GiB"]
    assert [terminal.spans(n) for n in ((), (4,), (-1, 0, 1, 5, 7, 8))] == ["", "4", "-1–1, 5, 7–8"]


def test_a_pipe_gets_plain_text(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lorax_async", "load", str(ADAPTERS / "json")]
    done = subprocess.run(
        [*command, "--base", base(tmp_path / "base")],
        capture_output=True,
        check=True,
        env=os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "20"},
    )
    text = done.stdout.decode()
    assert done.stderr == b""
    assert CONTROL.search(text) is None
    assert re.search(r"^ json +resident +15–29 .* ms$", text, re.MULTILINE)


def test_a_terminal_gets_bars(tmp_path: Path) -> None:
    arguments = ["load", str(ADAPTERS / "json"), "--base", base(tmp_path / "base")]
    process, terminal = on_a_terminal(arguments)
    text = read_until(terminal).decode()
    os.close(terminal)
    assert process.wait(60) == 0
    assert "\x1b[" in text
    assert "━" in text
    assert "15/15 layers" in text
    assert text.rstrip().endswith("ms")
