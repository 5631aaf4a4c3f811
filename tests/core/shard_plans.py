"""One module, an adapter for it, and the plan that a rank has."""

from __future__ import annotations

import torch

from core.adapter_files import file_of, plan
from lorax_async.adapter import AdapterSpec
from lorax_async.config import Shard
from lorax_async.core.layout import ModelLayout, Module, Parallel, Part
from lorax_async.core.moves import GroupPlan
from lorax_async.core.sharding import shard_layout

COLUMN, ROW, _ = Parallel
SPEC = AdapterSpec(rank=4, alpha=4.0)


def layout(*modules: Module) -> ModelLayout:
    return ModelLayout(modules, 1, "F32")


def column(outputs: int, *parts: Part, name: str = "layers.0.up_proj", inputs: int = 16) -> Module:
    return Module(name, inputs, outputs, 0, COLUMN, parts=parts)


def row(inputs: int, name: str = "layers.0.down_proj") -> Module:
    return Module(name, inputs, 16, 0, ROW)


def adapter(*modules: Module, rank: int = 4) -> bytes:
    tensors = []
    for module in modules:
        stem = f"base_model.model.{module.name}.lora_"
        tensors.append((f"{stem}A.weight", torch.randn(rank, module.in_features)))
        tensors.append((f"{stem}B.weight", torch.randn(module.out_features, rank)))
    return file_of(tensors)


def planned(
    module: Module, shard: Shard, *, rank: int = 4, dtype: str = "F32", rank_multiple: int = 1
) -> tuple[GroupPlan, int]:
    """The plan of an adapter of this one module, and where its tensors begin in the file."""
    file, base = adapter(module, rank=rank), layout(module)
    made = plan(
        file,
        AdapterSpec(rank=rank, alpha=float(rank)),
        base,
        dtype=dtype,
        rank_multiple=rank_multiple,
        cuts=shard_layout(base, shard).cuts,
    )
    (group,) = made.groups
    return group, len(file) - 4 * rank * (module.in_features + module.out_features)
