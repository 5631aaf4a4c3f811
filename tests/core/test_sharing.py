"""Shares of connections: bounded, none idle, even, and the urgent first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.sharing import Claim, shares

some_claims = st.lists(st.builds(Claim, st.integers(0, 2), st.integers(0, 20)), max_size=12)


def test_by_hand() -> None:
    assert shares([Claim(0, 99), Claim(0, 99), Claim(0, 2)], 16) == [7, 7, 2]
    assert shares([Claim(0, 99)] * 3, 16) == [6, 5, 5]
    assert shares([Claim(1, 99), Claim(0, 10)], 16) == [6, 10]
    assert shares([Claim(1, 99), Claim(0, 99)], 16) == [0, 16]
    assert shares([Claim(0, 1)] * 20, 16) == [1] * 16 + [0] * 4
    assert shares([], 16) == []


@given(claims=some_claims, connections=st.integers(0, 32))
def test_all_are_used_and_no_more(claims: list[Claim], connections: int) -> None:
    given_ = shares(claims, connections)
    wanted = [claim.wanted for claim in claims]
    assert all(0 <= part <= want for part, want in zip(given_, wanted, strict=True))
    assert sum(given_) == min(connections, sum(wanted))


@given(claims=some_claims, connections=st.integers(0, 32))
def test_nobody_has_two_more_than_one_who_wants_more(claims: list[Claim], connections: int) -> None:
    given_ = shares(claims, connections)
    for claim, part in zip(claims, given_, strict=True):
        if part == claim.wanted:
            continue
        for other, other_part in zip(claims, given_, strict=True):
            if other.urgency == claim.urgency:
                assert other_part <= part + 1
            if other.urgency > claim.urgency:
                assert other_part == 0, "a later one waits"
