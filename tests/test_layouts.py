"""Layouts of real model classes, tiny and random, and of adapters that PEFT saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import tiny
from lorax_async import layouts
from lorax_async.config import Limits
from lorax_async.core.layout import ModelLayout, Module, Parallel, Part
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    UnsupportedAdapterError,
)

# PEFT asks transformers for a property that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LLAMA: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
COLUMN, ROW = Parallel.COLUMN, Parallel.ROW


def llama(**changes: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**LLAMA | changes)


def gpt2() -> transformers.GPT2Config:
    return transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=16)


def t5(**changes: Any) -> transformers.T5Config:
    sizes = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2}
    return transformers.T5Config(**sizes | changes, num_heads=4)


def by_hand_llama() -> list[Module]:
    """From the published shapes of the architecture: out × in of each weight, heads of 8."""
    layer: list[Any] = [
        ("self_attn.q_proj", 32, 32, COLUMN, Part(32, 8)),
        ("self_attn.k_proj", 32, 16, COLUMN, Part(16, 8, replicable=True)),
        ("self_attn.v_proj", 32, 16, COLUMN, Part(16, 8, replicable=True)),
        ("self_attn.o_proj", 32, 32, ROW),
        ("mlp.gate_proj", 32, 40, COLUMN),
        ("mlp.up_proj", 32, 40, COLUMN),
        ("mlp.down_proj", 40, 32, ROW),
    ]
    modules = [
        Module(f"model.layers.{n}.{name}", inputs, outputs, n, kind, parts=tuple(parts))
        for n in range(3)
        for name, inputs, outputs, kind, *parts in layer
    ]
    embedding = Module("model.embed_tokens", 48, 32, -1, Parallel.REPLICATED, embedding=True)
    return [embedding, *modules, Module("lm_head", 32, 48, 3, COLUMN)]


def test_a_llama_in_memory() -> None:
    layout = layouts.from_module(transformers.LlamaForCausalLM(llama()))
    assert layout == ModelLayout(tuple(by_hand_llama()), 3, "F32", "model.")
    assert layout.resolve("layers.2.mlp.up_proj") == layout.index("model.layers.2.mlp.up_proj")
    bare = layouts.from_module(transformers.LlamaModel(llama()))
    assert bare.backbone_prefix == ""
    assert [m.name for m in bare.modules[:2]] == ["embed_tokens", "layers.0.self_attn.q_proj"]
    assert len(bare.modules) == 22


def test_a_gpt2_stores_its_weights_the_other_way_round() -> None:
    layout = layouts.from_module(transformers.GPT2LMHeadModel(gpt2()))
    assert layout.backbone_prefix == "transformer."
    thirds = Part(32, 8), Part(32, 8, True), Part(32, 8, True)
    first = [
        Module("transformer.wte", 48, 32, -1, Parallel.REPLICATED, embedding=True),
        Module("transformer.wpe", 16, 32, -1, Parallel.REPLICATED, embedding=True),
        Module("transformer.h.0.attn.c_attn", 32, 96, 0, COLUMN, transposed=True, parts=thirds),
        Module("transformer.h.0.attn.c_proj", 32, 32, 0, ROW, transposed=True),
        Module("transformer.h.0.mlp.c_fc", 32, 128, 0, COLUMN, transposed=True),
        Module("transformer.h.0.mlp.c_proj", 128, 32, 0, ROW, transposed=True),
    ]
    assert list(layout.modules[:6]) == first
    assert layout.modules[-1] == Module("lm_head", 32, 48, 2, COLUMN)
    assert len(layout.modules) == 2 + 2 * 4 + 1


CONFIGS: list[Callable[[], Any]] = [
    llama,
    gpt2,
    lambda: transformers.Qwen2Config(**{k: v for k, v in LLAMA.items() if k != "head_dim"}),
    lambda: transformers.GPTNeoXConfig(**dict(list(LLAMA.items())[:5])),
]


@pytest.mark.parametrize("make", CONFIGS)
def test_a_folder_with_nothing_but_a_config(make: Callable[[], Any], tmp_path: Path) -> None:
    config = make()
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config).to(torch.bfloat16)
    layout = layouts.from_pretrained(tmp_path)
    assert layout == layouts.from_module(model)
    assert layout.dtype == "BF16"
    weights = dict(model.named_parameters(remove_duplicate=False))
    for module in layout.modules:
        stored = (module.in_features, module.out_features)
        shape = tuple(weights[f"{module.name}.weight"].shape)
        assert shape == (stored if module.transposed or module.embedding else stored[::-1])
        assert (module.parallel is Parallel.REPLICATED) == module.embedding
    assert layouts.from_pretrained(str(tmp_path), torch.float16).dtype == "F16"
    assert layouts.from_pretrained(tmp_path, dtype="float32").dtype == "F32"


def test_what_is_no_causal_model_is_built_as_its_author_saved_it(tmp_path: Path) -> None:
    config = t5(dtype="bfloat16")
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    layout = layouts.from_pretrained(tmp_path)
    assert layout.num_layers == 2
    assert layout.modules[layout.index("decoder.block.1.layer.1.EncDecAttention.q")].layer == 1
    assert layout.modules[layout.index("decoder.block.1.layer.2.DenseReluDense.wo")].parallel == ROW


def test_folders_that_are_no_base(tmp_path: Path) -> None:
    for folder in (tmp_path, "some-org/some-model"):
        with pytest.raises(ConfigError, match="no config.json"):
            layouts.from_pretrained(folder)
    config = tmp_path / "config.json"
    wrong = ("{", "{}", '{"model_type": "no such"}', '{"model_type": "t5", "dtype": "bfloat16"}')
    for text in wrong:
        config.write_text(text)
        with pytest.raises(ConfigError, match="transformers cannot build"):
            layouts.from_pretrained(tmp_path)


def test_a_dtype_is_never_guessed(tmp_path: Path) -> None:
    config = json.loads(llama().to_json_string())
    config.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="names no dtype"):
        layouts.from_pretrained(tmp_path)
    assert layouts.from_pretrained(tmp_path, "bfloat16").dtype == "BF16"
    for wrong in ("float64", "BF16", torch.int8):
        with pytest.raises(ConfigError, match="is not one adapters can have"):
            layouts.from_pretrained(tmp_path, wrong)


class Projected(nn.Module):
    """A module before the layers, one within that no table knows, one after."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(4, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"router": nn.Linear(8, 2)})])
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 3, dtype=torch.float64)


def test_modules_outside_the_layers() -> None:
    layout = layouts.from_module(Projected())
    assert [(m.name, m.layer, m.parallel.value) for m in layout.modules] == [
        ("projector", -1, "replicated"),
        ("layers.0.router", 0, "replicated"),
        ("score", 1, "replicated"),
    ]
    assert layout.dtype == "F32"


def test_models_that_no_adapter_is_for() -> None:
    for model in (nn.Sequential(), nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match="no linear modules"):
            layouts.from_module(model)
    adapted = get_peft_model(
        transformers.LlamaForCausalLM(llama()), LoraConfig(target_modules=["q_proj"])
    )
    with pytest.raises(ConfigError, match="attached already"):
        layouts.from_module(adapted)


def save_adapter(folder: Path, **config: Any) -> Path:
    model: Any = get_peft_model(transformers.LlamaForCausalLM(llama()), LoraConfig(**config))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def test_an_adapter_by_peft(tmp_path: Path) -> None:
    save_adapter(
        tmp_path, r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}
    )
    layout = layouts.from_adapter(tmp_path)
    wanted = [m for m in by_hand_llama() if m.name.endswith(("q_proj", "down_proj"))]
    wanted = [replace(m, parts=()) for m in wanted]  # it does not say of how many heads
    assert set(layout.modules) == set(wanted)
    assert (layout.num_layers, layout.dtype, layout.backbone_prefix) == (3, "F32", "")
    assert layouts.from_adapter(str(tmp_path)) == layout


Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)


def test_the_dtype_of_an_adapter(tmp_path: Path) -> None:
    """The widest of several; its vectors, which stay as they are, say nothing of it."""
    save_adapter(tmp_path, target_modules=["q_proj"], use_dora=True)
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    for dtypes, word in (([bf16], "BF16"), ([bf16, f16], "F32"), ([bf16, f32], "F32")):

        def cast(tensors: Tensors, dtypes: list[torch.dtype] = dtypes) -> Tensors:
            return {
                name: tensor if "magnitude" in name else tensor.to(dtypes[n % len(dtypes)])
                for n, (name, tensor) in enumerate(tensors.items())
            }

        rewrite(tmp_path, cast)
        assert layouts.from_adapter(tmp_path).dtype == word
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "magnitude" not in n})
    with pytest.raises(AdapterFormatError, match="use_dora is set"):
        layouts.from_adapter(tmp_path)


def test_an_adapter_of_the_head_and_of_a_conv1d(tmp_path: Path) -> None:
    def head(tensors: Tensors) -> Tensors:
        return {
            name.replace("model.layers.2.self_attn.q_proj", "lm_head"): t
            for name, t in tensors.items()
        }

    save_adapter(tmp_path, target_modules=["q_proj"])
    rewrite(tmp_path, head)
    layout = layouts.from_adapter(tmp_path)
    assert layout.modules[layout.index("lm_head")].layer == layout.num_layers == 2
    get_peft_model(
        transformers.GPT2LMHeadModel(gpt2()),
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True),
    ).save_pretrained(str(tmp_path))
    assert all(module.transposed for module in layouts.from_adapter(tmp_path).modules)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda t: {}, AdapterFormatError, "no tensors"),
        (lambda t: dict(sorted(t.items())[:5]), AdapterFormatError, "only one of A and B"),
        (lambda t: {name: w[0] for name, w in t.items()}, AdapterFormatError, "two positive dim"),
        (
            lambda t: {name: w[:, :3] for name, w in t.items()},
            AdapterFormatError,
            "no pair of rank",
        ),
        (lambda t: {name: w.int() for name, w in t.items()}, UnsupportedAdapterError, "is I32"),
        (lambda t: t | {"x.weight": torch.ones(2, 2)}, UnsupportedAdapterError, "x.weight"),
    ],
)
def test_adapters_that_no_load_would_accept(
    change: Callable[[Tensors], Tensors], error: type[Exception], text: str, tmp_path: Path
) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    rewrite(tmp_path, lambda t: {name: w.contiguous() for name, w in change(t).items()})
    with pytest.raises(error, match=text):
        layouts.from_adapter(tmp_path)


def test_limits_and_missing_files(tmp_path: Path) -> None:
    save_adapter(tmp_path, target_modules=["q_proj"])
    for limits in (Limits(max_config_bytes=100), Limits(max_adapter_bytes=100), Limits(max_rank=7)):
        with pytest.raises(UnsupportedAdapterError, match="limit of"):
            layouts.from_adapter(tmp_path, limits=limits)
    with pytest.raises(AdapterFormatError, match="limit of 100"):
        layouts.from_adapter(tmp_path, limits=Limits(max_header_bytes=100))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).unlink()
        with pytest.raises(AdapterNotFoundError, match=name):
            layouts.from_adapter(tmp_path)


# -- embeddings -----------------------------------------------------------------------------------


def embeddings_of(model: Any) -> list[str]:
    modules = layouts.from_module(model).modules
    found = [module for module in modules if module.embedding]
    for module in found:
        kind = (module.layer, module.parallel, module.transposed)
        assert kind == (-1, Parallel.REPLICATED, False)
        weight = model.get_submodule(module.name).weight
        assert (module.in_features, module.out_features) == tuple(weight.shape)
    return [module.name for module in found]


MODELS: dict[str, tuple[Any, list[str]]] = {
    "llama": (llama, ["model.embed_tokens"]),
    # Its embedding multiplies what it looks up.
    "gemma": (lambda: transformers.Gemma3TextConfig(**LLAMA), ["model.embed_tokens"]),
    # Its positions are counted from the attention mask, by an embedding of another kind.
    "opt": (
        lambda: transformers.OPTConfig(
            **{name: LLAMA[name] for name in list(LLAMA)[:5] if name != "intermediate_size"},
            ffn_dim=40,
            max_position_embeddings=16,
            word_embed_proj_dim=32,
        ),
        ["model.decoder.embed_tokens"],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_that_look_tokens_up(name: str) -> None:
    config, names = MODELS[name]
    auto: Any = transformers.AutoModelForCausalLM
    assert embeddings_of(auto.from_config(config())) == names


def test_an_embedding_of_relative_positions_is_none() -> None:
    model = transformers.T5ForConditionalGeneration(t5())
    assert embeddings_of(model) == ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]


class Late(nn.Module):
    """An embedding is used first, wherever the class lists it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8)})])
        self.tokens = nn.Embedding(16, 8, **options)


def test_an_embedding_comes_before_the_layers() -> None:
    """One that changes its weights is none."""
    assert embeddings_of(Late()) == ["tokens"]
    assert embeddings_of(Late(max_norm=1.0)) == []


TOKENS = Module("model.embed_tokens", 48, 32, -1, Parallel.REPLICATED, embedding=True)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"fan_in_fan_out": True}])
def test_an_adapter_of_the_embedding_alone(more: dict[str, Any], tmp_path: Path) -> None:
    layout = layouts.from_adapter(save_adapter(tmp_path, target_modules=["embed_tokens"], **more))
    assert layout.modules == (TOKENS,)


def test_an_adapter_of_embedding_head_and_layers(tmp_path: Path) -> None:
    targets = ["embed_tokens", "lm_head", "q_proj"]
    layout = layouts.from_adapter(save_adapter(tmp_path, target_modules=targets, use_dora=True))
    assert [(module.name, module.layer, module.embedding) for module in layout.modules] == [
        ("model.embed_tokens", -1, True),
        *((f"model.layers.{n}.self_attn.q_proj", n, False) for n in range(3)),
        ("lm_head", 3, False),
    ]


def test_an_embedding_is_whole_on_every_rank_whatever_its_name(tmp_path: Path) -> None:
    tiny.write(tmp_path, rank=4, target_modules=["lm_head"])
    name = "base_model.model.lm_head.lora_embedding_"
    tensors = {f"{name}A": torch.zeros(4, 48), f"{name}B": torch.zeros(32, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    (module,) = layouts.from_adapter(tmp_path).modules
    assert (module.embedding, module.parallel) == (True, Parallel.REPLICATED)
