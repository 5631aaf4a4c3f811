"""Apply a LoRAX batch with this package's kernels: whole, or one process's share of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorax_async.adapters.batches import BatchLoraWeights, stacks_of
from lorax_async.errors import UsageError
from lorax_async.planning.batch_plan import BASE_ONLY, plan_rows
from lorax_kernels import Operands, Plan, apply

RANK_MULTIPLE = 8
"""The multiple of ranks that the kernels' tiles need."""

Stack = tuple[Tensor, Tensor]
"""A `[layers, r, in]` and B `[layers, out, r]` of one adapter; each layer is contiguous."""


class StackedTables:
    """`lorax_kernels.Tables` over one batch's adapters: a row per layer, a column per adapter.

    The scale is 1 everywhere, for `LoraWeights` has it in B. The tensors belong to this batch, so
    no captured CUDA graph may use them.
    """

    def __init__(self, stacks: list[Stack]) -> None:
        first = stacks[0][0]
        self.stacks, self._views = stacks, dict[tuple[int, int], Operands]()
        ranks = [a.shape[1] for a, _ in stacks]
        self.rank = torch.tensor([ranks] * len(first), dtype=torch.int32, device=first.device)
        self.scale = torch.ones(len(first), len(stacks), device=first.device)
        sides = list(zip(*stacks, strict=True))
        starts = torch.tensor([[one.data_ptr() for one in side] for side in sides])
        steps = [[one.stride(0) * one.element_size() for one in side] for side in sides]
        layers = torch.arange(len(first))[None, :, None]
        self.address = (starts[:, None] + layers * torch.tensor(steps)[:, None]).to(first.device)

    def operands(self, module: int, slot: int) -> Operands:
        """Return A, B and scale; the same views each time, by which kernels see no change."""
        if (module, slot) not in self._views:
            a, b = self.stacks[slot]
            self._views[module, slot] = a[module], b[module], 1.0
        return self._views[module, slot]

    def add(self, y: Tensor, x: Tensor, plan: Plan, layer: int) -> None:
        """Call `lorax_kernels.apply`. Raise `UsageError` for tensors that do not fit."""
        try:
            apply(y, x, plan, layer, self)
        except ValueError as error:
            raise UsageError(f"layer {layer}: {error}") from error


@dataclass(frozen=True, eq=False)
class Bridge:
    """Applies the adapters of a `BatchLoraWeights`, layer by layer; make one per layer type.

    With one process, call `apply`. If LoRAX splits adapters over `world_size` processes, each
    shrinks and expands its share, with an exchange in between. Column-parallel layers have A split
    by rank and B by `out`:

        v = bridge.shrink(x, layer)                         # x [rows, in]
        shrunk = v.new_empty(world_size, *v.shape)
        torch.distributed.all_gather_into_tensor(shrunk.flatten(0, 1), v)
        bridge.expand(y, shrunk, layer)                     # y [rows, out / world_size]

    Row-parallel layers have A split by `in`, so that `v` is summed:

        v = bridge.shrink(x, layer)                         # x [rows, in / world_size]
        torch.distributed.all_reduce(v)
        bridge.expand(y, v, layer)                          # y [rows, out / world_size]

    There `y` is this process's part of the output's columns, which are gathered afterwards (or,
    as in LoRAX, added to these columns of its partial sums, before they are summed).
    """

    plan: Plan
    # The weights in place; only a rank that is no multiple of 8 is copied, padded with zeros.
    stacks: list[Stack] = field(repr=False)
    local_ranks: list[int]
    world_size: int
    parts: int  # parts of `expand`'s input: world_size if A is split by rank, else 1

    @classmethod
    def of(cls, batch: BatchLoraWeights, *, world_size: int = 1) -> Self:
        """Make a bridge, in every process. Raise `UsageError` if adapters do not fit each other.

        The ranks show how weights are split: B always has the full rank, A the same (split by `in`)
        or one part of `world_size`.
        """
        if not batch.adapters:
            raise UsageError("this batch was made by hand, without adapters; use load")
        whole = stacks_of(batch.adapters, turned=True)
        parts = {index: _parts(index, stack, world_size) for index, stack in whole.items()}
        kinds = {index: _kind(stack) for index, stack in whole.items()}
        first = next(iter(whole))
        for index in whole:
            if kinds[index] != kinds[first]:
                raise UsageError(
                    f"adapter {index} has (layers, in, out, dtypes) {kinds[index]}, the first of"
                    f" this batch {kinds[first]}; load all of them for the same layers"
                )
            if parts[index] != parts[first]:
                raise UsageError(
                    f"A of adapter {index} has 1/{parts[index]} of its rank, that of the first of"
                    f" this batch 1/{parts[first]}; load all of them for the same layer type"
                )
        stacks = [_padded(a, b) for a, b in whole.values()]
        slots = {index: slot for slot, index in enumerate(whole)}
        rows = plan_rows([slots.get(i, BASE_ONLY) for i in batch.runs.indices], batch.runs.lengths)
        plan = Plan.from_segments(
            rows.bounds,
            rows.slots,
            device=stacks[0][0].device,
            max_rank=max(rank for a, b in stacks for rank in (a.shape[1], b.shape[2])),
        )
        local_ranks = [a.shape[1] for a, _ in whole.values()]
        return cls(plan, stacks, local_ranks, world_size, parts[first])

    @property
    def width(self) -> int:
        """The columns of a part: the largest padded local rank; the same in every process."""
        return max(a.shape[1] for a, _ in self.stacks)

    def apply(self, y: Tensor, x: Tensor, layer: int) -> None:
        """Add each row's adapter to a layer's output, `y += x @ A @ B`, in place.

        `x` `[rows, in]` and `y` `[rows, out]` are of the layer at place `layer` of the stacked
        weights; a row is a token, or one of `prefill_head_indices`. Rows without LoRA weights keep
        their bits. Raise `UsageError` for tensors that do not fit.
        """
        out = self.stacks[0][1].shape[1]
        if self.world_size > 1 or (y.dim() == 2 and y.shape[1] > out and y.shape[1] % out == 0):
            raise UsageError(
                f"layer {layer}: y has {y.shape[1]} columns and B {out}: one process's share of"
                " adapters is applied by Bridge.of(batch, world_size=…), shrink and expand"
            )
        self._whole.add(y, x, self.plan, layer)

    def shrink(self, x: Tensor, layer: int) -> Tensor:
        """Return this process's `x @ A`, `[rows, width]`: zeros beyond a row's local rank."""
        v = x.new_zeros(self.plan.tokens, self.width)
        self._shrinking.add(v, x, self.plan, layer)
        return v

    def expand(self, y: Tensor, v: Tensor, layer: int) -> None:
        """Add `v @ B` to this process's output columns `y`, in place.

        `v` is what all processes shrank: `[world_size, rows, width]`, gathered in their order, if A
        is split by rank, else `[rows, width]`, their sum.
        """
        part = [self.plan.tokens, self.width]
        blocks = v[None] if v.dim() == 2 else v
        dtype = self.stacks[0][1].dtype
        if list(blocks.shape) != [self.parts, *part] or v.dtype != dtype:
            expected = f"{part}, summed" if self.parts == 1 else f"{[self.parts, *part]}, gathered"
            raise UsageError(
                f"layer {layer}: expected v {expected} over all processes, in {dtype}, got"
                f" {list(v.shape)} in {v.dtype}"
            )
        joined = blocks.movedim(0, 1).flatten(1).contiguous()
        self._expanding.add(y, joined, self.plan, layer)

    @cached_property
    def _whole(self) -> StackedTables:
        return StackedTables(self.stacks)

    @cached_property
    def _shrinking(self) -> StackedTables:
        """Per adapter its A, and as B an identity `[layers, width, rank]`, one per rank."""
        columns, identities = list[Stack](), dict[int, Tensor]()
        for a, _ in self.stacks:
            rank = a.shape[1]
            if rank not in identities:
                identity = torch.eye(self.width, rank, dtype=a.dtype, device=a.device)
                identities[rank] = identity.expand(len(a), -1, -1)
            columns.append((a, identities[rank]))
        return StackedTables(columns)

    @cached_property
    def _expanding(self) -> StackedTables:
        """Per adapter its B, and as A a selection of its columns of all parts, one per rank.

        A part has `width` columns, of which an adapter of a lower rank uses only the first.
        """
        columns, choices = list[Stack](), dict[int, Tensor]()
        for (_, b), rank in zip(self.stacks, self.local_ranks, strict=True):
            if rank not in choices:
                at = torch.arange(self.parts * rank, device=b.device)
                choice = b.new_zeros(b.shape[2], self.parts * self.width)
                choice[at, at // rank * self.width + at % rank] = 1
                choices[rank] = choice.expand(len(b), -1, -1)
            columns.append((choices[rank], b))
        return StackedTables(columns)


def _kind(stack: Stack) -> tuple[object, ...]:
    """Return sizes and dtypes, which kernels need equal for all adapters of a layer."""
    a, b = stack
    return len(a), a.shape[2], b.shape[1], a.dtype, b.dtype


def _parts(index: int, stack: Stack, world_size: int) -> int:
    """Return into how many parts the rank of A is split."""
    local, rank = stack[0].shape[1], stack[1].shape[2]
    if world_size < 1 or rank not in (local, local * world_size):
        raise UsageError(
            f"A of adapter {index} has rank {local} and B has {rank}, which is no share of one in"
            f" {world_size} processes; load the weights for this world size, and give it to"
            " Bridge.of"
        )
    return rank // local


def _padded(a: Tensor, b: Tensor) -> Stack:
    more_a, more_b = -a.shape[1] % RANK_MULTIPLE, -b.shape[2] % RANK_MULTIPLE
    return pad(a, (0, 0, 0, more_a)) if more_a else a, pad(b, (0, more_b)) if more_b else b
