"""What `lorax-async plan` says, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from command_line import output
from lorax_async.cli import main

Capture = pytest.CaptureFixture[str]
RANKS = (1, 2, 4, 8)

TINY: dict[str, Any] = {  # as `tiny.layout` has q_proj and up_proj: 32 to 64
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "vocab_size": 64,
    "dtype": "float32",
}


def plan(capsys: Capture, *arguments: object) -> Any:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return output(capsys)


def refused(capsys: Capture, *arguments: object) -> str:
    assert main(["plan", *map(str, arguments), "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [
        tiny.write(tmp_path / "all" / f"a{n:02}", seed=n, rank=RANKS[n % len(RANKS)])
        for n in range(24)
    ]
