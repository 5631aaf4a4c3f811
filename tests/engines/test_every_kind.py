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
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import PLAIN, llama, logits_of, prompt, serving

pytestmark = [pytest.mark.filterwarnings(variants.FEATURE_WARNINGS)]
KINDS: dict[str, Any] = {
    "plain": PLAIN,
    "dora": {**PLAIN, "use_dora": True},
    "embedding": {**PLAIN, "target_modules": ["embed_tokens", "up_proj"]},
    "copies": {**PLAIN, "target_modules": ["embed_tokens", "lm_head"]},
    "head": {**PLAIN, "modules_to_save": ["lm_head"]},
    "embedding and head": {**PLAIN, "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "tokens": {**PLAIN, "trainable_token_indices": [2, 9, 33]},
}


def save(base: Any, lora: Any, folder: Path) -> Path:
    peft: Any = get_peft_model(llama(**base), LoraConfig(**lora))
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
@pytest.mark.parametrize("loop", event_loops.LOOPS)
def test_each_row_of_a_mixed_batch_is_pefts_alone(loop: str, tied: bool, tmp_path: Path) -> None:
    base: Any = {"tie_word_embeddings": tied}
    folders = {name: save(base, lora, tmp_path / name) for name, lora in KINDS.items()}
    rows = [*KINDS, None, "head", "tokens"]
    inputs = prompt(len(rows))

    async def mixed() -> torch.Tensor:
        model = llama(**base)
        async with serving(model) as (loader, attached), AsyncExitStack() as stack:
            loads = {it: await loader.load(folders[it]) for it in KINDS}
            for handle in loads.values():
                stack.enter_context(handle)
            with attached.batch([None if row is None else loads[row] for row in rows]):
                return await asyncio.to_thread(logits_of, model, inputs)

    with asyncio.Runner(loop_factory=event_loops.LOOPS[loop]) as runner:
        logits = runner.run(mixed())
    bare = logits_of(llama(**base), inputs)
    for number, row in enumerate(rows):
        part = {"input_ids": inputs["input_ids"][number : number + 1]}
        if row is None:
            expected = logits_of(llama(**base), part)
        else:
            peft = PeftModel.from_pretrained(llama(**base), folders[row]).eval()
            expected = logits_of(peft, part)
            assert not torch.allclose(expected[0], bare[number], atol=1e-4), row
        torch.testing.assert_close(logits[number : number + 1], expected, atol=5e-6, rtol=5e-6)
