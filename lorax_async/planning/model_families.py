"""What the names of modules, and a decoder's config, say about the modules of a model.

The names are those of Hugging Face's models. They say how tensor parallelism cuts a module, and
which parts its output has. For the families in `FAMILIES`, a config is enough for a layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lorax_async.formats.strict_json import JsonValue
from lorax_async.planning.layout import FusedPart, ModelLayout, Module, Parallelism

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


def parallel_of(name: str) -> Parallelism:
    """Return how tensor parallelism cuts a module of this name."""
    last = name.rpartition(".")[2]
    if last in _COLUMN:
        return Parallelism.COLUMN
    return Parallelism.ROW if last in _ROW else Parallelism.REPLICATED


# -- the parts of an output ------------------------------------------------------------------------

HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_VALUE_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
HEAD_DIMS = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
"""Attributes of attention modules and keys of configs; the first that is set counts."""

Parts: TypeAlias = tuple[FusedPart, ...]
FusedOrder = Literal["by projection", "by head", "bigcode", "falcon"]
"""All q heads, then all k and all v; each head's q, k and v beside each other; or by the config."""


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


_QUERY = frozenset({"q_proj", "q_lin", "wq", "q", "query", "q_attn"})
_KEY_VALUE = frozenset(
    {*("k_proj", "k_lin", "wk", "k", "key"), *("v_proj", "v_lin", "wv", "v", "value")}
)
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


def output_parts(
    model_type: str, name: str, out_features: int, attention: AttentionShape | None
) -> Parts:
    """Return the parts of a module's output; empty if it has none, or unknown ones.

    `model_type` is the config's, `attention` the shape of the attention around the module, if any.
    """
    last = name.rpartition(".")[2]
    kind = model_type, last
    if kind in _PLAIN:
        return (FusedPart(out_features),)
    if kind in _HALVES and out_features % 2 == 0:
        return FusedPart(out_features // 2), FusedPart(out_features // 2)
    parts: Parts = ()
    if attention is None:
        return parts
    if last in _QUERY:
        parts = (attention.query,)
    elif last in _KEY_VALUE:
        parts = (attention.key,)
    elif kind in _FUSED:
        parts = attention.fused(_FUSED[kind])
    return parts if sum(part.size for part in parts) == out_features else ()


# -- layouts of configs ----------------------------------------------------------------------------

Linears: TypeAlias = tuple[tuple[str, str, str], ...]
"""Name, input and output of each linear module of a layer, in the order of `named_modules`."""

_ATTENTION: Linears = (
    ("self_attn.q_proj", "hidden", "query"),
    ("self_attn.k_proj", "hidden", "key"),
    ("self_attn.v_proj", "hidden", "key"),
    ("self_attn.o_proj", "query", "hidden"),
)
_GATED: Linears = (
    ("mlp.gate_proj", "hidden", "inner"),
    ("mlp.up_proj", "hidden", "inner"),
    ("mlp.down_proj", "inner", "hidden"),
)
_GATE_FUSED: Linears = (
    ("mlp.gate_up_proj", "hidden", "gate and up"),
    ("mlp.down_proj", "inner", "hidden"),
)


@dataclass(frozen=True, slots=True)
class Family:
    """The layers of the models of one type, and the defaults of their configs.

    `key_value_heads` and `head_dim` count if the config has none. None are as many as there are
    query heads, and the hidden size divided by them.
    """

    key_value_heads: int | None = None
    head_dim: int | None = None
    layer: Linears = (*_ATTENTION, *_GATED)


FAMILIES: Mapping[str, Family] = {
    "cohere": Family(),
    "cohere2": Family(),
    "ernie4_5": Family(2, 128),
    "exaone4": Family(32),
    "gemma": Family(16, 256),
    "gemma2": Family(4, 256),
    "gemma3_text": Family(4, 256),
    "glm": Family(2, 128, (*_ATTENTION, *_GATE_FUSED)),
    "glm4": Family(2, 128, (*_ATTENTION, *_GATE_FUSED)),
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(8),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(),
    "phi": Family(
        layer=(
            *_ATTENTION[:3],
            ("self_attn.dense", "query", "hidden"),
            ("mlp.fc1", "hidden", "inner"),
            ("mlp.fc2", "inner", "hidden"),
        )
    ),
    "phi3": Family(
        layer=(
            ("self_attn.o_proj", "query", "hidden"),
            ("self_attn.qkv_proj", "hidden", "query, key and value"),
            *_GATE_FUSED,
        )
    ),
    "qwen2": Family(32),
    "qwen3": Family(32, 128),
    "seed_oss": Family(8, 128),
    "smollm3": Family(4),
    "starcoder2": Family(
        2, layer=(*_ATTENTION, ("mlp.c_fc", "hidden", "inner"), ("mlp.c_proj", "inner", "hidden"))
    ),
}
"""By `model_type`: decoders of `model.embed_tokens`, equal layers in `model.layers`, `lm_head`."""

_READ = ("num_attention_heads", "num_key_value_heads", "head_dim")
_UNSURE = {*HEAD_COUNTS, *KEY_VALUE_HEAD_COUNTS, *HEAD_DIMS, "text_config", "configuration_files"}
_UNSURE -= {*_READ}
"""Keys that these families do not have. With one, other values than those read here may count."""


def decoder_layout(config: Mapping[str, JsonValue]) -> ModelLayout | None:
    """Return the layout, but for its dtype, of the decoder that a `config.json` describes.

    Return None if `FAMILIES` does not tell for sure, which the values of a config can prevent.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        return None
    family = FAMILIES[model_type]
    vocabulary, hidden = _size(config, "vocab_size"), _size(config, "hidden_size")
    inner, num_layers = _size(config, "intermediate_size"), _size(config, "num_hidden_layers")
    attention = _attention(config, family, hidden)
    known = vocabulary and hidden and inner and num_layers and _UNSURE.isdisjoint(config)
    if attention is None or not known:
        return None
    query, key = attention.query.size, attention.key.size
    sizes = {"hidden": hidden, "query": query, "key": key, "inner": inner}
    sizes |= {"query, key and value": query + 2 * key, "gate and up": 2 * inner}
    whole = Parallelism.REPLICATED
    modules = [Module("model.embed_tokens", vocabulary, hidden, -1, whole, embedding=True)]
    for layer in range(num_layers):
        for name, inputs, outputs in family.layer:
            path, shape = f"model.layers.{layer}.{name}", (sizes[inputs], sizes[outputs])
            parts = output_parts(model_type, name, sizes[outputs], attention)
            modules.append(Module(path, *shape, layer, parallel_of(name), parts=parts))
    modules.append(Module("lm_head", hidden, vocabulary, num_layers, parallel_of("lm_head")))
    return ModelLayout(tuple(modules), num_layers, backbone_prefix="model.")


def _attention(
    config: Mapping[str, JsonValue], family: Family, hidden: int
) -> AttentionShape | None:
    heads = _size(config, "num_attention_heads")
    if not heads or hidden % heads:
        return None
    key_value_heads = _size(config, "num_key_value_heads", family.key_value_heads, heads)
    head_dim = _size(config, "head_dim", family.head_dim, hidden // heads)
    if not (key_value_heads and head_dim) or heads % key_value_heads:
        return None
    return AttentionShape(heads, key_value_heads, head_dim)


def _size(
    config: Mapping[str, JsonValue], key: str, default: int | None = None, derived: int = 0
) -> int:
    """Return the value of a key, or 0 if it is not a positive integer.

    A missing key counts as `default`; if that is None, it counts as `derived`, as null does then.
    """
    value = config.get(key, default)
    if value is None and default is None:
        return derived
    return value if type(value) is int and value > 0 else 0
