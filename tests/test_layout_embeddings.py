"""Which embeddings are part of a layout, and what an adapter tells of those that it targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from lorax_async import layouts
from lorax_async.core.layout import Module, Parallel
from lorax_async.errors import AdapterFormatError

# PEFT asks transformers for a property that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LLAMA: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def embeddings_of(model: Any) -> list[str]:
    modules = layouts.from_module(model).modules
    found = [module for module in modules if module.embedding]
    for module in found:
        kind = (module.layer, module.parallel, module.transposed)
        assert kind == (-1, Parallel.REPLICATED, False)
        weight = model.get_submodule(module.name).weight
        assert (module.in_features, module.out_features) == tuple(weight.shape)
    return [module.name for module in found]


def gemma() -> Any:
    """Its embedding multiplies what it looks up."""
    config = transformers.Gemma3TextConfig(**LLAMA, num_key_value_heads=2, head_dim=8)
    return transformers.Gemma3ForCausalLM(config)


def opt() -> Any:
    """Its positions are counted from the attention mask, by an embedding of another kind."""
    config = transformers.OPTConfig(
        vocab_size=48,
        hidden_size=32,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        word_embed_proj_dim=32,
    )
    return transformers.OPTForCausalLM(config)


def t5() -> Any:
    """Layer 0 has an embedding of relative positions."""
    sizes: dict[str, Any] = {
        "vocab_size": 48,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 2,
    }
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_heads=4))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (
            lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
            ["model.embed_tokens"],
        ),
        (gemma, ["model.embed_tokens"]),
        (opt, ["model.decoder.embed_tokens"]),
        (t5, ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]),
    ],
)
def test_embeddings_that_look_tokens_up(make: Any, names: list[str]) -> None:
    assert embeddings_of(make()) == names


class Late(nn.Module):
    """An embedding is used first, wherever the class lists it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8)})])
        self.tokens = nn.Embedding(16, 8, **options)


def test_an_embedding_comes_before_the_layers() -> None:
    assert embeddings_of(Late()) == ["tokens"]


def test_an_embedding_that_changes_its_weights_is_none() -> None:
    assert embeddings_of(Late(max_norm=1.0)) == []


def saved(folder: Path, **config: Any) -> Path:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    peft_model: Any = get_peft_model(model, LoraConfig(r=4, **config))
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


TOKENS = Module("model.embed_tokens", 48, 32, -1, Parallel.REPLICATED, embedding=True)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"fan_in_fan_out": True}])
def test_an_adapter_of_the_embedding_alone(more: dict[str, Any], tmp_path: Path) -> None:
    layout = layouts.from_adapter(saved(tmp_path, target_modules=["embed_tokens"], **more))
    assert layout.modules == (TOKENS,)


def test_an_adapter_of_embedding_head_and_layers(tmp_path: Path) -> None:
    targets = ["embed_tokens", "lm_head", "q_proj"]
    layout = layouts.from_adapter(saved(tmp_path, target_modules=targets, use_dora=True))
    assert [(module.name, module.layer, module.embedding) for module in layout.modules] == [
        ("model.embed_tokens", -1, True),
        *((f"model.layers.{n}.self_attn.q_proj", n, False) for n in range(2)),
        ("lm_head", 2, False),
    ]


def test_an_embedding_is_whole_on_every_rank_whatever_its_name(tmp_path: Path) -> None:
    tiny.write(tmp_path, rank=4, target_modules=["lm_head"])
    name = "base_model.model.lm_head.lora_embedding_"
    tensors = {f"{name}A": torch.zeros(4, 48), f"{name}B": torch.zeros(32, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (module,) = layouts.from_adapter(tmp_path).modules
    assert (module.embedding, module.parallel) == (True, Parallel.REPLICATED)


def test_vectors_say_nothing_of_the_dtype(tmp_path: Path) -> None:
    file = saved(tmp_path, target_modules=["q_proj"], use_dora=True) / "adapter_model.safetensors"
    cast = {
        name: tensor if "magnitude" in name else tensor.to(torch.bfloat16)
        for name, tensor in load_file(file).items()
    }
    save_file(cast, file)
    assert layouts.from_adapter(tmp_path).dtype == "BF16"


def test_an_adapter_without_its_magnitudes_has_no_layout(tmp_path: Path) -> None:
    file = saved(tmp_path, target_modules=["q_proj"], use_dora=True) / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "magnitude" not in n}, file)
    with pytest.raises(AdapterFormatError, match="use_dora is set"):
        layouts.from_adapter(tmp_path)
