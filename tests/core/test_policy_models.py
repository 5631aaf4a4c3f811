"""Eviction policies against models of their definitions, and in every state of small worlds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async.adapter import AdapterKey
from lorax_async.core.policies import EVICTION_POLICIES, GDSF, LFU, LRU, Policy, PolicyName, policy

KEYS = tuple(AdapterKey(name, ()) for name in "abcdef")
NBYTES = (1024, 2, 64, 512, 8, 1)
COSTS = (2048, 2, 64, 0, 100, 3)

Operation = tuple[str, int]
operations = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "ask", "evict", "unload"]), st.integers(0, 5)),
    max_size=60,
)


def carry_out(one: Policy, operation: Operation, holders: set[int]) -> None:
    """Ask for an adapter, which loads it if it is not there, or take its room from it."""
    verb, index = operation
    if verb == "ask" and index not in holders:
        one.admit(KEYS[index], NBYTES[index], COSTS[index])
        holders.add(index)
    elif verb == "ask":
        one.use(KEYS[index])
    elif index in holders:
        one.remove(KEYS[index], evicted=verb == "evict")
        holders.remove(index)


def told(one: Policy, history: list[Operation]) -> set[int]:
    """Carry a history out; returns who holds room after it."""
    holders: set[int] = set()
    for operation in history:
        carry_out(one, operation, holders)
    return holders


@pytest.mark.parametrize("name", EVICTION_POLICIES)
@given(history=operations)
def test_all_holders_are_ranked_once(name: PolicyName, history: list[Operation]) -> None:
    one = policy(name)
    holders = told(one, history)
    assert sorted(one.ranked(), key=str) == [KEYS[index] for index in sorted(holders)]


@given(operations)
def test_lru_is_an_ordered_dict(history: list[Operation]) -> None:
    one, model = LRU(), OrderedDict[int, None]()
    holders: set[int] = set()
    for operation in history:
        carry_out(one, operation, holders)
        verb, index = operation
        model[index] = None
        model.move_to_end(index)
        if verb != "ask":
            del model[index]
        assert list(one.ranked()) == [KEYS[key] for key in model]


def stays(history: list[Operation]) -> dict[int, list[int]]:
    """Who holds room after a history, and at which of its operations each was used since."""
    uses: dict[int, list[int]] = {}
    for number, (verb, index) in enumerate(history):
        if verb == "ask":
            uses.setdefault(index, []).append(number)
        else:
            uses.pop(index, None)
    return uses


def gdsf_priority(history: list[Operation], index: int, most_uses: int) -> Fraction:
    """By the definition, from the whole history each time."""
    uses = stays(history)[index]
    counted = min(len(uses), most_uses)
    return gdsf_age(history[: uses[-1]], most_uses) + counted * Fraction(
        COSTS[index], NBYTES[index]
    )


def gdsf_age(history: list[Operation], most_uses: int) -> Fraction:
    evictions = (
        gdsf_priority(history[:number], index, most_uses)
        for number, (verb, index) in enumerate(history)
        if verb == "evict" and index in stays(history[:number])
    )
    return max(evictions, default=Fraction(0))


def lfu_count(history: list[Operation], index: int, half_life: int) -> int:
    """By the definition: of each block of `half_life` uses the next one sees half."""
    count = 0
    asked = [number for number, (verb, _) in enumerate(history) if verb == "ask"]
    halved = set(asked[half_life - 1 :: half_life])
    own = set(stays(history)[index])
    for number in range(len(history)):
        count += number in own
        if number in halved:
            count //= 2
    return count


def by_definition(history: list[Operation], worth: Callable[[int], Hashable]) -> list[AdapterKey]:
    uses = stays(history)
    return [KEYS[i] for i in sorted(uses, key=lambda index: (worth(index), uses[index][-1]))]


short = operations.map(lambda history: history[:14])


@given(short, st.sampled_from([2, 64]))
def test_gdsf_is_its_definition(history: list[Operation], most_uses: int) -> None:
    one = GDSF(most_uses)
    told(one, history)
    assert list(one.ranked()) == by_definition(
        history, lambda index: gdsf_priority(history, index, most_uses)
    )


@given(operations, st.sampled_from([1, 2, 3, 7, 1024]))
def test_lfu_is_its_definition(history: list[Operation], half_life: int) -> None:
    one = LFU(half_life)
    told(one, history)
    assert list(one.ranked()) == by_definition(
        history, lambda index: lfu_count(history, index, half_life)
    )


# -- copies and states ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVICTION_POLICIES)
@given(before=operations, after=operations)
def test_a_copy_goes_its_own_way(
    name: PolicyName, before: list[Operation], after: list[Operation]
) -> None:
    one, whole = policy(name), policy(name)
    holders = told(one, before)
    twin = one.copy()
    state, ranking = one.state(), list(one.ranked())
    assert (twin.state(), list(twin.ranked())) == (state, ranking)
    for operation in after:
        carry_out(twin, operation, holders)
    assert (one.state(), list(one.ranked())) == (state, ranking)
    told(whole, before + after)
    assert (twin.state(), list(twin.ranked())) == (whole.state(), list(whole.ranked()))


def after_each(one: Policy, keys: int) -> dict[Operation, Policy]:
    """What may happen next, each to a copy."""
    holders = {KEYS.index(key) for key in one.ranked()}
    successors = {}
    for index in range(keys):
        for verb in ("ask", "evict", "unload") if index in holders else ("ask",):
            twin = one.copy()
            carry_out(twin, (verb, index), set(holders))
            successors[verb, index] = twin
    return successors


def explore(start: Policy, keys: int) -> int:
    """Reach every state; of two policies that meet in one, everything that follows is the same."""
    futures: dict[Hashable, tuple[list[AdapterKey], dict[Operation, Hashable]]] = {}
    queue = [start]
    while queue:
        one = queue.pop()
        successors = after_each(one, keys)
        future = list(one.ranked()), {step: twin.state() for step, twin in successors.items()}
        if one.state() not in futures:
            futures[one.state()] = future
            queue.extend(successors.values())
        assert futures[one.state()] == future
        assert len(futures) < 10_000
    return len(futures)


def test_lru_has_a_state_for_each_order_of_holders() -> None:
    assert explore(LRU(), 3) == 1 + 3 + 6 + 6
    assert explore(LRU(), 4) == 1 + 4 + 12 + 24 + 24


def test_equal_states_of_lfu_rank_alike_for_ever() -> None:
    # One adapter: gone after the first or second use of two; or there after the first with a
    # count of 1 or 2, after the second with 0 or 1.
    assert explore(LFU(half_life=2), 1) == 2 + 2 + 2
    assert explore(LFU(half_life=3), 3) > 100


def test_equal_states_of_gdsf_rank_alike_for_ever() -> None:
    # One adapter of 2 a use: gone; or there at L + 2 or L + 4.
    assert explore(GDSF(most_uses=2), 1) == 3
    assert explore(GDSF(most_uses=3), 3) > 1000


def test_states_of_gdsf_tell_what_a_use_is_worth() -> None:
    one, other = GDSF(), GDSF()
    one.admit(KEYS[0], 1, 2)
    one.admit(KEYS[1], 1, 1)
    one.remove(KEYS[1], evicted=True)  # L is 1: the first is at L + 1 as in the other,
    other.admit(KEYS[0], 1, 1)  # but its next use will be worth 2.
    assert one.state() != other.state()
