"""One rank of a tensor-parallel server, in a process of its own: `shard_rank.py FOLDER RANK WORLD`.

It holds its rows and columns of a small model, and of one adapter by its loader, and computes with
the other ranks what the whole model would. Writes what each comparison was off by, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

import sharded
from lorax_async import AdapterHandle, AdapterLoader, LoaderConfig, Shard
from lorax_kernels import Plan, apply

TOKENS = 5
SECONDS = 30.0

Weights = Mapping[str, Tensor]


def base_weights() -> dict[str, Tensor]:
    """`[out, in]` of every module, the same in every process, float32."""
    random = torch.Generator().manual_seed(7)
    return {
        module.name: torch.randn(module.out_features, module.in_features, generator=random) * 0.1
        for module in sharded.layout().modules
    }


def tokens() -> Tensor:
    return torch.randn(TOKENS, sharded.HIDDEN, generator=torch.Generator().manual_seed(8))


def with_adapter(base: Weights, folder: Path) -> dict[str, Tensor]:
    """The whole model's weights with the adapter's delta, in float64. Its scale is 2."""
    saved = load_file(folder / "adapter_model.safetensors")

    def delta(name: str) -> Tensor:
        a, b = (saved[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        return 2 * b @ a

    return {name: weight.double() + delta(name) for name, weight in base.items()}


def attention(qkv: Tensor, heads: int, groups: int) -> Tensor:
    """Of one sequence without a mask; q heads share those of k and v in order."""
    dim = sharded.HEAD_DIM
    q, k, v = (
        part.view(len(qkv), -1, dim).transpose(0, 1)
        for part in qkv.tensor_split([heads * dim, (heads + groups) * dim], dim=1)
    )
    k, v = (part.repeat_interleave(heads // groups, 0) for part in (k, v))
    scores: Tensor = (q @ k.transpose(1, 2) / dim**0.5).softmax(-1)
    mixed: Tensor = scores @ v
    return mixed.transpose(0, 1).reshape(len(qkv), -1)


class Whole:
    """The model on one process, in float64: the reference."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.outputs: dict[str, Tensor] = {}

    def linear(self, name: str, x: Tensor) -> Tensor:
        self.outputs[name] = y = x @ self.weights[name].T
        return y

    attention_heads = sharded.HEADS, sharded.GROUPS


class Rank:
    """The model on one of several processes, in float32."""

    def __init__(self, base: Weights, loader: AdapterLoader, handle: AdapterHandle) -> None:
        shard = handle.shard
        assert shard is not None
        self.shard, self.tables = shard, loader.device
        self.index = loader.held_layout.index
        self.plan = Plan.from_segments([0, TOKENS], [handle.slot.index])
        self.weights = {
            name: weight[sharded.rows_of(name, shard)][:, sharded.columns_of(name, shard)]
            for name, weight in base.items()
        }
        self.outputs: dict[str, Tensor] = {}
        world = shard.world_size
        self.attention_heads = sharded.HEADS // world, max(1, sharded.GROUPS // world)

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.weights[name].T
        tables: Any = self.tables
        apply(y, x.contiguous(), self.plan, self.index(name), tables)
        if name.endswith(("o_proj", "down_proj")):
            dist.all_reduce(y)  # the sum of the ranks' products, with their deltas
            self.outputs[name] = y
        else:
            self.outputs[name] = self.gathered(name, y)
        return y

    def gathered(self, name: str, y: Tensor) -> Tensor:
        """The whole output of a column-parallel module, from every rank's rows."""
        world = self.shard.world_size
        shares = [torch.empty_like(y) for _ in range(world)]
        dist.all_gather(shares, y)
        rows = [sharded.rows_of(name, Shard(rank, world)) for rank in range(world)]
        whole = torch.full((TOKENS, int(torch.cat(rows).max()) + 1), torch.nan)
        for share, there in zip(shares, rows, strict=True):
            whole[:, there] = share
        return whole


def forward(model: Whole | Rank, x: Tensor) -> Tensor:
    for layer in range(sharded.LAYERS):
        path = f"model.layers.{layer}"
        qkv = model.linear(f"{path}.self_attn.qkv_proj", x)
        x = x + model.linear(f"{path}.self_attn.o_proj", attention(qkv, *model.attention_heads))
        gate = model.linear(f"{path}.mlp.gate", x).mean(1, keepdim=True).sigmoid()
        up = model.linear(f"{path}.mlp.up_proj", x)
        x = x + gate * model.linear(f"{path}.mlp.down_proj", up.relu())
    return x


async def run(folder: Path, shard: Shard) -> dict[str, float]:
    base = base_weights()
    whole = Whole(with_adapter(base, folder))
    wanted = forward(whole, tokens().double())
    config = LoaderConfig(shard=shard, device_bytes=1 << 20, max_slots=2, timeout=SECONDS)
    async with (
        AdapterLoader(sharded.layout(), config) as loader,
        await loader.load(folder) as handle,
    ):
        rank = Rank(base, loader, handle)
        found = forward(rank, tokens())
    off = {name: _off(rank.outputs[name], output) for name, output in whole.outputs.items()}
    return off | {"model": _off(found, wanted)}


def _off(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def main() -> None:
    folder, shard = Path(sys.argv[1]), Shard(int(sys.argv[2]), int(sys.argv[3]))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=shard.rank,
        world_size=shard.world_size,
        timeout=timedelta(seconds=SECONDS),
    )
    try:
        sys.stdout.write(json.dumps(asyncio.run(run(folder, shard))))
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
