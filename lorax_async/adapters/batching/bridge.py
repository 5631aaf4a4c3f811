"""A batch of LoRAX's form on the kernels of this package: whole, or one process's share of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lorax_async.adapters.batches import BatchLoraWeights
from lorax_async.adapters.batching.rank_segments import Stacks
from lorax_async.adapters.batching.stacked_tables import (
    Stack,
    StackedTables,
    padded,
    plan_of,
    stacks_of,
)
from lorax_async.errors import UsageError
from lorax_kernels import Plan


@dataclass(frozen=True, slots=True, eq=False)
class Bridge:
    """Applies the adapters of a :class:`BatchLoraWeights` of world size 1, layer by layer."""

    plan: Plan
    tables: StackedTables

    @classmethod
    def of(cls, batch: BatchLoraWeights) -> Self:
        """For a batch in any form; made once per batch and layer type.

        The weights are used where they are, in the decode form. Only a local rank that is no
        multiple of 8 (an adapter's that was not padded) is copied, padded with zeros.

        Raises UsageError if the adapters do not fit one layer type, or are split by rank.
        """
        stacks = stacks_of(batch)
        for index, (a, b) in stacks.items():
            if a.shape[1] != b.shape[2]:
                raise UsageError(
                    f"A of adapter {index} has rank {a.shape[1]} and B has {b.shape[2]}: it is one "
                    "process's share, and a gather belongs between them; use ShardBridge.shrink "
                    "and ShardBridge.expand"
                )
        tables = StackedTables.of(map(padded, stacks.values()))
        return cls(plan_of(batch, tables.stacks), tables)

    def apply(self, y: Tensor, x: Tensor, layer: int) -> None:
        """Add each row's adapter to a layer's output: `y += x @ A @ B`, in place.

        `x` `[rows, in]` is the input of the layer that is at place `layer` of the stacked weights,
        `y` `[rows, out]` its output; a row is a token, or one of `prefill_head_indices`. Rows
        without LoRA weights keep their bits. Raises UsageError for tensors that do not fit.
        """
        out = self.tables.stacks[0][1].shape[1]
        if y.dim() == 2 and y.shape[1] > out and y.shape[1] % out == 0:
            raise UsageError(
                f"layer {layer}: y has {y.shape[1]} columns and B {out}: if it is one process's "
                f"share of {y.shape[1] // out}, use ShardBridge.shrink and ShardBridge.expand"
            )
        self.tables.add(y, x, self.plan, layer)


@dataclass(frozen=True, slots=True, eq=False)
class ShardBridge:
    """Applies one process's share of adapters, which LoRAX's sharding split over `world_size`.

    Column-parallel layers have A split along rank and B along `out`, so that what the processes
    shrank is gathered before it is expanded:

        v = bridge.shrink(x, layer)                         # x [rows, in]
        shrunk = v.new_empty(world_size, *v.shape)
        torch.distributed.all_gather_into_tensor(shrunk.flatten(0, 1), v)
        bridge.expand(y, shrunk, layer)                     # y [rows, out / world_size]

    Row-parallel layers have A split along `in` and B along `out`, so that it is summed:

        v = bridge.shrink(x, layer)                         # x [rows, in / world_size]
        torch.distributed.all_reduce(v)
        bridge.expand(y, v, layer)                          # y [rows, out / world_size]

    There `y` is this process's part of the output's columns, which are gathered afterwards (or,
    as in LoRAX, added to these columns of its partial sums, before they are summed).

    Attributes
    ----------
    plan
        The rows of the batch.
    parts
        How many parts `expand` takes: `world_size` if A is split along rank, else 1.
    width
        The columns of a part: the batch's largest local rank, up to a multiple of 8. Every process
        has the same.
    shrinking, expanding
        The tables of A and of B. The other operand puts each adapter's columns where they belong.
    """

    plan: Plan
    parts: int
    width: int
    shrinking: StackedTables
    expanding: StackedTables

    @classmethod
    def of(cls, batch: BatchLoraWeights, *, world_size: int) -> Self:
        """For a batch in any form; made once per batch and layer type, in every process.

        How the weights are split is seen in their ranks: B always has all of it, A has as much
        (split along `in`) or one part of `world_size`. As for copies, see :meth:`Bridge.of`.

        Raises UsageError if the adapters do not fit one layer type, this world or each other.
        """
        stacks = stacks_of(batch)
        parts = _parts(stacks, world_size)
        whole = [padded(stack) for stack in stacks.values()]
        ranks = [a.shape[1] for a, _ in stacks.values()]
        width = max(a.shape[1] for a, _ in whole)
        return cls(
            plan=plan_of(batch, whole),
            parts=parts,
            width=width,
            shrinking=StackedTables.of(_shrinking(whole, width)),
            expanding=StackedTables.of(_expanding(whole, ranks, parts, width)),
        )

    def shrink(self, x: Tensor, layer: int) -> Tensor:
        """What this process has of `x @ A`, by row, as a new tensor `[rows, width]`.

        `x` `[rows, in]` is this process's input of the layer. A row has its adapter's local rank
        of columns, the others are zero; so are rows without LoRA weights. Raises UsageError for a
        tensor that does not fit.
        """
        v = x.new_zeros(self.plan.tokens, self.width)
        self.shrinking.add(v, x, self.plan, layer)
        return v

    def expand(self, y: Tensor, v: Tensor, layer: int) -> None:
        """Add `v @ B` to this process's output columns `y` `[rows, out / world_size]`, in place.

        `v` is what all processes shrank: `[world_size, rows, width]`, gathered in their order, if A
        is split along rank, else `[rows, width]`, their sum. Rows without LoRA weights keep their
        bits. Raises UsageError for tensors that do not fit.
        """
        part = [self.plan.tokens, self.width]
        blocks = v[None] if v.dim() == 2 else v
        dtype = self.expanding.stacks[0][1].dtype
        if list(blocks.shape) != [self.parts, *part] or v.dtype != dtype:
            expected = f"{part}, summed" if self.parts == 1 else f"{[self.parts, *part]}, gathered"
            raise UsageError(
                f"layer {layer}: expected v {expected} over all processes, in {dtype}, "
                f"got {list(v.shape)} in {v.dtype}"
            )
        joined = blocks.movedim(0, 1).flatten(1).contiguous()
        self.expanding.add(y, joined, self.plan, layer)


def _parts(stacks: Stacks, world_size: int) -> int:
    """Into how many parts the ranks of A are split: `world_size` or 1, for all adapters alike."""
    splits: dict[int, int] = {}
    for index, (a, b) in stacks.items():
        local, rank = a.shape[1], b.shape[2]
        if world_size < 1 or rank not in (local, local * world_size):
            raise UsageError(
                f"A of adapter {index} has rank {local} and B has {rank}, which is no share of one "
                f"in {world_size} processes; load the weights for this world size"
            )
        splits[index] = rank // local
    first = next(iter(splits.values()))
    for index, parts in splits.items():
        if parts != first:
            raise UsageError(
                f"A of adapter {index} has 1/{parts} of its rank, that of the first of this batch "
                f"1/{first}; load all of them for the same layer type"
            )
    return first


def _shrinking(stacks: Iterable[Stack], width: int) -> list[Stack]:
    """Per adapter its A, and as B an identity `[layers, width, rank]`, one for each rank."""
    identities: dict[int, Tensor] = {}
    columns = []
    for a, _ in stacks:
        layers, rank, _ = a.shape
        if rank not in identities:
            identity = torch.eye(width, rank, dtype=a.dtype, device=a.device)
            identities[rank] = identity.expand(layers, -1, -1)
        columns.append((a, identities[rank]))
    return columns


def _expanding(
    stacks: Iterable[Stack], local_ranks: Iterable[int], parts: int, width: int
) -> list[Stack]:
    """Per adapter its B, and as A what takes its columns out of all parts, one for each rank.

    A part brings `width` columns, of which an adapter of a lower rank has only the first.
    """
    choices: dict[int, Tensor] = {}
    columns = []
    for (_, b), rank in zip(stacks, local_ranks, strict=True):
        if rank not in choices:
            at = torch.arange(parts * rank, device=b.device)
            choice = b.new_zeros(b.shape[2], parts * width)
            choice[at, at // rank * width + at % rank] = 1
            choices[rank] = choice.expand(len(b), -1, -1)
        columns.append((choices[rank], b))
    return columns
