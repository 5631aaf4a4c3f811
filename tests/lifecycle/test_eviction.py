"""The same requests to the whole lifecycle, to the loader's budget, and to the simulation of both."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import simulate_capacity as simulation
from lorax_async import AdapterKey, ConfigError
from lorax_async.cli.memory_estimate import count_fitting
from lorax_async.lifecycle import commands
from lorax_async.lifecycle.adapter_state import GroupSizes, Waiter, WantedTier
from lorax_async.lifecycle.lifecycle import Budgets, Lifecycle
from lorax_async.lifecycle.policies import EVICTION_POLICIES, LRU, PolicyName, policy
from lorax_async.lifecycle.residency import ImageBudget, Residency
from lorax_async.lifecycle.rules import LifecycleTimes


@dataclass
class Driver:
    """Does at once what the lifecycle commands, and never fails."""

    lifecycle: Lifecycle
    needs: Sequence[GroupSizes]
    loads: list[int] = field(default_factory=list)
    hits: int = 0
    refused: int = 0
    evictions: int = 0
    device_bytes: int = 0

    def request(self, number: int, position: int, *, look_up: bool) -> None:
        """Load one adapter and let it go again."""
        key, before = AdapterKey(str(position), ()), (len(self.loads), self.refused)
        if look_up and self.lifecycle.take_lease(key) is not None:
            queue = self.lifecycle.end_lease(key)
        else:
            queue = self.lifecycle.want(key, Waiter(number, WantedTier.DEVICE, float(number)))
        self.execute(queue)
        self.hits += before == (len(self.loads), self.refused)

    def execute(self, queue: list[commands.Command]) -> None:
        while queue:
            queue += self._do(queue.pop(0))

    def _do(self, command: commands.Command) -> list[commands.Command]:
        key, lifecycle = command.key, self.lifecycle
        match command:
            case commands.StartFetch():
                needs = self.needs[int(key.location)]
                checked = lifecycle.header_checked(key, command.attempt, needs)
                return [*checked, *lifecycle.published(key, command.attempt)]
            case commands.CopyGroups():
                return lifecycle.copy_done(command, fast=True)
            case commands.TakeSlot():
                self.loads.append(int(key.location))
                self.device_bytes += command.grant.nbytes
            case commands.ClearColumn():
                self.evictions += 1
            case commands.FailWaiters():
                self.refused += 1
            case commands.ServeWaiter():
                return lifecycle.end_lease(key)
        return []

    def outcome(self) -> simulation.SimulationResult:
        return simulation.SimulationResult(
            requests=self.hits + self.refused + len(self.loads),
            hits=self.hits,
            refused=self.refused,
            loads=len(self.loads),
            first_loads=len(set(self.loads)),
            evictions=self.evictions,
            device_bytes=self.device_bytes,
            file_bytes=sum(self.needs[position].file_nbytes for position in self.loads),
        )


GROUPS = st.lists(st.integers(1, 5 * 64), min_size=1, max_size=4).map(tuple)
NEEDS = st.builds(GroupSizes, GROUPS, file_nbytes=st.integers(0, 1 << 24))


@pytest.mark.parametrize("name", EVICTION_POLICIES)
@settings(deadline=None)
@given(
    asked=st.lists(st.integers(0, 7), max_size=60),
    nbytes=st.integers(0, 40 * 64),
    needs=st.lists(NEEDS, min_size=8, max_size=8),
    look_up=st.booleans(),
)
def test_the_lifecycle_evicts_as_it_is_simulated(
    name: PolicyName, asked: list[int], nbytes: int, needs: list[GroupSizes], look_up: bool
) -> None:
    """Lookups that need no waiting count as uses, too."""
    room = {"device_bytes": nbytes, "alignment": 64, "max_slots": 4, "copies": 2, "run_bytes": 0}
    device = Residency(**room, policy=policy(name))
    budgets = Budgets(device, LRU(), ImageBudget(0, 64, LRU()))
    driver = Driver(Lifecycle(budgets, LifecycleTimes()), needs)
    for number, position in enumerate(asked):
        driver.request(number, position, look_up=look_up)
    ranking = policy(name)
    assert (
        simulation.simulate(asked, needs, simulation.DeviceCapacity(nbytes, 64, 4), ranking)
        == driver.outcome()
    )
    assert list(ranking.ranked()) == list(device.policy.ranked())


def test_a_load_that_comes_back_within_a_tick_of_the_clock() -> None:
    """What was released meanwhile makes way for it, though it is as old as the one before."""
    room = {"device_bytes": 64, "alignment": 64, "max_slots": 1, "copies": 2, "run_bytes": 0}
    budgets = Budgets(Residency(**room, policy=LRU()), LRU(), ImageBudget(0, 64, LRU()))
    driver = Driver(life := Lifecycle(budgets, LifecycleTimes()), [GroupSizes((64,))] * 2)
    leased, wanted = AdapterKey("0", ()), AdapterKey("1", ())
    driver.request(0, 0, look_up=False)
    assert life.take_lease(leased)
    driver.execute(life.want(wanted, Waiter(1, WantedTier.DEVICE, 1.0)))
    driver.execute(life.withdraw(wanted, 1) + life.end_lease(leased))
    driver.execute(life.want(wanted, Waiter(2, WantedTier.DEVICE, 1.0)))
    assert driver.loads == [0, 1]


@pytest.mark.parametrize(
    ("name", "hits", "reloaded"), [("lru", 17, 146), ("lfu", 24, 132), ("gdsf", 26, 84)]
)
def test_a_trace_as_worked_out_by_hand(name: PolicyName, hits: int, reloaded: int) -> None:
    """Popularity falls off as in Zipf's law, and ids that come only once (u to z) go through.

    Units are layer groups of 2 MiB; opening an adapter costs as much as two of them.
    """
    sizes = dict(zip("abcdefuvwxyz", (2, 4, 1, 8, 2, 4, 4, 2, 1, 8, 4, 2), strict=True))
    asked = "cccbacdbeccfecedueybzcwcvfxadddccfecddefccdcfedc"
    needs = [GroupSizes((2 << 20,) * size, file_nbytes=size << 21) for size in sizes.values()]
    names = list(sizes)
    found = simulation.simulate(
        map(names.index, asked), needs, simulation.DeviceCapacity(26 << 20, 64, 4), policy(name)
    )
    first = sum(sizes[each] for each in set(asked)) << 21
    assert (found.hits, found.file_bytes - first) == (hits, reloaded << 20)
    assert (found.device_bytes, found.loads) == (found.file_bytes, len(asked) - hits)
    assert found.hit_rate == hits / len(asked)


def test_so_many_fit() -> None:
    rooms = [(6 * 64 + 191, 64, 8), (9 * 64, 64, 2), (191, 64, 8)]
    two = GroupSizes((64, 128))
    assert [count_fitting(two, *room) for room in rooms] == [2, 2, 0]
    assert simulation.SimulationResult().hit_rate == 0


def test_zipfs_law() -> None:
    """Of 1 : 1/2 : 1/3 the sum is 11/6: the first has 6/11 of all, the second 3/11."""
    for exponent, shares in ((1.0, (6 / 11, 3 / 11, 2 / 11)), (0.0, (1 / 3, 1 / 3, 1 / 3))):
        counts = Counter(simulation.draw_requests(3, exponent, 20_000, seed=1)).most_common()
        assert [count / 20_000 for _, count in counts] == pytest.approx(shares, abs=0.02)
    for count, exponent in [(0, 1.0), (1, -0.1), (1, float("nan")), (1, 11.0)]:
        with pytest.raises(ConfigError, match="Zipf's law"):
            simulation.draw_requests(count, exponent, 1, seed=0)
