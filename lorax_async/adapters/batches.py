"""A batch of adapters: its segments and addresses, and LoRAX's batch on this package's kernels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby, pairwise, repeat
from operator import itemgetter
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from lorax_async.errors import UsageError
from lorax_async.planning.batch_plan import BASE_ONLY, plan_rows
from lorax_kernels import Operands, Plan, apply

LORA = "lora"
MAX_DECODE_RANK = 128
"""Adapters of a higher local rank are applied by segment, also when a batch decodes."""

Integers = Tensor | Sequence[int]
"""A tensor `[n]` of integers on any device, or a plain sequence."""

Stack = tuple[Tensor, Tensor]
"""A and B of all layers of one type."""


class Runs:
    """Run i is the rows `bounds[i]` to `bounds[i + 1]`, not included, of adapter `indices[i]`.

    A run may be empty, and neighbours may share an adapter. Raise `UsageError` for other bounds.
    """

    def __init__(self, bounds: Integers = (0,), indices: Integers = ()) -> None:
        self.bounds = to_list("adapter_segments", bounds)
        self.indices = to_list("segment_indices", indices)
        self.lengths = [stop - start for start, stop in pairwise(self.bounds)]
        count = len(self.indices)
        if len(self.bounds) != count + 1 or self.bounds[0] != 0 or min(self.lengths, default=0) < 0:
            raise UsageError(
                f"expected adapter_segments of {count + 1} bounds from 0 in ascending order for"
                f" {count} segments, got {self.bounds}; use find_segments"
            )

    def by_row(self) -> list[int]:
        """Return the adapter index of each row."""
        return list(chain.from_iterable(map(repeat, self.indices, self.lengths)))

    @classmethod
    def of(cls, meta: AdapterBatchMetadata, heads: Integers | None) -> Self:
        """Return a batch's runs, over the rows `heads` only if given; one without a head is empty.

        Raise `UsageError` for metadata that contradicts itself, which would apply another user's
        adapter to a token, and for heads that do not ascend: a run's rows would be apart.
        """
        runs = cls(meta.adapter_segments, meta.segment_indices)
        count, tokens = runs.bounds[-1], to_list("adapter_indices", meta.adapter_indices)
        # Compare the number first: wrong bounds may be of any size.
        if count != len(tokens) or tokens != runs.by_row():
            raise UsageError(
                f"adapter_indices ({len(tokens)} tokens) and the segments (up to {count}) name"
                " different adapters for a token; make both from the same tokens, with"
                " AdapterBatchMetadata.from_indices"
            )
        if heads is None:
            return runs
        rows = to_list("prefill_head_indices", heads)
        if rows != sorted(rows) or (rows and not 0 <= rows[0] <= rows[-1] < count):
            raise UsageError(
                f"expected prefill_head_indices in ascending order and from 0 to {count - 1}, got"
                f" {rows}; give each request's last token, in the order of the batch"
            )
        return cls([bisect_left(rows, bound) for bound in runs.bounds], runs.indices)


def find_segments(adapter_indices: Integers) -> tuple[list[int], list[int]]:
    """Return bounds and adapters of the longest runs of tokens with one adapter.

    `adapter_indices` `[tokens]` is the adapter of each token. Segment i is the tokens `bounds[i]`
    to `bounds[i + 1]`, not included. Raise `UsageError` for anything but a row of integers.
    """
    bounds, indices = [0], list[int]()
    for index, same in groupby(to_list("adapter_indices", adapter_indices)):
        bounds.append(bounds[-1] + len(list(same)))
        indices.append(index)
    return bounds, indices


def concat_segments(
    batches: Iterable[tuple[Integers, Sequence[int]]],
) -> tuple[list[int], list[int]]:
    """Return the segments of concatenated batches, equal neighbours joined; as `find_segments`."""
    runs = [Runs(*batch) for batch in batches]
    pieces = ((i, n) for run in runs for i, n in zip(run.indices, run.lengths, strict=True) if n)
    joined_bounds, joined = [0], list[int]()
    for index, same in groupby(pieces, key=itemgetter(0)):
        joined_bounds.append(joined_bounds[-1] + sum(length for _, length in same))
        joined.append(index)
    return joined_bounds, joined


def to_list(name: str, values: Integers) -> list[int]:
    """Copy `values` to the host. Raise `UsageError` unless they are a row of integers."""
    if not isinstance(values, Tensor):
        return list(values)
    fractions = values.is_floating_point() or values.is_complex()
    if values.dim() != 1 or (fractions and values.numel()):
        raise UsageError(
            f"expected {name} to be a row of integers, got {list(values.shape)} in {values.dtype}"
        )
    return cast(list[int], values.tolist())


@dataclass(slots=True, eq=False)
class AdapterBatchMetadata:
    """Which adapter each token of a batch uses. Not frozen: LoRAX's models assign to it."""

    adapter_indices: Tensor  # [tokens]: the adapter of each
    adapter_set: set[int]
    adapter_segments: Tensor  # [segments + 1]: the bounds of the runs of one adapter
    segment_indices: list[int]  # the adapter of each segment
    adapter_list: list[int] = field(default_factory=list)  # only carried, for LoRAX's punica

    @classmethod
    def from_indices(cls, adapter_indices: Tensor) -> Self:
        """Make the metadata from the adapter of each token; bounds are int32 on its device."""
        bounds, indices = find_segments(adapter_indices)
        segments = torch.tensor(bounds, dtype=torch.int32, device=adapter_indices.device)
        return cls(adapter_indices, set(indices), segments, indices)


@dataclass(slots=True, eq=False)
class RankSegments:
    """The segments of a batch whose adapters have one local rank, for kernels that take addresses.

    By segment (`segment_starts`): A and B are as in `weights_a` and `weights_b`. By token
    (`indices`): as in `weights_a_t` and `weights_b_t`.
    """

    rank: int
    lora_a_ptr: Tensor  # int64 [n]: for each of n segments the address of its adapter's weights
    lora_b_ptr: Tensor
    tmp_shrink: Tensor | None = None  # by segment, what `BatchLoraWeights.get_tmp_tensors` returns
    tmp_expand: Tensor | None = None
    segment_starts: Tensor | None = None  # [n] in the dtype of adapter_segments
    segment_ends: Tensor | None = None
    indices: Tensor | None = None  # int64 [rows]: which of the n addresses a row uses, -1 for none


class BatchAdapterWeights(ABC):
    """The weights of one kind of adapter in one batch, for one layer type."""

    @abstractmethod
    def has_adapter(self, adapter_index: int) -> bool:
        """Return whether the batch uses this adapter and it has weights of this kind."""

    @classmethod
    @abstractmethod
    def key(cls) -> str:
        """Return the name of the kind."""

    @classmethod
    @abstractmethod
    def load(
        cls,
        adapter_weights: Mapping[int, object],
        meta: AdapterBatchMetadata,
        layer_name: str,
        prefill: bool,
        prefill_head_indices: Integers | None,
    ) -> Self | None:
        """Make the weights of a layer type; return None if the batch uses none of this kind."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchLoraWeights(BatchAdapterWeights):
    """The LoRA weights that one batch uses in the layers of one type, by adapter index."""

    lora_a: dict[int, Tensor]
    lora_b: dict[int, Tensor]
    adapter_index_configs: dict[int, Any]
    rank_data: dict[int, RankSegments]  # by local rank; tokens without weights are in no group
    use_sgmv: bool  # groups are by segment (prefill, or a local rank above 128), else by token
    layer_name: str
    prefill_head_indices: Integers | None  # the tokens that the layer gets, None for all
    adapters: dict[int, Any] = field(default_factory=dict)
    runs: Runs = field(default_factory=Runs)  # of rows, after prefill_head_indices
    stacks: dict[int, Stack] = field(default_factory=dict)  # keeps what rank_data addresses

    def has_adapter(self, adapter_index: int) -> bool:
        return adapter_index in self.adapter_index_configs

    def can_vectorize(self, pg: Any) -> bool:
        """Return whether LoRAX would use one kernel for all adapters of this process group."""
        ranks_fit = all(rank // pg.size() <= MAX_DECODE_RANK for rank in self.rank_data)
        return ranks_fit and self.layer_name != "lm_head"

    @classmethod
    def key(cls) -> str:
        return LORA

    @classmethod
    def get_tmp_tensors(  # the arguments are for classes that override it
        cls,
        nsegments: int,  # noqa: ARG003
        lora_rank: int,  # noqa: ARG003
        device: torch.device,  # noqa: ARG003
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the scratch memory of shrink and expand for one group of segments.

        The kernels here need none. Override it for kernels that do, as LoRAX's punica.
        """
        return None, None

    @classmethod
    def load(
        cls,
        adapter_weights: Mapping[int, object],
        meta: AdapterBatchMetadata,
        layer_name: str,
        prefill: bool,
        prefill_head_indices: Integers | None,
    ) -> Self | None:
        """Make the weights from `LoraWeights`; return None if no token's adapter has any.

        With `prefill_head_indices` (ascending) the rows of the layer are these tokens only. Raise
        `UsageError` for metadata that contradicts itself, and for weights whose addresses a kernel
        could not use.
        """
        adapters: dict[int, Any] = {}
        for index in to_list("segment_indices", meta.segment_indices):
            # LoRAX's other kinds may carry theirs as `lora_weights`.
            found = adapter_weights.get(index)
            weights = getattr(found, "lora_weights", found)
            if hasattr(weights, "lora_a_r"):
                adapters[index] = weights
        if not adapters:
            return None
        runs = Runs.of(meta, prefill_head_indices)
        by_segment = prefill or any(one.lora_a_r > MAX_DECODE_RANK for one in adapters.values())
        stacks = stacks_of(adapters, turned=not by_segment)
        places: dict[int, list[int]] = {}
        for place, index in enumerate(runs.indices):
            if index in adapters:
                places.setdefault(adapters[index].lora_a_r, []).append(place)
        dtype = meta.adapter_segments.dtype if by_segment else None
        return cls(
            lora_a={index: one.weights_a for index, one in adapters.items()},
            lora_b={index: one.weights_b for index, one in adapters.items()},
            adapter_index_configs={i: one.adapter_config for i, one in adapters.items()},
            rank_data={
                rank: cls._group(rank, runs, at, stacks, dtype) for rank, at in places.items()
            },
            use_sgmv=by_segment,
            layer_name=layer_name,
            prefill_head_indices=prefill_head_indices,
            adapters=adapters,
            runs=runs,
            stacks=stacks,
        )

    @classmethod
    def _group(
        cls,
        rank: int,
        runs: Runs,
        places: Sequence[int],
        stacks: Mapping[int, Stack],
        dtype: torch.dtype | None,
    ) -> RankSegments:
        """Make the group of the runs at `places`: by segment, bounds in `dtype`, or by token."""
        used = [runs.indices[place] for place in places]
        device = stacks[used[0]][0].device
        addresses = {index: [part.data_ptr() for part in stacks[index]] for index in used}
        a_ptr, b_ptr = torch.tensor(
            [addresses[index] for index in used], device=device
        ).T.contiguous()
        bounds = [(runs.bounds[place], runs.bounds[place + 1]) for place in places]
        if dtype is not None:
            starts, ends = torch.tensor(bounds, dtype=dtype, device=device).T.contiguous()
            scratch = cls.get_tmp_tensors(len(used), rank, device)
            return RankSegments(rank, a_ptr, b_ptr, *scratch, starts, ends)
        rows = [-1] * runs.bounds[-1]
        first: dict[int, int] = {}
        for at, (index, (start, stop)) in enumerate(zip(used, bounds, strict=True)):
            rows[start:stop] = [first.setdefault(index, at)] * (stop - start)
        indices = torch.tensor(rows, dtype=torch.int64, device=device)
        return RankSegments(rank, a_ptr, b_ptr, indices=indices)


def stacks_of(adapters: Mapping[int, Any], *, turned: bool) -> dict[int, Stack]:
    """Return the weights for kernels by token (`turned`: transposed) or by segment."""
    stacks = {
        index: (one.weights_a_t, one.weights_b_t) if turned else (one.weights_a, one.weights_b)
        for index, one in adapters.items()
    }
    device = next(iter(stacks.values()))[0].device
    for index, pair in stacks.items():
        for part in pair:
            if part.device != device or not part.is_contiguous():
                raise UsageError(
                    f"expected the weights of adapter {index} contiguous on {device}, got"
                    f" {list(part.shape)} with strides {part.stride()} on {part.device}"
                )
    return stacks


class StackedTables:
    """`lorax_kernels.Tables` over one batch's adapters: a row per layer, a column per adapter.

    A is `[layers, r, in]` and B `[layers, out, r]`, each layer contiguous. The scale is 1
    everywhere, for `LoraWeights` has it in B. The tensors belong to this batch, so no captured CUDA
    graph may use them.
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
    # The weights in place; only a rank that is not a multiple of 8 is copied, padded with zeros.
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
        kinds, parts = [], []
        for index, (a, b) in whole.items():
            local, rank = a.shape[1], b.shape[2]
            if world_size < 1 or rank not in (local, local * world_size):
                raise UsageError(
                    f"A of adapter {index} has rank {local} and B has {rank}, which is not a share"
                    f" of one in {world_size} processes; load the weights for this world size, and"
                    " give it to Bridge.of"
                )
            kinds.append((len(a), a.shape[2], b.shape[1], a.dtype, b.dtype))
            if kinds[-1] != kinds[0]:  # kernels need them equal for all adapters of a layer
                raise UsageError(
                    f"adapter {index} has (layers, in, out, dtypes) {kinds[-1]}, the first of this"
                    f" batch {kinds[0]}; load all of them for the same layers"
                )
            parts.append(rank // local)
            if parts[-1] != parts[0]:
                raise UsageError(
                    f"A of adapter {index} has 1/{parts[-1]} of its rank, that of the first of this"
                    f" batch 1/{parts[0]}; load all of them for the same layer type"
                )
        stacks = [_pad(a, b) for a, b in whole.values()]
        slots = {index: slot for slot, index in enumerate(whole)}
        rows = plan_rows([slots.get(i, BASE_ONLY) for i in batch.runs.indices], batch.runs.lengths)
        plan = Plan.from_segments(
            rows.bounds,
            rows.slots,
            device=stacks[0][0].device,
            max_rank=max(rank for a, b in stacks for rank in (a.shape[1], b.shape[2])),
        )
        local_ranks = [a.shape[1] for a, _ in whole.values()]
        return cls(plan, stacks, local_ranks, world_size, parts[0])

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
        """Per adapter its A, and as B an identity `[layers, width, rank]`."""
        columns = list[Stack]()
        for a, _ in self.stacks:
            identity = torch.eye(self.width, a.shape[1], dtype=a.dtype, device=a.device)
            columns.append((a, identity.expand(len(a), -1, -1)))
        return StackedTables(columns)

    @cached_property
    def _expanding(self) -> StackedTables:
        """Per adapter its B, and as A a selection of its columns of all parts.

        A part has `width` columns, of which an adapter of a lower rank uses only the first.
        """
        columns = list[Stack]()
        for (_, b), rank in zip(self.stacks, self.local_ranks, strict=True):
            at = torch.arange(self.parts * rank, device=b.device)
            choice = b.new_zeros(b.shape[2], self.parts * self.width)
            choice[at, at // rank * self.width + at % rank] = 1
            columns.append((choice.expand(len(b), -1, -1), b))
        return StackedTables(columns)


def _pad(a: Tensor, b: Tensor) -> Stack:
    """Pad the ranks to multiples of 8, which the kernels' tiles need."""
    more_a, more_b = -a.shape[1] % 8, -b.shape[2] % 8
    return pad(a, (0, 0, 0, more_a)) if more_a else a, pad(b, (0, more_b)) if more_b else b
