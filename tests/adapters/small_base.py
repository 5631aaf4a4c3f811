"""A small base of LoRAX's kind, adapters for it, and what their deltas are in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorax_async.adapters import LoraConfig
from lorax_async.core.layout import ModelLayout, Module, Parallel

LAYERS = 3
# Each size is shared evenly by 1 to 8 processes.
HIDDEN, KEY_VALUE, INTERMEDIATE, VOCABULARY = 840, 1680, 2520, 3360

SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "v_proj": (HIDDEN, KEY_VALUE),
    "down_proj": (INTERMEDIATE, HIDDEN),
    "lm_head": (HIDDEN, VOCABULARY),
}
"""Layer type → in and out features."""

ROW_PARALLEL = ("down_proj", "lm_head")


def module_name(layer: int, layer_type: str) -> str:
    if layer_type == "lm_head":
        return "lm_head"
    block = "mlp" if layer_type == "down_proj" else "self_attn"
    return f"model.layers.{layer}.{block}.{layer_type}"


def layers_of(layer_type: str) -> range:
    return range(1 if layer_type == "lm_head" else LAYERS)


def key(layer: int, layer_type: str, part: str) -> str:
    return f"base_model.model.{module_name(layer, layer_type)}.lora_{part}.weight"


def layout(dtype: str = "F32") -> ModelLayout:
    modules = []
    for layer_type, (inputs, outputs) in SHAPES.items():
        for layer in layers_of(layer_type):
            group = LAYERS if layer_type == "lm_head" else layer
            cut = Parallel.ROW if layer_type == "down_proj" else Parallel.COLUMN
            modules.append(Module(module_name(layer, layer_type), inputs, outputs, group, cut))
    return ModelLayout(tuple(modules), LAYERS, dtype, "model.")


@dataclass
class Linear:
    weight: Tensor


@dataclass
class BaseLayer:
    linear: Linear


@dataclass
class TensorParallelLayer:
    base_layer: BaseLayer


class FakeModel:
    """With the attributes that LoRAX's models have, and its way of splitting: remainders drop."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, world_size: int = 1, rank: int = 0
    ) -> None:
        self.dtype, self.world_size, self.rank = dtype, world_size, rank
        self.adapter_layers = list(SHAPES)
        self.target_to_layer: dict[tuple[int, str], tuple[str, Any]] = {}
        for layer_type, (inputs, outputs) in SHAPES.items():
            for layer in layers_of(layer_type):
                weight = torch.zeros((), dtype=dtype).expand(outputs, inputs)
                held = TensorParallelLayer(BaseLayer(Linear(weight)))
                name = module_name(layer, layer_type)
                self.target_to_layer[layer, layer_type] = name, held

    @property
    def weight_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.target_to_layer.values())

    def get_num_layers_for_type(self, layer_type: str) -> int | list[int]:
        return len(layers_of(layer_type))

    def is_row_parallel(self, layer_type: str) -> bool:
        return layer_type in ROW_PARALLEL

    def _shard(self, tensor: Tensor, dim: int) -> Tensor:
        block = tensor.shape[dim] // self.world_size
        return tensor.narrow(dim, self.rank * block, block)

    def shard_lora_weights(
        self, weights_a: list[Tensor], weights_b: list[Tensor], layer_type: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        dim = 0 if self.is_row_parallel(layer_type) else 1
        return (
            [self._shard(a, dim) for a in weights_a],
            [self._shard(b, 1) for b in weights_b],
        )


def tensors(
    rank: int | Mapping[str, int] = 8,
    *,
    types: Sequence[str] = tuple(SHAPES),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    skip: Sequence[tuple[int, str]] = (),
) -> dict[str, Tensor]:
    """An adapter's tensors; `rank` of all modules, or by module name ("" for the others)."""
    random = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for layer_type in types:
        inputs, outputs = SHAPES[layer_type]
        for layer in layers_of(layer_type):
            if (layer, layer_type) in skip:
                continue
            r = (
                rank
                if isinstance(rank, int)
                else rank.get(module_name(layer, layer_type), rank[""])
            )
            for part, shape in (("A", (r, inputs)), ("B", (outputs, r))):
                made[key(layer, layer_type, part)] = torch.randn(shape, generator=random).to(dtype)
    return made


def config(r: int = 8, alpha: float = 16, **changes: Any) -> LoraConfig:
    given: dict[str, Any] = {
        "base_model_name_or_path": "org/base",
        "r": r,
        "target_modules": list(SHAPES),
        "fan_in_fan_out": False,
        "lora_alpha": alpha,
        "use_rslora": False,
    }
    return LoraConfig(**(given | changes))


def write(
    folder: Path, weights: Mapping[str, Tensor] | None = None, r: int = 8, **changes: Any
) -> Path:
    """An adapter folder, written as PEFT writes it."""
    folder.mkdir(parents=True)
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": r,
        "lora_alpha": 16,
        "target_modules": list(SHAPES),
    }
    (folder / "adapter_config.json").write_text(json.dumps(values | changes))
    made = tensors(r) if weights is None else weights
    save_file(dict(sorted(made.items())), folder / "adapter_model.safetensors")
    return folder


def delta(made: Mapping[str, Tensor], layer: int, layer_type: str, scale: float) -> Tensor:
    """`[in, out]` in float64: what `x` is multiplied with."""
    a = made[key(layer, layer_type, "A")].double()
    b = made[key(layer, layer_type, "B")].double()
    return scale * (b @ a).T
