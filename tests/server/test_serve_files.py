"""Files and places that the operator names: what is wrong with one is said before the slow part."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from lorax_async import ConfigError
from lorax_async.cli import main
from lorax_async.server.assembly import Base


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Start a server with these options; returns the one line that it ends with."""

    def load(*_: Any, **__: Any) -> Base:
        raise AssertionError("the base model was loaded")

    def start(*options: str) -> str:
        command = ["serve", "--base", str(tmp_path), "--port", "0", "--json", *options]
        assert main(command) == 1
        told = capsys.readouterr()
        assert told.out == ""
        (line,) = told.err.splitlines()
        assert line.startswith("ConfigError: ")
        return line

    monkeypatch.setattr(Base, "load", load)
    return start


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _holds(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "is a folder; name a file"),
        (_fifo, "is no regular file; name a file"),
        (_socket, "cannot be read"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file; name a file"),
        (_large, "it has over 16,777,216 bytes; delete it"),
        (_holds(b""), "it is no JSON: .*; delete it"),
        (_holds(b'{"adapters": ['), "it is no JSON: .*line 1 column 15.*; delete it"),
        (_holds(b"\xff\xfe{"), "it is no text in UTF-8.*; delete it"),
        (_holds(b"[" * 100_000), "nested too deeply.*; delete it"),
        (_holds(b"[]"), "it has no list called adapters.*; delete it"),
        (_holds(b'{"adapters": 5}'), "it has no list called adapters.*; delete it"),
        (_holds(b'{"adapters": [5]}'), "its adapter number 1 is none.*; delete it"),
    ],
    ids=[
        *("a folder", "a FIFO", "a socket", "a loop of links", "a device", "too large", "empty"),
        *("cut short", "not UTF-8", "too deep", "a list", "a number", "not an adapter"),
    ],
)
def test_a_warm_list_that_is_none(
    refused: Callable[..., str], tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "warm"
    make(path)
    before = _seen(path)
    found: list[str] = []
    start = threading.Thread(target=lambda: found.append(refused("--warm", str(path))))
    start.start()
    start.join(60)
    assert not start.is_alive(), "it waits for somebody to write"
    assert str(path) in found[0]
    assert re.search(reason, found[0]), found[0]
    assert _seen(path) == before


def _seen(path: Path) -> tuple[int, int, int, int]:
    """What changes if somebody writes to it, or replaces it; reading changes its atime."""
    status = path.lstat()
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns


def test_a_warm_list_in_a_folder_that_is_not_there(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    told = refused("--warm", str(tmp_path / "none" / "warm"))
    assert f"there is no folder {tmp_path / 'none'}; make it" in told
    (tmp_path / "file").touch()
    told = refused("--warm", str(tmp_path / "file" / "warm"))
    assert "cannot be read (Not a directory)" in told


def test_adapters_that_are_none(refused: Callable[..., str], tmp_path: Path) -> None:
    whole = tiny.write(tmp_path / "all" / "whole")
    broken = tiny.write(tmp_path / "all" / "broken")
    (broken / "adapter_model.safetensors").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    for given, said in (
        (f"{tmp_path / 'missing'}", f"there is no folder {tmp_path / 'missing'}"),
        (f"sql={tmp_path / 'missing'}", f"there is no folder {tmp_path / 'missing'}"),
        (f"sql={empty}", f"{empty}: .*adapter_config.json"),
        (str(broken), f"{broken}: .*adapter_model.safetensors"),
        (str(tmp_path / "all"), f"{broken}: .*adapter_model.safetensors"),
        (str(whole / "adapter_config.json"), "there is no folder"),
    ):
        told = refused("--adapters", given)
        assert re.search(said, told), told


def test_a_cache_that_is_no_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = refused("--cache-dir", str(tmp_path / "file"))
    assert f"{str(tmp_path / 'file')!r} is not a folder" in told


def test_a_port_that_is_taken(refused: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}: " in refused("--port", port)


def test_a_base_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--base", str(tmp_path / "none"), "--port", "0"]) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_a_tokenizer_is_read_before_the_weights(tmp_path: Path) -> None:
    """Of a base that lacks both, the quick part is told of."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        Base.load(tmp_path, dtype="float32", device="cpu")
    reason = str(caught.value).partition("can be served: ")[2].replace(str(tmp_path), "")
    assert "tokenizer" in reason.lower()
    assert "safetensors" not in reason.lower()
