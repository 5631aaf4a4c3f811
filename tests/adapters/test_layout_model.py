"""LayoutModel: types, layers and weights of a layout; and how LoRAX shares each kind out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapters import small_base as base
from lorax_async.adapters.layout_model import LayoutModel
from lorax_async.errors import ConfigError, IncompatibleAdapterError, UsageError
from lorax_async.planning.layout import FusedPart, ModelLayout, Module, Parallelism

COLUMN, ROW, REPLICATED = Parallelism.COLUMN, Parallelism.ROW, Parallelism.REPLICATED


def model_of(*modules: Module, layers: int = 1, world_size: int = 1, rank: int = 0) -> LayoutModel:
    return LayoutModel(ModelLayout(modules, layers, "F32"), torch.float32, world_size, rank)


def shared(model: LayoutModel, layer_type: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    (part_a,), (part_b,) = model.shard_lora_weights([a], [b], layer_type)
    return part_a, part_b


def numbered(rows: int, columns: int) -> Tensor:
    return torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)


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
    with pytest.raises(UsageError, match="'k_proj'; it has down_proj, lm_head, q_proj, v_proj"):
        model.get_num_layers_for_type("k_proj")


def test_more_components_and_ids_where_the_last_and_a_count_do_not_tell() -> None:
    """GPT-2's two c_proj, under the names that LoRAX gives them; embeddings are not linear."""
    modules = [
        Module(f"h.{layer}.{name}", 4, 12, layer, COLUMN, transposed=True)
        for layer in (3, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
    ]
    embedding = Module("embed_tokens", 100, 4, -1, COLUMN, embedding=True)
    model = model_of(embedding, *modules, layers=4)
    assert sorted(model.adapter_layers) == ["attn.c_proj", "c_attn", "mlp.c_proj"]
    name, layer = model.target_to_layer[1, "mlp.c_proj"]
    assert (name, layer.base_layer.linear.weight.shape) == ("h.1.mlp.c_proj", (4, 12))
    assert model.get_num_layers_for_type("attn.c_proj") == [1, 3]
    assert set(model.weight_names) == {module.name for module in modules}


def test_what_is_no_model_is_refused() -> None:
    for rank, world_size in ((2, 2), (-1, 2), (0, 0), (True, 2), (0, 1.0)):
        with pytest.raises(ConfigError, match=r"rank|world size"):
            LayoutModel(base.layout(), torch.float32, world_size, rank)  # type: ignore[arg-type]
    for dtype in (torch.int8, "float32", None):
        with pytest.raises(ConfigError, match="floating point"):
            LayoutModel(base.layout(), dtype, 1)  # type: ignore[arg-type]
    modules = [Module("a.0.q", 4, 4, 0, COLUMN), Module("a.1.q", 4, 4, 1, ROW)]
    with pytest.raises(ConfigError, match="'q'"):
        model_of(*modules, layers=2)


def test_replicated_modules_are_whole_everywhere() -> None:
    modules = [Module(f"l.{n}.gate", 6, 10, n, REPLICATED) for n in range(2)]
    model = model_of(*modules, layers=2, world_size=4, rank=3)
    a, b = numbered(6, 8), numbered(8, 10)
    assert shared(model, "gate", a, b) == (a, b)
    made = {k: t for n in range(2) for k, t in base.pair(f"l.{n}.gate", 6, 10, seed=n).items()}
    weights = base.loaded(base.config(8, 8), model, made, "gate")
    assert weights.weights_a_t.shape == (2, 32, 6)
    b_of_second = made["base_model.model.l.1.gate.lora_B.weight"]
    assert torch.equal(weights.weights_b_t[1, :, :8], b_of_second)


THIRDS = [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
HEADS = [[0, 1, 2, 3, 8, 9, 12, 13], [4, 5, 6, 7, 10, 11, 14, 15]]


def test_fused_modules_are_shared_part_by_part() -> None:
    for layer_type, parts, got in [
        ("c_attn", (FusedPart(4), FusedPart(4), FusedPart(4)), THIRDS),  # Qwen's
        # Phi-3's: 4 heads and 2 of keys and values, of 2 features each; and two halves
        ("qkv_proj", (FusedPart(8, 2), FusedPart(4, 2), FusedPart(4, 2)), HEADS),
        ("gate_up_proj", (FusedPart(4), FusedPart(4)), [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ]:
        out, world = sum(part.size for part in parts), len(got)
        module = Module(f"l.0.{layer_type}", 16, out, 0, COLUMN, parts=parts)
        for place in range(world):
            model = model_of(module, world_size=world, rank=place)
            b = torch.arange(out).float().expand(8, out)
            _, part = shared(model, layer_type, torch.zeros(16, 8), b)
            assert part.tolist() == [got[place]] * 8


def q(inputs: int, outputs: int, cut: Parallelism = COLUMN, *parts: FusedPart) -> Module:
    return Module("l.0.q", inputs, outputs, 0, cut, parts=parts)


def test_sizes_that_do_not_divide_are_refused() -> None:
    """LoRAX drops the remainder, and with it features that the adapter changes."""
    for module, out, what in [
        (q(16, 10), 10, "B of q: 10 cannot"),
        (q(16, 8, COLUMN, FusedPart(4, 2), FusedPart(4)), 8, "B of q: 4 in units of 2"),
        (q(10, 8, ROW), 8, "A of q: 10 cannot"),
        (q(16, 10, ROW), 10, "B of q: 10 cannot"),
        (q(16, 8, COLUMN, FusedPart(4), FusedPart(4)), 6, "has 6 output features, and its parts 8"),
    ]:
        model = model_of(module, world_size=4)
        with pytest.raises(IncompatibleAdapterError, match=what):
            shared(model, "q", torch.zeros(module.in_features, 32), torch.zeros(32, out))
