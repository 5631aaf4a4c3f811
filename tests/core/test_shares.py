"""Shares of a batch, worked out by hand, and what must hold for any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.shares import level, share

wants = st.lists(st.lists(st.integers(1, 200), max_size=6), max_size=6)


def test_what_fits_is_given() -> None:
    assert share([[1, 100], [], [3]], 104, 3) == [[1, 100], [], [3]]


def test_a_hot_adapter_leaves_rows_to_the_others() -> None:
    assert share([[1] * 100, [1], [1, 1, 1]], 1000, 8) == [[1] * 4, [1], [1] * 3]


def test_where_rows_do_not_come_out_even_the_more_urgent_has_one_more() -> None:
    assert share([[1] * 9, [1] * 9, [1] * 9], 1000, 4) == [[1, 1], [1], [1]]


def test_with_fewer_rows_than_adapters_the_most_urgent_are_first() -> None:
    assert share([[1], [1], [1]], 1000, 2) == [[1], [1], []]


def test_a_long_prompt_leaves_tokens_to_the_others() -> None:
    # 64 tokens for a row of each prompt, 1 for the decoding one; of the other 127,
    # whoever wants more has the odd one.
    assert share([[1000], [1], [500]], 256, 8) == [[128], [1], [127]]


def test_what_one_does_not_want_others_have() -> None:
    # 64 + 64 are begun with, and 100 - 64 wanted by the second: the first has all of the rest.
    assert share([[1000], [100]], 256, 8) == [[156], [100]]


def test_no_prompt_is_begun_with_a_few_tokens() -> None:
    assert share([[1000], [1000], [1000]], 150, 8) == [[75], [75], []]


def test_the_end_of_a_prompt_may_be_few_tokens() -> None:
    assert share([[1000], [3], [10]], 80, 8) == [[67], [3], [10]]


def test_a_batch_may_be_smaller_than_that() -> None:
    assert share([[1000], [1]], 10, 8) == [[10], []]


def test_the_first_prompt_of_an_adapter_comes_first() -> None:
    assert share([[100, 100]], 170, 8) == [[100, 70]]


@pytest.mark.parametrize(
    ("asked", "room", "given"),
    [
        ([5, 1, 3], 7, [3, 1, 3]),
        ([5, 5], 5, [3, 2]),
        ([2, 9, 9], 12, [2, 5, 5]),
        ([1, 2], 10, [1, 2]),
        ([4], 0, [0]),
        ([], 3, []),
    ],
)
def test_levels(asked: list[int], room: int, given: list[int]) -> None:
    assert level(asked, room) == given


@given(wants, st.integers(1, 500), st.integers(1, 20), st.integers(1, 64))
def test_nobody_gets_too_much_and_nothing_is_left(
    asked: list[list[int]], tokens: int, rows: int, least: int
) -> None:
    given = share(asked, tokens, rows, least=least)
    flat = [each for adapter in given for each in adapter]
    assert sum(flat) <= tokens
    assert len(flat) <= rows
    assert all(len(one) <= len(other) for one, other in zip(given, asked, strict=True))
    for adapter, wanted in zip(given, asked, strict=True):
        for number, got in enumerate(adapter):
            assert min(least, tokens, wanted[number]) <= got <= wanted[number]
    wanting = [number for number, each in enumerate(asked) if each]
    if wanting:
        assert given[wanting[0]], "the most urgent one always gets some"
    # Tokens are left over only where every row has all that it wants.
    if (
        sum(flat) < tokens
        and len(flat) < rows
        and all(len(one) == len(two) for one, two in zip(given, asked, strict=True))
    ):
        assert given == asked


@given(wants, st.integers(1, 500), st.integers(1, 20))
def test_nobody_has_two_rows_more_than_one_who_wants_one(
    asked: list[list[int]], tokens: int, rows: int
) -> None:
    asked = [[1] * len(each) for each in asked]
    given = [len(each) for each in share(asked, tokens, rows)]
    for number, got in enumerate(given):
        if got < len(asked[number]):
            assert max(given) <= got + 1
