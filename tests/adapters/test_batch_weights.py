"""Batches in LoRAX's form: segments, groups of addresses, and bridges to the kernels."""

import ctypes
import gc
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorax_async.adapters import batches
from lorax_async.adapters.batches import AdapterBatchMetadata, BatchLoraWeights, Bridge
from lorax_async.adapters.layers import padded_rank
from lorax_async.errors import IncompatibleAdapterError, UsageError

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
    return {i: stand_in(1, seed=i, local_rank=rank) for i, rank in enumerate(ranks)}


def meta_of(tokens: list[int]) -> AdapterBatchMetadata:
    return AdapterBatchMetadata.from_indices(torch.tensor(tokens, dtype=torch.int64))


def loaded(
    weights: Mapping[int, object], tokens: list[int], prefill: bool = True, heads: Any = None
) -> BatchLoraWeights | None:
    chosen = None if heads is None else torch.tensor(heads, dtype=torch.int64)
    return BatchLoraWeights.load(weights, meta_of(tokens), "q_proj", prefill, chosen)


def load(weights: Mapping[int, object], tokens: list[int], **options: Any) -> BatchLoraWeights:
    batch = loaded(weights, tokens, **options)
    assert batch is not None
    return batch


def follow(address: int, shape: tuple[int, ...]) -> Tensor:
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


def delta_by_token(weights: Any, tokens: list[int], x: Tensor, layer: int) -> Tensor:
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
        return self.tokens if self.heads is None else [self.tokens[at] for at in self.heads]


@st.composite
def cases(draw: st.DrawFn, ranks: st.SearchStrategy[int]) -> Case:
    lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=8)
    tokens = [index for index, length in draw(lengths) for _ in range(length)]
    some = st.lists(st.integers(0, len(tokens) - 1), unique=True).map(sorted)
    rank_of = draw(st.dictionaries(st.integers(0, 5), ranks, min_size=1, max_size=5))
    heads, prefill = draw(st.none() | some), draw(st.booleans())
    return Case(rank_of, tokens, heads, prefill, draw(st.integers(0, LAYERS - 1)))


TOKENS = [0, 0, 1, 1, 0, 0, 1, 1]
tokens_of_a_batch = st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 5)), max_size=8).map(
    lambda runs: [index for index, length in runs for _ in range(length)]
)


def test_segments_are_the_runs() -> None:
    for tokens, bounds, indices in [
        ([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 1, 1], [0, 3, 5, 10, 12], [0, 1, 2, 1]),
        ([], [0], []),
        ([0], [0, 1], [0]),
        ([7, 7], [0, 2], [7]),
        ([7, 3], [0, 1, 2], [7, 3]),
    ]:
        for row in (tokens, torch.tensor(tokens)):  # [] is a float tensor
            assert batches.find_segments(row) == (bounds, indices)
        meta = meta_of(tokens)
        assert meta.adapter_indices.tolist() == tokens
        assert meta.adapter_set == set(indices)
        assert (meta.adapter_segments.tolist(), meta.segment_indices) == (bounds, indices)
        assert meta.adapter_segments.dtype == torch.int32
    first, last = (torch.tensor([0, 1, 4, 7]), [2, 1, 2]), (torch.tensor([0, 2, 5]), [2, 1])
    assert batches.concat_segments([first, last]) == ([0, 1, 4, 9, 12], [2, 1, 2, 1])
    long = 1 << 64  # more tokens than an iterator counts
    joined = batches.concat_segments([([0, long], [5]), ([0, 0, 3, 4], [7, 5, 5])])
    assert joined == ([0, long + 4], [5])


@given(st.lists(tokens_of_a_batch, max_size=5))
def test_segments_spell_the_tokens_also_when_batches_are_joined(given: list[list[int]]) -> None:
    together = [token for tokens in given for token in tokens]
    bounds, indices = batches.find_segments(together)
    runs = [(index, len(list(same))) for index, same in groupby(together)]
    ends = zip(bounds, bounds[1:], strict=False)
    assert [(i, stop - start) for i, (start, stop) in zip(indices, ends, strict=True)] == runs
    joined = batches.concat_segments(batches.find_segments(tokens) for tokens in given)
    assert joined == (bounds, indices)


def test_bounds_that_do_not_fit_are_refused() -> None:
    for bounds, indices, named in [
        ([0, 2], [], r"1 bounds from 0 in ascending order for 0 segments, got \[0, 2\]"),
        ([0], [4], r"2 bounds .* for 1 segments, got \[0\]"),
        ([], [], r"1 bounds .* got \[\]"),
        ([1, 2], [4], r"got \[1, 2\]"),
        ([0, 3, 2], [4, 5], r"got \[0, 3, 2\]; use find_segments"),
    ]:
        with pytest.raises(UsageError, match=named):
            batches.concat_segments([([0, 2], [1]), (bounds, indices)])
    with pytest.raises(UsageError, match="adapter_segments to be a row of integers"):
        batches.concat_segments([(torch.tensor([[0, 1]]), [4])])
    for values in (torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])):
        with pytest.raises(UsageError, match="adapter_indices to be a row of integers, g"):
            batches.find_segments(values)


def segments(group: Any) -> tuple[list[int], list[int]]:
    assert group.indices is None
    return group.segment_starts.tolist(), group.segment_ends.tolist()


def places(group: Any) -> tuple[int, list[int]]:
    assert group.segment_starts is group.segment_ends is None
    assert len(group.lora_a_ptr) == len(group.lora_b_ptr)
    return len(group.lora_a_ptr), group.indices.tolist()


class WithScratch(BatchLoraWeights):
    @classmethod
    def get_tmp_tensors(cls, *given: Any) -> Any:
        return given, given[0]


@pytest.mark.parametrize("prefill", [True, False])
def test_groups_are_by_rank_and_have_each_adapters_address(prefill: bool) -> None:
    weights = of_ranks(8, 16)
    batch = load(weights, TOKENS, prefill=prefill)
    other: Any = WithScratch.load(weights, meta_of(TOKENS), "q_proj", prefill, None)
    for rank, group in other.rank_data.items():  # by segment, punica's kernels need scratch memory
        scratch = ((2, rank, torch.device("cpu")), 2) if prefill else (None, None)
        assert (group.tmp_shrink, group.tmp_expand) == scratch
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


@pytest.mark.parametrize(("rank", "by_segment"), [(128, False), (144, True)])
def test_one_rank_above_128_puts_the_batch_into_segments(rank: int, by_segment: bool) -> None:
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
    made: list[weakref.ref[Tensor]]

    def __getattribute__(self, name: str) -> object:
        value = super().__getattribute__(name)
        if not isinstance(value, Tensor):
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
    found = {None if one is None else one.dtype for one in (starts, ends)}
    assert found == {dtype if prefill else None}
    x = integers(3, 3, IN)
    assert torch.equal(delta_by_address(batch, x, 1), delta_by_token(weights, [1, 1, 0], x, 1))


@pytest.mark.parametrize("prefill", [True, False])
def test_metadata_must_not_contradict_itself(prefill: bool) -> None:
    for tokens, bounds, indices, named in [
        ([0, 0], [0, 3], [0], r"indices \(2 tokens\) and the segments \(up to 3\) name different"),
        ([0, 1], [0, 2], [0], "name different adapters for a token"),
        ([0, 0], [0, 2, 1], [0, 1], r"ascending order for 2 segments, got \[0, 2, 1\]"),
        ([0, 0], [0, 1 << 62], [0], r"adapter_indices \(2 tokens\) and the segments \(up to 46"),
        ([0, 0], [0, 1], [0], r"adapter_indices \(2 tokens\) and the segments \(up to 1\)"),
    ]:
        meta = AdapterBatchMetadata(torch.tensor(tokens), {0}, torch.tensor(bounds), indices)
        with pytest.raises(UsageError, match=named):
            BatchLoraWeights.load(of_ranks(8, 8), meta, "q_proj", prefill, None)
    for heads in ([4, 2], [2, 1, 4], [-1, 2], [2, 8]):
        with pytest.raises(UsageError, match=r"prefill_head_indices .* from 0 to 7, got \["):
            load(of_ranks(8, 8), TOKENS, prefill=prefill, heads=heads)


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize("where", ["turned", "meta"])
def test_weights_that_an_address_does_not_describe_are_refused(prefill: bool, where: str) -> None:
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


RANKS = st.one_of(st.integers(1, 20), st.integers(1, 128), st.integers(1, 256))


def bridge_of(weights: dict[int, StandIn], tokens: list[int], world_size: int = 1) -> Bridge:
    return Bridge.of(load(weights, tokens), world_size=world_size)


@settings(max_examples=120, deadline=None)
@given(cases(RANKS))
def test_every_row_gets_its_own_adapter(case: Case) -> None:
    weights = {index: stand_in(rank, seed=index) for index, rank in case.ranks.items()}
    batch = loaded(weights, case.tokens, prefill=case.prefill, heads=case.heads)
    if batch is None:
        assert not weights.keys() & set(case.tokens)
        return
    x, before = integers(99, len(case.rows), IN), integers(98, len(case.rows), OUT)
    expected, y = delta_by_token(weights, case.rows, x, case.layer), before.clone()
    assert torch.equal(delta_by_address(batch, x, case.layer), expected)
    Bridge.of(batch).apply(y, x, case.layer)
    assert torch.equal(y, before + expected)


@pytest.mark.parametrize("local_rank", [1, 4, 8, 10, 12, 16, 200])
def test_any_local_rank_is_applied_and_a_padded_one_where_it_is(local_rank: int) -> None:
    """A rank that is no multiple of 8 is copied; other weights are used in their own memory."""
    weights = {0: stand_in(local_rank, local_rank=local_rank), 1: stand_in(3, seed=1)}
    bridge, tokens = bridge_of(weights, [1, 0, 0]), [1, 0, 0]
    x, y = integers(5, 3, IN), torch.zeros(3, OUT).double()
    first = delta_by_token(weights, tokens, x, 1)
    bridge.apply(y, x, 1)
    assert torch.equal(y, first)
    weights[0].weights_a_t *= 2
    bridge.apply(y, x, 1)
    second = first if local_rank % 8 else delta_by_token(weights, tokens, x, 1)
    assert torch.equal(y, first + second)


IN_EACH, OUT_EACH = 5, 3
"""Of one process, where a side is split."""


@dataclass(frozen=True)
class Whole:
    """A `[layers, in, rank]` and B `[layers, rank, out]` before they are split."""

    a: Tensor
    b: Tensor

    def share(self, world: int, place: int, *, by_rank: bool) -> StandIn:
        a = self.a.chunk(world, dim=2 if by_rank else 1)[place]
        return StandIn(a, self.b.chunk(world, dim=2)[place], "config")


def whole(rank: int, world: int, *, seed: int = 0) -> Whole:
    padded = padded_rank(rank, world)
    a = torch.zeros(LAYERS, IN_EACH * world, padded).double()
    b = torch.zeros(LAYERS, padded, OUT_EACH * world).double()
    a[:, :, :rank] = integers(2 * seed, LAYERS, IN_EACH * world, rank)
    b[:, :rank] = integers(2 * seed + 1, LAYERS, rank, OUT_EACH * world)
    return Whole(a, b)


class World:
    """All processes in one; column-parallel where A is split by rank, else row-parallel."""

    def __init__(
        self, adapters: dict[int, Whole], tokens: list[int], world: int, *, by_rank: bool, **of: Any
    ) -> None:
        self.adapters, self.by_rank, self.size = adapters, by_rank, world
        heads: list[int] | None = of.get("heads")
        self.rows = tokens if heads is None else [tokens[at] for at in heads]
        self.processes = []
        for place in range(world):
            shares = {i: one.share(world, place, by_rank=by_rank) for i, one in adapters.items()}
            self.processes.append(Bridge.of(load(shares, tokens, **of), world_size=world))

    def shrink(self, x: Tensor, layer: int) -> list[Tensor]:
        parts = [x] * self.size if self.by_rank else x.chunk(self.size, dim=1)
        pairs = zip(self.processes, parts, strict=True)
        return [process.shrink(part.contiguous(), layer) for process, part in pairs]

    def apply(self, y: Tensor, x: Tensor, layer: int) -> Tensor:
        shrunk = torch.stack(self.shrink(x, layer))
        outputs = [part.clone() for part in y.chunk(self.size, dim=1)]
        for process, output in zip(self.processes, outputs, strict=True):
            process.expand(output, shrunk if self.by_rank else shrunk.sum(dim=0), layer)
        return torch.cat(outputs, dim=1)

    def exact(self, x: Tensor, layer: int) -> Tensor:
        out = next(iter(self.adapters.values())).b.shape[2]
        delta = torch.zeros(len(self.rows), out).double()
        for row, index in enumerate(self.rows):
            if index in self.adapters:
                one = self.adapters[index]
                delta[row] = x[row] @ one.a[layer].double() @ one.b[layer].double()
        return delta


SHARED: dict[int, list[int]] = {world: [] for world in range(1, 9)}
for each in range(1, 257):
    for world, shared in SHARED.items():
        with suppress(IncompatibleAdapterError):
            padded_rank(each, world)
            shared.append(each)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 8), st.booleans())
def test_all_processes_add_each_tokens_adapter(data: Any, world: int, by_rank: bool) -> None:
    """Every row is shrunk by its process's share, and zero beyond; it may lie in any order."""
    case = data.draw(cases(st.sampled_from(SHARED[world])))
    case.tokens[0] = min(case.ranks)  # one adapter is used
    adapters = {i: whole(rank, world, seed=i) for i, rank in case.ranks.items()}
    of: Any = {"prefill": case.prefill, "heads": case.heads}
    every = World(adapters, case.tokens, world, by_rank=by_rank, **of)
    x = integers(99, len(case.rows), IN_EACH * world)
    before = integers(98, len(case.rows), OUT_EACH * world)
    y = every.apply(before, x, case.layer)
    assert torch.equal(y, before + every.exact(x, case.layer))
    if by_rank:
        shrunk = every.shrink(x, case.layer)
        for place, v in enumerate(shrunk):
            for row, index in enumerate(every.rows):
                expected = torch.zeros(v.shape[1]).double()
                if index in adapters:
                    a = adapters[index].a[case.layer].chunk(world, dim=1)[place]
                    expected[: a.shape[1]] = x[row] @ a
                assert torch.equal(v[row], expected)
        turned = before[:, :OUT_EACH].clone()
        every.processes[0].expand(turned, torch.stack(shrunk, 2).permute(2, 0, 1), case.layer)
        assert torch.equal(turned, y[:, :OUT_EACH])


@pytest.mark.parametrize("by_rank", [True, False, None])
def test_rows_without_weights_keep_their_bits(by_rank: bool | None) -> None:
    before = torch.tensor([-0.0, torch.nan, torch.inf, -torch.nan, 1e-300, 1.0]).double()
    y, x = before.repeat(3, 1), torch.full((3, 2 * IN_EACH), torch.nan).double()
    x[1], y[1] = 1.0, 0.0
    if by_rank is None:
        after = y.clone()
        bridge_of({1: whole(8, 2).share(1, 0, by_rank=True)}, [0, 1, 2]).apply(after, x, 0)
    else:
        after = World({1: whole(8, 2)}, [0, 1, 2], 2, by_rank=by_rank).apply(y, x, 0)
    assert torch.equal(after[[0, 2]].view(torch.int64), y[[0, 2]].view(torch.int64))
    assert after[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world", [1, 2])
def test_dtypes_of_models(dtype: torch.dtype, world: int) -> None:
    """Integers of this size are exact in all of them."""
    a = integers(1, LAYERS, IN_EACH * world, 16).to(dtype)
    one, x = Whole(a, integers(2, LAYERS, 16, 4).to(dtype)), integers(3, 2, IN_EACH * world)
    every = World({0: one}, [0, 0], world, by_rank=True)
    exact = every.exact(x, 1).to(dtype)
    y = torch.zeros(2, 4, dtype=dtype)
    assert torch.equal(every.apply(y, x.to(dtype), 1), exact)
    if world == 1:
        every.processes[0].apply(y, x.to(dtype), 1)
        assert torch.equal(y, exact)


def sized(local: int, rank: int, layers: int = LAYERS, inputs: int = IN, out: int = OUT) -> StandIn:
    return StandIn(integers(1, layers, inputs, local), integers(2, layers, rank, out))


def shapes(*ranks: tuple[int, int]) -> dict[int, StandIn]:
    return {i: sized(*pair) for i, pair in enumerate(ranks)}


KINDS = r"adapter 1 has \(layers, in, out, dtypes\) "


def test_adapters_that_do_not_fit_the_world_or_each_other_are_refused() -> None:
    for weights, world, named in [
        (
            shapes((12, 48)),
            2,
            "A of adapter 0 has rank 12 and B has 48, .* not a share of one in 2",
        ),
        (shapes((12, 48)), 1, "B has 48, which is not a share of one in 1"),
        (shapes((8, 16), (8, 24)), 2, "A of adapter 1 has rank 8 and B has 24"),
        (shapes((16, 8)), 2, "A of adapter 0 has rank 16 and B has 8"),
        (shapes((8, 8)), 0, "not a share of one in 0 processes; load the weights for this world"),
        (shapes((8, 16), (16, 16)), 2, "A of adapter 1 has 1/1 of its rank, .* first .* 1/2; load"),
        ({0: stand_in(8), 1: sized(8, 8, layers=3)}, 1, KINDS + r"\(3, 5, 3, "),
        ({0: stand_in(8), 1: sized(8, 8, inputs=6)}, 1, KINDS + r"\(2, 6, 3, "),
        ({0: stand_in(8), 1: sized(8, 8, out=4)}, 1, KINDS + r"\(2, 5, 4, "),
        (
            {0: stand_in(8), 1: StandIn(torch.ones(2, 5, 8), torch.ones(2, 8, 3))},
            1,
            KINDS + ".*torch.float32.*torch.float64",
        ),
    ]:
        with pytest.raises(UsageError, match=named):
            bridge_of(weights, list(weights), world)


def test_one_processs_share_is_not_applied_as_a_whole() -> None:
    """Split along the input, what tells is a layer's output of all processes, or the world size."""
    share, y = whole(8, 4).share(4, 0, by_rank=False), torch.ones(1, 4 * OUT_EACH).double()
    for world in (1, 4):
        with pytest.raises(UsageError, match="y has 12 columns and B 3: one process's share"):
            bridge_of({0: share}, [0], world).apply(y, torch.ones(1, IN_EACH).double(), 0)
    assert (y == 1).all()
    with pytest.raises(UsageError, match="made by hand, without adapters; use load"):
        Bridge.of(BatchLoraWeights({}, {}, {}, {}, False, "q_proj", None))


def test_what_the_kernels_refuse_is_refused_with_its_layer() -> None:
    other = (2, LAYERS, "layer 2: expected a module from 0 to 1, got 2")
    for rows, layer, named in [(3, 0, r"layer 0: expected x contiguous \[2, features\]"), other]:
        y, x = torch.ones(2, OUT).double(), torch.ones(rows, IN).double()
        with pytest.raises(UsageError, match=named):
            bridge_of({0: stand_in(8)}, [0, 0]).apply(y, x, layer)
        with pytest.raises(UsageError, match=named):
            World({0: whole(16, 2)}, [0, 0], 2, by_rank=False).processes[0].shrink(x, layer)
        assert (y == 1).all()


GATHERED = r"layer 0: expected v \[2, 2, 8\], gathered .*"
SUMMED = r"layer 0: expected v \[2, 16\], summed .*"
DOUBLE = torch.float64


def test_what_others_shrank_must_have_come_together() -> None:
    for by_rank, shape, dtype, y_columns, named in [
        (True, (2, 8), DOUBLE, OUT_EACH, rf"{GATHERED} got \[2, 8\]"),
        (True, (3, 2, 8), DOUBLE, OUT_EACH, rf"{GATHERED} got \[3, 2, 8\]"),
        (True, (2, 2, 8), torch.float32, OUT_EACH, r"in torch.float64, got \[2, 2, 8\] in .*32"),
        (False, (2, 2, 16), DOUBLE, OUT_EACH, rf"{SUMMED} got \[2, 2, 16\]"),
        (False, (3, 16), DOUBLE, OUT_EACH, rf"{SUMMED} got \[3, 16\]"),
        (False, (2, 16), DOUBLE, 6, r"layer 0: .* y \[tokens, 3\] .* y \[2, 6\]"),
    ]:
        process = World({0: whole(16, 2)}, [0, 0], 2, by_rank=by_rank).processes[0]
        y = torch.ones(2, y_columns).double()
        with pytest.raises(UsageError, match=named):
            process.expand(y, torch.ones(shape, dtype=dtype), 0)
        assert (y == 1).all()
