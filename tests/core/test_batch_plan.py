"""Segments of a batch against an oracle that goes token by token."""

from __future__ import annotations

from itertools import accumulate, chain, groupby, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.batch_plan import BASE_ONLY, Segments, plan_rows

sequences = st.lists(st.tuples(st.integers(BASE_ONLY, 3), st.integers(0, 40)), max_size=30)


def by_token(slots: list[int], lengths: list[int]) -> Segments:
    tokens = chain.from_iterable(map(repeat, slots, lengths))
    runs = [(slot, len(list(run))) for slot, run in groupby(tokens)]
    return Segments((0, *accumulate(length for _, length in runs)), tuple(slot for slot, _ in runs))


def test_one_token_per_sequence() -> None:
    plan = plan_rows([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 1, 1], [1] * 12)
    assert plan == Segments((0, 3, 5, 10, 12), (0, 1, 2, 1))
    assert plan.tokens == 12


def test_no_sequences() -> None:
    assert plan_rows([], []) == Segments((0,), ())
    assert plan_rows([], []).tokens == 0


def test_an_empty_sequence_does_not_separate_its_neighbours() -> None:
    assert plan_rows([5, BASE_ONLY, 5], [2, 0, 3]) == Segments((0, 5), (5,))


def test_rows_without_an_adapter_are_a_segment() -> None:
    assert plan_rows([BASE_ONLY, 4, BASE_ONLY], [2, 1, 3]) == Segments((0, 2, 3, 6), (-1, 4, -1))


@given(sequences)
def test_equals_the_runs_of_equal_tokens(batch: list[tuple[int, int]]) -> None:
    slots, lengths = [slot for slot, _ in batch], [length for _, length in batch]
    assert plan_rows(slots, lengths) == by_token(slots, lengths)


@given(sequences)
def test_one_sequence_or_many_tokens_make_no_difference(batch: list[tuple[int, int]]) -> None:
    tokens = [slot for slot, length in batch for _ in range(length)]
    whole = plan_rows([slot for slot, _ in batch], [length for _, length in batch])
    assert plan_rows(tokens, [1] * len(tokens)) == whole


@pytest.mark.parametrize(
    ("slots", "lengths", "named"),
    [
        ([0], [-1], "slot 0 and -1 tokens"),
        ([-2], [1], "slot -2 and 1 tokens"),
        ([-2], [0], "slot -2 and 0 tokens"),
        ([0, 1], [1], "shorter"),
        ([0], [1, 2], "longer"),
    ],
)
def test_refuses(slots: list[int], lengths: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan_rows(slots, lengths)
