"""One process's share of an adapter as LoRAX splits it, and all processes of a world in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.stacked import LAYERS, StandIn, integers, load
from lorax_async.adapters.batching.bridge import ShardBridge

IN_EACH, OUT_EACH = 5, 3
"""Of one process, where a side is split."""


def padded_for(rank: int, world: int) -> int:
    """The contract's: 8 for each process, or up to a multiple of 16."""
    return 8 * world if rank <= 8 * world else (rank + 15) // 16 * 16


@dataclass(frozen=True)
class Whole:
    """A `[layers, in, rank]` and B `[layers, rank, out]` before they are split."""

    a: Tensor
    b: Tensor

    def share(self, world: int, place: int, *, by_rank: bool) -> StandIn:
        a = self.a.chunk(world, dim=2 if by_rank else 1)[place]
        return StandIn(a, self.b.chunk(world, dim=2)[place], "config")


def whole(rank: int, world: int, *, seed: int = 0) -> Whole:
    padded = padded_for(rank, world)
    a = torch.zeros(LAYERS, IN_EACH * world, padded).double()
    b = torch.zeros(LAYERS, padded, OUT_EACH * world).double()
    a[:, :, :rank] = integers(2 * seed, LAYERS, IN_EACH * world, rank)
    b[:, :rank] = integers(2 * seed + 1, LAYERS, rank, OUT_EACH * world)
    return Whole(a, b)


def bridges(
    adapters: dict[int, Whole],
    tokens: list[int],
    world: int,
    *,
    by_rank: bool,
    prefill: bool = True,
) -> list[ShardBridge]:
    """One per process."""
    shares = [
        {i: one.share(world, place, by_rank=by_rank) for i, one in adapters.items()}
        for place in range(world)
    ]
    batches = [load(share, tokens, prefill=prefill) for share in shares]
    return [ShardBridge.of(batch, world_size=world) for batch in batches]


def column_parallel(processes: list[ShardBridge], x: Tensor, y: Tensor, layer: int) -> Tensor:
    gathered = torch.stack([process.shrink(x, layer) for process in processes])
    return expanded(processes, gathered, y, layer)


def row_parallel(processes: list[ShardBridge], x: Tensor, y: Tensor, layer: int) -> Tensor:
    parts = [part.contiguous() for part in x.chunk(len(processes), dim=1)]
    pairs = zip(processes, parts, strict=True)
    summed = torch.stack([process.shrink(part, layer) for process, part in pairs]).sum(dim=0)
    return expanded(processes, summed, y, layer)


def expanded(processes: list[ShardBridge], v: Tensor, y: Tensor, layer: int) -> Tensor:
    outputs = [
        part.clone(memory_format=torch.contiguous_format) for part in y.chunk(len(processes), dim=1)
    ]
    for process, output in zip(processes, outputs, strict=True):
        process.expand(output, v, layer)
    return torch.cat(outputs, dim=1)


def exact(adapters: dict[int, Whole], tokens: Sequence[int], x: Tensor, layer: int) -> Tensor:
    """`x · A · B` of each token's own adapter, of the weights as they were before the split."""
    out = next(iter(adapters.values())).b.shape[2]
    delta = torch.zeros(len(tokens), out).double()
    for row, index in enumerate(tokens):
        if index in adapters:
            delta[row] = x[row] @ adapters[index].a[layer] @ adapters[index].b[layer]
    return delta
