"""LoraWeights on a device of its own: layers are made on the host, and are there on return."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import small_base as base
from late_device.world import LATE, loaded
from lorax_async.adapters import LayoutModel, LoraWeights, WeightsFile


@pytest.fixture(autouse=True)
def late() -> Iterator[None]:
    yield from loaded()


class OnDevice:
    """A model whose weights are on the device."""

    def __init__(self, world_size: int, rank: int) -> None:
        self._inner = LayoutModel(base.layout(), torch.float32, world_size, rank)
        self.dtype, self.world_size = torch.float32, world_size
        weight = torch.empty(1, 1, dtype=torch.float32, device=LATE)
        self.target_to_layer = {
            key: (name, base.TensorParallelLayer(base.BaseLayer(base.Linear(weight))))
            for key, (name, _) in self._inner.target_to_layer.items()
        }
        self.layout = self._inner.layout
        self.weight_names = self._inner.weight_names
        self.get_num_layers_for_type = self._inner.get_num_layers_for_type
        self.shard_lora_weights = self._inner.shard_lora_weights


def bytes_now(tensor: torch.Tensor) -> bytes:
    """What memory holds at this moment, whatever streams have yet to do."""
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


@pytest.mark.parametrize("from_file", [True, False])
@pytest.mark.parametrize(("world_size", "place"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("rank", [5, 33])
def test_the_same_bytes_as_on_the_host(
    tmp_path: Path, rank: int, world_size: int, place: int, from_file: bool
) -> None:
    made = base.tensors(rank, skip=[(1, "v_proj")])
    folder, config = base.write(tmp_path / "a", made, rank), base.config(rank, 2 * rank)
    on_host = LayoutModel(base.layout(), torch.float32, world_size, place)
    on_device: Any = OnDevice(world_size, place)
    with WeightsFile.open(folder) as file:
        for layer_type in base.SHAPES:
            content = file if from_file else made
            found = []
            for model in (on_host, on_device):
                module_map, names = config.map_weights_for_model(content, model.weight_names)
                found.append(LoraWeights.load(config, model, module_map, layer_type, names))
            wanted, got = found
            assert wanted is not None
            assert got is not None
            assert got.weights_a.device.type == got.weights_b.device.type == "late"
            for name in ("weights_a", "weights_b"):
                ours: torch.Tensor = getattr(got, name)
                assert ours.is_contiguous()
                assert ours.shape == getattr(wanted, name).shape
                assert bytes_now(ours) == bytes_now(getattr(wanted, name))


@pytest.mark.parametrize("rank", [8, 33])
def test_what_is_on_the_device_already_is_there_on_return(rank: int) -> None:
    """Copies on the device run late; the caller may compute on any stream."""
    made = {name: torch.ones_like(tensor) for name, tensor in base.tensors(rank).items()}
    on_device: Any = OnDevice(1, 0)
    moved = {name: tensor.to(LATE) for name, tensor in made.items()}
    config = base.config(rank, rank)
    for layer_type in base.SHAPES:
        found = []
        for content, model in ((made, base.FakeModel()), (moved, on_device)):
            module_map, names = config.map_weights_for_model(content, model.weight_names)
            found.append(LoraWeights.load(config, model, module_map, layer_type, names))
        wanted, got = found
        assert wanted is not None
        assert got is not None
        assert bytes_now(got.weights_a) == bytes_now(wanted.weights_a)
        assert bytes_now(got.weights_b) == bytes_now(wanted.weights_b)
