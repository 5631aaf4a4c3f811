"""Folders that are no base model: each is told in a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorax_async import ConfigError
from lorax_async.cli import main
from lorax_async.commands import serve
from lorax_async.server.assembly import Base
from server.world import tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_base(whole: Path) -> None:
    base = Base.load(whole, dtype="float32", device="cpu")
    assert base.max_length == 64
    assert not base.model.training


def _says(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _holds(name: str, content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(content)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
        (_says(num_hidden_layers=2), "it lacks 9 weights"),
        (_says(vocab_size=100), ""),
        (_says(hidden_size="x"), ""),
        (_cut, ""),
        (_holds("model.safetensors", ""), ""),
        (_holds("config.json", "[]"), ""),
        (_holds("tokenizer.json", "{}"), ""),
        (_holds("tokenizer_config.json", "[]"), ""),
    ],
    ids=[
        "no config", "weights missing", "other sizes", "other types", "cut", "empty", "a list",
        "no tokenizer", "no tokenizer's config",
    ],
)  # fmt: skip
def test_what_is_none(
    whole: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(whole, folder)
    change(folder)
    with pytest.raises(ConfigError, match=rf"is no base model that can be served: {said}") as told:
        Base.load(folder, dtype="float32", device="cpu")
    assert "\n" not in str(told.value)


def test_a_device_that_is_not_there(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no device of the kind cuda"):
        Base.load(whole, dtype="float32", device="cuda")


@pytest.mark.parametrize(
    "options",
    [
        ["--host", ""],
        ["--host", "a..b"],
        ["--max-length", "0"],
    ],
    ids=" ".join,
)
def test_options_that_are_wrong(
    whole: Path, options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(serve, "as_application", lambda: None)
    assert main(["serve", "--base", str(whole), "--port", "0", "--json", *options]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
