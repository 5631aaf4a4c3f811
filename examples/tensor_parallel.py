"""Two tensor-parallel ranks, each with a loader that reads its own part: docs/internals.md.

    python examples/tensor_parallel.py

The ranks of a real server are processes with a device each; here both are in one.
"""

import asyncio
from pathlib import Path

import torch

from lorax_async import AdapterLoader, LoaderConfig, Shard, layouts

shout = Path(__file__).parent / "adapters" / "shout"
NAME = "model.layers.0.self_attn.q_proj"  # column-parallel: a rank has its rows of B


async def main() -> None:
    layout = layouts.from_adapter(shout)
    parts = []
    x = torch.randn(5, 576)
    for rank in range(2):
        config = LoaderConfig(max_slots=2, dtype="float32", shard=Shard(rank, world_size=2))
        async with AdapterLoader(layout, config) as loader, loader.load(shout) as handle:
            q = handle.modules[NAME]
            print(f"rank {rank}: A {tuple(q.a.shape)}, B {tuple(q.b.shape)}")
            parts.append(q.scale * (x @ q.a.T) @ q.b.T)
    config = LoaderConfig(dtype="float32")
    async with AdapterLoader(layout, config) as loader, loader.load(shout) as handle:
        q = handle.modules[NAME]
        whole = q.scale * (x @ q.a.T) @ q.b.T
    print("as on one device:", torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5))


if __name__ == "__main__":
    asyncio.run(main())
