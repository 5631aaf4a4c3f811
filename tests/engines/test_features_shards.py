"""Features in sharded loaders: what a rank can compute of them, and what it cannot."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engines.variants import FEATURE_WARNINGS, PEFT_WARNING, active, llama, save
from lorax_async import AdapterLoader, LoaderConfig, UsageError, layouts
from lorax_async.config import Shard
from lorax_async.engines.transformers import attach

pytestmark = [
    pytest.mark.filterwarnings(PEFT_WARNING),
    pytest.mark.filterwarnings(FEATURE_WARNINGS),
]

WORLD = 2
FEATURES = [{"use_dora": True}, {"lora_bias": True}]


def share(rank: int) -> Any:
    """A rank's part of `llama`, cut as Megatron-LM cuts; the head is whole."""
    model = llama()
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        by_columns = name.endswith(("o_proj", "down_proj"))
        piece = linear.weight.detach().chunk(WORLD, int(by_columns))[rank]
        linear.weight = nn.Parameter(piece.clone())
        linear.out_features, linear.in_features = piece.shape
    return model


async def output(rank: int, adapter: Path, module: str, x: torch.Tensor) -> torch.Tensor:
    """What a rank's module makes of its input, for one row with the adapter."""
    layout = layouts.from_module(llama()).replicate("lm_head")
    config = LoaderConfig(device_bytes=1 << 20, shard=Shard(rank, WORLD))
    model = share(rank)
    async with AdapterLoader(layout, config) as loader:
        with attach(model, loader) as attached:
            async with await loader.load(adapter) as handle:
                with attached.batch([handle]), torch.no_grad():
                    made: torch.Tensor = model.get_submodule(module)(x)
    return made


@pytest.mark.parametrize("feature", FEATURES)
def test_the_ranks_outputs_together_are_pefts(feature: dict[str, Any], tmp_path: Path) -> None:
    """Column-parallel: each rank has whole rows, and their biases or magnitudes."""
    module = "model.layers.1.mlp.up_proj"
    lora = {"r": 4, "target_modules": ["up_proj", "k_proj"], **feature}
    adapter = save(llama(), lora, tmp_path / "adapter")
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    with active(llama(), only=adapter) as theirs, torch.no_grad():
        expected = theirs.base_model.model.get_submodule(module)(x)
    made = [asyncio.run(output(rank, adapter, module, x)) for rank in range(WORLD)]
    torch.testing.assert_close(torch.cat(made, -1), expected)


@pytest.mark.parametrize("feature", FEATURES)
def test_what_is_for_after_the_sum_is_refused(feature: dict[str, Any], tmp_path: Path) -> None:
    """Row-parallel: each rank would add the bias, and measure its part of the rows only."""
    lora = {"r": 4, "target_modules": ["up_proj", "down_proj"], **feature}
    adapter = save(llama(), lora, tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"'model.layers.0.mlp.down_proj', of which Shard\(rank=1"):
        asyncio.run(output(1, adapter, "model.layers.1.mlp.up_proj", torch.zeros(1, 1, 32)))
