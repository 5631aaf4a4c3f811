"""map_weights_for_model: every tensor belongs to a module, or is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adapters import small_base as base
from lorax_async.adapters import LoraConfig
from lorax_async.errors import (
    AdapterFormatError,
    IncompatibleAdapterError,
    UnsupportedAdapterError,
)

pytestmark = pytest.mark.usefixtures("nothing_left", "no_network")

CONFIG = "adapter_config.json"


def folder(tmp_path: Path, **changes: Any) -> Path:
    return base.write(tmp_path / "adapter", base.tensors(types=["q_proj"]), **changes)


@pytest.mark.parametrize("gone", ["A", "B"])
def test_only_one_of_a_and_b_is_refused(gone: str) -> None:
    made = base.tensors()
    del made[base.key(1, "q_proj", gone)]
    other = "B" if gone == "A" else "A"
    with pytest.raises(AdapterFormatError, match=f"q_proj.lora_{other}.weight' has no {gone}"):
        base.config().map_weights_for_model(made, base.FakeModel().weight_names)


def test_tensors_that_no_module_takes_are_refused() -> None:
    """LoRAX drops them without a word; the adapter's answers are others then."""
    made = base.tensors()
    names = [n for n in base.FakeModel().weight_names if "v_proj" not in n]
    with pytest.raises(IncompatibleAdapterError, match=r"v_proj.*\(6 tensors in all\)"):
        base.config().map_weights_for_model(made, names)
    kept = {name: tensor for name, tensor in made.items() if "v_proj" not in name}
    module_map, matched = base.config().map_weights_for_model(kept, names)
    assert matched == set(kept)
    assert set(module_map) == set(names)


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding"),
        ("base_model.model.lm_head.base_layer.weight", "copy of the base"),
        ("something.else", "no 'base_model.model.' in front"),
    ],
)
def test_tensors_of_other_features_are_refused_by_name(name: str, feature: str) -> None:
    made = base.tensors() | {name: torch.zeros(1)}
    with pytest.raises(UnsupportedAdapterError, match=feature):
        base.config().map_weights_for_model(made, base.FakeModel().weight_names)


def test_patterns_that_would_take_too_long(tmp_path: Path) -> None:
    path = folder(tmp_path, rank_pattern={f"(a|b)*{n}x": 8 for n in range(100)})
    config = LoraConfig.load(path)
    names = [f"{'a' * 100}.{n}" for n in range(6000)]
    made = {
        f"base_model.model.{name}.lora_{part}.weight": torch.zeros(8, 8)
        for name in names
        for part in "AB"
    }
    with pytest.raises(UnsupportedAdapterError, match="too long to match"):
        config.map_weights_for_model(made, names)


def test_json_text_is_what_peft_writes(tmp_path: Path) -> None:
    """The test's own adapters are no easier than real ones."""
    path = folder(tmp_path)
    peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"]).save_pretrained(str(path))
    assert len(json.loads((path / CONFIG).read_text())) > 30
    assert LoraConfig.load(path).target_modules == ["q_proj"]
