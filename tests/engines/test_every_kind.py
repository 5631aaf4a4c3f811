"""Adapters of every kind share one batch: each row is what PEFT computes with its adapter alone."""

import asyncio
import warnings
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import event_loops
import peft_adapters as variants
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import PLAIN, llama, logits_of, prompt, serving

pytestmark = [
    pytest.mark.filterwarnings(variants.FEATURE_WARNINGS),
    pytest.mark.filterwarnings("ignore:.*explicitly set RoPE"),
]
hf: Any = transformers
KINDS: dict[str, Any] = {
    "plain": PLAIN,
    "dora": {**PLAIN, "use_dora": True},
    "embedding": {**PLAIN, "target_modules": ["embed_tokens", "up_proj"]},
    "copies": {**PLAIN, "target_modules": ["embed_tokens", "lm_head"]},
    "head": {**PLAIN, "modules_to_save": ["lm_head"]},
    "embedding and head": {**PLAIN, "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "tokens": {**PLAIN, "trainable_token_indices": [2, 9, 33]},
}
FUSED = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
OF_EXPERTS: dict[str, Any] = {
    **{name: lora for name, lora in KINDS.items() if name != "embedding"},
    "embedding": {**PLAIN, "target_modules": ["embed_tokens", "o_proj"]},
    "experts": {**PLAIN, "target_parameters": FUSED},
    "experts and head": {**PLAIN, "target_parameters": FUSED[1:], "modules_to_save": ["lm_head"]},
    "experts and tokens": {**PLAIN, "target_parameters": FUSED, "trainable_token_indices": [2, 9]},
}


def qwen3_moe(**other: Any) -> Any:
    """The same weights each time, large enough for experts to matter."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    model = hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**sizes, **heads, **experts, attn_implementation="eager", **other)
    )
    random = torch.Generator().manual_seed(5)
    for weight in model.parameters():
        weight.data.normal_(0, 0.2, generator=random)
    return model.eval()


FAMILIES: dict[str, Any] = {"llama": (llama, KINDS), "qwen3_moe": (qwen3_moe, OF_EXPERTS)}


def save(base: Any, lora: Any, folder: Path) -> Path:
    peft: Any = get_peft_model(base, LoraConfig(**lora))
    random = torch.Generator().manual_seed(len(folder.name))
    for name, weight in peft.named_parameters():
        if ".lora_" in name or "trainable_tokens_delta" in name:
            weight.data.add_(torch.empty_like(weight).normal_(0, 0.05, generator=random))
        elif ".modules_to_save." in name:
            weight.data.add_(torch.empty_like(weight).normal_(0, 0.3, generator=random))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it adds the base's weights
        peft.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loop", event_loops.LOOPS)
def test_each_row_of_a_mixed_batch_is_pefts_alone(
    loop: str, family: str, tied: bool, tmp_path: Path
) -> None:
    build, kinds = FAMILIES[family]
    folders = {
        name: save(build(tie_word_embeddings=tied), lora, tmp_path / name)
        for name, lora in kinds.items()
    }
    rows = [*kinds, None, "head", "tokens"]
    inputs = prompt(len(rows))

    async def mixed() -> torch.Tensor:
        model = build(tie_word_embeddings=tied)
        async with serving(model) as (loader, attached), AsyncExitStack() as stack:
            loads = {it: await loader.load(folders[it]) for it in kinds}
            for handle in loads.values():
                stack.enter_context(handle)
            with attached.batch([None if row is None else loads[row] for row in rows]):
                return await asyncio.to_thread(logits_of, model, inputs)

    with asyncio.Runner(loop_factory=event_loops.LOOPS[loop]) as runner:
        logits = runner.run(mixed())
    bare = logits_of(build(tie_word_embeddings=tied), inputs)
    for number, row in enumerate(rows):
        part = {"input_ids": inputs["input_ids"][number : number + 1]}
        model = build(tie_word_embeddings=tied)
        if row is not None:
            model = PeftModel.from_pretrained(model, folders[row]).eval()
            assert not torch.allclose(logits_of(model, part)[0], bare[number], atol=1e-4), row
        expected = logits_of(model, part)
        # PEFT adds what experts learned to their weights, so that the last bits differ.
        size = float(expected.abs().max()) if "experts" in str(row) else 1.0
        torch.testing.assert_close(
            logits[number : number + 1], expected, atol=5e-6 * size, rtol=5e-6
        )
