"""Segments of one local rank: the addresses of weights, and which rows use which of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lorax_async.adapters.batching.segments import Runs
from lorax_async.errors import UsageError

Stacks = Mapping[int, tuple[Tensor, Tensor]]
"""By adapter index, A and B of all layers of one type."""


class Stacked(Protocol):
    """Of `LoraWeights`, what a batch reads: one adapter's weights of one layer type.

    Every tensor is contiguous, for a kernel gets its address alone. Any property may be read for
    every batch, so that none may copy each time.
    """

    @property
    def lora_a_r(self) -> int:
        """The local rank."""

    @property
    def weights_a(self) -> Tensor:
        """`[layers, r, in]` for a local rank from 16 to 128, else `[layers, in, r]`."""

    @property
    def weights_b(self) -> Tensor:
        """`[layers, r, out]`."""

    @property
    def weights_a_t(self) -> Tensor:
        """`[layers, r, in]`."""

    @property
    def weights_b_t(self) -> Tensor:
        """`[layers, out, r]`."""

    @property
    def adapter_config(self) -> Any:
        """The adapter's `LoraConfig`."""


@dataclass(slots=True, eq=False)
class RankSegments:
    """The segments of a batch whose adapters have one local rank, for kernels that take addresses.

    By segment (`segment_starts` is not None): A and B are as in `weights_a` and `weights_b`. By
    token (`indices` is not None): as in `weights_a_t` and `weights_b_t`.

    `tmp_shrink` and `tmp_expand` are scratch memory of punica's CUDA kernels. Only these can say
    how large it must be, and :func:`lorax_kernels.apply` needs none, so both are always None here
    (as LoRAX leaves them in decoding). Who calls punica's `sgmv` assigns its own, which is why this
    is not frozen.

    Attributes
    ----------
    rank
        The local rank of all of them.
    lora_a_ptr, lora_b_ptr
        Int64 `[n]`, for each of the n segments the address of its adapter's stacked weights.
    segment_starts, segment_ends
        `[n]` in the dtype of `adapter_segments`: the rows of each segment, the end not included.
    indices
        Int64 `[rows]`: which of the n addresses a row uses (the first, where an adapter has several
        segments), -1 for none in this group.
    """

    rank: int
    lora_a_ptr: Tensor
    lora_b_ptr: Tensor
    tmp_shrink: Tensor | None = None
    tmp_expand: Tensor | None = None
    segment_starts: Tensor | None = None
    segment_ends: Tensor | None = None
    indices: Tensor | None = None


def prefill_stacks(adapters: Mapping[int, Stacked]) -> Stacks:
    """As a kernel reads them by segment. Raises UsageError where an address would not do."""
    return _check({index: (one.weights_a, one.weights_b) for index, one in adapters.items()})


def decode_stacks(adapters: Mapping[int, Stacked]) -> Stacks:
    """As a kernel reads them by token. Raises UsageError where an address would not do."""
    return _check({index: (one.weights_a_t, one.weights_b_t) for index, one in adapters.items()})


def group_by_segment(
    ranks: Mapping[int, int], runs: Runs, stacks: Stacks, dtype: torch.dtype
) -> dict[int, RankSegments]:
    """The runs whose adapter has a rank, by rank; `dtype` is that of starts and ends."""
    groups = {}
    for rank, places in _places(ranks, runs).items():
        a_ptr, b_ptr = _addresses(runs, places, stacks)
        starts = [runs.bounds[place] for place in places]
        ends = [runs.bounds[place + 1] for place in places]
        groups[rank] = RankSegments(
            rank,
            a_ptr,
            b_ptr,
            segment_starts=torch.tensor(starts, dtype=dtype, device=a_ptr.device),
            segment_ends=torch.tensor(ends, dtype=dtype, device=a_ptr.device),
        )
    return groups


def group_by_token(ranks: Mapping[int, int], runs: Runs, stacks: Stacks) -> dict[int, RankSegments]:
    """As `group_by_segment`, with a place among the addresses for each row."""
    groups = {}
    for rank, places in _places(ranks, runs).items():
        a_ptr, b_ptr = _addresses(runs, places, stacks)
        rows = [-1] * runs.bounds[-1]
        first: dict[int, int] = {}
        for at, place in enumerate(places):
            start, stop = runs.bounds[place], runs.bounds[place + 1]
            rows[start:stop] = [first.setdefault(runs.indices[place], at)] * (stop - start)
        indices = torch.tensor(rows, dtype=torch.int64, device=a_ptr.device)
        groups[rank] = RankSegments(rank, a_ptr, b_ptr, indices=indices)
    return groups


def _places(ranks: Mapping[int, int], runs: Runs) -> dict[int, list[int]]:
    places: dict[int, list[int]] = {}
    for place, index in enumerate(runs.indices):
        if index in ranks:
            places.setdefault(ranks[index], []).append(place)
    return places


def _addresses(runs: Runs, places: Sequence[int], stacks: Stacks) -> tuple[Tensor, Tensor]:
    used = [runs.indices[place] for place in places]
    pairs = {index: stacks[index] for index in used}
    a_at = {index: a.data_ptr() for index, (a, _) in pairs.items()}
    b_at = {index: b.data_ptr() for index, (_, b) in pairs.items()}
    device = stacks[used[0]][0].device
    return (
        torch.tensor([a_at[index] for index in used], dtype=torch.int64, device=device),
        torch.tensor([b_at[index] for index in used], dtype=torch.int64, device=device),
    )


def _check(stacks: Stacks) -> Stacks:
    device = next(iter(stacks.values()))[0].device
    for index, pair in stacks.items():
        for part in pair:
            if part.device != device or not part.is_contiguous():
                raise UsageError(
                    f"expected the weights of adapter {index} contiguous on {device}, got "
                    f"{list(part.shape)} with strides {part.stride()} on {part.device}"
                )
    return stacks
