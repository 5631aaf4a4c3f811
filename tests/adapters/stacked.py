"""Stand-ins for `LoraWeights`, batches of them, and what a kernel sees that gets addresses only."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from hypothesis import strategies as st
from torch import Tensor

from lorax_async.adapters import AdapterBatchMetadata, BatchLoraWeights, padded_rank

LAYERS, IN, OUT = 2, 5, 3


class StandIn:
    """A `[layers, in, r]` and B `[layers, r, out]` in all the orders that a batch may ask for."""

    def __init__(self, a: Tensor, b: Tensor, adapter_config: object = None) -> None:
        self.lora_a_r, self.lora_b_r = a.shape[2], b.shape[1]
        self.weights_a_t = a.transpose(1, 2).contiguous()
        self.weights_a = self.weights_a_t if 16 <= self.lora_a_r <= 128 else a.contiguous()
        self.weights_b, self.weights_b_t = b.contiguous(), b.transpose(1, 2).contiguous()
        self.adapter_config = adapter_config


def integers(seed: int, *shape: int) -> Tensor:
    """Small enough that every sum of products is exact in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).double()


def stand_in(rank: int, *, seed: int = 0, local_rank: int | None = None) -> StandIn:
    """Weights of a rank, zero-padded as LoRAX does for one process, or to `local_rank`."""
    width = local_rank or padded_rank(rank, 1)
    a, b = torch.zeros(LAYERS, IN, width).double(), torch.zeros(LAYERS, width, OUT).double()
    a[:, :, :rank] = integers(2 * seed, LAYERS, IN, rank)
    b[:, :rank, :] = integers(2 * seed + 1, LAYERS, rank, OUT)
    return StandIn(a, b, f"config {seed}")


def of_ranks(*ranks: int) -> dict[int, StandIn]:
    """Adapter i has the i-th local rank."""
    return {i: stand_in(1, seed=i, local_rank=rank) for i, rank in enumerate(ranks)}


def meta_of(tokens: list[int]) -> AdapterBatchMetadata:
    return AdapterBatchMetadata.from_indices(torch.tensor(tokens, dtype=torch.int64))


def loaded(
    weights: Mapping[int, object],
    tokens: list[int],
    *,
    prefill: bool = True,
    heads: list[int] | None = None,
) -> BatchLoraWeights | None:
    chosen = None if heads is None else torch.tensor(heads, dtype=torch.int64)
    return BatchLoraWeights.load(weights, meta_of(tokens), "q_proj", prefill, chosen)


def load(
    weights: Mapping[int, object],
    tokens: list[int],
    *,
    prefill: bool = True,
    heads: list[int] | None = None,
) -> BatchLoraWeights:
    batch = loaded(weights, tokens, prefill=prefill, heads=heads)
    assert batch is not None
    return batch


def follow(address: int, shape: tuple[int, ...]) -> Tensor:
    """The float64 values that lie there."""
    memory = (ctypes.c_double * prod(shape)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float64).view(shape)


def delta_by_address(batch: BatchLoraWeights, x: Tensor, layer: int) -> Tensor:
    """What kernels would add for the rows `x`, with nothing but the groups to go by."""
    delta = torch.zeros(len(x), OUT).double()
    for rank, group in batch.rank_data.items():
        assert group.rank == rank
        pairs = list(zip(group.lora_a_ptr.tolist(), group.lora_b_ptr.tolist(), strict=True))
        if group.segment_starts is None or group.segment_ends is None:
            assert group.indices is not None
            for row, at in enumerate(group.indices.tolist()):
                if at >= 0:
                    a_t = follow(pairs[at][0], (LAYERS, rank, IN))[layer]
                    b_t = follow(pairs[at][1], (LAYERS, OUT, rank))[layer]
                    delta[row] += b_t @ (a_t @ x[row])
            continue
        assert group.indices is None
        ends = zip(group.segment_starts.tolist(), group.segment_ends.tolist(), pairs, strict=True)
        for start, stop, (at_a, at_b) in ends:
            turned = 16 <= rank <= 128
            a = follow(at_a, (LAYERS, rank, IN) if turned else (LAYERS, IN, rank))[layer]
            b = follow(at_b, (LAYERS, rank, OUT))[layer]
            for row in range(start, stop):
                delta[row] += (x[row] @ (a.T if turned else a)) @ b
    return delta


def delta_by_token(
    weights: Mapping[int, StandIn], tokens: Sequence[int], x: Tensor, layer: int
) -> Tensor:
    """`x · A · B` of each token's own adapter."""
    delta = torch.zeros(len(tokens), OUT).double()
    for row, index in enumerate(tokens):
        if index in weights:
            a, b = weights[index].weights_a_t[layer].T, weights[index].weights_b[layer]
            delta[row] = x[row] @ a.double() @ b.double()
    return delta


@dataclass(frozen=True)
class Case:
    ranks: dict[int, int]
    tokens: list[int]
    heads: list[int] | None
    prefill: bool
    layer: int

    @property
    def rows(self) -> list[int]:
        """The adapters of the rows that a layer gets."""
        return self.tokens if self.heads is None else [self.tokens[at] for at in self.heads]


@st.composite
def cases(draw: st.DrawFn, ranks: st.SearchStrategy[int]) -> Case:
    """Batches over adapters 0 to 5, of which only some have weights."""
    lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=8)
    tokens = [index for index, length in draw(lengths) for _ in range(length)]
    some = st.lists(st.integers(0, len(tokens) - 1), unique=True).map(sorted)
    return Case(
        ranks=draw(st.dictionaries(st.integers(0, 5), ranks, min_size=1, max_size=5)),
        tokens=tokens,
        heads=draw(st.none() | some),
        prefill=draw(st.booleans()),
        layer=draw(st.integers(0, LAYERS - 1)),
    )
