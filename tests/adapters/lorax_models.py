"""Stand-ins with the attributes that LoRAX's layers have, fused as its model families fuse them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LAYERS = 2
HIDDEN, KEY_VALUE, INTERMEDIATE, VOCABULARY = 64, 16, 96, 80

SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KEY_VALUE),
    "v_proj": (HIDDEN, KEY_VALUE),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
    "lm_head": (HIDDEN, VOCABULARY),
}
"""Layer type → in and out features of a Llama with grouped-query attention."""

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj", "lm_head")


def module_name(layer: int, layer_type: str) -> str:
    if layer_type == "lm_head":
        return layer_type
    block = "self_attn" if layer_type in (*QKV, "o_proj") else "mlp"
    return f"model.layers.{layer}.{block}.{layer_type}"


def layers_of(layer_type: str) -> range:
    return range(1 if layer_type == "lm_head" else LAYERS)


class ProcessGroup:
    """As LoRAX's FakeGroup."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class Linear:
    def __init__(self, weight: Tensor, **attributes: object) -> None:
        self.weight = weight
        vars(self).update(attributes)


class BaseLayer:
    def __init__(self, linear: Linear) -> None:
        self.linear = linear


class HeadLayer(BaseLayer):
    def __init__(self, linear: Linear, process_group: ProcessGroup, should_gather: bool) -> None:
        super().__init__(linear)
        self.process_group, self.should_gather = process_group, should_gather


class MultiAdapterLayer:
    """Column-parallel; `sizes` are those of all processes together, or None."""

    def __init__(
        self,
        linear: Linear,
        layer_id: int,
        layer_names: Sequence[str],
        sizes: Sequence[int] | None,
        process_group: ProcessGroup,
    ) -> None:
        self.base_layer, self.layer_id = BaseLayer(linear), layer_id
        self.layer_names, self.sizes, self.process_group = layer_names, sizes, process_group


class RowLayer:
    def __init__(
        self, base_layer: BaseLayer, layer_id: int, layer_name: str, process_group: ProcessGroup
    ) -> None:
        self.base_layer, self.layer_id = base_layer, layer_id
        self.layer_name, self.process_group = layer_name, process_group


def weight(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros((), dtype=dtype).expand(outputs, inputs)


class LoraxModel:
    """Layers by (layer id, layer type), and LoRAX's way of splitting an adapter."""

    dtype = torch.float32

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.world_size = world_size
        self.process_group = ProcessGroup(rank, world_size)
        self.target_to_layer: dict[tuple[int, str], tuple[str, Any]] = {}
        self.row_parallel: tuple[str, ...] = ROW_PARALLEL

    @property
    def weight_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.target_to_layer.values())

    def get_num_layers_for_type(self, layer_type: str) -> int:
        return sum(of == layer_type for _, of in self.target_to_layer)

    def is_row_parallel(self, layer_type: str) -> bool:
        return layer_type in self.row_parallel

    def shard_lora_weights(
        self, weights_a: list[Tensor], weights_b: list[Tensor], layer_type: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        rank, dim = self.process_group.rank(), 0 if self.is_row_parallel(layer_type) else 1
        return (
            [a.chunk(self.world_size, dim)[rank] for a in weights_a],
            [b.chunk(self.world_size, 1)[rank] for b in weights_b],
        )


def llama(rank: int = 0, world_size: int = 1, vocabulary: int = VOCABULARY) -> LoraxModel:
    """q, k, v in one layer, gate and up in another, as most of LoRAX's families have them."""
    model = LoraxModel(rank, world_size)
    group, targets = model.process_group, model.target_to_layer
    for layer in range(LAYERS):
        for names in (QKV, GATE_UP):
            sizes = [SHAPES[name][1] for name in names]
            linear = Linear(weight(sum(sizes) // world_size, HIDDEN))
            fused = MultiAdapterLayer(linear, layer, names, sizes, group)
            targets.update({(layer, name): (module_name(layer, name), fused) for name in names})
        for name in ("o_proj", "down_proj"):
            inputs, outputs = SHAPES[name]
            base = BaseLayer(Linear(weight(outputs, inputs // world_size)))
            targets[layer, name] = module_name(layer, name), RowLayer(base, layer, name, group)
    gathers = world_size > 1 and vocabulary % world_size == 0
    rows = vocabulary // world_size if gathers else vocabulary
    head = HeadLayer(Linear(weight(rows, HIDDEN)), group, gathers)
    targets[0, "lm_head"] = "lm_head", RowLayer(head, 0, "lm_head", group)
    return model


def one_layer(linear: Linear, layer_type: str, sizes: list[int] | None) -> LoraxModel:
    """A model with one column-parallel layer of one name."""
    model = LoraxModel()
    layer = MultiAdapterLayer(linear, 0, [layer_type], sizes, model.process_group)
    model.target_to_layer[0, layer_type] = f"model.layers.0.{layer_type}", layer
    return model


def key(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def pair(module: str, inputs: int, outputs: int, rank: int = 8) -> dict[str, Tensor]:
    """A and B of one module."""
    random = torch.Generator().manual_seed(inputs * outputs)
    return {
        key(module, "A"): torch.randn(rank, inputs, generator=random),
        key(module, "B"): torch.randn(outputs, rank, generator=random),
    }


def tensors(*types: str, rank: int = 8) -> dict[str, Tensor]:
    """An adapter that fits a Llama, of some layer types or all."""
    made: dict[str, Tensor] = {}
    for name in types or SHAPES:
        for layer in layers_of(name):
            made |= pair(module_name(layer, name), *SHAPES[name], rank=rank)
    return made
