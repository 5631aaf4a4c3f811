"""A batch of LoRAX's form on the kernels of this package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorax_async.adapters.batches import BatchLoraWeights
from lorax_async.adapters.rank_segments import Stacked, Stacks, decode_stacks
from lorax_async.core.batch_plan import BASE_ONLY, plan_rows
from lorax_async.errors import UsageError
from lorax_kernels import Operands, Plan, apply

RANK_MULTIPLE = 8
"""What the kernels' tiles want of a rank."""

Stack = tuple[Tensor, Tensor]
"""A `[layers, r, in]` and B `[layers, out, r]`, of one adapter."""


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

    @classmethod
    def of(cls, adapters: Mapping[int, Stacked]) -> Self:
        """The columns are in the order of `adapters`. As for errors, see :meth:`Bridge.of`."""
        if not adapters:
            raise UsageError("this batch was made by hand, without adapters; use load")
        stacks = {i: _padded(i, stack) for i, stack in decode_stacks(adapters).items()}
        _check_alike(stacks)
        columns = tuple(stacks.values())
        ranks = [a.shape[1] for a, _ in columns]
        first = columns[0][0]
        return cls(
            address=_addresses(columns),
            rank=torch.tensor([ranks] * len(first), dtype=torch.int32, device=first.device),
            scale=torch.ones(len(first), len(columns), device=first.device),
            stacks=columns,
        )

    def operands(self, module: int, slot: int) -> Operands:
        a, b = self.stacks[slot]
        return a[module], b[module], 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Bridge:
    """Applies the adapters of a :class:`BatchLoraWeights`, layer by layer."""

    plan: Plan
    tables: StackedTables

    @classmethod
    def of(cls, batch: BatchLoraWeights) -> Self:
        """For a batch in any form; made once per batch and layer type.

        The weights are used where they are, in the decode form. Only a local rank that is no
        multiple of 8 (an adapter's that was not padded) is copied, padded with zeros.

        Raises UsageError if the adapters do not fit one layer type, or if they are sharded by
        rank: LoRAX gathers between A and B, which one kernel for both cannot do.
        """
        slots = {index: slot for slot, index in enumerate(batch.adapters)}
        tables = StackedTables.of(batch.adapters)
        rows = [slots.get(index, BASE_ONLY) for index in batch.runs.indices]
        segments = plan_rows(rows, batch.runs.lengths)
        plan = Plan.from_segments(segments.bounds, segments.slots, device=tables.rank.device)
        return cls(plan, tables)

    def apply(self, y: Tensor, x: Tensor, layer: int) -> None:
        """Add each row's adapter to a layer's output: `y += x @ A @ B`, in place.

        `x` `[rows, in]` is the input of the layer that is at place `layer` of the stacked weights,
        `y` `[rows, out]` its output; a row is a token, or one of `prefill_head_indices`. Rows
        without LoRA weights keep their bits. Raises UsageError for tensors that do not fit.
        """
        try:
            apply(y, x, self.plan, layer, self.tables)
        except ValueError as error:
            raise UsageError(f"layer {layer}: {error}") from error


def _padded(index: int, stack: Stack) -> Stack:
    a, b = stack
    rank = a.shape[1]
    if b.shape[2] != rank:
        raise UsageError(
            f"A of adapter {index} has rank {rank} and B has {b.shape[2]}: it is sharded by rank, "
            "and a gather belongs between them; use weights for world size 1, or let the loader "
            "shard"
        )
    missing = -rank % RANK_MULTIPLE
    return (pad(a, (0, 0, 0, missing)), pad(b, (0, missing))) if missing else stack


def _check_alike(stacks: Stacks) -> None:
    """A kernel knows one size and dtype for all adapters of a layer."""
    expected = _kind(next(iter(stacks.values())))
    for index, stack in stacks.items():
        if _kind(stack) != expected:
            raise UsageError(
                f"adapter {index} has (layers, in, out, dtypes) {_kind(stack)}, the first of this "
                f"batch {expected}; load all of them for the same layers"
            )


def _kind(stack: Stack) -> tuple[object, ...]:
    a, b = stack
    return len(a), a.shape[2], b.shape[1], a.dtype, b.dtype


def _addresses(columns: tuple[Stack, ...]) -> Tensor:
    """Int64 `[2, layers, adapters]`: where A (0) and B (1) of each layer begin."""
    starts = [[part.data_ptr() for part in parts] for parts in zip(*columns, strict=True)]
    steps = [[part[0].nbytes for part in parts] for parts in zip(*columns, strict=True)]
    layers = torch.arange(len(columns[0][0]))[None, :, None]
    addresses = torch.tensor(starts)[:, None, :] + layers * torch.tensor(steps)[:, None, :]
    return addresses.to(columns[0][0].device)
