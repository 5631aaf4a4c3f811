"""What one batch needs of the adapters it uses, for one layer type, in LoRAX's form.

Names and signatures are those of `lorax_server.adapters.weights` and `lorax_server.adapters.lora`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeGuard

import torch
from torch import Tensor

from lorax_async.adapters.batching.rank_segments import (
    RankSegments,
    Stacked,
    decode_stacks,
    group_by_segment,
    group_by_token,
    prefill_stacks,
)
from lorax_async.adapters.batching.segments import (
    Integers,
    Runs,
    find_segments,
    runs_of,
    to_list,
)
from lorax_async.errors import UsageError

LORA = "lora"
LM_HEAD = "lm_head"
MAX_DECODE_RANK = 128
"""Adapters of a higher local rank are applied by segment, also when a batch decodes."""


class Group(Protocol):
    """Of `torch.distributed.ProcessGroup`, what is asked here."""

    def size(self) -> int:
        """How many processes share a layer."""


@dataclass(slots=True, eq=False)
class AdapterBatchMetadata:
    """Which adapter each token of a batch uses. Not frozen: LoRAX's models assign to it.

    Attributes
    ----------
    adapter_indices
        `[tokens]` of integers, the adapter of each token.
    adapter_set
        All of them, once.
    adapter_segments
        `[segments + 1]` of integers, the bounds of the runs of tokens with one adapter.
    segment_indices
        The adapter of each segment.
    adapter_list
        The adapter of each request. Only carried: LoRAX gives it, and its punica wrapper reads it.
    """

    adapter_indices: Tensor
    adapter_set: set[int]
    adapter_segments: Tensor
    segment_indices: list[int]
    adapter_list: list[int] = field(default_factory=list)

    @classmethod
    def from_indices(cls, adapter_indices: Tensor) -> Self:
        """All of it from the adapter of each token, `[tokens]`; bounds are int32, on its device."""
        bounds, indices = find_segments(adapter_indices)
        segments = torch.tensor(bounds, dtype=torch.int32, device=adapter_indices.device)
        return cls(adapter_indices, set(indices), segments, indices)


class BatchAdapterWeights(ABC):
    """What one kind of adapter gives to one batch, for one layer type."""

    @abstractmethod
    def has_adapter(self, adapter_index: int) -> bool:
        """Whether a token of this batch uses this adapter, and it has weights of this kind."""

    @classmethod
    @abstractmethod
    def key(cls) -> str:
        """The name of the kind."""

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
        """For a batch, out of a layer type's adapters; None where it uses none of the kind."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchLoraWeights(BatchAdapterWeights):
    """The LoRA weights that one batch uses in the layers of one type.

    Attributes
    ----------
    lora_a, lora_b
        `weights_a` and `weights_b` by adapter index.
    adapter_index_configs
        The adapters' configs by adapter index.
    rank_data
        By local rank, in the order in which the batch first uses them. A token whose adapter has
        no LoRA weights is in no group.
    use_sgmv
        Whether the groups are by segment (prefill, or a local rank above 128) or by token.
    layer_name
        The layer type.
    prefill_head_indices
        The tokens that the layer gets, None for all of them.
    adapters
        The weights themselves by adapter index.
    runs
        Which rows use which adapter, after `prefill_head_indices`.
    pointed
        The tensors whose addresses are in `rank_data`: they stay for as long as this does.
    """

    lora_a: dict[int, Tensor]
    lora_b: dict[int, Tensor]
    adapter_index_configs: dict[int, Any]
    rank_data: dict[int, RankSegments]
    use_sgmv: bool
    layer_name: str
    prefill_head_indices: Integers | None
    adapters: dict[int, Stacked] = field(default_factory=dict)
    runs: Runs = field(default_factory=Runs)
    pointed: tuple[Tensor, ...] = ()

    def has_adapter(self, adapter_index: int) -> bool:
        return adapter_index in self.adapter_index_configs

    def can_vectorize(self, pg: Group) -> bool:
        """Whether LoRAX would use one kernel for all adapters, rather than a loop over them."""
        ranks_fit = all(rank // pg.size() <= MAX_DECODE_RANK for rank in self.rank_data)
        return ranks_fit and self.layer_name != LM_HEAD

    @classmethod
    def key(cls) -> str:
        return LORA

    @classmethod
    def load(
        cls,
        adapter_weights: Mapping[int, object],
        meta: AdapterBatchMetadata,
        layer_name: str,
        prefill: bool,
        prefill_head_indices: Integers | None,
    ) -> Self | None:
        """As LoRAX's, by adapter index; None if no token's adapter has LoRA weights.

        With `prefill_head_indices` (ascending) the rows of the layer are these tokens only, in
        prefill and in decoding. Copies the metadata to the host.

        Raises UsageError for metadata that contradicts itself, and for weights whose addresses a
        kernel could not use.
        """
        indices = to_list("segment_indices", meta.segment_indices)
        adapters = _lora_adapters(adapter_weights, indices)
        if not adapters:
            return None
        ranks = {index: adapter.lora_a_r for index, adapter in adapters.items()}
        by_segment = prefill or max(ranks.values()) > MAX_DECODE_RANK
        runs = _runs(meta)
        if prefill_head_indices is not None:
            runs = runs.over(prefill_head_indices)
        if by_segment:
            stacks = prefill_stacks(adapters)
            rank_data = group_by_segment(ranks, runs, stacks, meta.adapter_segments.dtype)
        else:
            stacks = decode_stacks(adapters)
            rank_data = group_by_token(ranks, runs, stacks)
        return cls(
            lora_a={index: adapter.weights_a for index, adapter in adapters.items()},
            lora_b={index: adapter.weights_b for index, adapter in adapters.items()},
            adapter_index_configs={i: adapter.adapter_config for i, adapter in adapters.items()},
            rank_data=rank_data,
            use_sgmv=by_segment,
            layer_name=layer_name,
            prefill_head_indices=prefill_head_indices,
            adapters=adapters,
            runs=runs,
            pointed=tuple(tensor for pair in stacks.values() for tensor in pair),
        )


def _lora_adapters(weights: Mapping[int, object], indices: Sequence[int]) -> dict[int, Stacked]:
    """Those that the batch uses. LoRAX's own adapters may carry theirs as `lora_weights`."""
    used = {index: weights[index] for index in indices if index in weights}
    inner = {index: getattr(one, "lora_weights", one) for index, one in used.items()}
    return {index: one for index, one in inner.items() if _is_stacked(one)}


def _is_stacked(weights: object) -> TypeGuard[Stacked]:
    return hasattr(weights, "lora_a_r")


def _runs(meta: AdapterBatchMetadata) -> Runs:
    """Checked, for a contradiction would apply a stranger's adapter to a token."""
    runs = runs_of(meta.adapter_segments, meta.segment_indices)
    tokens = to_list("adapter_indices", meta.adapter_indices)
    # Their number first: bounds that are wrong may be of any size.
    if runs.bounds[-1] != len(tokens) or runs.by_row() != tokens:
        raise UsageError(
            f"adapter_indices ({len(tokens)} tokens) and the segments (up to "
            f"{runs.bounds[-1]}) name different adapters for a token; make both from the same "
            "tokens, with AdapterBatchMetadata.from_indices"
        )
    return runs
