"""Stacked weights of one batch as the tables that `lorax_kernels` reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorax_async.adapters.batches import BatchLoraWeights
from lorax_async.adapters.batching.rank_segments import Stacks, decode_stacks
from lorax_async.core.batch_plan import BASE_ONLY, plan_rows
from lorax_async.errors import UsageError
from lorax_kernels import Operands, Plan, apply

RANK_MULTIPLE = 8
"""What the kernels' tiles want of a rank."""

Stack = tuple[Tensor, Tensor]
"""A `[layers, r, in]` and B `[layers, out, r]`, of one adapter; each layer is contiguous."""


@dataclass(frozen=True, slots=True, eq=False)
class StackedTables:
    """`lorax_kernels.Tables` over one batch's adapters: a row per layer, a column per adapter.

    The scale is 1 everywhere, for `LoraWeights` has it in B. The tensors are of this batch: a
    captured graph cannot hold them.
    """

    address: Tensor
    rank: Tensor
    scale: Tensor
    stacks: tuple[Stack, ...]
    views: dict[tuple[int, int], Operands] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, stacks: Iterable[Stack]) -> Self:
        """A column per stack; all of them are alike but for their ranks."""
        columns = tuple(stacks)
        ranks = [a.shape[1] for a, _ in columns]
        first = columns[0][0]
        return cls(
            address=_addresses(columns),
            rank=torch.tensor([ranks] * len(first), dtype=torch.int32, device=first.device),
            scale=torch.ones(len(first), len(columns), device=first.device),
            stacks=columns,
        )

    def operands(self, module: int, slot: int) -> Operands:
        """The same views again: by that kernels know that the weights are as they were."""
        found = self.views.get((module, slot))
        if found is None:
            a, b = self.stacks[slot]
            found = self.views[module, slot] = a[module], b[module], 1.0
        return found

    def add(self, y: Tensor, x: Tensor, plan: Plan, layer: int) -> None:
        """As `lorax_kernels.apply`. Raises UsageError for tensors that do not fit."""
        try:
            apply(y, x, plan, layer, self)
        except ValueError as error:
            raise UsageError(f"layer {layer}: {error}") from error


def stacks_of(batch: BatchLoraWeights) -> Stacks:
    """The weights of its adapters where they are, in the decode form, A and B `[layers, …]`.

    Raises UsageError if there are none, or if they do not fit one layer type.
    """
    if not batch.adapters:
        raise UsageError("this batch was made by hand, without adapters; use load")
    stacks = decode_stacks(batch.adapters)
    expected = _kind(next(iter(stacks.values())))
    for index, stack in stacks.items():
        if _kind(stack) != expected:
            raise UsageError(
                f"adapter {index} has (layers, in, out, dtypes) {_kind(stack)}, the first of this "
                f"batch {expected}; load all of them for the same layers"
            )
    return stacks


def plan_of(batch: BatchLoraWeights, stacks: Iterable[Stack]) -> Plan:
    """Where the stacks are; slots are counted in the order of `batch.adapters`."""
    found = tuple(stacks)
    slots = {index: slot for slot, index in enumerate(batch.adapters)}
    rows = [slots.get(index, BASE_ONLY) for index in batch.runs.indices]
    segments = plan_rows(rows, batch.runs.lengths)
    max_rank = max(rank for a, b in found for rank in (a.shape[1], b.shape[2]))
    return Plan.from_segments(
        segments.bounds, segments.slots, device=found[0][0].device, max_rank=max_rank
    )


def padded(stack: Stack) -> Stack:
    """With zeros up to a rank that the kernels want; what has one already is not copied."""
    a, b = stack
    more_a, more_b = -a.shape[1] % RANK_MULTIPLE, -b.shape[2] % RANK_MULTIPLE
    return pad(a, (0, 0, 0, more_a)) if more_a else a, pad(b, (0, more_b)) if more_b else b


def _kind(stack: Stack) -> tuple[object, ...]:
    """A kernel knows one size and dtype for all adapters of a layer."""
    a, b = stack
    return len(a), a.shape[2], b.shape[1], a.dtype, b.dtype


def _addresses(columns: tuple[Stack, ...]) -> Tensor:
    """Int64 `[2, layers, adapters]`: where A (0) and B (1) of each layer begin."""
    parts = list(zip(*columns, strict=True))
    starts = [[part.data_ptr() for part in side] for side in parts]
    steps = [[part.stride(0) * part.element_size() for part in side] for side in parts]
    layers = torch.arange(len(columns[0][0]))[None, :, None]
    addresses = torch.tensor(starts)[:, None, :] + layers * torch.tensor(steps)[:, None, :]
    return addresses.to(columns[0][0].device)
