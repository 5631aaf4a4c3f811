"""What a training loop pushes answers as PEFT's own model does at that moment."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

from engines.variants import FEATURE_WARNINGS, VARIANTS, llama, logits_of, prompt, serving, wrapped
from lorax_async import layouts
from lorax_async.config import LoaderConfig, Shard
from lorax_async.loader import AdapterLoader
from merges import assert_same, weights_of

pytestmark = [pytest.mark.filterwarnings(FEATURE_WARNINGS)]

PATTERNS = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    # In the order of the config, as the live model has it, the first that matches counts.
    "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn.*": 3},
    "alpha_pattern": {"layers.1.self_attn.q_proj": 5, "q_proj": 1},
}
SMALL = ("every_linear", "rslora", "dora", "lora_bias", "embedding_and_all", "dora_embedding")
LORAS: dict[str, Any] = {name: VARIANTS[name].lora for name in SMALL} | {"patterns": PATTERNS}


@pytest.mark.parametrize("name", LORAS)
async def test_it_answers_as_the_live_model_and_as_its_file(tmp_path: Path, name: str) -> None:
    model, inputs = llama(), prompt(2)
    with wrapped(llama(), LORAS[name], seed=5) as live:
        given = get_peft_model_state_dict(live, save_embedding_layers=False)
        config: LoraConfig = live.peft_config["default"]
        expected = logits_of(live.eval(), inputs)
        live.save_pretrained(tmp_path, save_embedding_layers=False)
    async with (
        serving(model) as (loader, attached),
        await loader.load_tensors("policy", given, config) as handle,
    ):
        with attached.batch([handle] * 2):
            logits = await asyncio.to_thread(logits_of, model, inputs)
        if name != "patterns":  # PEFT sorts them when it saves: its own file does not load
            async with await loader.load(tmp_path) as twin:
                assert_same(weights_of(handle), weights_of(twin))
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
    assert not torch.allclose(logits, logits_of(model, inputs), atol=1e-3)
    if name == "every_linear":
        for rank in range(2):
            settings = LoaderConfig(shard=Shard(rank, 2), dtype="bfloat16")
            async with (
                AdapterLoader(layouts.from_module(model), settings) as loader,
                await loader.load_tensors("policy", given, config) as handle,
                await loader.load(tmp_path) as twin,
            ):
                assert_same(weights_of(handle), weights_of(twin))
                assert handle.nbytes == twin.nbytes


async def test_each_step_of_training_is_served() -> None:
    model, inputs = llama(), prompt(2)
    base = logits_of(model, inputs)
    with wrapped(llama(), VARIANTS["every_linear"].lora, seed=5) as live:
        config = live.peft_config["default"]
        weights = [p for p in live.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(weights, lr=0.3)
        async with serving(model, max_slots=2) as (loader, attached):
            for _ in range(4):
                optimizer.zero_grad()
                live(**inputs, labels=inputs["input_ids"]).loss.backward()
                optimizer.step()
                given = get_peft_model_state_dict(live)
                async with await loader.replace("policy", given, config) as handle:
                    with attached.batch([handle, None]):
                        logits = await asyncio.to_thread(logits_of, model, inputs)
                expected = logits_of(live, inputs)
                torch.testing.assert_close(logits[0], expected[0], atol=2e-5, rtol=2e-5)
                torch.testing.assert_close(logits[1], base[1], atol=2e-5, rtol=2e-5)
            assert len(loader.placement().adapters) == 1
