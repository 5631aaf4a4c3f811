"""A small tensor-parallel base with grouped heads, adapters for it, and each rank's share."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lorax_async.config import Shard
from lorax_async.handle import AdapterHandle
from lorax_async.planning.layout import FusedPart, ModelLayout, Module, Parallelism

LAYERS, HIDDEN, HEADS, GROUPS, HEAD_DIM, FFN = 2, 32, 8, 2, 4, 48
SIZES = {
    "self_attn.qkv_proj": (HIDDEN, (HEADS + 2 * GROUPS) * HEAD_DIM),
    "self_attn.o_proj": (HEADS * HEAD_DIM, HIDDEN),
    "mlp.up_proj": (HIDDEN, FFN),
    "mlp.down_proj": (FFN, HIDDEN),
    "mlp.gate": (HIDDEN, 3),
}
"""Of each module: in, out."""
PARALLEL = {
    "qkv_proj": Parallelism.COLUMN,
    "o_proj": Parallelism.ROW,
    "up_proj": Parallelism.COLUMN,
    "down_proj": Parallelism.ROW,
    "gate": Parallelism.REPLICATED,
}


def layout(dtype: str = "F32") -> ModelLayout:
    group = FusedPart(GROUPS * HEAD_DIM, HEAD_DIM, replicable=True)
    parts = {"qkv_proj": (FusedPart(HEADS * HEAD_DIM, HEAD_DIM), group, group)}
    modules = []
    for layer in range(LAYERS):
        for name, (inputs, outputs) in SIZES.items():
            last = name.rpartition(".")[2]
            path = f"model.layers.{layer}.{name}"
            made = Module(path, inputs, outputs, layer, PARALLEL[last], parts=parts.get(last, ()))
            modules.append(made)
    return ModelLayout(tuple(modules), LAYERS, dtype, "model.")


def write(folder: Path, rank: int = 4, seed: int = 0) -> Path:
    """Write an F32 adapter of every module."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": "all-linear",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = torch.Generator().manual_seed(seed)
    pairs = {}
    for module in layout().modules:
        a = torch.randn(rank, module.in_features, generator=random)
        pairs[module.name] = a, torch.randn(module.out_features, rank, generator=random)
    save(folder, pairs)
    return folder


def save(folder: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write these A and B, by module, into an adapter's folder."""
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": tensor.contiguous()
        for name, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def rows_of(name: str, shard: Shard) -> torch.Tensor:
    """Return the outputs of a module that a rank has."""
    last, world = name.rpartition(".")[2], shard.world_size
    every = torch.arange(SIZES[".".join(name.split(".")[-2:])][1])
    if last == "up_proj":
        return every.chunk(world)[shard.rank]
    if last != "qkv_proj":
        return every
    q, k, v = every.tensor_split([HEADS * HEAD_DIM, (HEADS + GROUPS) * HEAD_DIM])
    group = shard.rank * GROUPS // world
    pieces = min(world, GROUPS)
    return torch.cat([q.chunk(world)[shard.rank], k.chunk(pieces)[group], v.chunk(pieces)[group]])


def columns_of(name: str, shard: Shard) -> torch.Tensor:
    """Return the inputs of a module that a rank has."""
    every = torch.arange(SIZES[".".join(name.split(".")[-2:])][0])
    whole = name.rpartition(".")[2] not in {"o_proj", "down_proj"}
    return every if whole else every.chunk(shard.world_size)[shard.rank]


def share_of(folder: Path, shard: Shard) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B of every module, read by safetensors itself and cut for a rank."""
    saved = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in (module.name for module in layout().modules):
        a, b = (saved[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        found[name] = (a[:, columns_of(name, shard)], b[rows_of(name, shard)])
    return found


def assert_is_the_share(handle: AdapterHandle, folder: Path, shard: Shard) -> None:
    expected = share_of(folder, shard)
    assert handle.modules.keys() == expected.keys()
    for name, module in handle.modules.items():
        for found, wanted in zip((module.a, module.b), expected[name], strict=True):
            assert torch.equal(found.cpu(), wanted.to(found.dtype))
        assert (module.scale, module.rank) == (2.0, len(expected[name][0]))
