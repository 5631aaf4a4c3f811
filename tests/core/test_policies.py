"""Eviction policies: a trace and its hits worked out by hand, ageing, ties and faults."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from core.eviction_trace import (
    DEVICE_NBYTES,
    HITS,
    OPENING_COST,
    RELOADED,
    REQUESTS,
    SIZES,
    SLOTS,
    Step,
    steps,
)
from lorax_async.adapter import AdapterKey
from lorax_async.core.policies import EVICTION_POLICIES, GDSF, LFU, Policy, PolicyName, policy
from lorax_async.errors import InternalError

A, B, C, D = (AdapterKey(name, ()) for name in "abcd")


def names(one: Policy) -> str:
    return "".join(key.location for key in one.ranked())


def admit(one: Policy, *keys: AdapterKey) -> None:
    for key in keys:
        one.admit(key, 4, 8)


def use(one: Policy, key: AdapterKey, times: int = 1) -> None:
    for _ in range(times):
        one.use(key)


# -- the trace ------------------------------------------------------------------------------------


def play(one: Policy) -> Iterator[Step]:
    """A cache that does what the trace's description says."""
    cached: set[str] = set()
    for request in REQUESTS:
        victims: list[str] = []
        hit = request in cached
        if hit:
            one.use(AdapterKey(request, ()))
        else:
            while not fits(cached, request):
                victim = next(one.ranked())
                one.remove(victim, evicted=True)
                cached.remove(victim.location)
                victims.append(victim.location)
            size = SIZES[request]
            one.admit(AdapterKey(request, ()), size, size + OPENING_COST)
            cached.add(request)
        yield Step(request, hit, tuple(victims), tuple(names(one)))


def fits(cached: set[str], name: str) -> bool:
    taken = sum(map(SIZES.__getitem__, cached))
    return len(cached) < SLOTS and taken + SIZES[name] <= DEVICE_NBYTES


def reloaded(played: list[Step]) -> int:
    return sum(
        SIZES[step.request]
        for number, step in enumerate(played)
        if not step.hit and step.request in REQUESTS[:number]
    )


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_the_trace_goes_as_worked_out_by_hand(name: PolicyName) -> None:
    played = list(play(policy(name)))
    for number, (done, expected) in enumerate(zip(played, steps(name), strict=True)):
        assert done == expected, number
    assert {number for number, step in enumerate(played) if step.hit} == HITS[name]
    assert reloaded(played) == RELOADED[name]


def test_the_policies_differ_and_gdsf_loads_the_fewest_bytes_again() -> None:
    again = {name: reloaded(list(play(policy(name)))) for name in EVICTION_POLICIES}
    assert again["gdsf"] < again["lfu"] < again["lru"]
    assert len(set(HITS.values())) == 3


# -- ageing, ties, faults -------------------------------------------------------------------------


def test_lfu_forgets_what_was_popular() -> None:
    one = LFU(half_life=4)
    admit(one, A)
    use(one, A, 6)  # Uses 1 to 7: halved to 2 after the fourth, 5 at the seventh.
    admit(one, B)  # The eighth: 5 and 1 become 2 and 0.
    assert names(one) == "ba"
    use(one, B, 3)  # 2 and 3.
    assert names(one) == "ab"


def test_without_ageing_lfu_would_not_forget() -> None:
    one = LFU(half_life=1000)
    admit(one, A)
    use(one, A, 6)
    admit(one, B)
    use(one, B, 3)
    assert names(one) == "ba"


def test_lfu_halves_to_nothing_and_ranks_by_recency_then() -> None:
    one = LFU(half_life=3)
    admit(one, B, A)
    use(one, B)  # The third use: b has 1, a has 0.
    admit(one, C, D)
    use(one, C)  # The sixth: b 0, a 0, c 1, d 0.
    assert names(one) == "abdc"


def test_lfu_counts_the_longer_the_more_hold_room() -> None:
    """200 holders halve after 1,600 uses: first a with 1,024 of its own, and then 376 more."""
    one = LFU()
    admit(one, *(AdapterKey(f"other {number}", ()) for number in range(199)))
    admit(one, A)
    use(one, A, 1023)
    use(one, AdapterKey("other 0", ()), 375)
    assert dict(one._marks)[A] == 1024
    use(one, AdapterKey("other 0", ()), 2)
    assert dict(one._marks)[A] == 512


def test_lfu_halves_after_1024_uses_where_few_hold_room() -> None:
    one = LFU()
    admit(one, B, A)
    use(one, A, 1021)
    assert dict(one._marks)[A] == 1022
    use(one, A)
    assert dict(one._marks)[A] == 511
    one.remove(B, evicted=True)
    use(one, A, 1024)
    assert dict(one._marks)[A] == (511 + 1024) // 2


def scanned_until_gone(one: Policy, key: AdapterKey, limit: int) -> int:
    """Scan ids once each through one place beside `key`; returns how many came before it went."""
    for count in range(limit):
        newcomer = AdapterKey(f"scan {count}", ())
        one.admit(newcomer, 4, 8)
        victim = next(one.ranked())
        if victim == key:
            return count
        one.remove(victim, evicted=True)
    return limit


def test_gdsf_lets_go_of_what_was_popular() -> None:
    one = GDSF()
    admit(one, A)
    use(one, A, 9)
    # Each use is worth 2: a has 20, scan n comes with 2(n + 1) and takes L there. At 20 a is older.
    assert scanned_until_gone(one, A, 100) == 9


def test_gdsf_counts_no_more_uses_than_matter() -> None:
    one = GDSF(most_uses=5)
    admit(one, A)
    use(one, A, 1000)
    assert scanned_until_gone(one, A, 100) == 4


@pytest.mark.parametrize(("evicted", "first"), [(True, "bc"), (False, "cb")])
def test_gdsf_ages_by_evictions_alone(evicted: bool, first: str) -> None:
    one = GDSF()
    one.admit(A, 1, 4)
    one.admit(B, 1, 5)
    one.remove(A, evicted=evicted)
    one.admit(C, 1, 3)  # 3, and 4 more if a was evicted: before or after the 5 of b.
    assert names(one) == first


def test_gdsf_does_not_grow_younger() -> None:
    one = GDSF()
    one.admit(A, 1, 1)
    one.admit(B, 1, 10)
    one.remove(B, evicted=True)  # a was in use and passed over: L is 10,
    one.remove(A, evicted=True)  # and stays 10 when a goes at 1.
    one.admit(C, 1, 1)  # 11
    one.admit(D, 2, 1)  # 10.5
    assert names(one) == "dc"


def test_gdsf_weighs_cost_by_size() -> None:
    one = GDSF()
    one.admit(A, 100, 200)
    one.admit(B, 10, 30)
    one.admit(C, 1000, 1000)
    assert names(one) == "cab"


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_of_equals_the_least_recently_used_goes(name: PolicyName) -> None:
    one = policy(name)
    admit(one, A, B, C)
    use(one, B)
    use(one, A)
    use(one, C)
    assert names(one) == "bac"


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_what_comes_back_starts_anew(name: PolicyName) -> None:
    one = policy(name)
    admit(one, A, B)
    use(one, A, 3)
    one.remove(A, evicted=False)
    assert names(one) == "b"
    admit(one, A)
    assert names(one) == "ba"
    use(one, B)
    assert names(one) == "ab"


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_the_ranking_stands_while_holders_go(name: PolicyName) -> None:
    one = policy(name)
    admit(one, A, B, C)
    for key in one.ranked():
        one.remove(key, evicted=True)
    assert names(one) == ""


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_the_first_is_found_whoever_was_used_and_went_before(name: PolicyName) -> None:
    one = policy(name)
    admit(one, A, B, C)
    use(one, A)
    use(one, B, 2)
    one.remove(C, evicted=False)
    assert next(one.ranked()) == A  # What was remembered of c's place, and of a's first, is old.
    one.remove(A, evicted=True)
    assert names(one) == "b"
    one.remove(B, evicted=True)
    assert next(one.ranked(), None) is None


@pytest.mark.parametrize("kind", [LFU, GDSF])
def test_what_is_remembered_is_bounded_by_the_holders(kind: type[LFU | GDSF]) -> None:
    one = kind()
    admit(one, A, B)
    for _ in range(500):
        use(one, A)
        admit(one, C)
        one.remove(C, evicted=True)
    assert len(one._heap) <= 2 * 3 + 64
    assert names(one) == "ba"


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_a_holder_that_is_none_is_a_fault_and_changes_nothing(name: PolicyName) -> None:
    one = policy(name)
    admit(one, A, B)
    before = one.state()
    with pytest.raises(InternalError, match="a holds room already"):
        admit(one, A)
    with pytest.raises(InternalError, match="c holds no room"):
        one.use(C)
    with pytest.raises(InternalError, match="c holds no room"):
        one.remove(C, evicted=True)
    assert one.state() == before


@pytest.mark.parametrize(("nbytes", "cost"), [(0, 1.0), (1, -1.0), (1, float("nan"))])
def test_gdsf_refuses_numbers_out_of_range(nbytes: int, cost: float) -> None:
    one = GDSF()
    with pytest.raises(InternalError, match="a takes"):
        one.admit(A, nbytes, cost)
    assert names(one) == ""
