"""A batch on the kernels: each token gets x · A · B of its own adapter, and others keep their bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from adapters.stacked import (
    IN,
    LAYERS,
    OUT,
    Case,
    StandIn,
    cases,
    delta_by_token,
    follow,
    integers,
    load,
    loaded,
    stand_in,
)
from lorax_async.adapters.batches import BatchLoraWeights
from lorax_async.adapters.batching.bridge import Bridge
from lorax_async.errors import UsageError
from lorax_kernels import Tables


def bridge_of(weights: dict[int, StandIn], tokens: list[int]) -> Bridge:
    return Bridge.of(load(weights, tokens))


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int64)


@settings(max_examples=120, deadline=None)
@given(cases())
def test_every_row_gets_its_own_adapter(case: Case) -> None:
    weights = case.weights()
    batch = loaded(weights, case.tokens, prefill=case.prefill, heads=case.heads)
    if batch is None:
        return
    rows = case.tokens if case.heads is None else [case.tokens[at] for at in case.heads]
    x, before = integers(99, len(rows), IN), integers(98, len(rows), OUT)
    y = before.clone()
    Bridge.of(batch).apply(y, x, case.layer)
    assert torch.equal(y, before + delta_by_token(weights, rows, x, case.layer))


def test_values_worked_out_by_hand() -> None:
    one = StandIn(
        torch.tensor([[[3.0], [1.0]], [[0.0], [2.0]]]), torch.tensor([[[5.0, 7.0]], [[1.0, -1.0]]])
    )
    bridge = bridge_of({6: one}, [6, 0])
    x, y = torch.tensor([[2.0, 4.0], [1.0, 1.0]]), torch.ones(2, 2)
    bridge.apply(y, x, 0)
    assert y.tolist() == [[51.0, 71.0], [1.0, 1.0]]  # 1 + 5 * (3*2 + 1*4), 1 + 7 * 10
    bridge.apply(y, x, 1)
    assert y.tolist() == [[59.0, 63.0], [1.0, 1.0]]  # + 8, - 8


def test_rows_without_weights_keep_their_bits() -> None:
    bridge = bridge_of({1: stand_in(8)}, [0, 1, 2])
    y = torch.tensor([[-0.0, torch.nan, torch.inf], [1.0, 1.0, 1.0], [1e-300, -0.0, -torch.nan]])
    y, x = y.double(), torch.full((3, IN), torch.nan).double()
    x[1] = 1.0
    before = y.clone()
    bridge.apply(y, x, 0)
    assert torch.equal(bits(y[[0, 2]]), bits(before[[0, 2]]))
    assert y[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_models(dtype: torch.dtype) -> None:
    one = StandIn(integers(1, LAYERS, IN, 8).to(dtype), integers(2, LAYERS, 8, OUT).to(dtype))
    x, y = integers(3, 4, IN).to(dtype), torch.zeros(4, OUT, dtype=dtype)
    bridge_of({0: one}, [0] * 4).apply(y, x, 1)
    exact = delta_by_token({0: stand_in_of(one)}, [0] * 4, x.double(), 1)
    assert torch.equal(y, exact.to(dtype))  # integers of this size are exact in all of them


def stand_in_of(one: StandIn) -> StandIn:
    """The same values in float64."""
    return StandIn(one.weights_a_t.transpose(1, 2).double(), one.weights_b.double())


# -- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local_rank", "padded"), [(1, 8), (4, 8), (8, 8), (10, 16), (12, 16), (16, 16), (200, 200)]
)
def test_a_local_rank_is_padded_to_a_multiple_of_8(local_rank: int, padded: int) -> None:
    weights = {0: stand_in(local_rank, local_rank=local_rank)}
    bridge = bridge_of(weights, [0, 0])
    assert bridge.tables.rank.tolist() == [[padded]] * LAYERS
    operands = bridge.tables.operands(1, 0)
    a, b, scale = operands
    assert (a.shape, b.shape, scale) == ((padded, IN), (OUT, padded), 1.0)
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert torch.equal(a[:local_rank], weights[0].weights_a_t[1])
    assert torch.equal(b[:, :local_rank], weights[0].weights_b_t[1])
    assert not a[local_rank:].any()
    assert not b[:, local_rank:].any()
    x, y = integers(5, 2, IN), torch.zeros(2, OUT).double()
    bridge.apply(y, x, 1)
    assert torch.equal(y, delta_by_token(weights, [0, 0], x, 1))


def test_what_is_padded_already_is_used_where_it_is() -> None:
    weights = {0: stand_in(8), 1: stand_in(200, seed=1)}
    tables = bridge_of(weights, [1, 0]).tables
    for slot, index in enumerate([1, 0]):
        a, b = weights[index].weights_a_t, weights[index].weights_b_t
        assert tables.address[0, :, slot].tolist() == [layer.data_ptr() for layer in a]
        assert tables.address[1, :, slot].tolist() == [layer.data_ptr() for layer in b]


def test_addresses_lead_to_each_layers_weights() -> None:
    weights = {0: stand_in(12, local_rank=12), 1: stand_in(8, seed=1)}
    tables: Tables = bridge_of(weights, [0, 1, 3]).tables
    assert tables.address.shape == (2, LAYERS, 2)
    assert tables.address.dtype == torch.int64
    assert tables.rank.dtype == torch.int32
    assert torch.equal(tables.scale, torch.ones(LAYERS, 2))
    for layer in range(LAYERS):
        for slot in range(2):
            operands = tables.operands(layer, slot)
            assert operands is not None
            rank = int(tables.rank[layer, slot])
            at_a, at_b = tables.address[:, layer, slot].tolist()
            assert torch.equal(follow(at_a, (rank, IN)), operands[0])
            assert torch.equal(follow(at_b, (OUT, rank)), operands[1])


def test_the_plan_joins_what_it_may() -> None:
    plan = bridge_of({5: stand_in(8), 2: stand_in(16, seed=1)}, [5, 5, 0, 3, 2, 5]).plan
    assert plan.tokens == 6
    assert plan.segments == ((0, 2, 0), (4, 5, 1), (5, 6, 0))  # columns: 5, then 2
    assert plan.bounds.tolist() == [0, 2, 4, 5, 6]
    assert plan.slots.tolist() == [0, -1, 1, 0]


# -- refusals -------------------------------------------------------------------------------------


def test_weights_sharded_by_rank_are_refused() -> None:
    split = StandIn(integers(1, LAYERS, IN, 12), integers(2, LAYERS, 48, OUT))  # 33 on 4 processes
    with pytest.raises(UsageError, match="A of adapter 0 has rank 12 and B has 48: it is one"):
        bridge_of({0: split}, [0])


@pytest.mark.parametrize(
    ("a", "b", "named"),
    [
        ((LAYERS + 1, IN, 8), (LAYERS + 1, 8, OUT), r"\(3, 5, 3, "),
        ((LAYERS, IN + 1, 8), (LAYERS, 8, OUT), r"\(2, 6, 3, "),
        ((LAYERS, IN, 8), (LAYERS, 8, OUT + 1), r"\(2, 5, 4, "),
    ],
)
def test_adapters_of_other_layers_are_refused(
    a: tuple[int, ...], b: tuple[int, ...], named: str
) -> None:
    weights = {0: stand_in(8), 1: StandIn(integers(1, *a), integers(2, *b))}
    with pytest.raises(UsageError, match=rf"adapter 1 has \(layers, in, out, dtypes\) {named}"):
        bridge_of(weights, [0, 1])


def test_another_dtype_is_refused() -> None:
    weights = {0: stand_in(8), 1: StandIn(torch.ones(LAYERS, IN, 8), torch.ones(LAYERS, 8, OUT))}
    with pytest.raises(UsageError, match=r"adapter 1 has .*torch.float32.*torch.float64"):
        bridge_of(weights, [0, 1])


@pytest.mark.parametrize(
    ("rows", "features", "layer", "named"),
    [
        (3, IN, 0, r"layer 0: expected x contiguous \[2, features\]"),
        (2, IN + 1, 1, r"layer 1: expected x \[tokens, 5\]"),
        (2, IN, LAYERS, "layer 2: expected a module from 0 to 1, got 2"),
        (2, IN, -1, "layer -1: expected a module from 0 to 1, got -1"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    rows: int, features: int, layer: int, named: str
) -> None:
    y = torch.ones(2, OUT).double()
    with pytest.raises(UsageError, match=named):
        bridge_of({0: stand_in(8)}, [0, 0]).apply(y, torch.ones(rows, features).double(), layer)
    assert torch.equal(y, torch.ones(2, OUT).double())


def test_tensors_that_overlap_are_refused() -> None:
    buffer = torch.arange(2 * IN + 2 * OUT).double()
    x, y = buffer[: 2 * IN].view(2, IN), buffer[2 * IN - 1 : -1].view(2, OUT)
    bridge = bridge_of({0: stand_in(8)}, [0, 0])
    with pytest.raises(UsageError, match="layer 1: expected y and x in memory of their own"):
        bridge.apply(y, x, 1)
    assert torch.equal(buffer, torch.arange(2 * IN + 2 * OUT).double())


def test_a_batch_made_by_hand_is_refused() -> None:
    batch = BatchLoraWeights({}, {}, {}, {}, False, "q_proj", None)
    with pytest.raises(UsageError, match="made by hand, without adapters; use load"):
        Bridge.of(batch)
