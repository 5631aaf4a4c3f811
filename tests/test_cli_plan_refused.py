"""Lists, traces and numbers of which `lorax-async plan` makes nothing, and says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import base
from lorax_async.cli import main
from planned import TINY, Capture, adapters, refused

__all__ = ["adapters"]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"name": "a"}], "one of rank, bytes and path"),
        ([{"name": "a", "rank": 1, "bytes": 2}], "one of rank, bytes and path"),
        ([{"rank": 1}], "an adapter has a name"),
        ([{"name": "a", "rank": -1}], "rank is a whole number"),
        ([{"name": "a", "rank": True}], "rank is a whole number"),
        ([{"name": "a", "rank": 999}], "above the limit"),
        ([{"name": "a", "bytes": 0}], "bytes is a whole number"),
        ([{"name": "a", "bytes": "9" * 5000}], "bytes is a whole number"),
        ([], "lists no adapter"),
        ([{"name": "a", "path": "nowhere"}], "AdapterNotFoundError"),
        (["a"], "a list of objects"),
    ],
)
def test_a_list_that_says_nothing_is_refused(
    tmp_path: Path, capsys: Capture, rows: list[object], text: str
) -> None:
    (tmp_path / "list").write_text(json.dumps(rows))
    folder = base(tmp_path / "base", **TINY)
    told = refused(
        capsys, "--base", folder, "--adapters", tmp_path / "list", "--device-bytes", "1MiB"
    )
    assert text in told


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"name,rank\na,\xff\n", "no JSON or CSV"),
        (b"[" * 100_000, "no JSON or CSV"),
        (b"[{]", "no JSON or CSV"),
        (b"name,rank\na," + b"1" * 200_000, "no JSON or CSV"),
        (b"", "lists no adapter"),
        (b"name,rank\n", "lists no adapter"),
    ],
)
def test_a_list_that_is_none_is_refused(
    tmp_path: Path, capsys: Capture, content: bytes, text: str
) -> None:
    (tmp_path / "list").write_bytes(content)
    folder = base(tmp_path / "base", **TINY)
    arguments = ("--adapters", tmp_path / "list", "--device-bytes", "1MiB")
    assert text in refused(capsys, "--base", folder, *arguments)


def test_of_many_the_broken_one_is_named(
    tmp_path: Path, capsys: Capture, adapters: list[Path]
) -> None:
    folder = base(tmp_path / "base", **TINY)
    weights = adapters[5] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    arguments = ("--adapters", tmp_path / "all", "--device-bytes", "1MiB")
    assert "all/a05" in refused(capsys, "--base", folder, *arguments)


def test_a_trace_that_is_no_text_is_refused(tmp_path: Path, capsys: Capture) -> None:
    folder = base(tmp_path / "base", **TINY)
    (tmp_path / "trace").write_bytes(b"r8\nr8\xff\n")
    arguments = ("--adapters", "1x8", "--device-bytes", "1MiB", "--trace", tmp_path / "trace")
    assert "no text in UTF-8" in refused(capsys, "--base", folder, *arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--adapters", "nowhere"), "not as 10000x16"),
        (("--adapters", "."), "holds none"),
        (("--adapters", "99999999x1"), "at most"),
        (("--adapters", "0x1"), "Zipf's law"),
        (("--adapters", "1x1", "--zipf", "-1"), "Zipf's law"),
        (("--adapters", "1x1", "--rate", "0"), "--rate"),
        (("--adapters", "1x1", "--targets", "qq_proj"), "qq_proj"),
        (("--adapters", "1x1", "--trace", "trace"), "'other', which --adapters has not"),
        (("--adapters", "1x1", "1x1", "--trace", "trace"), "two adapters are called 'r1'"),
        (("--adapters", "1x1", "--trace", "absent"), "absent"),
    ],
)
def test_what_cannot_be_planned_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    arguments: tuple[str, ...],
    text: str,
) -> None:
    folder = base(tmp_path / "base", **TINY)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    Path("trace").write_text("r1\nother\n")
    assert text in refused(capsys, "--base", folder, "--device-bytes", "1MiB", *arguments)


@pytest.mark.parametrize(
    "wrong",
    [("--requests", "0"), ("--requests", "100000001"), ("--max-slots", "65537"), ("--zipf", "x")],
)
def test_wrong_usage_is_2(tmp_path: Path, capsys: Capture, wrong: tuple[str, str]) -> None:
    arguments = ["plan", "--base", ".", "--adapters", "1x1", "--device-bytes", "1", *wrong]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
