"""Addresses of a batch followed in memory, and what no address would describe."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings

from adapters.stacked import (
    IN,
    LAYERS,
    OUT,
    Case,
    StandIn,
    cases,
    delta_by_address,
    delta_by_token,
    integers,
    load,
    loaded,
    of_ranks,
)
from lorax_async.adapters.batches import AdapterBatchMetadata, BatchLoraWeights
from lorax_async.errors import UsageError


@settings(max_examples=120, deadline=None)
@given(cases())
def test_addresses_lead_to_each_tokens_adapter(case: Case) -> None:
    weights = case.weights()
    batch = loaded(weights, case.tokens, prefill=case.prefill, heads=case.heads)
    if batch is None:
        assert not weights.keys() & set(case.tokens)
        return
    rows = case.tokens if case.heads is None else [case.tokens[at] for at in case.heads]
    x = integers(99, len(rows), IN)
    expected = delta_by_token(weights, rows, x, case.layer)
    assert torch.equal(delta_by_address(batch, x, case.layer), expected)


class Forgetful(StandIn):
    """Makes its tensors anew whenever asked."""

    def __getattribute__(self, name: str) -> object:
        value = super().__getattribute__(name)
        return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("prefill", [True, False])
def test_what_an_address_names_stays_as_long_as_the_batch(prefill: bool) -> None:
    weights = {0: Forgetful(integers(1, LAYERS, IN, 8), integers(2, LAYERS, 8, OUT))}
    batch = load({**weights}, [0, 0], prefill=prefill)
    pointed = [weakref.ref(tensor) for tensor in batch.pointed]
    addresses = [batch.rank_data[8].lora_a_ptr.item(), batch.rank_data[8].lora_b_ptr.item()]
    assert [tensor.data_ptr() for tensor in batch.pointed] == addresses
    x = integers(3, 2, IN)
    assert torch.equal(delta_by_address(batch, x, 1), delta_by_token({**weights}, [0, 0], x, 1))
    del batch
    gc.collect()
    assert [ref() for ref in pointed] == [None, None]


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill", [True, False])
@pytest.mark.parametrize(
    ("tokens", "bounds", "indices", "named"),
    [
        (
            [0, 0],
            [0, 3],
            [0],
            r"adapter_indices \(2 tokens\) and the segments \(up to 3\) name different",
        ),
        ([0, 1], [0, 2], [0], "name different adapters for a token"),
        ([0, 0], [0, 2, 1], [0, 1], r"ascending order for 2 segments, got \[0, 2, 1\]"),
        ([0, 0], [0, 2], [0, 1], "expected adapter_segments of 3 bounds"),
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
def test_segment_indices_may_be_a_tensor(prefill: bool) -> None:
    """Whose elements are equal to an adapter's index and not found by it."""
    weights = of_ranks(8, 16)
    made = []
    for indices in ([1, 0], torch.tensor([1, 0])):
        tokens, bounds = torch.tensor([1, 1, 0]), torch.tensor([0, 2, 3])
        meta = AdapterBatchMetadata(tokens, {0, 1}, bounds, indices)  # type: ignore[arg-type]
        batch = BatchLoraWeights.load(weights, meta, "q_proj", prefill, None)
        assert batch is not None
        made.append(batch)
    assert made[1].runs == made[0].runs
    assert list(made[1].rank_data) == [16, 8]
    assert made[1].has_adapter(0)


@pytest.mark.parametrize("prefill", [True, False])
def test_heads_outside_the_batch_are_refused(prefill: bool) -> None:
    with pytest.raises(UsageError, match=r"from 0 to 1, got \[2\]"):
        load(of_ranks(8), [0, 0], prefill=prefill, heads=[2])


@pytest.mark.parametrize("prefill", [True, False])
def test_weights_that_an_address_does_not_describe_are_refused(prefill: bool) -> None:
    weights = of_ranks(8, 8)
    weights[1].weights_b = weights[1].weights_b_t.transpose(1, 2)
    weights[1].weights_b_t = integers(0, LAYERS, 8, OUT).transpose(1, 2)
    with pytest.raises(UsageError, match="expected the weights of adapter 1 contiguous on cpu"):
        load(weights, [0, 1], prefill=prefill)


@pytest.mark.parametrize("prefill", [True, False])
def test_weights_on_two_devices_are_refused(prefill: bool) -> None:
    weights = of_ranks(8, 8)
    weights[1].weights_b = weights[1].weights_b.to("meta")
    weights[1].weights_b_t = weights[1].weights_b_t.to("meta")
    with pytest.raises(UsageError, match="adapter 1 contiguous on cpu, got .* on meta"):
        load(weights, [0, 1], prefill=prefill)
