"""Requests against a budget: a trace worked out by hand, and against the loader's own budget."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.eviction_trace import (
    DEVICE_NBYTES,
    GROUP_NBYTES,
    HITS,
    RELOADED,
    REQUESTS,
    SIZES,
    SLOTS,
    steps,
)
from lorax_async.adapter import AdapterKey
from lorax_async.core.life import Grant, Needs
from lorax_async.core.policies import EVICTION_POLICIES, LRU, PolicyName, policy
from lorax_async.core.popularity import Zipf
from lorax_async.core.residency import Residency
from lorax_async.core.simulation import Outcome, Room, fitting, simulate
from lorax_async.errors import ConfigError


def room(nbytes: int, slots: int = 8) -> Room:
    return Room(nbytes, 64, slots)


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_a_trace_goes_as_worked_out_by_hand(name: PolicyName) -> None:
    names = sorted(SIZES)
    needs = [
        Needs((GROUP_NBYTES,) * (SIZES[each] // GROUP_NBYTES), file_nbytes=SIZES[each])
        for each in names
    ]
    found = simulate(map(names.index, REQUESTS), needs, room(DEVICE_NBYTES, SLOTS), policy(name))
    loads = len(REQUESTS) - len(HITS[name])
    nbytes = RELOADED[name] + sum(SIZES[each] for each in set(REQUESTS))
    assert found == Outcome(
        requests=len(REQUESTS),
        hits=len(HITS[name]),
        refused=0,
        loads=loads,
        first_loads=len(set(REQUESTS)),
        evictions=sum(len(step.victims) for step in steps(name)),
        device_bytes=nbytes,
        file_bytes=nbytes,
    )
    assert found.hit_rate == len(HITS[name]) / len(REQUESTS)


def test_what_fits_no_empty_device_is_refused_and_nobody_goes_for_it() -> None:
    small, large = Needs((64,), file_nbytes=60), Needs((64, 128), file_nbytes=180)
    found = simulate([0, 1, 0, 1], [small, large], room(128), LRU())
    assert found == Outcome(4, 1, 2, 1, 1, 0, 64, 60)


def test_nothing_asked_is_nothing_found() -> None:
    assert simulate([], [Needs((64,))], room(64), LRU()) == Outcome()
    assert Outcome().hit_rate == 0


def test_holes_that_are_too_small_count() -> None:
    """Four units: a, b, c and d take one each; with b and d gone, two single ones hold no pair."""
    one, pair = Needs((64,), file_nbytes=1), Needs((128,), file_nbytes=2)
    asked = [0, 1, 2, 3, 0, 2, 4]  # b and d are the least recently used, and then a
    found = simulate(asked, [one, one, one, one, pair], room(256), LRU())
    assert found == Outcome(7, 2, 0, 5, 5, 3, 4 * 64 + 128, 6)


def by_residency(asked: Sequence[int], needs: Sequence[Needs], residency: Residency) -> Outcome:
    """The same requests, by what a loader asks of its budget, extent by extent."""
    held: dict[AdapterKey, Grant] = {}
    grants: list[tuple[int, Grant]] = []
    hits = refused = 0
    for position in asked:
        key = AdapterKey(str(position), ())
        if key in held:
            residency.policy.use(key)
            hits += 1
        elif not residency.fits_beside((), needs[position].group_nbytes):
            refused += 1
        else:
            while (grant := residency.claim(key, needs[position])) is None:
                victim = next(residency.ranked())
                residency.release(victim, held.pop(victim), evicted=True)
            held[key] = grant
            grants.append((position, grant))
    return Outcome(
        requests=len(asked),
        hits=hits,
        refused=refused,
        loads=len(grants),
        first_loads=len({position for position, _ in grants}),
        evictions=residency.evictions,
        device_bytes=sum(grant.nbytes for _, grant in grants),
        file_bytes=sum(needs[position].file_nbytes for position, _ in grants),
    )


GROUPS = st.lists(st.integers(1, 5 * 64), min_size=1, max_size=4).map(tuple)


@pytest.mark.parametrize("name", EVICTION_POLICIES)
@given(
    asked=st.lists(st.integers(0, 7), max_size=60),
    nbytes=st.integers(0, 40 * 64),
    groups=st.lists(GROUPS, min_size=8, max_size=8),
    files=st.lists(st.integers(0, 1 << 24), min_size=8, max_size=8),
)
def test_it_is_what_the_loaders_budget_does(
    name: PolicyName,
    asked: list[int],
    nbytes: int,
    groups: list[tuple[int, ...]],
    files: list[int],
) -> None:
    needs = [Needs(*each) for each in zip(groups, [()] * 8, files, strict=True)]
    residency = Residency(
        device_bytes=nbytes, alignment=64, max_slots=4, copies=1, policy=policy(name)
    )
    ranking = policy(name)
    found = simulate(asked, needs, room(nbytes, 4), ranking)
    assert found == by_residency(asked, needs, residency)
    assert list(ranking.ranked()) == list(residency.ranked())


def test_so_many_fit() -> None:
    needs = Needs((64, 128))
    assert fitting(needs, room(6 * 64 + 191)) == 2
    assert fitting(needs, room(9 * 64, slots=2)) == 2
    assert fitting(needs, room(191)) == 0


def test_zipfs_law() -> None:
    """Of 1 : 1/2 : 1/3 the sum is 11/6: the first has 6/11 of all, the second 3/11."""
    three = Zipf(3, 1)
    assert [three.pick(n / 11 + 1e-9) for n in range(11)] == [0] * 6 + [1] * 3 + [2] * 2
    assert [Zipf(4, 0).pick(n / 8) for n in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert three.pick(1 - 2**-53) == 2


@pytest.mark.parametrize(("count", "exponent"), [(0, 1.0), (1, -0.1), (1, float("nan")), (1, 11.0)])
def test_no_law_for_nobody(count: int, exponent: float) -> None:
    with pytest.raises(ConfigError, match="Zipf's law"):
        Zipf(count, exponent)
