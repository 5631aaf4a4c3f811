"""A small Llama of LoRAX's kind, fused as its families are, and adapters for it as PEFT writes them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorax_async.adapters.lora import LoraConfig, LoraWeights
from lorax_async.adapters.weights_file import WeightsFile
from lorax_async.planning.layout import ModelLayout, Module, Parallelism

WEIGHTS, FLOAT32 = "adapter_model.safetensors", torch.float32
Tensors = Mapping[str, Tensor]
Content = Tensors | WeightsFile
LAYERS = 3
# Each size is shared evenly by 1 to 8 processes.
HIDDEN, KEY_VALUE, INTERMEDIATE, VOCABULARY = 840, 1680, 2520, 3360
OUTPUTS = {"q": HIDDEN, "k": KEY_VALUE, "v": KEY_VALUE, "o": HIDDEN, "gate": INTERMEDIATE}
OUTPUTS["up"] = INTERMEDIATE
SHAPES = {f"{name}_proj": (HIDDEN, outputs) for name, outputs in OUTPUTS.items()}
SHAPES |= {"down_proj": (INTERMEDIATE, HIDDEN), "lm_head": (HIDDEN, VOCABULARY)}
"""Layer type → in and out features."""

TYPES = ("q_proj", "v_proj", "down_proj", "lm_head")
"""What the layout has, and most adapters change."""

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj", "lm_head")


def module_name(layer: int, layer_type: str) -> str:
    if layer_type == "lm_head":
        return layer_type
    block = "self_attn" if layer_type in (*QKV, "o_proj") else "mlp"
    return f"model.layers.{layer}.{block}.{layer_type}"


def layers_of(layer_type: str) -> range:
    return range(1 if layer_type == "lm_head" else LAYERS)


def layout(dtype: str = "F32") -> ModelLayout:
    modules = []
    for layer_type in TYPES:
        for layer in layers_of(layer_type):
            group = LAYERS if layer_type == "lm_head" else layer
            cut = Parallelism.ROW if layer_type == "down_proj" else Parallelism.COLUMN
            name = module_name(layer, layer_type)
            modules.append(Module(name, *SHAPES[layer_type], group, cut))
    return ModelLayout(tuple(modules), LAYERS, dtype, "model.")


Linear = BaseLayer = ParallelLayer = SimpleNamespace
"""A parallel layer has a `base_layer`, that a `linear`, and that a `weight`.

The first says how it is split: column-parallel ones have `layer_names`, row-parallel `layer_name`.
"""


def weight(outputs: int, inputs: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros((), dtype=dtype).expand(outputs, inputs)


class LoraxModel:
    """Layers by (layer id, layer type), and LoRAX's way of splitting: remainders drop."""

    def __init__(self, dtype: torch.dtype = FLOAT32, world_size: int = 1, rank: int = 0) -> None:
        self.dtype, self.world_size, self.rank = dtype, world_size, rank
        self.target_to_layer: dict[tuple[int, str], tuple[str, Any]] = {}

    @property
    def weight_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.target_to_layer.values())

    def get_num_layers_for_type(self, layer_type: str) -> int | list[int]:
        return sum(of == layer_type for _, of in self.target_to_layer) or LAYERS

    def _piece(self, tensor: Tensor, dim: int) -> Tensor:
        size = tensor.shape[dim] // self.world_size
        return tensor.narrow(dim, self.rank * size, size)

    def shard_lora_weights(
        self, weights_a: list[Tensor], weights_b: list[Tensor], layer_type: str
    ) -> tuple[list[Tensor], list[Tensor]]:
        dim = 0 if layer_type in ROW_PARALLEL else 1
        return [self._piece(a, dim) for a in weights_a], [self._piece(b, 1) for b in weights_b]


def lorax_model(
    dtype: torch.dtype = FLOAT32, world_size: int = 1, rank: int = 0, vocabulary: int = VOCABULARY
) -> LoraxModel:
    """q, k, v in one layer, gate and up in another, as most of LoRAX's families have them."""
    model = LoraxModel(dtype, world_size, rank)
    for layer in range(LAYERS):
        for names in (QKV, GATE_UP):
            sizes = [SHAPES[name][1] for name in names]
            linear = Linear(weight=weight(sum(sizes) // world_size, HIDDEN, dtype))
            fused = ParallelLayer(base_layer=BaseLayer(linear=linear))
            fused.layer_names, fused.sizes = names, sizes
            for name in names:
                model.target_to_layer[layer, name] = module_name(layer, name), fused
        for name in ("o_proj", "down_proj"):
            inputs, outputs = SHAPES[name]
            linear = Linear(weight=weight(outputs, inputs // world_size, dtype))
            row = ParallelLayer(base_layer=BaseLayer(linear=linear), layer_name=name)
            model.target_to_layer[layer, name] = module_name(layer, name), row
    gathers = world_size > 1 and vocabulary % world_size == 0
    head = Linear(weight=weight(vocabulary // world_size if gathers else vocabulary, HIDDEN, dtype))
    base = BaseLayer(linear=head, should_gather=gathers)
    shared = ParallelLayer(base_layer=base, layer_name="lm_head")
    model.target_to_layer[0, "lm_head"] = "lm_head", shared
    return model


def pair(module: str, inputs: int, outputs: int, rank: int = 8, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed + inputs * outputs)
    prefix = f"base_model.model.{module}"
    a, b = torch.randn(rank, inputs, generator=random), torch.randn(outputs, rank, generator=random)
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}


def key(layer: int, layer_type: str, part: str) -> str:
    return f"base_model.model.{module_name(layer, layer_type)}.lora_{part}.weight"


def tensors(
    rank: int = 8, types: Sequence[str] = TYPES, dtype: torch.dtype = FLOAT32, skip: Any = ()
) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for layer_type in types:
        for layer in layers_of(layer_type):
            if (layer, layer_type) not in skip:
                name = module_name(layer, layer_type)
                made |= pair(name, *SHAPES[layer_type], rank, seed=layer)
    return {name: tensor.to(dtype) for name, tensor in made.items()}


BOTH = {"base_model_name_or_path": "org/base", "target_modules": list(TYPES)}


def config(r: int = 8, alpha: float = 16, **changes: Any) -> LoraConfig:
    given = {"r": r, "lora_alpha": alpha, "fan_in_fan_out": False, "use_rslora": False}
    values: dict[str, Any] = BOTH | given | changes
    return LoraConfig(**values)


def write(folder: Path, weights: Tensors | None = None, r: int = 8, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    values = BOTH | {"peft_type": "LORA", "r": r, "lora_alpha": 16}
    (folder / "adapter_config.json").write_text(json.dumps(values | changes))
    made = tensors(r) if weights is None else weights
    save_file(dict(sorted(made.items())), folder / WEIGHTS)
    return folder


def load(config: LoraConfig, model: Any, made: Content, layer_type: str) -> LoraWeights | None:
    module_map, names = config.map_weights_for_model(made, model.weight_names)
    return LoraWeights.load(config, model, module_map, layer_type, names)


def loaded(config: LoraConfig, model: Any, made: Content, layer_type: str) -> LoraWeights:
    weights = load(config, model, made, layer_type)
    assert weights is not None
    return weights
