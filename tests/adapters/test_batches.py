"""Groups of a batch, in prefill and in decoding, against values worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from adapters.stacked import IN, LAYERS, OUT, load, meta_of, of_ranks, stand_in
from lorax_async.adapters.batches import (
    AdapterBatchMetadata,
    BatchAdapterWeights,
    BatchLoraWeights,
)
from lorax_async.adapters.batching.rank_segments import RankSegments

TOKENS = [0, 0, 1, 1, 0, 0, 1, 1]


def segments(group: RankSegments) -> tuple[list[int], list[int]]:
    assert group.indices is None
    assert group.segment_starts is not None
    assert group.segment_ends is not None
    return group.segment_starts.tolist(), group.segment_ends.tolist()


def places(group: RankSegments) -> tuple[int, list[int]]:
    assert group.segment_starts is None
    assert group.segment_ends is None
    assert group.indices is not None
    assert len(group.lora_a_ptr) == len(group.lora_b_ptr)
    return len(group.lora_a_ptr), group.indices.tolist()


# -- metadata -------------------------------------------------------------------------------------


def test_metadata_of_tokens() -> None:
    meta = meta_of(TOKENS)
    assert meta.adapter_indices.tolist() == TOKENS
    assert meta.adapter_set == {0, 1}
    assert meta.adapter_segments.tolist() == [0, 2, 4, 6, 8]
    assert meta.adapter_segments.dtype == torch.int32
    assert meta.segment_indices == [0, 1, 0, 1]


def test_metadata_may_be_assigned_to_as_models_do() -> None:
    bounds = torch.tensor([0, 2])
    meta = AdapterBatchMetadata(torch.tensor([3, 3]), {3}, bounds, [3])
    assert meta.adapter_list == []
    meta.adapter_indices, meta.adapter_segments = torch.tensor([3]), torch.tensor([0, 1])
    batch = BatchLoraWeights.load({3: stand_in(8)}, meta, "q_proj", False, None)
    assert batch is not None
    assert places(batch.rank_data[8]) == (1, [0])


# -- prefill --------------------------------------------------------------------------------------


def test_prefill_groups_segments_by_rank() -> None:
    weights = of_ranks(8, 16)
    batch = load(weights, TOKENS, prefill=True)
    assert batch.use_sgmv
    assert batch.rank_data.keys() == {8, 16}
    assert segments(batch.rank_data[8]) == ([0, 4], [2, 6])
    assert segments(batch.rank_data[16]) == ([2, 6], [4, 8])
    for index, group in enumerate(batch.rank_data.values()):
        assert group.lora_a_ptr.tolist() == [weights[index].weights_a.data_ptr()] * 2
        assert group.lora_b_ptr.tolist() == [weights[index].weights_b.data_ptr()] * 2
        assert group.lora_a_ptr.dtype == group.lora_b_ptr.dtype == torch.int64
        assert group.tmp_shrink is None
        assert group.tmp_expand is None


def test_what_belongs_to_the_adapters_is_there_by_index() -> None:
    batch = load(of_ranks(8, 16), TOKENS, prefill=True)
    assert batch.lora_a.keys() == batch.lora_b.keys() == {0, 1}
    assert batch.lora_a[0].shape == (LAYERS, IN, 8)
    assert batch.lora_a[1].shape == (LAYERS, 16, IN)
    assert batch.lora_b[0].shape == (LAYERS, 8, OUT)
    assert batch.lora_b[1].shape == (LAYERS, 16, OUT)
    assert batch.adapter_index_configs == {0: "config 0", 1: "config 1"}
    assert (batch.layer_name, batch.prefill_head_indices) == ("q_proj", None)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_starts_and_ends_have_the_dtype_of_the_bounds(dtype: torch.dtype) -> None:
    bounds = torch.tensor([0, 2], dtype=dtype)
    meta = AdapterBatchMetadata(torch.tensor([0, 0]), {0}, bounds, [0])
    batch = BatchLoraWeights.load(of_ranks(8), meta, "q_proj", True, None)
    assert batch is not None
    starts, ends = batch.rank_data[8].segment_starts, batch.rank_data[8].segment_ends
    assert starts is not None
    assert ends is not None
    assert starts.dtype == ends.dtype == dtype


@pytest.mark.parametrize(
    ("heads", "of_rank_8", "of_rank_16"),
    [
        ([1, 3, 5, 7], ([0, 2], [1, 3]), ([1, 3], [2, 4])),
        ([0, 1, 3, 5, 7], ([0, 3], [2, 4]), ([2, 4], [3, 5])),
        ([1, 7], ([0, 1], [1, 1]), ([1, 1], [1, 2])),  # two segments have no such token
    ],
)
def test_heads_make_segments_over_the_last_tokens(
    heads: list[int],
    of_rank_8: tuple[list[int], list[int]],
    of_rank_16: tuple[list[int], list[int]],
) -> None:
    batch = load(of_ranks(8, 16), TOKENS, prefill=True, heads=heads)
    assert segments(batch.rank_data[8]) == of_rank_8
    assert segments(batch.rank_data[16]) == of_rank_16
    assert batch.prefill_head_indices is not None


# -- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (
            [8, 8, 16],
            {
                8: (4, [0, 0, 1, 1, 0, 0, 1, 1, -1, -1]),
                16: (1, [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0]),
            },
        ),
        (
            [4, 8, 16],
            {
                4: (2, [0, 0, -1, -1, 0, 0, -1, -1, -1, -1]),
                8: (2, [-1, -1, 0, 0, -1, -1, 0, 0, -1, -1]),
                16: (1, [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0]),
            },
        ),
    ],
)
def test_decoding_names_an_address_for_each_token(
    ranks: list[int], expected: dict[int, tuple[int, list[int]]]
) -> None:
    batch = load(of_ranks(*ranks), [*TOKENS, 2, 2], prefill=False)
    assert not batch.use_sgmv
    assert {rank: places(group) for rank, group in batch.rank_data.items()} == expected


def test_decoding_reads_the_transposed_form() -> None:
    weights = of_ranks(8, 16)
    batch = load(weights, TOKENS, prefill=False)
    for index, group in enumerate(batch.rank_data.values()):
        assert group.lora_a_ptr.tolist() == [weights[index].weights_a_t.data_ptr()] * 2
        assert group.lora_b_ptr.tolist() == [weights[index].weights_b_t.data_ptr()] * 2
        assert group.indices is not None
        assert group.indices.dtype == torch.int64
    assert batch.lora_a[0].shape == (LAYERS, IN, 8)


def test_decoding_with_heads_names_an_address_for_each_of_them() -> None:
    batch = load(of_ranks(8, 16), TOKENS, prefill=False, heads=[1, 3, 4])
    assert places(batch.rank_data[8]) == (2, [0, -1, 0])
    assert places(batch.rank_data[16]) == (2, [-1, 0, -1])


@pytest.mark.parametrize(("rank", "by_segment"), [(128, False), (144, True)])
def test_one_rank_above_128_puts_the_batch_into_segments(rank: int, by_segment: bool) -> None:
    batch = load(of_ranks(8, rank), TOKENS, prefill=False)
    assert batch.use_sgmv is by_segment
    assert [group.indices is None for group in batch.rank_data.values()] == [by_segment] * 2


def test_an_adapter_that_no_token_uses_does_not_matter() -> None:
    batch = load(of_ranks(8, 144), [0, 0], prefill=False)
    assert not batch.use_sgmv
    assert batch.rank_data.keys() == {8}
    assert batch.lora_a.keys() == batch.lora_b.keys() == {0}
    assert not batch.has_adapter(1)


# -- who is in, and who is not --------------------------------------------------------------------


@pytest.mark.parametrize("prefill", [True, False])
def test_tokens_without_lora_weights_are_in_no_group(prefill: bool) -> None:
    batch = load({4: stand_in(8)}, [0, 4, 4, 7, 4, 0], prefill=prefill)
    assert batch.rank_data.keys() == {8}
    group = batch.rank_data[8]
    if prefill:
        assert segments(group) == ([1, 4], [3, 5])
    else:
        assert places(group) == (2, [-1, 0, 0, -1, 0, -1])
    assert batch.has_adapter(4)
    assert not batch.has_adapter(0)
    assert not batch.has_adapter(7)


@dataclass
class OtherKind:
    """Not LoRA; as LoRAX's Medusa adapters, it may carry LoRA weights beside its own."""

    lora_weights: object = None


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize(
    "weights",
    [{}, {1: stand_in(8)}, {0: OtherKind()}, {0: None}],
    ids=["nobody's", "another's", "of another kind", "of nobody"],
)
def test_a_batch_without_lora_weights_has_nothing(
    weights: dict[int, object], prefill: bool
) -> None:
    meta = meta_of([0, 0])
    assert BatchLoraWeights.load(weights, meta, "q_proj", prefill, None) is None
    assert BatchLoraWeights.load(of_ranks(8), meta_of([]), "q_proj", prefill, None) is None


def test_lora_weights_beside_others_count() -> None:
    inner = stand_in(8, seed=3)
    batch = BatchLoraWeights.load({0: OtherKind(inner)}, meta_of([0]), "q_proj", True, None)
    assert batch is not None
    assert batch.lora_a[0] is inner.weights_a
    assert batch.adapter_index_configs == {0: "config 3"}


class Group:
    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize(
    ("rank", "layer", "world_size", "answer"),
    [
        (128, "q_proj", 1, True),
        (144, "q_proj", 1, False),
        (256, "q_proj", 2, True),
        (8, "lm_head", 1, False),
    ],
)
def test_can_vectorize(rank: int, layer: str, world_size: int, answer: bool) -> None:
    batch = BatchLoraWeights.load(of_ranks(8, rank), meta_of(TOKENS), layer, True, None)
    assert batch is not None
    assert batch.can_vectorize(Group(world_size)) is answer


def test_the_kind_is_lora() -> None:
    assert BatchLoraWeights.key() == "lora"
    assert issubclass(BatchLoraWeights, BatchAdapterWeights)
    with pytest.raises(TypeError, match="abstract"):
        BatchAdapterWeights()  # type: ignore[abstract]
