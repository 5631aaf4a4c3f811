"""The trace of `eviction_trace` played through the whole lifecycle, with a driver that never fails."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from core.eviction_trace import (
    DEVICE_NBYTES,
    GROUP_NBYTES,
    HITS,
    RELOADED,
    REQUESTS,
    SIZES,
    SLOTS,
    Step,
    steps,
)
from lorax_async.adapter import AdapterKey
from lorax_async.core import commands
from lorax_async.core.life import Needs
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.policies import EVICTION_POLICIES, LRU, PolicyName, policy
from lorax_async.core.residency import HostBudget, ImageBudget, Residency
from lorax_async.core.settling import Budgets
from lorax_async.core.waiters import Tier, Waiter


def new_lifecycle(name: PolicyName) -> Lifecycle:
    device = Residency(
        device_bytes=DEVICE_NBYTES, alignment=64, max_slots=SLOTS, copies=2, policy=policy(name)
    )
    return Lifecycle(Budgets(device, HostBudget(0, LRU()), ImageBudget(0, 64, LRU())))


def needs(key: AdapterKey) -> Needs:
    nbytes = SIZES[key.location]
    return Needs((GROUP_NBYTES,) * (nbytes // GROUP_NBYTES), file_nbytes=nbytes)


@dataclass
class Driver:
    """Does at once what it is told."""

    lifecycle: Lifecycle
    served: int = 0
    cleared: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def obey(self, answer: list[commands.Command]) -> None:
        queue = list(answer)
        while queue:
            queue += self._do(queue.pop(0))

    def _do(self, command: commands.Command) -> list[commands.Command]:
        key, lifecycle = command.key, self.lifecycle
        match command:
            case commands.Fetch():
                checked = lifecycle.header_checked(key, command.attempt, needs(key))
                return [*checked, *lifecycle.published(key, command.attempt)]
            case commands.Copy():
                return lifecycle.copy_done(key, command.group)
            case commands.TakeSlot():
                self.loaded.append(key.location)
            case commands.ClearColumn():
                self.cleared.append(key.location)
            case commands.Serve():
                self.served += 1
                return lifecycle.end_lease(key)
        return []

    def request(self, number: int, name: str) -> Step:
        """Load one adapter and let it go again."""
        before = len(self.loaded)
        self.cleared.clear()
        waiter = Waiter(number, Tier.DEVICE, float(number))
        self.obey(self.lifecycle.want(AdapterKey(name, ()), waiter))
        ranked = tuple(key.location for key in self.lifecycle.budgets.device.ranked())
        return Step(name, len(self.loaded) == before, tuple(self.cleared), ranked)


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_a_trace_of_loads_hits_and_evicts_as_worked_out_by_hand(name: PolicyName) -> None:
    driver = Driver(new_lifecycle(name))
    played = [driver.request(number, request) for number, request in enumerate(REQUESTS)]

    assert [number for number, step in enumerate(played) if step.hit] == sorted(HITS[name])
    assert played == list(steps(name))
    assert driver.served == len(REQUESTS)
    again = [one for n, one in enumerate(driver.loaded) if one in driver.loaded[:n]]
    assert sum(SIZES[one] for one in again) == RELOADED[name]


@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_lookups_that_need_no_waiting_count_as_uses_too(name: PolicyName) -> None:
    driver = Driver(new_lifecycle(name))
    for number, request in enumerate(REQUESTS):
        key = AdapterKey(request, ())
        if driver.lifecycle.take_lease(key) is None:
            assert number not in HITS[name]
            driver.request(number, request)
        else:
            assert number in HITS[name]
            driver.obey(driver.lifecycle.end_lease(key))
