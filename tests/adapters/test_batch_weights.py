"""A batch's segments and groups, in prefill and in decoding; and what contradicts itself."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.stacked import (
    IN,
    LAYERS,
    OUT,
    StandIn,
    delta_by_address,
    delta_by_token,
    integers,
    load,
    loaded,
    meta_of,
    of_ranks,
    stand_in,
)
from lorax_async.adapters import (
    AdapterBatchMetadata,
    BatchLoraWeights,
    RankSegments,
    concat_segments,
    find_segments,
)
from lorax_async.errors import UsageError

TOKENS = [0, 0, 1, 1, 0, 0, 1, 1]
Integers = torch.Tensor | list[int]


tokens_of_a_batch = st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 5)), max_size=8).map(
    lambda runs: [index for index, length in runs for _ in range(length)]
)


@pytest.mark.parametrize(
    ("tokens", "bounds", "indices"),
    [
        ([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 1, 1], [0, 3, 5, 10, 12], [0, 1, 2, 1]),
        ([], [0], []),
        ([0], [0, 1], [0]),
        ([7, 7], [0, 2], [7]),
        ([7, 3], [0, 1, 2], [7, 3]),
    ],
)
def test_segments_are_the_runs(tokens: list[int], bounds: list[int], indices: list[int]) -> None:
    assert find_segments(tokens) == (bounds, indices)
    assert find_segments(torch.tensor(tokens)) == (bounds, indices)  # [] is a float tensor
    meta = meta_of(tokens)
    assert meta.adapter_indices.tolist() == tokens
    assert meta.adapter_set == set(indices)
    assert (meta.adapter_segments.tolist(), meta.segment_indices) == (bounds, indices)
    assert meta.adapter_segments.dtype == torch.int32


@given(st.lists(tokens_of_a_batch, max_size=5))
def test_segments_spell_the_tokens_also_when_batches_are_joined(batches: list[list[int]]) -> None:
    together = [token for tokens in batches for token in tokens]
    bounds, indices = find_segments(together)
    runs = [(index, len(list(same))) for index, same in groupby(together)]
    ends = zip(bounds, bounds[1:], strict=False)
    assert [(i, stop - start) for i, (start, stop) in zip(indices, ends, strict=True)] == runs
    assert concat_segments(find_segments(tokens) for tokens in batches) == (bounds, indices)


FIRST = (torch.tensor([0, 1, 4, 7, 8]), [2, 1, 2, 1])
LAST = (torch.tensor([0, 2, 5]), [1, 2])


@pytest.mark.parametrize(
    ("batches", "bounds", "indices"),
    [
        ([FIRST, LAST], [0, 1, 4, 7, 10, 13], [2, 1, 2, 1, 2]),  # and no argument is changed
        ([([0, 2], [5]), ([0, 0, 3, 4], [7, 5, 5])], [0, 6], [5]),  # an empty run, equal ones
        ([], [0], []),
    ],
)
def test_equal_neighbours_are_joined(
    batches: list[tuple[Integers, list[int]]], bounds: list[int], indices: list[int]
) -> None:
    for _ in range(2):
        assert concat_segments(batches) == (bounds, indices)


@pytest.mark.parametrize(
    ("bounds", "indices", "named"),
    [
        ([0, 2], [], r"1 bounds from 0 in ascending order for 0 segments, got \[0, 2\]"),
        ([0], [4], r"2 bounds .* for 1 segments, got \[0\]"),
        ([], [], r"1 bounds .* got \[\]"),
        ([1, 2], [4], r"got \[1, 2\]"),
        ([0, 3, 2], [4, 5], r"got \[0, 3, 2\]; use find_segments"),
        (torch.tensor([[0, 1]]), [4], "expected adapter_segments to be a row of integers"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(
    bounds: Integers, indices: list[int], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        concat_segments([([0, 2], [1]), (bounds, indices)])
    for values in (torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])):
        with pytest.raises(UsageError, match="expected adapter_indices to be a row of integers, g"):
            find_segments(values)


def listed(values: torch.Tensor | None) -> list[int] | None:
    return None if values is None else [int(value) for value in values]


def segments(group: RankSegments) -> tuple[list[int] | None, list[int] | None]:
    assert group.indices is None
    return listed(group.segment_starts), listed(group.segment_ends)


def places(group: RankSegments) -> tuple[int, list[int] | None]:
    assert group.segment_starts is group.segment_ends is None
    assert len(group.lora_a_ptr) == len(group.lora_b_ptr)
    return len(group.lora_a_ptr), listed(group.indices)


@pytest.mark.parametrize("prefill", [True, False])
def test_groups_are_by_rank_and_have_each_adapters_address(prefill: bool) -> None:
    weights = of_ranks(8, 16)
    batch = load(weights, TOKENS, prefill=prefill)
    assert batch.use_sgmv == prefill
    assert list(batch.rank_data) == [8, 16]
    if prefill:
        assert segments(batch.rank_data[8]) == ([0, 4], [2, 6])
        assert segments(batch.rank_data[16]) == ([2, 6], [4, 8])
    for index, group in enumerate(batch.rank_data.values()):
        one = weights[index]
        a, b = (one.weights_a, one.weights_b) if prefill else (one.weights_a_t, one.weights_b_t)
        assert group.lora_a_ptr.tolist() == [a.data_ptr()] * 2
        assert group.lora_b_ptr.tolist() == [b.data_ptr()] * 2
        assert group.lora_a_ptr.dtype == group.lora_b_ptr.dtype == torch.int64
        assert group.tmp_shrink is group.tmp_expand is None
    assert batch.lora_a == {i: one.weights_a for i, one in weights.items()}
    assert batch.lora_b == {i: one.weights_b for i, one in weights.items()}
    assert batch.adapter_index_configs == {0: "config 0", 1: "config 1"}
    assert (batch.layer_name, batch.prefill_head_indices) == ("q_proj", None)


@pytest.mark.parametrize(
    ("heads", "of_rank_8", "of_rank_16"),
    [
        ([1, 3, 5, 7], ([0, 2], [1, 3]), ([1, 3], [2, 4])),
        ([0, 1, 3, 5, 7], ([0, 3], [2, 4]), ([2, 4], [3, 5])),
        ([1, 7], ([0, 1], [1, 1]), ([1, 1], [1, 2])),  # two segments have no such token
        ([], ([0, 0], [0, 0]), ([0, 0], [0, 0])),
    ],
)
def test_heads_make_segments_over_the_last_tokens(
    heads: list[int],
    of_rank_8: tuple[list[int], list[int]],
    of_rank_16: tuple[list[int], list[int]],
) -> None:
    batch = load(of_ranks(8, 16), TOKENS, heads=heads)
    assert segments(batch.rank_data[8]) == of_rank_8
    assert segments(batch.rank_data[16]) == of_rank_16
    assert batch.prefill_head_indices is not None


@pytest.mark.parametrize(
    ("ranks", "heads", "expected"),
    [
        ([8, 8, 16], None, {8: (4, [0, 0, 1, 1, 0, 0, 1, 1, -1, -1]), 16: (1, [-1] * 8 + [0, 0])}),
        ([8, 16, 8], [1, 3, 4], {8: (3, [0, -1, 0]), 16: (2, [-1, 0, -1])}),
    ],
)
def test_decoding_names_an_address_for_each_token(
    ranks: list[int], heads: list[int] | None, expected: dict[int, tuple[int, list[int]]]
) -> None:
    batch = load(of_ranks(*ranks), [*TOKENS, 2, 2], prefill=False, heads=heads)
    assert not batch.use_sgmv
    assert {rank: places(group) for rank, group in batch.rank_data.items()} == expected


@pytest.mark.parametrize(("rank", "by_segment"), [(128, False), (144, True)])
def test_one_rank_above_128_puts_the_batch_into_segments(rank: int, by_segment: bool) -> None:
    """An adapter that no token uses does not matter."""
    weights = of_ranks(8, rank)
    batch = load(weights, TOKENS, prefill=False)
    assert batch.use_sgmv is by_segment
    assert [group.indices is None for group in batch.rank_data.values()] == [by_segment] * 2
    for size in (1, 2):
        group: Any = SimpleNamespace(size=lambda size=size: size)
        assert batch.can_vectorize(group) is (not by_segment or size == 2)
    other = load(weights, [0, 0], prefill=False)
    assert (other.use_sgmv, other.key()) == (False, "lora")
    assert other.rank_data.keys() == {8}
    assert other.lora_a.keys() == other.lora_b.keys() == {0}
    assert [other.has_adapter(index) for index in (0, 1)] == [True, False]
    head = BatchLoraWeights.load(weights, meta_of(TOKENS), "lm_head", True, None)
    assert head is not None
    assert not head.can_vectorize(SimpleNamespace(size=lambda: 8))


@dataclass
class OtherKind:
    """Not LoRA; as LoRAX's Medusa adapters, it may carry LoRA weights beside its own."""

    lora_weights: object = None


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("prefill", [True, False])
def test_tokens_without_lora_weights_are_in_no_group(prefill: bool, carried: bool) -> None:
    one = stand_in(8, seed=3)
    weights: Mapping[int, object] = {4: OtherKind(one) if carried else one, 7: OtherKind()}
    batch = load(weights, [0, 4, 4, 7, 4, 0], prefill=prefill)
    assert batch.rank_data.keys() == {8}
    if prefill:
        assert segments(batch.rank_data[8]) == ([1, 4], [3, 5])
    else:
        assert places(batch.rank_data[8]) == (2, [-1, 0, 0, -1, 0, -1])
    assert [batch.has_adapter(index) for index in (0, 4, 7)] == [False, True, False]
    assert batch.lora_a[4] is one.weights_a
    assert batch.adapter_index_configs == {4: "config 3"}


@pytest.mark.parametrize("prefill", [True, False])
def test_a_batch_without_lora_weights_has_nothing(prefill: bool) -> None:
    for weights in ({}, {1: stand_in(8)}, {0: OtherKind()}, {0: None}):
        assert loaded(weights, [0, 0], prefill=prefill) is None
    assert loaded(of_ranks(8), [], prefill=prefill) is None


class Forgetful(StandIn):
    """Makes its tensors anew whenever asked."""

    made: list[weakref.ref[torch.Tensor]]

    def __getattribute__(self, name: str) -> object:
        value = super().__getattribute__(name)
        if not isinstance(value, torch.Tensor):
            return value
        copy = value.clone()
        super().__getattribute__("made").append(weakref.ref(copy))
        return copy


@pytest.mark.parametrize("prefill", [True, False])
def test_what_an_address_names_stays_as_long_as_the_batch(prefill: bool) -> None:
    one = Forgetful(integers(1, LAYERS, IN, 8), integers(2, LAYERS, 8, OUT))
    one.made = []
    batch = load({0: one}, [0, 0], prefill=prefill)
    x, made = integers(3, 2, IN), list(one.made)
    assert torch.equal(delta_by_address(batch, x, 1), delta_by_token({0: one}, [0, 0], x, 1))
    del batch
    gc.collect()
    assert made
    assert not [ref for ref in made if ref() is not None]


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_metadata_may_be_assigned_to_and_be_tensors(prefill: bool, dtype: torch.dtype) -> None:
    """A tensor's elements are equal to an adapter's index and not found by it."""
    meta = AdapterBatchMetadata(torch.tensor([3]), {3}, torch.tensor([0, 1]), [3])
    assert meta.adapter_list == []
    meta.adapter_indices = torch.tensor([1, 1, 0])
    meta.adapter_segments = torch.tensor([0, 2, 3], dtype=dtype)
    meta.segment_indices = torch.tensor([1, 0])  # type: ignore[assignment]
    weights = of_ranks(8, 16)
    batch = BatchLoraWeights.load(weights, meta, "q_proj", prefill, None)
    assert batch is not None
    assert list(batch.rank_data) == [16, 8]
    assert batch.has_adapter(0)
    starts, ends = batch.rank_data[8].segment_starts, batch.rank_data[8].segment_ends
    assert {None if one is None else one.dtype for one in (starts, ends)} == {
        dtype if prefill else None
    }
    x = integers(3, 3, IN)
    assert torch.equal(delta_by_address(batch, x, 1), delta_by_token(weights, [1, 1, 0], x, 1))


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize(
    ("tokens", "bounds", "indices", "named"),
    [
        ([0, 0], [0, 3], [0], r"indices \(2 tokens\) and the segments \(up to 3\) name different"),
        ([0, 1], [0, 2], [0], "name different adapters for a token"),
        ([0, 0], [0, 2, 1], [0, 1], r"ascending order for 2 segments, got \[0, 2, 1\]"),
        ([0, 0], [0, 1 << 62], [0], r"adapter_indices \(2 tokens\) and the segments \(up to 46"),
        ([0, 0], [0, 1], [0], r"adapter_indices \(2 tokens\) and the segments \(up to 1\)"),
    ],
)
def test_metadata_must_not_contradict_itself(
    tokens: list[int], bounds: list[int], indices: list[int], named: str, prefill: bool
) -> None:
    meta = AdapterBatchMetadata(torch.tensor(tokens), {0}, torch.tensor(bounds), indices)
    with pytest.raises(UsageError, match=named):
        BatchLoraWeights.load(of_ranks(8, 8), meta, "q_proj", prefill, None)


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("heads", [[4, 2], [2, 1, 4], [-1, 2], [2, 8]])
def test_heads_must_be_tokens_in_order(heads: list[int], prefill: bool) -> None:
    with pytest.raises(UsageError, match=r"prefill_head_indices .* from 0 to 7, got \["):
        load(of_ranks(8, 8), TOKENS, prefill=prefill, heads=heads)


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("where", ["turned", "meta"])
def test_weights_that_an_address_does_not_describe_are_refused(prefill: bool, where: str) -> None:
    """Not contiguous, or on another device than the first."""
    weights = of_ranks(8, 8)
    one = weights[1]
    if where == "meta":
        one.weights_b, one.weights_b_t = one.weights_b.to("meta"), one.weights_b_t.to("meta")
    else:
        one.weights_b = one.weights_b_t.transpose(1, 2)
        one.weights_b_t = integers(0, LAYERS, 8, OUT).transpose(1, 2)
    named = f"adapter 1 contiguous on cpu, got .* on {'meta' if where == 'meta' else 'cpu'}"
    with pytest.raises(UsageError, match=named):
        load(weights, [0, 1], prefill=prefill)
