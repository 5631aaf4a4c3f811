"""Shares of connections: bounded, none idle, even, and the urgent first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.sharing import Claim, shares

claims_at_origins = st.lists(
    st.builds(
        Claim,
        st.integers(0, 1),
        st.integers(0, 20),
        st.sampled_from("abc"),
        st.just(False),
        st.booleans(),
    ),
    max_size=12,
)
some_claims = st.lists(st.builds(Claim, st.integers(0, 2), st.integers(0, 20)), max_size=12)


def test_by_hand() -> None:
    assert shares([Claim(0, 99), Claim(0, 99), Claim(0, 2)], 16) == [7, 7, 2]
    assert shares([Claim(0, 99)] * 3, 16) == [6, 5, 5]
    assert shares([Claim(1, 99), Claim(0, 10)], 16) == [6, 10]
    assert shares([Claim(1, 99), Claim(0, 99)], 16) == [0, 16]
    assert shares([Claim(0, 1)] * 20, 16) == [1] * 16 + [0] * 4
    assert shares([], 16) == []


def test_origins_by_hand() -> None:
    many = [Claim(0, 1, "a")] * 30
    assert shares([*many, Claim(0, 99, "b")], 16) == [1] * 8 + [0] * 22 + [8]
    assert shares([*many, Claim(0, 2, "b")], 16) == [1] * 14 + [0] * 16 + [2]
    assert shares([Claim(0, 99, "a"), Claim(0, 99, "b"), Claim(0, 99, "b")], 16) == [8, 4, 4]
    assert shares([Claim(0, 99, "a"), Claim(1, 99, "b")], 16) == [16, 0]


def test_retries_come_after_what_was_not_tried() -> None:
    old, new = Claim(0, 1, "a", retried=True), Claim(0, 1, "a")
    assert shares([*[old] * 3, new], 2) == [1, 0, 0, 1]
    other = Claim(0, 1, "b")
    assert shares([old, other], 1) == [0, 1]


def test_who_is_stalled_gets_one_and_what_nobody_else_wants() -> None:
    stalled, healthy = Claim(0, 99, "a", stalled=True), Claim(0, 99, "b")
    assert shares([stalled], 16) == [16]
    assert shares([stalled, healthy], 16) == [1, 15]
    assert shares([stalled, Claim(0, 2, "b")], 16) == [14, 2]
    assert shares([stalled, Claim(1, 99, "b")], 16) == [1, 15]
    assert shares([stalled, Claim(0, 2, "b")], 16, soon=16) == [1, 2]
    assert shares([stalled, Claim(0, 2, "b")], 16, soon=4) == [10, 2]
    assert shares([healthy, Claim(0, 99, "a")], 16, soon=16) == [8, 8]
    assert shares([Claim(0, 99, n, stalled=True) for n in range(20)] + [healthy], 16)[-1] == 1


@given(claims=claims_at_origins, connections=st.integers(0, 32))
def test_no_origin_has_two_more_than_one_that_wants_more(
    claims: list[Claim], connections: int
) -> None:
    given_ = shares(claims, connections)
    assert sum(given_) == min(connections, sum(claim.wanted for claim in claims))
    for urgency in (0, 1):
        parts, wanted = dict[object, int](), dict[object, int]()
        for claim, part in zip(claims, given_, strict=True):
            assert part <= claim.wanted
            if claim.urgency == urgency:
                parts[claim.origin] = parts.get(claim.origin, 0) + part
                wanted[claim.origin] = wanted.get(claim.origin, 0) + claim.wanted
        for origin, part in parts.items():
            if part < wanted[origin]:
                assert max(parts.values()) <= part + 1


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
