"""What the names of modules, and a decoder's config, say about the modules of a model.

The names are those of Hugging Face's models. They say how tensor parallelism cuts a module, and
which parts its output has. For the families in `FAMILIES`, a config is enough for a layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from lorax_async.formats.peft_names import HEADS
from lorax_async.formats.strict_json import JsonValue
from lorax_async.planning.layout import FusedPart, ModelLayout, Module, Parallelism, Parameter

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

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_VALUE_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
HEAD_DIMS = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
"""Keys of configs and, but for the first, attributes of attention modules; the first set counts."""

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
_MEGATRON_MLP: Linears = (
    ("mlp.dense_h_to_4h", "hidden", "inner"),
    ("mlp.dense_4h_to_h", "inner", "hidden"),
)
_SHARED_EXPERT: Linears = (
    ("mlp.shared_expert.gate_proj", "hidden", "shared"),
    ("mlp.shared_expert.up_proj", "hidden", "shared"),
    ("mlp.shared_expert.down_proj", "shared", "hidden"),
    ("mlp.shared_expert_gate", "hidden", "one"),
)


def _fused_attention(name: str) -> Linears:
    return (
        (f"{name}.query_key_value", "hidden", "query, key and value"),
        (f"{name}.dense", "query", "hidden"),
    )


Keys: TypeAlias = Mapping[str, tuple[str, ...]]

_KEYS: Keys = {
    "vocabulary": ("vocab_size",),
    "hidden": ("hidden_size",),
    "inner": ("intermediate_size",),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "key/value heads": ("num_key_value_heads",),
    "head": ("head_dim",),
}
"""The keys of sizes in a config."""

_EQUAL_HEADS: Keys = {"key/value heads": (), "head": ()}
_GPT2_KEYS: Keys = {
    **_EQUAL_HEADS,
    "hidden": ("n_embd", "hidden_size"),
    "inner": ("n_inner",),
    "layers": ("n_layer", "num_hidden_layers"),
    "heads": ("n_head", "num_attention_heads"),
    "positions": ("n_positions", "max_position_embeddings"),
}
_BLOOM_KEYS: Keys = {
    **_EQUAL_HEADS,
    "hidden": ("hidden_size", "n_embed"),
    "inner": (),
    "layers": ("n_layer", "num_hidden_layers"),
    "heads": ("n_head", "num_attention_heads"),
}
_FALCON_KEYS: Keys = {
    "hidden": ("hidden_size", "n_embed"),
    "inner": ("ffn_hidden_size",),
    "key/value heads": ("num_kv_heads",),
    "head": (),
}
_EXPERTS: Keys = {"experts": ("num_experts", "num_local_experts")}
_ALL_SPARSE: Mapping[str, JsonValue] = {"decoder_sparse_step": 1, "mlp_only_layers": []}


@dataclass(frozen=True, slots=True)
class Family:
    """The modules of the models of one type, and the defaults of their configs.

    Attributes
    ----------
    key_value_heads, head_dim
        They count if the config has none. None are as many as there are query heads, and the hidden
        size divided by them.
    expansion
        The inner size is this many hidden sizes if the config has none.
    layer
        The linear modules of each layer. They are `transposed` in GPT-2.
    layers, embeddings
        The path of the layers, and the embeddings before them with their sizes.
    keys
        The keys of sizes where they differ from `_KEYS`. If there are several, all that a config
        has must agree.
    requires
        The values of other keys, if they are there, with which all layers are equal. Text is
        the key that has the value.
    """

    key_value_heads: int | None = None
    head_dim: int | None = None
    expansion: int = 0
    layer: Linears = (*_ATTENTION, *_GATED)
    transposed: bool = False
    layers: str = "model.layers"
    embeddings: tuple[tuple[str, str], ...] = (("model.embed_tokens", "vocabulary"),)
    keys: Keys = field(default_factory=dict)
    requires: Mapping[str, JsonValue] = field(default_factory=dict)


_BLOOM = Family(
    expansion=4,
    layer=(*_fused_attention("self_attention"), *_MEGATRON_MLP),
    layers="transformer.h",
    embeddings=(("transformer.word_embeddings", "vocabulary"),),
    keys=_BLOOM_KEYS,
)

FAMILIES: Mapping[str, Family] = {
    "bloom": _BLOOM,
    "cohere": Family(),
    "cohere2": Family(),
    "ernie4_5": Family(2, 128),
    "exaone4": Family(32),
    "falcon": replace(_BLOOM, keys=_FALCON_KEYS),
    "gemma": Family(16, 256),
    "gemma2": Family(4, 256),
    "gemma3_text": Family(4, 256),
    "glm": Family(2, 128, layer=(*_ATTENTION, *_GATE_FUSED)),
    "glm4": Family(2, 128, layer=(*_ATTENTION, *_GATE_FUSED)),
    "gpt2": Family(
        expansion=4,
        layer=(
            ("attn.c_attn", "hidden", "query, key and value"),
            ("attn.c_proj", "hidden", "hidden"),
            ("mlp.c_fc", "hidden", "inner"),
            ("mlp.c_proj", "inner", "hidden"),
        ),
        transposed=True,
        layers="transformer.h",
        embeddings=(("transformer.wte", "vocabulary"), ("transformer.wpe", "positions")),
        keys=_GPT2_KEYS,
        requires={"add_cross_attention": False},
    ),
    "gpt_neox": Family(
        layer=(*_fused_attention("attention"), *_MEGATRON_MLP),
        layers="gpt_neox.layers",
        embeddings=(("gpt_neox.embed_in", "vocabulary"),),
        keys=_EQUAL_HEADS,
    ),
    "gpt_oss": Family(8, 64, layer=_ATTENTION),
    "granite": Family(),
    "llama": Family(),
    "mistral": Family(8),
    "mixtral": Family(8, layer=_ATTENTION),
    "olmo": Family(),
    "olmo2": Family(),
    "olmo3": Family(),
    "olmoe": Family(layer=_ATTENTION),
    "opt": Family(
        layer=(
            ("self_attn.k_proj", "hidden", "key"),
            ("self_attn.v_proj", "hidden", "key"),
            ("self_attn.q_proj", "hidden", "query"),
            ("self_attn.out_proj", "query", "hidden"),
            ("fc1", "hidden", "inner"),
            ("fc2", "inner", "hidden"),
        ),
        layers="model.decoder.layers",
        embeddings=(("model.decoder.embed_tokens", "vocabulary"),),
        keys={**_EQUAL_HEADS, "inner": ("ffn_dim",)},
        requires={"word_embed_proj_dim": "hidden_size"},
    ),
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
    "qwen2_moe": Family(
        16,
        layer=(*_ATTENTION, *_SHARED_EXPERT),
        keys={**_EXPERTS, "shared": ("shared_expert_intermediate_size",)},
        requires=_ALL_SPARSE,
    ),
    "qwen3": Family(32, 128),
    "qwen3_moe": Family(4, layer=_ATTENTION, keys=_EXPERTS, requires=_ALL_SPARSE),
    "seed_oss": Family(8, 128),
    "smollm3": Family(4),
    "starcoder2": Family(
        2, layer=(*_ATTENTION, ("mlp.c_fc", "hidden", "inner"), ("mlp.c_proj", "inner", "hidden"))
    ),
}
"""By `model_type`: decoders of embeddings, equal layers and `lm_head`, as transformers 5 has them.

Its experts are not linear modules."""

_FUSED_EXPERTS: Mapping[str, tuple[str, str]] = {
    "gpt_oss": ("mlp.router", "intermediate_size"),
    "mixtral": ("mlp.gate", "intermediate_size"),
    "olmoe": ("mlp.gate", "intermediate_size"),
    "qwen2_moe": ("mlp.gate", "moe_intermediate_size"),
    "qwen3_moe": ("mlp.gate", "moe_intermediate_size"),
}
"""The router beside `mlp.experts`, and the key of the experts' inner size."""

_UNSURE = {*HEAD_COUNTS, *KEY_VALUE_HEAD_COUNTS, *HEAD_DIMS, "text_config", "configuration_files"}
"""Keys that can change what counts, if a family does not read them."""


def decoder_layout(config: Mapping[str, JsonValue]) -> ModelLayout | None:
    """Return the layout, but for its dtype, of the decoder that a `config.json` describes.

    Return None if `FAMILIES` does not tell for sure, which the values of a config can prevent.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        return None
    family = FAMILIES[model_type]
    attention = _config_attention(config, model_type)
    sizes = None if attention is None else _sizes(config, model_type, attention)
    if sizes is None:
        return None
    num_layers, whole = sizes["layers"], Parallelism.REPLICATED
    modules = [
        Module(path, sizes[size], sizes["hidden"], -1, whole, embedding=True)
        for path, size in family.embeddings
    ]
    for layer in range(num_layers):
        for name, inputs, outputs in family.layer:
            path, shape = f"{family.layers}.{layer}.{name}", (sizes[inputs], sizes[outputs])
            parts = output_parts(model_type, name, sizes[outputs], attention)
            modules.append(Module(path, *shape, layer, parallel_of(name), family.transposed, parts))
    shape = sizes["hidden"], sizes["vocabulary"]
    modules.append(Module("lm_head", *shape, num_layers, parallel_of("lm_head")))
    return ModelLayout(
        tuple(modules),
        num_layers,
        backbone_prefix=f"{family.layers.split('.')[0]}.",
        parameters=tuple(_fused_experts(config, model_type, num_layers)),
    )


def _fused_experts(
    config: Mapping[str, JsonValue], model_type: str, num_layers: int
) -> Iterator[Parameter]:
    """Yield the bare parameters of each layer; none where the config has not all sizes."""
    router, key = _FUSED_EXPERTS.get(model_type, ("", ""))
    keys = (*_EXPERTS["experts"], key, "hidden_size")
    sizes = [size for it in keys if type(size := config.get(it)) is int]
    if not router or len(sizes) != len(keys) - 1:  # one of the two names of the experts' count
        return
    experts, inner, hidden = sizes
    transposed = model_type == "gpt_oss"
    for layer in range(num_layers):
        path = f"{FAMILIES[model_type].layers}.{layer}"
        yield Parameter(f"{path}.{router}", "weight", (experts, hidden), layer)
        for name, outs, ins in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            shape = (experts, ins, outs) if transposed else (experts, outs, ins)
            yield Parameter(f"{path}.mlp.experts", name, shape, layer, transposed)
            if transposed:
                yield Parameter(f"{path}.mlp.experts", f"{name}_bias", (experts, outs), layer)


def _config_attention(config: Mapping[str, JsonValue], model_type: str) -> AttentionShape | None:
    """Return the shape of the attention; None if it is not sure."""
    family = FAMILIES[model_type]
    hidden, heads = _size(config, family, "hidden"), _size(config, family, "heads")
    if not heads or hidden % heads:
        return None
    key_value_heads = _size(config, family, "key/value heads", family.key_value_heads, heads)
    head_dim = _size(config, family, "head", family.head_dim, hidden // heads)
    grouped = multi_query = False
    if _fused_order(model_type) == "falcon":
        grouped = config.get("new_decoder_architecture") is True
        multi_query = not grouped and config.get("multi_query", True) is True
        key_value_heads = 1 if multi_query else key_value_heads
    if not (key_value_heads and head_dim) or heads % key_value_heads:
        return None
    return AttentionShape(heads, key_value_heads, head_dim, multi_query, grouped)


def _fused_order(model_type: str) -> FusedOrder | None:
    return next((order for (kind, _), order in _FUSED.items() if kind == model_type), None)


def _sizes(
    config: Mapping[str, JsonValue], model_type: str, attention: AttentionShape
) -> Mapping[str, int] | None:
    """Return the sizes by which `Family` describes modules; None if they are not sure."""
    family = FAMILIES[model_type]
    keys = {**_KEYS, **family.keys}
    sizes = {size: _size(config, family, size) for size in keys if size not in _EQUAL_HEADS}
    sizes["inner"] = _size(config, family, "inner", None, family.expansion * sizes["hidden"])
    read = {key for names in keys.values() for key in names}
    equal = all(
        config[key] == (config.get(value) if isinstance(value, str) else value)
        for key, value in family.requires.items()
        if key in config
    )
    # transformers 5.25 also saves what it derives from Falcon's own keys.
    heads = {key: config.get(key) for key in KEY_VALUE_HEAD_COUNTS}
    read.update(key for key, count in heads.items() if count == attention.key_value_heads)
    if 0 in sizes.values() or not equal or not (_UNSURE - read).isdisjoint(config):
        return None
    order = _fused_order(model_type)
    fused = () if order is None else attention.fused(order)
    return {
        **sizes,
        "query": attention.query.size,
        "key": attention.key.size,
        "query, key and value": sum(part.size for part in fused),
        "gate and up": 2 * sizes["inner"],
        "one": 1,
    }


def _size(
    config: Mapping[str, JsonValue],
    family: Family,
    size: str,
    default: int | None = None,
    derived: int = 0,
) -> int:
    """Return the value of a size's keys, or 0 if it is not one positive integer.

    A missing key counts as `default`; if that is None, it counts as `derived`, as null does then.
    """
    keys = family.keys.get(size, _KEYS.get(size, ()))
    values = [config[key] for key in keys if key in config] or [default]
    value = values[0]
    if any(other != value for other in values):
        return 0
    if value is None and default is None:
        return derived
    return value if type(value) is int and value > 0 else 0
