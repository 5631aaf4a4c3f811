"""What the download scheduler decides by: shares of connections, waits, and what a disk keeps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.disk_budget import FETCH_FIXED_COST, DiskBudget, Stored
from lorax_async.core.policies import policy
from lorax_async.core.retries import Retries, retry_after_of
from lorax_async.core.sharing import Claim, shares

STALLED, OTHER = Claim(0, 99, "a", stalled=True), Claim(0, 2, "b")


@pytest.mark.parametrize(("soon", "given_"), [(0, [14, 2]), (4, [10, 2]), (16, [1, 2])])
def test_who_is_stalled_has_one_and_what_nobody_wants_now_or_soon(
    soon: int, given_: list[int]
) -> None:
    assert shares([STALLED, OTHER], 16, soon=soon) == given_
    assert shares([STALLED, Claim(1, 99, "b")], 16) == [1, 15]


@given(
    claims=st.lists(
        st.builds(
            *(Claim, st.integers(0, 2), st.integers(0, 20), st.sampled_from("abc")),
            stalled=st.booleans(),
        ),
        max_size=12,
    ),
    one_origin=st.booleans(),
    connections=st.integers(0, 32),
)
def test_all_are_used_and_nobody_has_two_more_than_one_who_wants_more(
    claims: list[Claim], one_origin: bool, connections: int
) -> None:
    """Of origins, and of those who want something of one."""
    if one_origin:
        claims = [Claim(claim.urgency, claim.wanted) for claim in claims]
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
    retries = Retries(attempts=7, base=1.0, most=8.0)
    assert [retries.wait(failed, 0.5) for failed in range(1, 8)] == [0.5, 1, 2, 4, 4, 4, None]
    retries = Retries(obeyed=30.0, base=0.5)
    assert retries.wait(1, 0.5, retry_after=10.0) == pytest.approx(10.25)
    assert retries.wait(1, 0.0, retry_after=30.0) == 30.0
    assert retries.wait(1, 0.0, retry_after=30.1) is None


@given(
    failed=st.integers(1, 10_000),
    draw=st.floats(0, 1, exclude_max=True),
    after=st.none() | st.floats(0, 1e9),
)
def test_no_wait_is_longer_than_it_may_be(failed: int, draw: float, after: float | None) -> None:
    retries = Retries(attempts=20_000)
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


def budget(entries: dict[str, Stored], partials: dict[str, Stored]) -> DiskBudget:
    found = DiskBudget(100, policy("lru"))
    found.observe(entries, partials)
    return found


def test_what_is_on_disk_counts_whoever_put_it_there_until_it_is_gone() -> None:
    found = budget({"a": Stored(30, 1)}, {"p": Stored(20, 1)})
    assert (found.used, found.free) == (50, 50)
    found.observe({"b": Stored(90, 1)}, {"p": Stored(21, 1)})
    assert (found.used, found.free) == (111, -11)
    for name in ("p", "nobody"):
        found.forget(name, evicted=True)
    assert (found.used, list(found.victims())) == (90, ["b"])
    found.observe({}, {})
    assert (found.used, list(found.victims())) == (0, [])


def test_a_use_counts_wherever_it_was() -> None:
    entries = {name: Stored(1, at) for at, name in enumerate("abc")}
    found = budget(entries, {"p": Stored(1, 99), "q": Stored(1, 98)})
    found.use("a", Stored(1, 10))
    assert list(found.victims()) == ["q", "p", "b", "c", "a"], "partials go first"
    assert found.fits_beside(99, ["a", "nobody"])
    assert not found.fits_beside(100, ["a", "nobody"])
    found.observe(entries | {"a": Stored(1, 10)}, {})  # our own use again
    assert list(found.victims()) == ["b", "c", "a"]
    found.observe(entries | {"a": Stored(1, 10), "b": Stored(1, 11)}, {})  # another process's
    assert list(found.victims()) == ["c", "a", "b"]
    found.use("a", Stored(12, 12))  # another one of the same name
    assert (found.used, list(found.victims())) == (14, ["c", "b", "a"])


def test_gdsf_weighs_what_a_fetch_costs() -> None:
    """Of equal use the large one goes: (32 MiB + n) / n falls with n. An empty one is one, too."""
    found = DiskBudget(100, policy("gdsf"))
    found.observe({"empty": Stored(0, 3), "large": Stored(90, 2), "small": Stored(9, 1)}, {})
    assert list(found.victims()) == ["large", "small", "empty"]
    assert FETCH_FIXED_COST == 33_554_432
