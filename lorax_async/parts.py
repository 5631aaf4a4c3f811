"""Of which parts the outputs of real models' linear modules are made: heads, and fused q, k and v.

How a fused output is laid out is known by the kind of model and the module's name alone, as written
in the modelling files of transformers 5.24 (and Qwen's own, for "qwen"). What is not known here has
no parts, and `core/sharding.py` refuses to cut what may be fused of unknown ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorax_async.core.layout import Part

_QUERY = frozenset({"q_proj", "q_lin", "wq", "q", "query", "q_attn"})
_KEY_VALUE = frozenset(
    {*("k_proj", "k_lin", "wk", "k", "key"), *("v_proj", "v_lin", "wv", "v", "value")}
)
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
_DIMS = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")


@dataclass(frozen=True, slots=True)
class Attention:
    """What an attention module says of itself, or its config of it.

    `grouped`: its q heads lie beside the k and v that they share (`new_decoder_architecture`).
    """

    heads: int
    key_value_heads: int
    head_dim: int
    multi_query: bool = False
    grouped: bool = False

    @property
    def query(self) -> Part:
        return Part(self.heads * self.head_dim, self.head_dim)

    @property
    def key(self) -> Part:
        return Part(self.key_value_heads * self.head_dim, self.head_dim, replicable=True)

    value = key


Parts = tuple[Part, ...]
Fused = Callable[[Attention], Parts]


def _in_a_row(attention: Attention) -> Parts:
    """All heads of q, then those of k, then those of v."""
    return attention.query, attention.key, attention.value


def _by_head(attention: Attention) -> Parts:
    """Each head's q, k and v beside each other."""
    return (Part(3 * attention.heads * attention.head_dim, 3 * attention.head_dim),)


def _of_bigcode(attention: Attention) -> Parts:
    return _in_a_row(attention) if attention.multi_query else _by_head(attention)


def _of_falcon(attention: Attention) -> Parts:
    if not attention.grouped:
        return _of_bigcode(attention)
    unit = (attention.heads // attention.key_value_heads + 2) * attention.head_dim
    return (Part(attention.key_value_heads * unit, unit),)


_FUSED: Mapping[tuple[str, str], Fused] = {
    **{(kind, "c_attn"): _in_a_row for kind in ("gpt2", "openai-gpt", "qwen")},
    **{(kind, "qkv_proj"): _in_a_row for kind in ("phi3", "phi4_multimodal")},
    **{(kind, "Wqkv"): _in_a_row for kind in ("mpt", "dbrx")},
    ("gpt_bigcode", "c_attn"): _of_bigcode,
    ("falcon", "query_key_value"): _of_falcon,
    **{
        (kind, "query_key_value"): _by_head
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
    """The parts of the output of `model`'s linear module `name`; empty: none that are known."""
    last = name.rpartition(".")[2]
    config = _config_above(model, name)
    kind = getattr(config, "model_type", ""), last
    if kind in _PLAIN:
        return (Part(out_features),)
    if kind in _HALVES and out_features % 2 == 0:
        return Part(out_features // 2), Part(out_features // 2)
    attention = _attention(model.get_submodule(name.rpartition(".")[0]), config)
    if attention is None:
        return ()
    made: Parts = ()
    if last in _QUERY:
        made = (attention.query,)
    elif last in _KEY_VALUE:
        made = (attention.key,)
    elif kind in _FUSED:
        made = _FUSED[kind](attention)
    return made if sum(part.size for part in made) == out_features else ()


def _config_above(model: Any, name: str) -> Any:
    """Of the nearest module around `name` that has one."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        config = getattr(model.get_submodule(path), "config", None)
        if config is not None:
            return config
    return None


def _attention(module: Any, config: Any) -> Attention | None:
    heads = _first(module, _HEADS) or _first(config, _HEADS)
    if not heads:
        return None
    head_dim = _first(module, _DIMS) or _first(config, _DIMS)
    head_dim = head_dim or _first(config, ("hidden_size",)) // heads
    groups = _first(module, ("num_key_value_groups",))
    key_value_heads = _first(module, _KEY_VALUE_HEADS) or (heads // groups if groups else 0)
    key_value_heads = key_value_heads or _first(config, _KEY_VALUE_HEADS) or heads
    if not head_dim or heads % key_value_heads:
        return None
    return Attention(
        heads,
        key_value_heads,
        head_dim,
        multi_query=getattr(module, "multi_query", False) is True,
        grouped=getattr(module, "new_decoder_architecture", False) is True,
    )


def _first(owner: Any, names: tuple[str, ...]) -> int:
    """The first of these attributes that is a positive number, or 0."""
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
