"""Adapters of vision-language models with the names of transformers before 4.52."""

import asyncio
from pathlib import Path
from typing import Any

import peft_adapters as variants
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft_adapters import WEIGHTS, logits_of, read_weights, serving
from safetensors.torch import save_file

from lorax_async import IncompatibleAdapterError

pytestmark = [
    pytest.mark.filterwarnings(variants.FEATURE_WARNINGS),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]
TEXT: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40}
EYE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
CLASSES = {
    "gemma3": ("gemma3_text", "Gemma3ForConditionalGeneration"),
    "llava": ("llama", "LlavaForConditionalGeneration"),
    "mistral3": ("mistral", "Mistral3ForConditionalGeneration"),
}
INPUTS = {"input_ids": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])}
NOW, ONCE = "base_model.model.model.language_model.", "base_model.model.language_model.model."
TEXT_ONLY = r".*language_model.*\.(q_proj|v_proj)"


def build(model_type: str) -> Any:
    text, architecture = CLASSES[model_type]
    config = transformers.AutoConfig.for_model(model_type, text_config={"model_type": text, **TEXT})
    for name, value in EYE.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    return getattr(transformers, architecture)(config).eval()


def save(model_type: str, folder: Path, rename: Any, targets: Any = TEXT_ONLY) -> Path:
    """As PEFT saves it, with names by `rename`."""
    peft: Any = get_peft_model(build(model_type), LoraConfig(r=4, target_modules=targets))
    random = torch.Generator().manual_seed(1)
    for name, weight in peft.named_parameters():
        if ".lora_" in name:
            weight.data.normal_(0, 0.2, generator=random)
    peft.save_pretrained(folder, save_embedding_layers=False)
    tensors = {rename(name): it for name, it in read_weights(folder).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def once(name: str) -> str:
    return name.replace(NOW, ONCE).replace("model.model.vision_tower", "model.vision_tower")


@pytest.mark.parametrize("model_type", CLASSES)
async def test_they_are_applied_as_peft_applies_them(model_type: str, tmp_path: Path) -> None:
    adapter = save(model_type, tmp_path, once)
    expected = logits_of(PeftModel.from_pretrained(build(model_type), adapter).eval(), INPUTS)
    assert not torch.equal(expected, logits_of(build(model_type), INPUTS))
    model = build(model_type)
    async with serving(model) as (loader, attached), await loader.load(adapter) as handle:
        assert any(name.startswith("model.language_model.layers.") for name in handle.modules)
        with attached.batch([handle] * 2):
            assert torch.equal(await asyncio.to_thread(logits_of, model, INPUTS), expected)


def half(name: str) -> str:
    """One layer has a name that no version had."""
    return once(name).replace("layers.1.", "blocks.1.")


def with_head(name: str) -> str:
    """PEFT would leave the head's name, and so ignore its tensors."""
    return once(name).replace("base_model.model.lm_head", "base_model.model.language_model.lm_head")


@pytest.mark.parametrize(
    ("rename", "targets"),
    [
        (half, TEXT_ONLY),
        (with_head, r".*language_model.*q_proj|lm_head"),
        (once, ["q_proj"]),  # PEFT leaves the vision tower's names too
    ],
)
async def test_what_would_be_applied_in_part_is_refused(
    rename: Any, targets: Any, tmp_path: Path
) -> None:
    adapter = save("llava", tmp_path, rename, targets)
    with pytest.warns(UserWarning, match="Found missing adapter keys"):
        PeftModel.from_pretrained(build("llava"), adapter)
    async with serving(build("llava")) as (loader, _):
        with pytest.raises(IncompatibleAdapterError, match="no such module"):
            await loader.load(adapter)
