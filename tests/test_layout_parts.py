"""Heads and fused outputs of real model classes. The oracle is their own code, run rank by rank.

A rank's attention is the model's own module with fewer heads, whose projections are the rows and
columns that the sharded layout names: the ranks' outputs must sum to that of the whole module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lorax_async import layouts
from lorax_async.config import Shard
from lorax_async.core.layout import Module, Part
from lorax_async.core.sharding import Cut, Sharding, shard_layout
from lorax_async.errors import ConfigError

HIDDEN, LAYERS = 32, 1
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
GQA = SIZES | {"num_key_value_heads": 2}
Q = Part(32, 4)
K = Part(8, 4, replicable=True)
FULL_K = Part(32, 4, replicable=True)
ONE_K = Part(4, 4, replicable=True)
BY_HEAD = (Part(96, 12),)
Parts = tuple[Part, ...]

Case = tuple[Callable[[], Any], dict[str, Parts], tuple[int, ...]]
CASES: dict[str, Case] = {
    "llama": (
        lambda: transformers.LlamaConfig(**GQA, head_dim=4),
        {"q_proj": (Q,), "k_proj": (K,), "v_proj": (K,), "o_proj": (), "gate_proj": ()},
        (2, 4, 8),
    ),
    "llama whose heads are wide": (
        lambda: transformers.LlamaConfig(**GQA, head_dim=6),
        {"q_proj": (Part(48, 6),), "k_proj": (Part(12, 6, True),), "o_proj": ()},
        (2, 4, 8),
    ),
    "qwen2": (
        lambda: transformers.Qwen2Config(**GQA),
        {"q_proj": (Q,), "k_proj": (K,), "v_proj": (K,)},
        (2, 4, 8),
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(**SIZES, n_positions=16),
        {"c_attn": (Q, FULL_K, FULL_K), "c_fc": (), "c_proj": ()},
        (2, 4, 8),
    ),
    "phi3": (
        lambda: transformers.Phi3Config(**GQA),
        {"qkv_proj": (Q, K, K), "gate_up_proj": (Part(40), Part(40)), "o_proj": ()},
        (2, 4, 8),
    ),
    "gpt_neox": (
        lambda: transformers.GPTNeoXConfig(**SIZES),
        {"query_key_value": BY_HEAD, "dense_h_to_4h": (Part(40),), "dense": ()},
        (2, 4, 8),
    ),
    "gpt_bigcode": (
        lambda: transformers.GPTBigCodeConfig(**SIZES, n_positions=16, n_inner=40),
        {"c_attn": (Q, ONE_K, ONE_K), "c_fc": ()},
        (2, 4, 8),
    ),
    "gpt_bigcode without shared heads": (
        lambda: transformers.GPTBigCodeConfig(
            **SIZES, n_positions=16, n_inner=40, multi_query=False
        ),
        {"c_attn": BY_HEAD},
        (2, 4, 8),
    ),
    "falcon": (
        lambda: transformers.FalconConfig(**SIZES, multi_query=True),
        {"query_key_value": (Q, ONE_K, ONE_K), "dense_h_to_4h": (Part(128),)},
        (2, 4, 8),
    ),
    "falcon without shared heads": (
        lambda: transformers.FalconConfig(**SIZES, multi_query=False),
        {"query_key_value": BY_HEAD},
        (2, 4, 8),
    ),
    "falcon's new decoder": (
        lambda: transformers.FalconConfig(**SIZES, num_kv_heads=2, new_decoder_architecture=True),
        {"query_key_value": (Part(48, 24),)},
        (2,),
    ),
}
"""Of each kind: its config, the parts by hand, and worlds that can share its attention."""


def model_of(config: Any) -> nn.Module:
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config).double().eval()
    for parameter in model.parameters():  # some are zero at first, and would show nothing
        nn.init.normal_(parameter, std=0.3)
    assert isinstance(model, nn.Module)
    return model


MORE: dict[str, Case] = {
    "bloom": (
        lambda: transformers.BloomConfig(**SIZES),
        {"query_key_value": BY_HEAD, "dense": (), "dense_h_to_4h": (Part(128),)},
        (),
    ),
    "mpt": (
        lambda: transformers.MptConfig(d_model=HIDDEN, n_heads=8, n_layers=1, vocab_size=48),
        {"Wqkv": (Q, FULL_K, FULL_K), "up_proj": ()},
        (),
    ),
    # Four blocks, each of q, v, k; and what attends to another sequence has no q.
    "codegen": (
        lambda: transformers.CodeGenConfig(**SIZES, rotary_dim=4),
        {"qkv_proj": (), "fc_in": ()},
        (),
    ),
    "gpt2 with cross attention": (
        lambda: transformers.GPT2Config(**SIZES, n_positions=16, add_cross_attention=True),
        {"c_attn": (), "q_attn": (Q,)},
        (),
    ),
}


def on_meta(config: Any) -> nn.Module:
    auto: Any = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config)
    return model


@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_parts_by_hand(name: str) -> None:
    config, wanted, _ = (CASES | MORE)[name]
    layout = layouts.from_module(on_meta(config()))
    found = {m.name.rpartition(".")[2]: m.parts for m in layout.modules}
    assert {last: found[last] for last in wanted} == wanted


@pytest.mark.parametrize(("name", "module"), [("codegen", "qkv_proj"), (list(MORE)[-1], "c_attn")])
def test_what_is_fused_in_a_way_that_is_not_known_is_not_cut(name: str, module: str) -> None:
    layout = layouts.from_module(on_meta(MORE[name][0]()))
    with pytest.raises(ConfigError, match=rf"{module}' may be fused"):
        shard_layout(layout, Shard(0, 2))
    assert shard_layout(layout.replicate(module), Shard(0, 2)).cuts


class Block(nn.Module):
    """A model whose code comes with its weights, as Qwen's first version."""

    def __init__(self, model_type: str, outputs: int, **facts: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            model_type=model_type, hidden_size=HIDDEN, num_attention_heads=8
        )
        attention = nn.ModuleDict(
            {"c_attn": nn.Linear(HIDDEN, outputs), "k_proj": nn.Linear(HIDDEN, 8)}
        )
        for name, value in facts.items():
            setattr(attention, name, value)
        self.h = nn.ModuleList([nn.ModuleDict({"attn": attention})])


@pytest.mark.parametrize(
    ("model", "fused", "k"),
    [
        (Block("qwen", 96, num_heads=8, head_dim=4), (Q, FULL_K, FULL_K), ()),
        (Block("qwen", 96), (Q, FULL_K, FULL_K), ()),
        (Block("qwen", 64), (), ()),
        (Block("unknown", 96), (), ()),
        (Block("unknown", 96, num_key_value_heads=2), (), (K,)),
        (Block("unknown", 96, num_key_value_groups=4), (), (K,)),
        (Block("qwen", 48, num_key_value_heads=2), (Q, K, K), (K,)),
        # Eight heads cannot share three of k, and what has no heads is no attention.
        (Block("qwen", 96, num_key_value_heads=3), (), ()),
        (nn.ModuleList([nn.ModuleDict({"c_attn": nn.Linear(8, 24)})]), (), None),
    ],
)
def test_facts_of_the_module_come_before_its_configs(
    model: nn.Module, fused: Parts, k: Parts | None
) -> None:
    parts = {m.name.rpartition(".")[2]: m.parts for m in layouts.from_module(model).modules}
    assert (parts["c_attn"], parts.get("k_proj")) == (fused, k)


def test_a_head_of_an_odd_vocabulary_is_kept_whole_on_request() -> None:
    """50257, as GPT-2 has it, is odd: the error says how to go on, and then it does."""
    layout = layouts.from_module(on_meta(transformers.GPT2Config(**SIZES | {"vocab_size": 50257})))
    with pytest.raises(ConfigError, match=r"50,257 output.*layout\.replicate\('lm_head'\)"):
        shard_layout(layout, Shard(0, 2))
    held = shard_layout(layout.replicate("lm_head"), Shard(0, 2)).held
    assert held.modules[held.index("lm_head")].out_features == 50257
    assert held.modules[held.index("transformer.h.0.attn.c_attn")].out_features == 48


class Attention:
    """The first attention module of a model: how it was called, and what it gave."""

    def __init__(self, model: nn.Module) -> None:
        self.path = next(
            name for name, _ in model.named_modules() if name.endswith(("attn", "attention"))
        )
        self.module = model.get_submodule(self.path)
        calls: list[tuple[Any, Any, Any]] = []
        hook = self.module.register_forward_hook(
            lambda _, *call: calls.append(call), with_kwargs=True
        )
        model(input_ids=torch.arange(12).view(2, 6), use_cache=False)
        hook.remove()
        ((self.args, self.kwargs, output),) = calls
        self.output = output[0]

    def of_rank(self, sharding: Sharding, shard: Shard) -> torch.Tensor:
        share = copy.deepcopy(self.module)
        for module, cut in zip(sharding.whole.modules, sharding.cuts, strict=True):
            if module.name.startswith(f"{self.path}."):
                linear = share.get_submodule(module.name.removeprefix(f"{self.path}."))
                cut_linear(linear, module, cut, shard)
        narrow(share, shard.world_size)
        output: torch.Tensor = share(*self.args, **self.kwargs)[0]
        return output


def cut_linear(linear: Any, module: Module, cut: Cut, shard: Shard) -> None:
    rows = torch.cat([torch.arange(*each) for each in cut.rows])
    columns = torch.arange(*cut.columns)
    weight = linear.weight.T if module.transposed else linear.weight
    weight = weight.detach()[rows][:, columns]
    linear.weight = nn.Parameter(weight.T if module.transposed else weight)
    linear.nf = len(rows)
    if linear.bias is not None:
        once = shard.rank == 0 or len(columns) == module.in_features
        linear.bias = nn.Parameter(linear.bias.detach()[rows] * once)


NARROWED = ("num_heads", "num_attention_heads", "split_size", "embed_dim", "hidden_size")
KEY_VALUE = ("num_key_value_heads", "num_kv_heads", "kv_heads")


def narrow(attention: Any, world: int) -> None:
    """Tell a module, and its config, that it has so many times fewer heads."""
    attention.config = copy.deepcopy(attention.config)
    groups = getattr(attention, "num_key_value_groups", None)
    if groups is not None:
        heads = attention.config.num_attention_heads
        shared = max(1, heads // groups // world)
        attention.num_key_value_groups = heads // world // shared
    for owner in (attention, attention.config):
        for name in NARROWED:
            if hasattr(owner, name):
                setattr(owner, name, getattr(owner, name) // world)
        for name in KEY_VALUE:
            if isinstance(getattr(owner, name, None), int):
                setattr(owner, name, max(1, getattr(owner, name) // world))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_ranks_of_a_models_own_attention_sum_to_it(name: str) -> None:
    config, _, worlds = CASES[name]
    model = model_of(config())
    layout = layouts.from_module(model, "float32")
    attention = Attention(model)
    for world in worlds:
        shards = [Shard(rank, world) for rank in range(world)]
        whole = sum(attention.of_rank(shard_layout(layout, s), s) for s in shards)
        assert isinstance(whole, torch.Tensor)
        torch.testing.assert_close(whole, attention.output)
