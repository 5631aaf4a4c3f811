"""Adapters with random weights, written by PEFT, and PEFT's outputs with them."""

import asyncio
import copy
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorax_async import layouts
from lorax_async.config import LoaderConfig
from lorax_async.engines.transformers import AttachedModel, attach
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.testing import FakeSource

Lora = Mapping[str, Any]
Inputs = Mapping[str, torch.Tensor]
MiB = 1 << 20
WEIGHTS = "adapter_model.safetensors"
PLAIN: Lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
PEFT_WARNING = r"ignore:The `is_gradient_checkpointing` attribute:FutureWarning"
# Wrapping a model makes peft 0.21 ask transformers 5.23 in a way that transformers deprecates.
FEATURE_WARNINGS = r"ignore:.*(lora_bias=True|tie_word_embeddings=True|have invalid shape)"
# PEFT warns that adapters with a bias, or of tied modules, cannot be merged; no test merges them. And
# when it saves biases it takes them for matrices that were gathered wrongly.


@dataclass(frozen=True, slots=True)
class Variant:
    """Arguments of `LoraConfig`, and the saved file's form. `bare`: trained on the backbone."""

    lora: Lora = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    bare: bool = False


ATTENTION = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
EVERY = {**ATTENTION, "target_modules": "all-linear"}
VARIANTS = {
    "plain": Variant(ATTENTION),
    "every_linear": Variant(EVERY),
    "rslora": Variant({**ATTENTION, "use_rslora": True}),
    "patterns": Variant(
        {
            **EVERY,
            # PEFT sorts the patterns when it saves, and the first that matches wins.
            "rank_pattern": {r".*\.1\d\.mlp\.down_proj": 20, "down_proj": 5, "q_proj": 2},
            "alpha_pattern": {"v_proj": 3, "model.layers.7.self_attn.k_proj": 40, "down_proj": 1},
        }
    ),
    "regex": Variant({**ATTENTION, "target_modules": r".*\.[5-8]\.(self_attn|mlp)\.[qkd].*_proj"}),
    "layers": Variant({**ATTENTION, "layers_to_transform": [0, 3, 29]}),
    "excluded": Variant({**EVERY, "exclude_modules": r".*\.layers\.1?\d\..*|.*\.o_proj"}),
    "excluded_names": Variant({**ATTENTION, "exclude_modules": ["layers.2.self_attn.q_proj"]}),
    "bf16": Variant(EVERY, torch.bfloat16),
    "f16": Variant(EVERY, torch.float16),
    "rank_3": Variant({**ATTENTION, "r": 3}),
    "rank_12": Variant({**ATTENTION, "r": 12}, torch.bfloat16),
    "rank_20": Variant({**EVERY, "r": 20}, torch.float16),
    "bare_backbone": Variant(ATTENTION, bare=True),
    "dora": Variant({**EVERY, "use_dora": True}),
    "dora_bf16": Variant({**EVERY, "use_dora": True, "use_rslora": True}, torch.bfloat16),
    "lora_bias": Variant({**EVERY, "lora_bias": True}),
    "embedding": Variant({"r": 4, "target_modules": ["embed_tokens"]}),
    "lm_head": Variant({"r": 4, "target_modules": ["lm_head"]}),
    "embedding_and_all": Variant({"r": 3, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "dora_embedding": Variant(
        {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True}
    ),
}


@contextmanager
def wrapped(model: Any, lora: Lora, seed: int | None = None) -> Iterator[Any]:
    """Wrap the model in a new PeftModel with random weights; unwrap it afterwards."""
    peft_model: Any = get_peft_model(model, LoraConfig(**copy.deepcopy(dict(lora))))
    rank = peft_model.peft_config["default"].r
    random = torch.Generator().manual_seed(rank if seed is None else seed)
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "magnitude" in name:
                weight.mul_(torch.empty_like(weight).uniform_(0.7, 1.3, generator=random))
            elif ".lora_" in name:
                weight.normal_(0, 0.04, generator=random)
    try:
        yield peft_model
    finally:
        peft_model.unload()


def save(
    model: Any, lora: Lora, folder: Path, dtype: Any = torch.float32, seed: int | None = None
) -> Path:
    with wrapped(model, lora, seed) as peft_model:
        # An lm_head among the targets is LoRA like the others; the base's own weight is not needed.
        peft_model.save_pretrained(folder, save_embedding_layers=False)
    if dtype != torch.float32:
        file = folder / "adapter_model.safetensors"
        cast = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        save_file(cast, file, metadata={"format": "pt"})
    return folder


def build(model: Any, variant: Variant, folder: Path) -> Path:
    """Write a variant for a headed model; always the same one, for some round worse than others."""
    target = model.model if variant.bare else model
    return save(target, variant.lora, folder, variant.dtype, seed=crc32(folder.name.encode()))


@contextmanager
def active(model: Any, **folders: Path) -> Iterator[Any]:
    """Yield a PeftModel with these adapters, the first active; unwrap the model afterwards."""
    (first, folder), *others = folders.items()
    peft_model: Any = PeftModel.from_pretrained(model, folder, adapter_name=first)
    for name, other in others:
        peft_model.load_adapter(other, adapter_name=name)
    try:
        yield peft_model.eval()
    finally:
        peft_model.unload()


def llama(**changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    torch.manual_seed(3)
    model: Any = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **tokens, **changes}))
    return model.eval()


def prompt(rows: int, tokens: int = 5) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(2, 2 + rows * tokens).view(rows, tokens) % 64}


@torch.no_grad()
def logits_of(model: Any, inputs: Inputs, **more: Any) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs, **more).logits
    return logits


@asynccontextmanager
async def serving(model: Any, **given: Any) -> AsyncIterator[tuple[AdapterLoader, AttachedModel]]:
    settings = {"device_bytes": 64 * MiB, "timeout": 60.0} | given
    source = settings.pop("source", None)
    layout = layouts.from_module(model)
    async with AdapterLoader(layout, LoaderConfig(**settings), source=source) as loader:
        with attach(model, loader) as attached:
            yield loader, attached


@asynccontextmanager
async def streaming(
    small: Any, source: FakeSource, **settings: Any
) -> AsyncIterator[tuple[AttachedModel, AdapterHandle, AdapterHandle]]:
    """ "warm" is there, "cold" on its way."""
    async with (
        serving(small, source=source, **settings) as (loader, attached),
        await loader.load("warm") as warm,
        loader.stream("cold") as cold,
    ):
        yield attached, warm, cold


@asynccontextmanager
async def adapted(
    model: Any, adapter: Path, **settings: Any
) -> AsyncIterator[tuple[AttachedModel, AdapterHandle]]:
    async with serving(model, **settings) as (it, attached), await it.load(adapter) as handle:
        yield attached, handle


async def logits_with(model: Any, adapter: Path, inputs: Inputs) -> torch.Tensor:
    rows = len(inputs["input_ids"])
    async with adapted(model, adapter) as (attached, handle):
        with attached.batch([handle] * rows):
            return await asyncio.to_thread(logits_of, model, inputs)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors without a map of the file, which an error's frames would keep."""
    return load((folder / WEIGHTS).read_bytes())


async def logits_by_row(
    model: Any, adapters: Sequence[Path | None], inputs: Inputs, **settings: Any
) -> torch.Tensor:
    """Return the logits of a batch with an adapter, or the base, in each row."""
    async with serving(model, **settings) as (loader, attached), AsyncExitStack() as stack:
        loads = {it: await loader.load(it) for it in dict.fromkeys(adapters) if it is not None}
        for handle in loads.values():
            stack.enter_context(handle)
        with attached.batch([None if it is None else loads[it] for it in adapters]):
            return await asyncio.to_thread(logits_of, model, inputs)


def pefts(model: Any, adapter: Path, inputs: Inputs) -> torch.Tensor:
    """Return PEFT's logits. Use a model only for this: PEFT freezes what it wraps."""
    with active(model, only=adapter):
        return logits_of(model, inputs)
