"""Eviction policies against models of their definitions, and in every state of small worlds."""

import pickle
from collections.abc import Callable, Hashable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_async import AdapterKey, InternalError
from lorax_async.lifecycle.policies import (
    EVICTION_POLICIES,
    GDSF,
    LFU,
    LRU,
    EvictionPolicy,
    PolicyName,
    policy,
)

KEYS = A, B, C, *_ = tuple(AdapterKey(name, ()) for name in "abcdef")
NBYTES = (1024, 2, 64, 512, 8, 1)
COSTS = (2048, 2, 64, 0, 100, 3)

Operation = tuple[str, int]
operations = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "ask", "evict", "unload"]), st.integers(0, 5)),
    max_size=60,
)


def carry_out(one: EvictionPolicy, operation: Operation, holders: set[int]) -> None:
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


def stays(history: list[Operation]) -> dict[int, list[int]]:
    """Who holds room after a history, and at which of its operations each was used since."""
    uses: dict[int, list[int]] = {}
    for number, (verb, index) in enumerate(history):
        if verb == "ask":
            uses.setdefault(index, []).append(number)
        else:
            uses.pop(index, None)
    return uses


def gdsf_priority(history: list[Operation], index: int, max_uses: int) -> Fraction:
    """How old the cache was at the last use, and what its uses are worth."""
    uses = stays(history)[index]
    before = history[: uses[-1]]
    evictions = (
        gdsf_priority(before[:number], gone, max_uses)
        for number, (verb, gone) in enumerate(before)
        if verb == "evict" and gone in stays(before[:number])
    )
    age = max(evictions, default=Fraction(0))
    return age + min(len(uses), max_uses) * Fraction(COSTS[index], NBYTES[index])


def lfu_count(history: list[Operation], index: int, half_life: int) -> int:
    """Of each block of `half_life` uses the next one sees half."""
    count = 0
    asked = [number for number, (verb, _) in enumerate(history) if verb == "ask"]
    halved = set(asked[half_life - 1 :: half_life])
    own = set(stays(history)[index])
    for number in range(len(history)):
        count += number in own
        if number in halved:
            count //= 2
    return count


@pytest.mark.parametrize(
    ("new", "length", "worth"),
    [
        (LRU, 60, lambda _, index: 0),
        *(
            (lambda n=n: LFU(n), 60, lambda history, index, n=n: lfu_count(history, index, n))
            for n in (1, 2, 3, 7, 1024)
        ),
        *(
            (lambda n=n: GDSF(n), 14, lambda history, index, n=n: gdsf_priority(history, index, n))
            for n in (2, 64)
        ),
    ],
)
@given(history=operations)
def test_each_policy_is_its_definition(
    new: Callable[[], EvictionPolicy],
    length: int,
    worth: Callable[[list[Operation], int], int | Fraction],
    history: list[Operation],
) -> None:
    """Of equals the one goes first that was used the longest time ago."""
    one, history, holders = new(), history[:length], set[int]()
    for operation in history:
        carry_out(one, operation, holders)
    uses = stays(history)
    ranking = sorted(uses, key=lambda index: (worth(history, index), uses[index][-1]))
    assert list(one.ranked()) == [KEYS[index] for index in ranking]
    for key in one.ranked():  # it stands while holders go
        one.remove(key, evicted=True)
    assert list(one.ranked()) == []


@pytest.mark.parametrize(("others", "ranked"), [(0, "ab"), (198, "ba")])
def test_lfu_halves_after_1024_uses_or_eight_for_each_that_holds_room(
    others: int, ranked: str
) -> None:
    """After 1,192 uses of 2 a has 300 and b 389; the 1,388 of 200 are fewer than 1,600."""
    one = LFU()
    for key in (*(AdapterKey(f"other {n}", ()) for n in range(others)), A, B):
        one.admit(key, 4, 8)
    for key in [A] * 600 + [B] * 590:
        one.use(key)
    assert "".join(key.location for key in one.ranked() if key in (A, B)) == ranked


def after_each(one: EvictionPolicy, keys: int) -> dict[Operation, EvictionPolicy]:
    """What may happen next, each to a copy, which leaves the original as it is."""
    before = one.state(), list(one.ranked())
    holders = {KEYS.index(key) for key in one.ranked()}
    successors = {}
    for index in range(keys):
        for verb in ("ask", "evict", "unload") if index in holders else ("ask",):
            successors[verb, index] = twin = one.copy()
            assert (twin.state(), list(twin.ranked())) == before
            carry_out(twin, (verb, index), set(holders))
    assert (one.state(), list(one.ranked())) == before
    return successors


@pytest.mark.parametrize(
    ("start", "keys", "count"),
    [
        (LRU(), 3, 1 + 3 + 6 + 6),  # one for each order of holders
        (LRU(), 4, 1 + 4 + 12 + 24 + 24),
        (LFU(half_life=2), 1, 6),  # gone or there, at the first or second use of two, 0 to 2
        (LFU(half_life=3), 3, None),
        (GDSF(max_uses=2), 1, 3),  # gone, or there at L + 2 or L + 4
        (GDSF(max_uses=2), 3, None),
    ],
)
def test_policies_in_equal_states_rank_alike_for_ever(
    start: EvictionPolicy, keys: int, count: int | None
) -> None:
    """Every state is reached; of two policies that meet in one, what follows is the same."""
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
    assert len(futures) == count or (count is None and len(futures) > 100)


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_what_is_remembered_is_bounded_by_the_holders(name: PolicyName) -> None:
    one = policy(name)
    sizes = []
    for _ in range(2):
        for n in range(1_000):
            (one.use if n else lambda key: one.admit(key, 4, 8))(A)
            one.admit(C, 4, 8)
            one.remove(C, evicted=True)
        sizes.append(len(pickle.dumps(one)))
        one.remove(A, evicted=False)
    assert max(sizes) < 5_000


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_a_holder_that_is_none_is_a_fault_and_changes_nothing(name: PolicyName) -> None:
    one = policy(name)
    one.admit(A, 4, 8)
    before = one.state()
    with pytest.raises(InternalError, match="a is a holder already"):
        one.admit(A, 4, 8)
    with pytest.raises(InternalError, match="c is not a holder"):
        one.use(C)
    with pytest.raises(InternalError, match="c is not a holder"):
        one.remove(C, evicted=True)
    assert one.state() == before


def test_gdsf_refuses_numbers_out_of_range() -> None:
    one = GDSF()
    for nbytes, cost in [(0, 1.0), (1, -1.0), (1, float("nan"))]:
        with pytest.raises(InternalError, match="a: invalid size"):
            one.admit(A, nbytes, cost)
    assert list(one.ranked()) == []
