"""Segments against the contract's values and an oracle that goes token by token."""

from __future__ import annotations

import time
from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.adapters.batching.segments import Integers, Runs, concat_segments, find_segments
from lorax_async.errors import UsageError

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
    assert find_segments(torch.tensor(tokens, dtype=torch.int32)) == (bounds, indices)


@given(tokens_of_a_batch)
def test_segments_spell_the_tokens(tokens: list[int]) -> None:
    bounds, indices = find_segments(tokens)
    assert indices == [index for index, _ in groupby(tokens)]
    assert Runs(tuple(bounds), tuple(indices)).by_row() == tokens


@pytest.mark.parametrize("values", [torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]])])
def test_tokens_must_be_a_row_of_integers(values: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"expected adapter_indices to be a row of integers, got"):
        find_segments(values)


def test_the_cost_is_linear() -> None:
    tokens = torch.arange(100_000) // 2  # quadratic, or an operator per token, would take minutes
    before = time.perf_counter()
    bounds, _ = find_segments(tokens)
    assert len(bounds) == 50_001
    assert time.perf_counter() - before < 5


# -- joining --------------------------------------------------------------------------------------

FIRST = (torch.tensor([0, 1, 4, 7, 8]), [2, 1, 2, 1])
OTHER = (torch.tensor([0, 1, 4, 7]), [2, 1, 2])
LAST = (torch.tensor([0, 2, 5]), [1, 2])


@pytest.mark.parametrize(
    ("batches", "bounds", "indices"),
    [
        ([FIRST, LAST], [0, 1, 4, 7, 10, 13], [2, 1, 2, 1, 2]),
        ([OTHER, LAST], [0, 1, 4, 7, 9, 12], [2, 1, 2, 1, 2]),
        ([([0, 2], [5]), ([0], []), ([0, 3], [5])], [0, 5], [5]),
        ([([0, 2], [5]), ([0, 0, 3, 4], [7, 5, 5])], [0, 6], [5]),  # an empty run, equal ones
        ([([0], [])], [0], []),
        ([], [0], []),
    ],
)
def test_equal_neighbours_are_joined(
    batches: list[tuple[Integers, list[int]]], bounds: list[int], indices: list[int]
) -> None:
    assert concat_segments(batches) == (bounds, indices)


@given(st.lists(tokens_of_a_batch, max_size=5))
def test_joining_is_finding_in_all_tokens(batches: list[list[int]]) -> None:
    together = [token for tokens in batches for token in tokens]
    assert concat_segments(find_segments(tokens) for tokens in batches) == find_segments(together)


def test_joining_changes_no_argument() -> None:
    bounds, indices = torch.tensor([0, 2]), [1]
    assert concat_segments([(bounds, indices), (bounds, indices)]) == ([0, 4], [1])
    assert (bounds.tolist(), indices) == ([0, 2], [1])


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
def test_joining_refuses_bounds_that_do_not_fit(
    bounds: Integers, indices: list[int], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        concat_segments([([0, 2], [1]), (bounds, indices)])


# -- the last tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "bounds"),
    [
        ([2, 4, 9, 11], (0, 1, 2, 3, 4)),
        ([0, 2, 9], (0, 2, 2, 3, 3)),  # nothing of the second and the last run is wanted
        ([], (0, 0, 0, 0, 0)),
        (list(range(12)), (0, 3, 5, 10, 12)),
    ],
)
def test_heads_are_counted_run_by_run(heads: list[int], bounds: tuple[int, ...]) -> None:
    runs = Runs((0, 3, 5, 10, 12), (0, 1, 2, 1))
    assert runs.over(heads) == Runs(bounds, (0, 1, 2, 1))
    assert runs.over(torch.tensor(heads)) == Runs(bounds, (0, 1, 2, 1))


@given(tokens_of_a_batch, st.data())
def test_heads_keep_their_adapters(tokens: list[int], data: st.DataObject) -> None:
    chosen = [at for at in range(len(tokens)) if data.draw(st.booleans())]
    bounds, indices = find_segments(tokens)
    over = Runs(tuple(bounds), tuple(indices)).over(chosen)
    assert over.by_row() == [tokens[at] for at in chosen]
    assert over.indices == tuple(indices)


@pytest.mark.parametrize("heads", [[4, 2], [2, 1, 4], [-1, 2], [2, 12]])
def test_heads_must_be_tokens_in_order(heads: list[int]) -> None:
    with pytest.raises(UsageError, match=r"prefill_head_indices .* from 0 to 11, got \["):
        Runs((0, 3, 5, 10, 12), (0, 1, 2, 1)).over(heads)
