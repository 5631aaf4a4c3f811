"""LayoutModel: types, layers and weights of a layout; and how LoRAX shares each kind out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from adapters import small_base as base
from lorax_async.adapter import ModulePattern
from lorax_async.adapters import LayoutModel, LoraWeights
from lorax_async.core.layout import ModelLayout, Module, Parallel, Part
from lorax_async.core.peft_names import compile_pattern
from lorax_async.errors import ConfigError, IncompatibleAdapterError, UsageError

COLUMN, ROW, REPLICATED = Parallel.COLUMN, Parallel.ROW, Parallel.REPLICATED


def model_of(*modules: Module, layers: int = 1, world_size: int = 1, rank: int = 0) -> LayoutModel:
    return LayoutModel(ModelLayout(modules, layers, "F32"), torch.float32, world_size, rank)


def numbered(rows: int, columns: int) -> Tensor:
    return torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)


def columns_of(model: LayoutModel, layer_type: str, out: int, rank: int = 8) -> list[int]:
    """Which output features of B this process gets, in its order."""
    a, b = torch.zeros(16, rank), torch.arange(out).float().expand(rank, out)
    _, (part,) = model.shard_lora_weights([a], [b], layer_type)
    assert torch.equal(part, part[:1].expand_as(part))
    return [int(feature) for feature in part[0]]


# -- names ----------------------------------------------------------------------------------------


def test_types_are_the_last_component() -> None:
    model = LayoutModel(base.layout(), torch.bfloat16, 2, 1)
    assert model.adapter_layers == ["q_proj", "v_proj", "down_proj", "lm_head"]
    assert model.get_num_layers_for_type("q_proj") == 3
    assert model.get_num_layers_for_type("lm_head") == 1
    name, layer = model.target_to_layer[2, "down_proj"]
    assert name == "model.layers.2.mlp.down_proj"
    assert model.target_to_layer[0, "lm_head"][0] == "lm_head"
    assert len(model.target_to_layer) == 10
    weight = layer.base_layer.linear.weight
    assert (weight.shape, weight.dtype) == ((840, 2520), torch.bfloat16)
    assert weight.untyped_storage().nbytes() == 2
    assert (model.dtype, model.world_size, model.rank) == (torch.bfloat16, 2, 1)


def test_a_transposed_base_has_its_weight_so() -> None:
    model = model_of(Module("h.0.c_attn", 4, 12, 0, COLUMN, transposed=True))
    assert model.target_to_layer[0, "c_attn"][1].base_layer.linear.weight.shape == (4, 12)


def test_more_components_where_one_does_not_tell_modules_apart() -> None:
    """GPT-2's two c_proj, under the names that LoRAX gives them."""
    modules = [
        Module(f"h.{layer}.{name}", 4, 4, layer, COLUMN)
        for layer in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    model = model_of(*modules, layers=2)
    assert sorted(model.adapter_layers) == ["attn.c_proj", "c_attn", "c_fc", "mlp.c_proj"]
    assert model.target_to_layer[1, "mlp.c_proj"][0] == "h.1.mlp.c_proj"
    assert model.get_num_layers_for_type("attn.c_proj") == 2


def test_types_of_some_layers_only_tell_their_ids() -> None:
    modules = [Module(f"layers.{n}.x_proj", 4, 4, n, COLUMN) for n in (3, 1)]
    model = model_of(*modules, layers=4)
    assert model.get_num_layers_for_type("x_proj") == [1, 3]
    assert set(model.target_to_layer) == {(1, "x_proj"), (3, "x_proj")}


def test_embeddings_are_no_linear_modules() -> None:
    embedding = Module("embed_tokens", 100, 4, -1, COLUMN, embedding=True)
    model = model_of(embedding, Module("layers.0.q", 4, 4, 0, COLUMN))
    assert model.weight_names == ("layers.0.q",)


def test_unknown_types_are_named_with_those_there_are() -> None:
    model = LayoutModel(base.layout(), torch.float32, 1)
    with pytest.raises(UsageError, match="'k_proj'; it has down_proj, lm_head, q_proj, v_proj"):
        model.get_num_layers_for_type("k_proj")


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0), (True, 2), (0, 1.0)])
def test_ranks_are_of_their_world(rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match=r"rank|world size"):
        LayoutModel(base.layout(), torch.float32, world_size, rank)


@pytest.mark.parametrize("dtype", [torch.int8, "float32", None])
def test_weights_are_of_floating_point(dtype: object) -> None:
    with pytest.raises(ConfigError, match="floating point"):
        LayoutModel(base.layout(), dtype, 1)  # type: ignore[arg-type]


def test_layers_of_a_type_are_cut_alike() -> None:
    modules = [Module("a.0.q", 4, 4, 0, COLUMN), Module("a.1.q", 4, 4, 1, ROW)]
    with pytest.raises(ConfigError, match="'q'"):
        model_of(*modules, layers=2)


# -- sharing out ----------------------------------------------------------------------------------


def test_row_parallel_types_split_the_input() -> None:
    for place in range(2):
        model = model_of(Module("l.0.o_proj", 4, 6, 0, ROW), world_size=2, rank=place)
        a, b = numbered(4, 8), numbered(8, 6)
        (part_a,), (part_b,) = model.shard_lora_weights([a], [b], "o_proj")
        assert torch.equal(part_a, a[2 * place : 2 * place + 2])
        assert torch.equal(part_b, b[:, 3 * place : 3 * place + 3])


@pytest.mark.parametrize("layer_type", ["q_proj", "embed_out"])
def test_column_parallel_types_split_the_rank(layer_type: str) -> None:
    for place in range(2):
        model = model_of(Module(f"l.0.{layer_type}", 4, 6, 0, COLUMN), world_size=2, rank=place)
        a, b = numbered(4, 8), numbered(8, 6)
        (part_a,), (part_b,) = model.shard_lora_weights([a], [b], layer_type)
        assert torch.equal(part_a, a[:, 4 * place : 4 * place + 4])
        assert torch.equal(part_b, b[:, 3 * place : 3 * place + 3])


def test_the_head_is_row_parallel_in_lorax_whatever_the_layout_says() -> None:
    model = LayoutModel(base.layout(), torch.float32, 2)
    assert [t for t in model.adapter_layers if model.is_row_parallel(t)] == ["down_proj", "lm_head"]
    (a,), _ = model.shard_lora_weights([numbered(840, 16)], [numbered(16, 3360)], "lm_head")
    assert a.shape == (420, 16)


def test_replicated_modules_are_whole_everywhere() -> None:
    model = model_of(Module("l.0.gate", 5, 7, 0, REPLICATED), world_size=2, rank=1)
    a, b = numbered(5, 8), numbered(8, 7)
    assert model.shard_lora_weights([a], [b], "gate") == ([a], [b])


def test_qwens_c_attn_is_split_in_thirds() -> None:
    parts = (Part(4), Part(4), Part(4))
    module = Module("l.0.c_attn", 16, 12, 0, COLUMN, parts=parts)
    got = [columns_of(model_of(module, world_size=2, rank=r), "c_attn", 12) for r in range(2)]
    assert got == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]


def test_phi_3s_qkv_proj_has_smaller_k_and_v() -> None:
    """4 heads and 2 of keys and values, of 2 features each."""
    module = Module("l.0.qkv_proj", 16, 16, 0, COLUMN, parts=(Part(8, 2), Part(4, 2), Part(4, 2)))
    got = [columns_of(model_of(module, world_size=2, rank=r), "qkv_proj", 16) for r in range(2)]
    assert got == [[0, 1, 2, 3, 8, 9, 12, 13], [4, 5, 6, 7, 10, 11, 14, 15]]


def test_phi_3s_gate_up_proj_has_two_halves() -> None:
    module = Module("l.0.gate_up_proj", 16, 8, 0, COLUMN, parts=(Part(4), Part(4)))
    got = [columns_of(model_of(module, world_size=4, rank=r), "gate_up_proj", 8) for r in range(4)]
    assert got == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize("world_size", range(1, 9))
def test_all_processes_together_have_every_feature_once(world_size: int) -> None:
    parts = (Part(840), Part(1680, 2), Part(840))
    module = Module("l.0.qkv", 16, 3360, 0, COLUMN, parts=parts)
    got = [
        columns_of(model_of(module, world_size=world_size, rank=place), "qkv", 3360, 8 * world_size)
        for place in range(world_size)
    ]
    assert sorted(feature for one in got for feature in one) == list(range(3360))
    assert {len(one) for one in got} == {3360 // world_size}


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (Module("l.0.q", 16, 10, 0, COLUMN), "B of q: 10 cannot"),
        (Module("l.0.q", 16, 8, 0, COLUMN, parts=(Part(4, 2), Part(4))), "B of q: 4 in units of 2"),
        (Module("l.0.q", 10, 8, 0, ROW), "A of q: 10 cannot"),
        (Module("l.0.q", 16, 10, 0, ROW), "B of q: 10 cannot"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(module: Module, what: str) -> None:
    """LoRAX drops the remainder, and with it features that the adapter changes."""
    model = model_of(module, world_size=4)
    a, b = torch.zeros(module.in_features, 32), torch.zeros(32, module.out_features)
    with pytest.raises(IncompatibleAdapterError, match=what):
        model.shard_lora_weights([a], [b], "q")


def test_parts_that_are_not_the_output_are_refused() -> None:
    module = Module("l.0.q", 16, 8, 0, COLUMN, parts=(Part(4), Part(4)))
    with pytest.raises(IncompatibleAdapterError, match="has 6 output features, and its parts 8"):
        columns_of(model_of(module, world_size=2), "q", 6)


# -- through LoraWeights.load ---------------------------------------------------------------------


def test_a_model_that_drops_a_remainder_is_found_out() -> None:
    model = base.FakeModel(world_size=8)
    weight = torch.zeros((), dtype=torch.float32).expand(841, 840)
    made = base.tensors(types=["q_proj"])
    for layer in range(base.LAYERS):
        made[base.key(layer, "q_proj", "B")] = torch.zeros(841, 8)
        model.target_to_layer[layer, "q_proj"][1].base_layer.linear.weight = weight
    module_map, names = base.config().map_weights_for_model(made, model.weight_names)
    with pytest.raises(IncompatibleAdapterError, match=r"'q_proj': \[64, 105\] is no even share"):
        LoraWeights.load(base.config(), model, module_map, "q_proj", names)


@pytest.mark.parametrize("place", [0, 1])
def test_absent_layers_and_mixed_ranks_among_processes(place: int) -> None:
    """A layer of a high rank must leave nothing behind in the next one."""
    ranks = {"": 4, base.module_name(0, "q_proj"): 20}
    made = base.tensors(ranks, types=["q_proj"], skip=[(1, "q_proj")])
    model = LayoutModel(base.layout(), torch.float32, 2, place)
    config = base.config(4, 4)
    config = dataclasses.replace(config, _rank_patterns=_pattern("layers.0.self_attn.q_proj", 20))
    module_map, names = config.map_weights_for_model(made, model.weight_names)
    weights = LoraWeights.load(config, model, module_map, "q_proj", names)
    assert weights is not None
    assert weights.adapter_config.padded_rank == 32
    half = slice(16 * place, 16 * place + 16)
    for layer, rank, scale in ((0, 20, 4 / 20), (2, 4, 1.0)):
        a, b = torch.zeros(32, 840), torch.zeros(32, 840)
        a[:rank] = made[base.key(layer, "q_proj", "A")]
        b[:rank] = made[base.key(layer, "q_proj", "B")].T * scale
        assert torch.equal(weights.weights_a[layer], a[half])
        assert torch.equal(weights.weights_b[layer], b[:, 420 * place : 420 * (place + 1)])
    assert not weights.weights_a[1].any()
    assert not weights.weights_b[1].any()


def _pattern(text: str, value: float) -> tuple[ModulePattern, ...]:
    matches, _ = compile_pattern(text)
    return (ModulePattern(text, matches, value),)


def test_replicated_modules_load_on_several_processes() -> None:
    modules = [Module(f"l.{n}.gate", 6, 10, n, REPLICATED) for n in range(2)]
    model = model_of(*modules, layers=2, world_size=4, rank=3)
    made = {
        f"base_model.model.l.{n}.gate.lora_{part}.weight": torch.randn(shape)
        for n in range(2)
        for part, shape in (("A", (8, 6)), ("B", (10, 8)))
    }
    module_map, names = base.config(8, 8).map_weights_for_model(made, model.weight_names)
    weights = LoraWeights.load(base.config(8, 8), model, module_map, "gate", names)
    assert weights is not None
    assert weights.weights_a_t.shape == (2, 32, 6)
    assert torch.equal(
        weights.weights_b_t[1, :, :8], made["base_model.model.l.1.gate.lora_B.weight"]
    )
