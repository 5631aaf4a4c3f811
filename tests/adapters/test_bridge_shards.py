"""All processes of a world in one: what they shrink and expand together is x · A · B."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.shares import (
    IN_EACH,
    OUT_EACH,
    Whole,
    bridges,
    column_parallel,
    exact,
    expanded,
    padded_for,
    row_parallel,
    whole,
)
from adapters.stacked import LAYERS, integers, load
from lorax_async.adapters.batching.bridge import ShardBridge


@dataclass(frozen=True)
class Case:
    world: int
    ranks: dict[int, int]
    tokens: list[int]
    prefill: bool
    layer: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Batches over adapters 0 to 5, of which only some have weights; one of them is used."""
    world = draw(st.integers(1, 8))
    admitted = [rank for rank in range(1, 257) if padded_for(rank, world) % world == 0]
    rank = st.sampled_from(admitted)
    ranks = draw(st.dictionaries(st.integers(0, 5), rank, min_size=1, max_size=4))
    used = st.tuples(st.sampled_from(sorted(ranks)), st.integers(1, 3))
    anyone = st.tuples(st.integers(0, 5), st.integers(1, 3))
    runs = [draw(used), *draw(st.lists(anyone, max_size=5))]
    return Case(
        world=world,
        ranks=ranks,
        tokens=[index for index, length in draw(st.permutations(runs)) for _ in range(length)],
        prefill=draw(st.booleans()),
        layer=draw(st.integers(0, LAYERS - 1)),
    )


@settings(max_examples=100, deadline=None)
@given(cases(), st.booleans())
def test_all_processes_together_add_each_tokens_adapter(case: Case, by_rank: bool) -> None:
    adapters = {i: whole(rank, case.world, seed=i) for i, rank in case.ranks.items()}
    processes = bridges(adapters, case.tokens, case.world, by_rank=by_rank, prefill=case.prefill)
    x = integers(99, len(case.tokens), IN_EACH * case.world)
    before = integers(98, len(case.tokens), OUT_EACH * case.world)
    together = column_parallel if by_rank else row_parallel
    y = together(processes, x, before, case.layer)
    assert torch.equal(y, before + exact(adapters, case.tokens, x, case.layer))


@settings(max_examples=50, deadline=None)
@given(cases())
def test_every_row_is_shrunk_by_its_share_and_zero_beyond(case: Case) -> None:
    adapters = {i: whole(rank, case.world, seed=i) for i, rank in case.ranks.items()}
    processes = bridges(adapters, case.tokens, case.world, by_rank=True)
    x = integers(99, len(case.tokens), IN_EACH * case.world)
    for place, process in enumerate(processes):
        v = process.shrink(x, case.layer)
        for row, index in enumerate(case.tokens):
            expected = torch.zeros(v.shape[1]).double()
            if index in adapters:
                a = adapters[index].a[case.layer].chunk(case.world, dim=1)[place]
                expected[: a.shape[1]] = x[row] @ a
            assert torch.equal(v[row], expected)


# -- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "world", "padded", "local", "width"), [(33, 4, 48, 12, 16), (65, 8, 80, 10, 16)]
)
def test_local_ranks_that_are_no_multiple_of_8(
    rank: int, world: int, padded: int, local: int, width: int
) -> None:
    """Rank i of A takes input 0 times i + 1, and B gives it to output 0 and, negated, to the last."""
    a = torch.zeros(LAYERS, world, padded).double()
    b = torch.zeros(LAYERS, padded, world).double()
    a[1, 0, :rank] = torch.arange(1, rank + 1).double()
    b[1, :rank, 0], b[1, :rank, -1] = 1.0, -1.0
    adapters = {7: Whole(a, b)}
    processes = bridges(adapters, [7, 2], world, by_rank=True)
    x = torch.ones(2, world).double()
    shrunk = [process.shrink(x, 1) for process in processes]
    for place, v in enumerate(shrunk):
        ranks = range(place * local + 1, place * local + local + 1)
        first = [float(i) if i <= rank else 0.0 for i in ranks]
        assert v.tolist() == [first + [0.0] * (width - local), [0.0] * width]
    assert processes[0].shrinking.rank.tolist() == [[width]] * LAYERS
    assert processes[0].expanding.rank.tolist() == [[padded]] * LAYERS
    y = column_parallel(processes, x, torch.zeros(2, world).double(), 1)
    total = rank * (rank + 1) / 2
    assert y.tolist() == [[total, *[0.0] * (world - 2), -total], [0.0] * world]


def test_columns_of_different_ranks_line_up() -> None:
    """Two processes; local ranks 8 and 24 (16 and 48 padded), so that a part is 24 wide."""
    low, high = whole(16, 2, seed=1), whole(48, 2, seed=2)
    processes = bridges({0: low, 1: high}, [0, 1, 9], 2, by_rank=True)
    assert [(one.parts, one.width) for one in processes] == [(2, 24), (2, 24)]
    v = torch.zeros(2, 3, 24).double()
    v[1, 0, 3] = 5.0  # of process 1: rank 8 + 3 of the first adapter, 24 + 3 of the second
    v[1, 1, 3] = 7.0
    v[0, 0, 8:] = v[1, 0, 8:] = 99.0  # beyond the first adapter's local rank
    v[:, 2] = 99.0
    y = expanded(processes, v, torch.zeros(3, 2 * OUT_EACH).double(), 1)
    assert torch.equal(y[0], 5 * low.b[1, 11])
    assert torch.equal(y[1], 7 * high.b[1, 27])
    assert not y[2].any()


@pytest.mark.parametrize("by_rank", [True, False])
def test_what_came_together_may_lie_in_any_order(by_rank: bool) -> None:
    process = bridges({0: whole(16, 2)}, [0, 0, 0], 2, by_rank=by_rank)[0]
    v = integers(4, 3, process.width, 2).permute(2, 0, 1) if by_rank else integers(4, 16, 3).T
    turned, straight = torch.zeros(3, OUT_EACH).double(), torch.zeros(3, OUT_EACH).double()
    process.expand(turned, v, 0)
    process.expand(straight, v.contiguous(), 0)
    assert turned.any()
    assert torch.equal(turned, straight)


@pytest.mark.parametrize("heads", [[], [1, 3]])
def test_rows_are_the_heads_where_there_are_some(heads: list[int]) -> None:
    adapters, tokens = {0: whole(8, 2), 1: whole(40, 2, seed=1)}, [0, 0, 1, 1]
    shares = [{i: one.share(2, k, by_rank=True) for i, one in adapters.items()} for k in range(2)]
    batches = [load(share, tokens, heads=heads) for share in shares]
    x, y = integers(5, len(heads), 2 * IN_EACH), torch.zeros(len(heads), 2 * OUT_EACH).double()
    processes = [ShardBridge.of(batch, world_size=2) for batch in batches]
    expected = exact(adapters, [tokens[at] for at in heads], x, 1)
    assert torch.equal(column_parallel(processes, x, y, 1), expected)


@pytest.mark.parametrize("by_rank", [True, False])
def test_rows_without_weights_keep_their_bits(by_rank: bool) -> None:
    processes = bridges({1: whole(8, 2)}, [0, 1, 2], 2, by_rank=by_rank)
    before = torch.tensor([-0.0, torch.nan, torch.inf, -torch.nan, 1e-300, 1.0]).double()
    y = before.repeat(3, 1)
    x = torch.full((3, 2 * IN_EACH), torch.nan).double()
    x[1] = 1.0
    y[1] = 0.0
    together = column_parallel if by_rank else row_parallel
    after = together(processes, x, y, 0)
    assert torch.equal(after[[0, 2]].view(torch.int64), y[[0, 2]].view(torch.int64))
    assert after[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_models(dtype: torch.dtype) -> None:
    a, b = integers(1, LAYERS, IN_EACH, 16).to(dtype), integers(2, LAYERS, 16, 4).to(dtype)
    processes = bridges({0: Whole(a, b)}, [0, 0], 2, by_rank=True)
    x = integers(3, 2, IN_EACH)
    y = column_parallel(processes, x.to(dtype), torch.zeros(2, 4, dtype=dtype), 1)
    values = exact({0: Whole(a.double(), b.double())}, [0, 0], x, 1)
    assert torch.equal(y, values.to(dtype))  # integers of this size are exact in all of them


def test_nothing_of_the_size_of_the_weights_is_copied() -> None:
    one = whole(16, 2).share(2, 0, by_rank=True)
    bridge = ShardBridge.of(load({0: one}, [0]), world_size=2)
    (a, identity), (choice, b) = bridge.shrinking.stacks[0], bridge.expanding.stacks[0]
    assert (a.data_ptr(), b.data_ptr()) == (one.weights_a_t.data_ptr(), one.weights_b_t.data_ptr())
    assert identity.stride(0) == choice.stride(0) == 0  # one for all layers
    assert bridge.shrinking.address[1, :, 0].tolist() == [identity.data_ptr()] * LAYERS
    assert bridge.expanding.address[0, :, 0].tolist() == [choice.data_ptr()] * LAYERS
    assert bridge.expanding.address[1, :, 0].tolist() == [layer.data_ptr() for layer in b]


def test_adapters_of_one_rank_share_an_identity() -> None:
    processes = bridges(
        {i: whole(r, 2, seed=i) for i, r in enumerate([16, 16, 32])}, [0, 1, 2], 2, by_rank=True
    )
    for tables, side in [(processes[0].shrinking, 1), (processes[0].expanding, 0)]:
        first, second, third = (stack[side].data_ptr() for stack in tables.stacks)
        assert first == second != third
