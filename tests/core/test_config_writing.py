"""A config in memory is written as PEFT writes it, but for the order of its members."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from lorax_async.config import Limits
from lorax_async.core.config_writing import write_config
from lorax_async.core.peft_config import parse_config
from lorax_async.errors import AdapterFormatError, UsageError

LORAS: list[dict[str, Any]] = [
    {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
    {"r": 4, "target_modules": "all-linear", "exclude_modules": ["lm_head"], "use_dora": True},
    {"r": 8, "rank_pattern": {"b": 2, "a": 3}, "alpha_pattern": {"z": 1.5}, "use_rslora": True},
    {"r": 8, "lora_bias": True, "layers_to_transform": [1, 2], "target_modules": {"k_proj"}},
]


@pytest.mark.parametrize("lora", LORAS, ids=range(4))
def test_the_members_are_those_that_peft_writes(tmp_path: Path, lora: dict[str, Any]) -> None:
    config = LoraConfig(**lora)
    config.save_pretrained(str(tmp_path))
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = json.loads(write_config(config))
    for members in (theirs, ours):
        for name, value in members.items():
            if isinstance(value, list):
                members[name] = sorted(value)
    assert ours == theirs
    assert parse_config(write_config(config), Limits()).rank == lora["r"]


def test_patterns_keep_their_order() -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"z": 2, "a": 3}}
    for given in (config, LoraConfig(r=4, rank_pattern={"z": 2, "a": 3})):
        spec = parse_config(write_config(given), Limits())
        assert [pattern.text for pattern in spec.rank_patterns] == ["z", "a"]


def test_sets_have_one_spelling() -> None:
    names = [f"module_{n}" for n in range(50)]
    written = {write_config({"target_modules": kind(names)}) for kind in (set, frozenset, sorted)}
    assert len(written) == 1


def test_what_is_given_is_not_changed() -> None:
    config: dict[str, object] = {"target_modules": {"b", "a"}}
    write_config(config)
    assert config == {"target_modules": {"b", "a"}}


@pytest.mark.parametrize("config", [None, "{}", [("r", 4)], LoraConfig, 4])
def test_what_is_no_config(config: Any) -> None:
    with pytest.raises(UsageError, match=r"a dict as in adapter_config.json, or a peft.LoraConfig"):
        write_config(config)


def _deep() -> dict[str, object]:
    deep: dict[str, object] = {}
    for _ in range(100_000):
        deep = {"x": deep}
    return deep


def _circular() -> dict[str, object]:
    circular: dict[str, object] = {}
    circular["x"] = circular
    return circular


@pytest.mark.parametrize(
    "config",
    [
        {"r": float("inf")},
        {"r": b"4"},
        {"x": {1, "a"}},
        {(1, 2): 3},
        {"x": Path()},
        _circular(),
        _deep(),
    ],
    ids=range(7),
)
def test_what_json_does_not_have(config: dict[str, object]) -> None:
    with pytest.raises(AdapterFormatError, match="adapter_config.json cannot be written"):
        write_config(config)
