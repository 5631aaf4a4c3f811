"""Whose turn is next: of copies in equal shares by bytes, and of slots the most urgent."""

import pickle
from collections.abc import Iterator, Sequence
from itertools import product
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_async import AdapterKey, SlotId
from lorax_async.lifecycle import rules
from lorax_async.lifecycle.adapter_state import (
    AdapterState,
    GroupSizes,
    SlotGrant,
    SlotState,
    Waiter,
    WantedTier,
)
from lorax_async.lifecycle.arena import Extent
from lorax_async.lifecycle.commands import CopyGroups
from lorax_async.lifecycle.policies import LRU
from lorax_async.lifecycle.residency import ImageBudget, Residency
from lorax_async.lifecycle.rules import CopyQueue, LifecycleRules, PriorityQueue

UNIT = 64  # Bytes; sizes below are multiples of it
groups = st.lists(st.integers(1, 20), min_size=1, max_size=12)


class Link:
    """A copy queue in front of a link with room for `window` runs at once, of `run` units each."""

    def __init__(self, window: int = 1, run: int = 0) -> None:
        room = {"device_bytes": 1 << 30, "alignment": UNIT, "max_slots": 1000, "copies": window}
        room["run_bytes"] = UNIT * run
        budgets = Residency(**room, policy=LRU()), LRU(), ImageBudget(0, UNIT, LRU())
        self.rules = LifecycleRules(*budgets)
        self.queue = CopyQueue(self.rules)
        self.states: dict[str, AdapterState] = {}
        self.in_flight: list[CopyGroups] = []

    def begin(self, name: str, sizes: Sequence[int], *, foreground: bool = True) -> None:
        """An adapter whose groups, of so many units, are all here."""
        nbytes = tuple(UNIT * size for size in sizes)
        number = len(self.states) + 1
        grant = SlotGrant(SlotId(number, number), tuple(Extent(0, each) for each in nbytes))
        life = AdapterState(AdapterKey(name, ()), slot=SlotState.FILLING, grant=grant)
        life.needs = GroupSizes(nbytes)
        life.fetched, life.is_fast = life.all_groups, True
        life.waiters.add(Waiter(number, WantedTier.DEVICE, 0.0, foreground))
        self.states[name] = self.rules.states[life.key] = life
        self.queue.update(life)

    def next(self) -> tuple[str, int] | None:
        """Whose copy of how many units ran; None if there is none left."""
        self.queue.submit()
        self.in_flight += cast(list[CopyGroups], self.rules.take_commands())
        if not self.in_flight:
            return None
        copy = min(self.in_flight, key=lambda copy: copy.tag)
        self.in_flight.remove(copy)
        self.queue.copied(self.states[copy.key.location], copy)
        return copy.key.location, copy.nbytes // UNIT

    def run(self) -> Iterator[tuple[str, int]]:
        while (copy := self.next()) is not None:
            yield copy


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.lists(groups, min_size=2, max_size=6), st.integers(1, 8), st.sampled_from([0, 30]))
def test_equal_shares_at_any_time(flows: list[list[int]], window: int, run: int) -> None:
    """Of any two with something left, none is ahead by more than a run and the other's largest."""
    link = Link(window, run)
    for number, sizes in enumerate(flows):
        link.begin(str(number), sizes)
    moved = [0] * len(flows)
    for name, size in link.run():
        moved[int(name)] += size
        waiting = [n for n, sizes in enumerate(flows) if moved[n] < sum(sizes)]
        for one, other in product(waiting, waiting):
            assert moved[one] - moved[other] <= run + max(flows[other])
    assert moved == [sum(sizes) for sizes in flows]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(groups, st.lists(groups, min_size=1, max_size=5))
def test_shares_count_from_the_arrival_on(early: list[int], late: list[list[int]]) -> None:
    """Who comes later neither waits for what others moved before, nor has anything in store."""
    link = Link()
    link.begin("early", early)
    link.begin("always", [1] * 1000)
    for _ in range(2 * len(early) + 20):
        link.next()
    for number, sizes in enumerate(late):
        link.begin(str(number), sizes)
    moved = {"early": 0, "always": 0} | {str(number): 0 for number in range(len(late))}
    waiting = set(range(len(late)))
    while waiting:
        ran = link.next()
        assert ran is not None
        moved[ran[0]] += ran[1]
        waiting = {n for n in waiting if moved[str(n)] < sum(late[n])}
        for n in waiting:
            assert -max(late[n]) - 1 <= moved[str(n)] - moved["always"] <= 2


def test_foreground_goes_before_prefetch() -> None:
    """However much it has moved already; and a prefetch that somebody joins is one no longer."""
    link = Link()
    link.begin("hint", [1] * 4, foreground=False)
    link.begin("joined", [1] * 2, foreground=False)
    link.begin("load", [5] * 3)
    assert [link.next() for _ in range(2)] == [("load", 5)] * 2
    link.begin("late", [7])
    link.states["joined"].waiters.add(Waiter(99, WantedTier.DEVICE, 0.0))
    link.queue.update(link.states["joined"])
    ran = [name for name, _ in link.run()]
    assert set(ran[:4]) == {"load", "late", "joined"}
    assert ran[4:] == ["hint"] * 4
    link.begin("L", [3] * 2, foreground=False)
    link.begin("a", [1] * 6, foreground=False)
    assert "".join(name for name, _ in link.run()) == "aaLaaaLa", "prefetches share, too"
    link.begin("hint", [1] * 100, foreground=False)
    link.begin("load", [1] * 100)
    assert {link.next() for _ in range(50)} == {("load", 1)}
    link.states["hint"].waiters.add(Waiter(99, WantedTier.DEVICE, 0.0))
    link.queue.update(link.states["hint"])
    joined = [name for name, _ in link.run()][:100].count("hint")
    assert 45 <= joined <= 55, "it has waited as a prefetch, and has nothing in store"
    link = Link(window=64)
    link.begin("load", [rules.IN_FLIGHT_BYTES // UNIT // 6 - 1] * 40)
    link.states["load"].is_fast = False  # so that it cannot be submitted whole
    link.begin("hint", [1] * 10, foreground=False)
    assert [name for name, _ in link.run()] == ["load"] * 40 + ["hint"] * 10, "in the threads, too"


def test_loads_that_are_cancelled_hold_up_no_other() -> None:
    """Their copies run to the end, and count."""
    link = Link(window=64)
    link.begin("large", [4] * 20)
    assert link.next() is not None
    for number in range(20):
        link.begin(name := str(number), [2])
        link.queue.submit()
        link.states[name].slot = SlotState.DRAINING
        link.queue.update(link.states[name])
        while link.states[name].copying:
            link.next()
    assert link.states["large"].copying <= 20 - 8, "it had its share"


def test_one_with_large_groups_leaves_room_for_who_comes_next() -> None:
    """By hand: a run per thread, as one group has all bytes that one may have under way."""
    link = Link(window=64)
    link.begin("large", [rules.FAST_IN_FLIGHT_BYTES // UNIT] * 20)
    assert link.next() is not None
    assert len(link.in_flight) == 64 // rules.COPIES_AHEAD - 1
    link.begin("small", [1])
    link.queue.submit()
    names = [command.key.location for command in link.rules.take_commands()]
    assert names == ["small"]
    link = Link(window=16, run=rules.RUN_BYTES // UNIT)
    for number in range(8):
        link.begin(str(number), [rules.RUN_BYTES // UNIT // 4] * 20)
    link.queue.submit()
    runs = cast(list[CopyGroups], link.rules.take_commands())
    assert [run.key.location for run in runs] == [*"01234567"], "8 at a time"
    assert sum(run.nbytes for run in runs) == rules.FAST_IN_FLIGHT_BYTES, "of all eight together"
    link.begin("late", [1])
    link.queue.copied(link.states["0"], runs[0])
    link.queue.submit()
    late, *_ = cast(list[CopyGroups], link.rules.take_commands())
    assert late.key.location == "late"
    assert sum(run.tag <= late.tag for run in runs) <= 8, "it waits for its share"


def test_a_prefetch_has_less_in_flight_than_a_load() -> None:
    for foreground, nbytes in ((True, rules.FAST_IN_FLIGHT_BYTES), (False, rules.IN_FLIGHT_BYTES)):
        link = Link(window=64, run=rules.RUN_BYTES // UNIT)
        link.begin("large", [rules.RUN_BYTES // UNIT // 4] * 200, foreground=foreground)
        link.queue.submit()
        runs = cast(list[CopyGroups], link.rules.take_commands())
        assert sum(run.nbytes for run in runs) == nbytes


KEYS = [AdapterKey(name, ()) for name in "abcde"]
urgencies = st.none() | st.tuples(st.booleans(), st.integers(0, 3))


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(KEYS), urgencies), max_size=300))
def test_the_head_is_the_most_urgent(
    changes: list[tuple[AdapterKey, tuple[bool, int] | None]],
) -> None:
    line: PriorityQueue[tuple[bool, int]] = PriorityQueue()
    waiting: dict[AdapterKey, tuple[bool, int]] = {}
    for key, urgency in changes:
        line.update(key, urgency)
        if urgency is None:
            waiting.pop(key, None)
        else:
            waiting[key] = urgency
        assert (line.head is None) == (not waiting)
        assert line.head is None or waiting[line.head] == min(waiting.values())


def test_wishes_that_come_and_go_behind_a_head_that_stays_take_no_memory() -> None:
    line: PriorityQueue[tuple[bool, float]] = PriorityQueue()
    line.update(KEYS[0], (False, 1.0))
    for n in range(10_000):
        for key, urgency in ((KEYS[1], (False, 1.0 + n)), (KEYS[2], (True, 1.0))):
            line.update(key, urgency)
            assert line.head == KEYS[0], "of equals the first is first"
            line.update(key, None)
    assert len(pickle.dumps(line)) < 5_000
