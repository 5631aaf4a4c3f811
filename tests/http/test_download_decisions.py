"""What the download scheduler decides by: shares of connections, and waits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.http.download_scheduler import ConnectionDemand, shares
from lorax_async.http.failures import RetryPolicy, retry_after_of

STALLED, OTHER = ConnectionDemand(0, 99, "a", stalled=True), ConnectionDemand(0, 2, "b")


def test_who_is_stalled_has_one_and_what_nobody_wants_now_or_soon() -> None:
    given_ = [shares([STALLED, OTHER], 16, soon=soon) for soon in (0, 4, 16)]
    assert given_ == [[14, 2], [10, 2], [1, 2]]
    assert shares([STALLED, ConnectionDemand(1, 99, "b")], 16) == [1, 15]


def test_silent_downloads_of_an_origin_have_one_connection_together_and_what_is_left() -> None:
    silent = [ConnectionDemand(0, 1, "a", silent=True)] * 24
    assert shares([*silent, ConnectionDemand(0, 99, "a")], 16) == [1, *[0] * 23, 15]
    assert sum(shares([*silent, ConnectionDemand(0, 4, "a")], 16)) == 16
    stalled = [ConnectionDemand(0, 1, "a", stalled=True, silent=True)] * 24
    assert shares([*stalled, ConnectionDemand(0, 99, "a", stalled=True)], 16)[-1] >= 15


def test_a_later_urgency_has_no_more_connections_than_are_useful() -> None:
    urgent, hint = ConnectionDemand(0, 4, "a", useful=4), ConnectionDemand(1, 4, "a", useful=4)
    assert shares([urgent, hint], 16) == [4, 0]
    assert shares([urgent, hint, ConnectionDemand(1, 9, "b")], 16) == [4, 0, 9]
    assert shares([ConnectionDemand(0, 3, "a"), hint], 16) == [3, 1]
    assert shares([hint, hint], 16) == [4, 4], "equals share the link"


fields = st.integers(0, 2), st.integers(0, 20), st.sampled_from("abc"), st.booleans()
demands = st.builds(ConnectionDemand, *fields, silent=st.just(False), useful=st.none())


@given(st.lists(demands, max_size=12), st.booleans(), st.integers(0, 32))
def test_all_are_used_and_nobody_has_two_more_than_one_who_wants_more(
    claims: list[ConnectionDemand], one_origin: bool, connections: int
) -> None:
    """Of origins, and of those who want something of one."""
    if one_origin:
        claims = [ConnectionDemand(claim.urgency, claim.wanted) for claim in claims]
    given_ = shares(claims, connections)
    pairs = list(zip(claims, given_, strict=True))
    assert all(0 <= part <= claim.wanted for claim, part in pairs)
    assert sum(given_) == min(connections, sum(claim.wanted for claim in claims))
    for claim, part in pairs:
        if part < claim.wanted and one_origin:
            assert all(other <= part + 1 for c, other in pairs if c.urgency == claim.urgency)
            assert not any(other for c, other in pairs if c.urgency > claim.urgency)
    if any(claim.stalled for claim in claims):
        return
    for urgency in range(3):
        parts, wanted = dict[object, int](), dict[object, int]()
        for claim, part in pairs:
            if claim.urgency == urgency:
                parts[claim.origin] = parts.get(claim.origin, 0) + part
                wanted[claim.origin] = wanted.get(claim.origin, 0) + claim.wanted
        short = [part for origin, part in parts.items() if part < wanted[origin]]
        assert not short or max(parts.values()) <= min(short) + 1


NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


def test_waits_double_up_to_the_most_and_a_source_is_obeyed_within_reason() -> None:
    retries = RetryPolicy(attempts=7, base=1.0, most=8.0)
    assert [retries.wait(failed, 0.5) for failed in range(1, 8)] == [0.5, 1, 2, 4, 4, 4, None]
    retries = RetryPolicy(obeyed=30.0, base=0.5)
    assert retries.wait(1, 0.5, retry_after=10.0) == pytest.approx(10.25)
    assert retries.wait(1, 0.0, retry_after=30.0) == 30.0
    assert retries.wait(1, 0.0, retry_after=30.1) is None


@given(
    failed=st.integers(1, 10_000),
    draw=st.floats(0, 1, exclude_max=True),
    after=st.none() | st.floats(0, 1e9),
)
def test_no_wait_is_longer_than_it_may_be(failed: int, draw: float, after: float | None) -> None:
    retries = RetryPolicy(attempts=20_000)
    wait = retries.wait(failed, draw, after)
    if wait is not None:
        assert (after or 0.0) <= wait <= max(retries.most, retries.obeyed + 1.0)


RETRY_AFTER = {
    "0": 0.0,
    "120": 120.0,
    "Tue, 14 Nov 2023 22:13:50 GMT": 30.0,
    "Tue, 14 Nov 2023 22:00:00 GMT": 0.0,
    **dict.fromkeys(["-1", "1.5", "soon", "", "9" * 40]),
    **dict.fromkeys(["Tue, 99 Nov 2023 22:13:50 GMT", "Fri, 31 Dec 9999 23:59:59 +2400"]),
}


def test_retry_after() -> None:
    assert {text: retry_after_of(text, NOW) for text in RETRY_AFTER} == RETRY_AFTER
