"""x·A·B stays the same under padding, orientation, sharding and putting together again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters import small_base as base
from lorax_async.adapters import LayoutModel, LoraWeights, padded_rank
from lorax_async.errors import IncompatibleAdapterError

LAYOUT = base.layout()
RANKS, WORLDS = st.integers(1, 256), st.integers(1, 8)
TYPES = st.sampled_from(["q_proj", "v_proj", "down_proj", "lm_head"])


def shards(
    made: dict[str, Tensor], rank: int, layer_type: str, models: list[Any]
) -> list[LoraWeights]:
    config = base.config(rank, 2 * rank)
    found = []
    for model in models:
        module_map, names = config.map_weights_for_model(made, model.weight_names)
        weights = LoraWeights.load(config, model, module_map, layer_type, names)
        assert weights is not None
        assert not names
        found.append(weights)
    return found


def admitted(rank: int, world_size: int) -> bool:
    least = 8 * world_size
    padded = least if rank <= least else (rank + 15) // 16 * 16
    return padded % world_size == 0


@settings(max_examples=40, deadline=None)
@given(rank=RANKS, world_size=WORLDS, layer_type=TYPES, ours=st.booleans())
def test_the_delta_is_the_same(rank: int, world_size: int, layer_type: str, ours: bool) -> None:
    made = base.tensors(rank, types=[layer_type], dtype=torch.float64)
    dtype = torch.float64
    models: list[Any] = [
        LayoutModel(LAYOUT, dtype, world_size, place)
        if ours
        else base.FakeModel(dtype, world_size, place)
        for place in range(world_size)
    ]
    if not admitted(rank, world_size):
        with pytest.raises(IncompatibleAdapterError):
            shards(made, rank, layer_type, models)
        return
    parts = shards(made, rank, layer_type, models)
    row = layer_type in base.ROW_PARALLEL
    inputs, outputs = base.SHAPES[layer_type]
    padded = padded_rank(rank, world_size)
    x = torch.randn(2, inputs, dtype=dtype)
    for layer in base.layers_of(layer_type):
        wanted = x @ base.delta(made, layer, layer_type, 2.0)
        if row:  # each process has a piece of x, and the sum of their products is whole
            pieces = x.chunk(world_size, 1)
            hidden = sum(
                piece @ part.weights_a_t[layer].T for piece, part in zip(pieces, parts, strict=True)
            )
        else:  # each process has a piece of the rank
            hidden = torch.cat([x @ part.weights_a_t[layer].T for part in parts], 1)
        assert isinstance(hidden, Tensor)
        assert hidden.shape == (2, padded)
        ways = [
            torch.cat([hidden @ part.weights_b[layer] for part in parts], 1),
            torch.cat([hidden @ part.weights_b_t[layer].T for part in parts], 1),
        ]
        for got in ways:
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    local = padded if row else padded // world_size
    for part in parts:
        assert (part.lora_a_r, part.lora_b_r) == (local, padded)
        assert part.weights_b.shape[2] == outputs // world_size
        stored = part.weights_a.shape[1:]
        features = inputs // world_size if row else inputs
        assert stored == ((local, features) if 16 <= local <= 128 else (features, local))
        assert part.adapter_config.padded_rank == padded


@settings(max_examples=25, deadline=None)
@given(rank=RANKS, layer_type=TYPES, data=st.data())
def test_ours_and_loraxs_own_models_agree(rank: int, layer_type: str, data: st.DataObject) -> None:
    world_size = data.draw(WORLDS.filter(lambda world: admitted(rank, world)))
    place = data.draw(st.integers(0, world_size - 1))
    made = base.tensors(rank, types=[layer_type])
    models: list[Any] = [
        LayoutModel(LAYOUT, torch.float32, world_size, place),
        base.FakeModel(torch.float32, world_size, place),
    ]
    ours, theirs = shards(made, rank, layer_type, models)
    assert torch.equal(ours.weights_a, theirs.weights_a)
    assert torch.equal(ours.weights_b, theirs.weights_b)
