"""What the download scheduler decides by: shares of connections, waits, and what a disk keeps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.disk_budget import FETCH_FIXED_COST, DiskBudget, Stored
from lorax_async.core.policies import PolicyName, policy
from lorax_async.core.retries import Retries, retry_after_of
from lorax_async.core.sharing import Claim, shares

# -- shares of connections ------------------------------------------------------------------------

MANY = [Claim(0, 1, "a")] * 30
STALLED, HEALTHY = Claim(0, 99, "a", stalled=True), Claim(0, 99, "b")
OLD, NEW = Claim(0, 1, "a", retried=True), Claim(0, 1, "a")


@pytest.mark.parametrize(
    ("claims", "connections", "given_"),
    [
        ([Claim(0, 99), Claim(0, 99), Claim(0, 2)], 16, [7, 7, 2]),
        ([Claim(1, 99), Claim(0, 10)], 16, [6, 10]),
        ([Claim(0, 1)] * 20, 16, [1] * 16 + [0] * 4),
        ([], 16, []),
        # By origins first.
        ([*MANY, Claim(0, 99, "b")], 16, [1] * 8 + [0] * 22 + [8]),
        ([*MANY, Claim(0, 2, "b")], 16, [1] * 14 + [0] * 16 + [2]),
        ([Claim(0, 99, "a"), Claim(0, 99, "b"), Claim(0, 99, "b")], 16, [8, 4, 4]),
        ([Claim(0, 99, "a"), Claim(1, 99, "b")], 16, [16, 0]),
        # Retries come after what was not tried.
        ([*[OLD] * 3, NEW], 2, [1, 0, 0, 1]),
        ([OLD, Claim(0, 1, "b")], 1, [0, 1]),
        # Who is stalled gets one, and what nobody else wants.
        ([STALLED], 16, [16]),
        ([STALLED, HEALTHY], 16, [1, 15]),
        ([STALLED, Claim(0, 2, "b")], 16, [14, 2]),
        ([STALLED, Claim(1, 99, "b")], 16, [1, 15]),
        (
            [*(Claim(0, 99, n, stalled=True) for n in range(20)), HEALTHY],
            16,
            [1] * 15 + [0] * 5 + [1],
        ),
    ],
)
def test_shares_by_hand(claims: list[Claim], connections: int, given_: list[int]) -> None:
    assert shares(claims, connections) == given_


def test_connections_are_kept_for_what_comes_soon() -> None:
    assert shares([STALLED, Claim(0, 2, "b")], 16, soon=16) == [1, 2]
    assert shares([STALLED, Claim(0, 2, "b")], 16, soon=4) == [10, 2]
    assert shares([HEALTHY, Claim(0, 99, "a")], 16, soon=16) == [8, 8]


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


# -- waits between attempts -----------------------------------------------------------------------

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


def test_waits_double_up_to_the_most() -> None:
    retries = Retries(attempts=7, base=1.0, most=8.0)
    assert [retries.wait(failed, 0.5) for failed in range(1, 8)] == [0.5, 1, 2, 4, 4, 4, None]


def test_a_source_is_obeyed_within_reason() -> None:
    retries = Retries(obeyed=30.0, base=0.5)
    assert retries.wait(1, 0.5, retry_after=10.0) == pytest.approx(10.25)
    assert retries.wait(1, 0.0, retry_after=30.0) == 30.0
    assert retries.wait(1, 0.0, retry_after=30.1) is None
    assert retries.wait(1, 0.0, retry_after=86_400.0) is None


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


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30.0),
        ("Tue, 14 Nov 2023 22:00:00 GMT", 0.0),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
        ("9" * 40, None),
        ("Tue, 99 Nov 2023 22:13:50 GMT", None),
        ("Fri, 31 Dec 9999 23:59:59 +2400", None),
    ],
)
def test_retry_after(text: str, seconds: float | None) -> None:
    assert retry_after_of(text, NOW) == seconds


# -- what a disk keeps ----------------------------------------------------------------------------


def budget(
    entries: dict[str, Stored], partials: dict[str, Stored], name: PolicyName = "lru"
) -> DiskBudget:
    found = DiskBudget(100, policy(name))
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


@pytest.mark.parametrize(
    ("name", "entries", "victims"),
    [
        ("lru", {"a": Stored(1, 20), "b": Stored(1, 10), "c": Stored(1, 30)}, "qpbac"),
        # Of equal use the large one goes: (32 MiB + n) / n falls with n.
        ("gdsf", {"l": Stored(90, 2), "s": Stored(9, 1)}, "qpls"),
        ("gdsf", {"a": Stored(0, 1)}, "qpa"),  # an empty entry is an entry
    ],
)
def test_partials_go_first_and_then_by_the_policy(
    name: PolicyName, entries: dict[str, Stored], victims: str
) -> None:
    found = budget(entries, {"p": Stored(1, 99), "q": Stored(1, 98)}, name)
    assert "".join(found.victims()) == victims
    assert FETCH_FIXED_COST == 32 << 20


def test_a_use_counts_wherever_it_was() -> None:
    entries = {name: Stored(1, at) for at, name in enumerate("abc")}
    found = budget(entries, {})
    found.use("a", Stored(1, 10))
    assert list(found.victims()) == ["b", "c", "a"]
    found.observe(entries | {"a": Stored(1, 10)}, {})  # our own use again
    assert list(found.victims()) == ["b", "c", "a"]
    found.observe(entries | {"a": Stored(1, 10), "b": Stored(1, 11)}, {})  # another process's
    assert list(found.victims()) == ["c", "a", "b"]


def test_what_was_just_put_there_counts_from_then_on() -> None:
    found = budget({"a": Stored(1, 1)}, {}, "lfu")
    found.use("b", Stored(1, 5))
    found.use("b", Stored(1, 6))
    found.use("a", Stored(1, 7))
    assert list(found.victims()) == ["b", "a"]
    found.observe({"a": Stored(1, 7), "b": Stored(1, 6), "c": Stored(1, 9)}, {})
    assert list(found.victims()) == ["c", "b", "a"]


def test_another_one_of_the_same_name_is_new() -> None:
    found = budget({"a": Stored(10, 1), "b": Stored(10, 2)}, {})
    found.observe({"a": Stored(11, 3), "b": Stored(10, 2)}, {})
    assert (found.used, list(found.victims())) == (21, ["b", "a"])
    found.use("b", Stored(12, 4))
    assert (found.used, list(found.victims())) == (23, ["a", "b"])


@pytest.mark.parametrize(
    ("staying", "fits"),
    [((), 100), (("a",), 70), (("a", "p"), 50), (("a", "a", "nobody"), 70)],
)
def test_what_stays_bounds_what_can_fit(staying: tuple[str, ...], fits: int) -> None:
    found = budget({"a": Stored(30, 1), "b": Stored(40, 1)}, {"p": Stored(20, 1)})
    assert found.fits_beside(fits, staying)
    assert not found.fits_beside(fits + 1, staying)
