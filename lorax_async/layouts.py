"""Make a `ModelLayout` from a base model's config, from a model, or from an adapter's shapes.

The functions block (import transformers, build a model without weights, read files): call them
while the server starts, or in a thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from lorax_async.config import DTYPES, Limits
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    LoraxError,
    UnsupportedAdapterError,
    shorten,
)
from lorax_async.formats.peft_config import parse_config
from lorax_async.formats.peft_names import WEIGHT_DTYPES, TensorRole, layer_index, parse_tensor_name
from lorax_async.formats.safetensors import Header, TensorSpan
from lorax_async.planning.layout import FusedPart, ModelLayout, Module, Parallelism
from lorax_async.planning.transfer_plan import plan_transfer
from lorax_async.sources.local import read_header

_QUERY = frozenset({"q_proj", "q_lin", "wq", "q", "query", "q_attn"})
_KEY_VALUE = frozenset(
    {*("k_proj", "k_lin", "wk", "k", "key"), *("v_proj", "v_lin", "wv", "v", "value")}
)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
_DIMS = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Head counts and dimension of an attention module, from its attributes or config.

    `grouped`: q heads are stored beside the k and v that they share (`new_decoder_architecture`).
    """

    heads: int
    key_value_heads: int
    head_dim: int
    multi_query: bool = False
    grouped: bool = False

    @property
    def query(self) -> FusedPart:
        return FusedPart(self.heads * self.head_dim, self.head_dim)

    @property
    def key(self) -> FusedPart:
        return FusedPart(self.key_value_heads * self.head_dim, self.head_dim, replicable=True)

    def fused(self, order: FusedOrder) -> Parts:
        """Return the parts of the output of one module that computes q, k and v."""
        if order == "falcon" and self.grouped:
            unit = (self.heads // self.key_value_heads + 2) * self.head_dim
            return (FusedPart(self.key_value_heads * unit, unit),)
        if order == "by projection" or (order != "by head" and self.multi_query):
            return self.query, self.key, self.key
        return (FusedPart(3 * self.heads * self.head_dim, 3 * self.head_dim),)


Parts = tuple[FusedPart, ...]
FusedOrder = Literal["by projection", "by head", "bigcode", "falcon"]
"""All q heads, then all k and all v; each head's q, k and v beside each other; or by the config."""

_FUSED: Mapping[tuple[str, str], FusedOrder] = {
    **{(kind, "c_attn"): "by projection" for kind in ("gpt2", "openai-gpt", "qwen")},
    **{(kind, "qkv_proj"): "by projection" for kind in ("phi3", "phi4_multimodal")},
    **{(kind, "Wqkv"): "by projection" for kind in ("mpt", "dbrx")},
    ("gpt_bigcode", "c_attn"): "bigcode",
    ("falcon", "query_key_value"): "falcon",
    **{
        (kind, "query_key_value"): "by head"
        for kind in ("bloom", "gpt_neox", "gpt_neox_japanese", "persimmon")
    },
}
_HALVES = {
    (kind, "gate_up_proj")
    for kind in ("phi3", "phi4_multimodal", "glm", "glm4", "glm4v_text", "glm_image_text")
}
_PLAIN = {
    (kind, "dense_h_to_4h")
    for kind in ("bloom", "falcon", "gpt_neox", "gpt_neox_japanese", "persimmon")
}


def parts_of(model: Any, name: str, out_features: int) -> Parts:
    """Return the parts of the output of `model`'s linear module `name`; empty if unknown."""
    last = name.rpartition(".")[2]
    config, path = None, name
    while config is None and path:  # that of the nearest module around it which has one
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
    kind = getattr(config, "model_type", ""), last
    if kind in _PLAIN:
        return (FusedPart(out_features),)
    if kind in _HALVES and out_features % 2 == 0:
        return FusedPart(out_features // 2), FusedPart(out_features // 2)
    attention = _attention(model.get_submodule(name.rpartition(".")[0]), config)
    if attention is None:
        return ()
    parts: Parts = ()
    if last in _QUERY:
        parts = (attention.query,)
    elif last in _KEY_VALUE:
        parts = (attention.key,)
    elif kind in _FUSED:
        parts = attention.fused(_FUSED[kind])
    return parts if sum(part.size for part in parts) == out_features else ()


def _attention(module: Any, config: Any) -> AttentionShape | None:
    heads = _first_size(module, _HEADS) or _first_size(config, _HEADS)
    if not heads:
        return None
    head_dim = _first_size(module, _DIMS) or _first_size(config, _DIMS)
    head_dim = head_dim or _first_size(config, ("hidden_size",)) // heads
    groups = _first_size(module, ("num_key_value_groups",))
    key_value_heads = _first_size(module, _KEY_VALUE_HEADS) or (heads // groups if groups else 0)
    key_value_heads = key_value_heads or _first_size(config, _KEY_VALUE_HEADS) or heads
    if not head_dim or heads % key_value_heads:
        return None
    return AttentionShape(
        heads,
        key_value_heads,
        head_dim,
        multi_query=getattr(module, "multi_query", False) is True,
        grouped=getattr(module, "new_decoder_architecture", False) is True,
    )


def _first_size(owner: Any, names: tuple[str, ...]) -> int:
    """Return the first of these attributes that is a positive int, or 0."""
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


HEADS = frozenset({"lm_head", "embed_out"})
# The names in Llama, Qwen, GPT-2, GPT-NeoX, Falcon, Phi, OPT, BLOOM, T5 and similar models.
_COLUMN = HEADS | {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "q_lin", "k_lin", "v_lin", "wq", "wk", "wv"),
    *("q", "k", "v", "query", "key", "value", "query_key_value", "W_pack", "Wqkv", "wqkv"),
    *("c_attn", "q_attn", "in_proj", "gate_proj", "up_proj", "gate_up_proj"),
    *("c_fc", "fc1", "fc_in"),
    *("dense_h_to_4h", "lin1", "w1", "w3", "wi", "wi_0", "wi_1"),
}
_ROW = frozenset(
    {
        *("o_proj", "out_proj", "c_proj", "dense", "out_lin", "wo", "o"),
        *("down_proj", "dense_4h_to_h", "fc2", "fc_out", "lin2", "w2"),
    }
)


def is_lookup(name: str, module: nn.Module) -> bool:
    """Return whether the module is a lookup of token or position ids, with an optional scale.

    An adapter cannot target embeddings that compute anything else (OPT's positions), or those
    within a layer (T5's relative positions), whose input is not tokens.
    """
    if not isinstance(module, nn.Embedding) or layer_index(name) is not None:
        return False
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return plain and module.max_norm is None


def parallel_of(name: str) -> Parallelism:
    """Return how tensor parallelism cuts a module of this name."""
    last = name.rpartition(".")[2]
    if last in _COLUMN:
        return Parallelism.COLUMN
    return Parallelism.ROW if last in _ROW else Parallelism.REPLICATED


Dtype: TypeAlias = str | torch.dtype | None

CONFIG_FILE = "adapter_config.json"

_MATRICES = (TensorRole.A, TensorRole.B)


def from_pretrained(dir: str | Path, dtype: Dtype = None) -> ModelLayout:
    """Return the layout of the base model in a local folder, from its `config.json` alone.

    The model is built on the meta device: no weights are read, nothing is downloaded, and no code
    from the folder is run. `dtype` is the one in which the server runs the base (torch's, or its
    name), None the config's.

    Raise `ConfigError` if the folder has no config, transformers cannot build it, or the dtype is
    unknown.
    """
    folder = Path(dir)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{str(folder)!r} has no config.json; pass the folder of a base model")
    import transformers  # noqa: PLC0415 (slow, and not needed by `from_module`)

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
                automatic: Any = transformers.AutoModelForCausalLM
                model = automatic.from_config(config)
            else:
                model = getattr(transformers, (config.architectures or [""])[0])(config)
        if not isinstance(model, nn.Module):
            raise TypeError(f"{type(model).__name__} is not a model")
    except Exception as error:  # an untrusted config can make transformers raise anything
        raise ConfigError(
            f"transformers cannot build the model of {str(folder)!r} ({error}); build it yourself"
            " and use layouts.from_module"
        ) from error
    dtype = dtype or config.dtype
    if dtype is None:
        raise ConfigError("the config has no dtype; pass the one in which the base will run")
    return from_module(model, dtype)


def from_module(model: nn.Module, dtype: Dtype = None) -> ModelLayout:
    """Return the layout of a base model in memory or on the meta device, without adapters.

    Its modules are those that PEFT adapts: `nn.Linear`, transformers' `Conv1D`, and embeddings of
    tokens or positions. A linear module without a layer number comes before the layers if it does
    so in the model, else after them; an embedding comes before them. The class is that on which the
    adapters were trained, or its form with or without a head. `dtype` is the one in which it
    computes (torch's, or its name), None the most frequent one of its linear weights.

    Raise `ConfigError` if the model has no numbered layers, has adapters attached, or its dtype is
    unknown.
    """
    modules: list[Module] = []
    linears: dict[str, Any] = {}
    for name, module in _adaptable_modules(model):
        if isinstance(module, nn.Embedding):
            sizes = module.num_embeddings, module.embedding_dim
            modules.append(Module(name, *sizes, -1, Parallelism.REPLICATED, embedding=True))
        else:
            linears[name] = module
    layers = [layer_index(name) for name in linears]
    numbered = [layer for layer in layers if layer is not None]
    if not numbered:
        raise ConfigError(f"{type(model).__name__} has no linear modules in numbered layers")
    num_layers = max(numbered) + 1
    first = layers.index(numbered[0])
    for place, ((name, linear), layer) in enumerate(zip(linears.items(), layers, strict=True)):
        outside = -1 if place < first else num_layers
        modules.append(_linear_module(model, name, linear, outside if layer is None else layer))
    common = Counter(linear.weight.dtype for linear in linears.values()).most_common(1)[0][0]
    dtype_name = str(dtype or common).removeprefix("torch.")
    if dtype_name not in DTYPES:
        raise ConfigError(
            f"the base's dtype {dtype_name!r} is not supported for adapters; pass dtype, one of"
            f" {', '.join(DTYPES)}"
        )
    backbone = getattr(model, "base_model_prefix", "")
    headed = isinstance(backbone, str) and isinstance(getattr(model, backbone, None), nn.Module)
    prefix = f"{backbone}." if headed and backbone else ""
    return ModelLayout(tuple(modules), num_layers, DTYPES[dtype_name], prefix)


def _adaptable_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield linear modules and embeddings, by name; raise `ConfigError` if one has an adapter."""
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415 (slow)

    for name, module in model.named_modules():
        if name.endswith(".base_layer") or ".lora_A." in name:
            raise ConfigError(
                f"module {name!r} belongs to an attached adapter; take the layout of the plain"
                " base model"
            )
        if (isinstance(module, nn.Linear | Conv1D) or is_lookup(name, module)) and name:
            yield name, module


def _linear_module(model: nn.Module, name: str, linear: Any, layer: int) -> Module:
    transposed = not isinstance(linear, nn.Linear)
    # A quantised linear packs its weight, so take the sizes from the module.
    sizes = linear.weight.shape if transposed else (linear.in_features, linear.out_features)
    inputs, outputs = map(int, sizes)
    parallel = parallel_of(name)
    parts = parts_of(model, name, outputs) if parallel is Parallelism.COLUMN else ()
    return Module(name, inputs, outputs, layer, parallel, transposed, parts)


def from_adapter(dir: str | Path, *, limits: Limits | None = None) -> ModelLayout:
    """Return a layout of the modules that one adapter targets, without its base model.

    The dtype is that of A and B, or F32 if they have several. `lm_head` comes after the layers, any
    other module without a layer number before them. Raise what a load of this adapter raises:
    `AdapterNotFoundError`, `AdapterFormatError` or `UnsupportedAdapterError`.
    """
    folder, limits = Path(dir), limits or Limits()
    spec = parse_config(_read(folder / CONFIG_FILE, limits.max_config_bytes), limits)
    try:
        header, _ = read_header(folder, limits)
    except LoraxError as error:
        raise error.located(id=str(folder)) from error
    shapes = _shapes(header)
    numbers = {path: layer_index(path) for path in shapes}
    num_layers = 1 + max((n for n in numbers.values() if n is not None), default=0)
    layers: dict[str, int] = {}
    for path, number in numbers.items():
        outside = num_layers if path.rpartition(".")[2] in HEADS else -1
        layers[path] = outside if number is None else number
    modules = [
        Module(
            name=path,
            in_features=a.shape[1],
            out_features=b.shape[0],
            layer=layers[path],
            parallel=Parallelism.REPLICATED if embedding else parallel_of(path),
            transposed=spec.fan_in_fan_out and not embedding,
            embedding=embedding,
        )
        for path, (a, b, embedding) in shapes.items()
    ]
    dtypes = {span.dtype for a, b, _ in shapes.values() for span in (a, b)}
    uniform = len(dtypes) == 1 and dtypes <= set(WEIGHT_DTYPES)
    layout = ModelLayout(tuple(modules), num_layers, dtypes.pop() if uniform else "F32")
    # Make the checks of a load, and so raise its errors, by planning the transfer.
    plan_transfer(
        header,
        spec,
        layout,
        dtype=None,
        alignment=1,
        rank_multiple=1,
        limits=limits,
        staging_move_bytes=1 << 30,
    )
    return layout


def _shapes(header: Header) -> dict[str, tuple[TensorSpan, TensorSpan, bool]]:
    """Return A and B of each module, and whether it is an embedding."""
    parts: dict[str, dict[TensorRole, TensorSpan]] = {}
    embeddings: dict[str, bool] = {}
    for span in header.tensors:
        name = parse_tensor_name(span.name)
        if name.part not in _MATRICES:
            continue
        if len(span.shape) != 2 or 0 in span.shape:
            raise AdapterFormatError(
                f"tensor {shorten(span.name, 200)!r} has shape {list(span.shape)}, not two"
                " positive dimensions; save the adapter again"
            )
        parts.setdefault(name.module, {})[name.part] = span
        embeddings[name.module] = name.embedding is True
    for path, matrices in parts.items():
        if len(matrices) < len(_MATRICES):
            raise AdapterFormatError(
                f"module {shorten(path, 200)!r} has only one of A and B; save the adapter again"
            )
    if not parts:
        raise AdapterFormatError("the file has no tensors; save the adapter again")
    return {
        path: (ab[TensorRole.A], ab[TensorRole.B], embeddings[path]) for path, ab in parts.items()
    }


def _read(path: Path, limit: int) -> bytes:
    if not path.is_file():
        raise AdapterNotFoundError(f"there is no file {str(path)!r}")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UnsupportedAdapterError(f"{path.name} is larger than the limit of {limit:,} bytes")
    return content
