"""Which modules of a model PEFT adapts, and what a layout says of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lorax_async.core.layout import Module, Parallel
from lorax_async.core.peft_names import layer_index
from lorax_async.errors import ConfigError
from lorax_async.parts import parts_of

HEADS = frozenset({"lm_head", "embed_out"})
# By the names that Llama, Qwen, GPT-2, GPT-NeoX, Falcon, Phi, OPT, BLOOM, T5 and their kin use.
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


def adaptable(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Its linear modules and its embeddings, by name. `ConfigError` if adapters are attached."""
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415 (slow)

    for name, module in model.named_modules():
        if name.endswith(".base_layer") or ".lora_A." in name:
            raise ConfigError(
                f"module {name!r} belongs to an adapter that is attached already; take the layout"
                " of the plain base model"
            )
        if (isinstance(module, nn.Linear | Conv1D) or looks_up(name, module)) and name:
            yield name, module


def looks_up(name: str, module: nn.Module) -> bool:
    """Whether it gives rows of its weight for ids of tokens or positions, scaled perhaps.

    What computes anything else, as OPT's positions do, no adapter can be for. What lies within a
    layer (T5's relative positions) has no tokens for its input.
    """
    if not isinstance(module, nn.Embedding) or layer_index(name) is not None:
        return False
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    return plain and module.max_norm is None


def embedding_module(name: str, module: nn.Embedding) -> Module:
    sizes = module.num_embeddings, module.embedding_dim
    return Module(name, *sizes, -1, Parallel.REPLICATED, embedding=True)


def linear_module(model: nn.Module, name: str, linear: Any, layer: int) -> Module:
    """What a layout says of one of the model's linear modules."""
    transposed = not isinstance(linear, nn.Linear)
    # A quantised linear packs its weight: only the module knows its sizes.
    sizes = linear.weight.shape if transposed else (linear.in_features, linear.out_features)
    inputs, outputs = map(int, sizes)
    parallel = parallel_of(name)
    parts = parts_of(model, name, outputs) if parallel is Parallel.COLUMN else ()
    return Module(name, inputs, outputs, layer, parallel, transposed, parts)


def parallel_of(name: str) -> Parallel:
    """How tensor parallelism cuts a module of this name."""
    last = name.rpartition(".")[2]
    if last in _COLUMN:
        return Parallel.COLUMN
    return Parallel.ROW if last in _ROW else Parallel.REPLICATED
