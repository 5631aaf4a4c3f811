"""More requests than an engine serves: few loads, full batches and fair waits, in virtual time."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from event_loops import until
from scheduler_world import MANY, VirtualClock, finish, held, opened, rows, silence, step
from tiny_sources import is_resident, make_source, state

from lorax_async import Request
from overload import (
    CROWDED,
    EQUAL,
    Demand,
    Mix,
    each_of_its_own,
    least_loads,
    passing,
    patient,
    play,
    returning,
    zipf,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

SLOW = pytest.mark.slow


def list_of(demands: list[Demand], adapters: int = 60, **server: int) -> Mix:
    return Mix(each_of_its_own(demands), len(demands), adapters, **server)


def greedy(requests: int, at: float, seed: int = 0) -> list[Demand]:
    """One tenant asks for so much of its own adapter at once, beside all the others."""
    tenant = [Demand(0, 50, at, "greedy")] * requests
    return sorted(tenant + passing(15, 12, [0.0, *EQUAL[1:]], [50], seed), key=lambda one: one.at)


def bursts(seed: int = 0) -> list[Demand]:
    """Two hundred at once, as many again when half of them are done, and again."""
    moments = [passing(1e9, 2e-7, EQUAL, [40], seed + number) for number in range(3)]
    return [
        replace(demand, at=4.0 * number)
        for number, moment in enumerate(moments)
        for demand in moment
    ]


SMALL = [1.0] * 10
FAST = {
    "equal": replace(CROWDED, requests=350),
    "slow loads": replace(CROWDED, requests=250, load=0.5),
    "zipf": list_of(passing(40, 8, zipf(60), [50])),
    "bursts": list_of(bursts()),
    "greedy": list_of(greedy(150, 0.0)),
    "one slot": Mix(returning(30, SMALL, [10]), 200, adapters=10, slots=1, places=8),
    "fewer than places": Mix(returning(12, EQUAL, [30]), 200, starvation_age=0.2),
}
MORE = {
    "equal, many": Mix(returning(400, EQUAL, [50]), 1500),
    "equal, long": Mix(returning(80, EQUAL, [100]), 400, places=16, starvation_age=0.5),
    "equal, fast loads": replace(CROWDED, load=0.002),
    "equal, no places": replace(CROWDED, places=None),
    "equal, two slots": Mix(returning(60, SMALL, [20]), 800, adapters=10, slots=2, places=16),
    "equal, 16 slots": Mix(returning(150, EQUAL, [50]), 500, slots=16),
    "equal, many adapters": Mix(returning(200, zipf(300, 0.5), [30]), 800, adapters=300),
    "of any length": replace(CROWDED, users=returning(120, EQUAL, [5, 20, 40, 60, 125])),
    "some long ones": list_of(passing(30, 14, EQUAL, [20] * 19 + [400])),
    "young ones are not overdue": replace(CROWDED, starvation_age=0.1),
    "steep zipf": list_of(passing(40, 12, zipf(60, 1.5), [50])),
    "greedy later": list_of(greedy(200, 3.0)),
} | {
    f"{name}, seed {seed}": mix
    for seed in (1, 2, 3)
    for name, mix in {
        "equal": replace(CROWDED, users=returning(120, EQUAL, [50], seed)),
        "zipf": list_of(passing(40, 12, zipf(60), [50], seed)),
        "bursts": list_of(bursts(10 * seed)),
        "greedy": list_of(greedy(200, 0.0, seed)),
    }.items()
}  # fmt: skip


@pytest.mark.parametrize(
    "mix",
    [pytest.param(mix, id=name) for name, mix in FAST.items()]
    + [pytest.param(mix, id=name, marks=SLOW) for name, mix in MORE.items()],
)
def test_overload_costs_few_loads_and_no_request_waits_for_two_fair_times(mix: Mix) -> None:
    ours, reference = play(mix), patient(mix)
    assert ours.loads >= least_loads(ours), "the bound is none"
    assert reference.loads >= least_loads(reference), "the bound is none"
    assert ours.loads_per_request <= 1.2 * reference.loads_per_request
    assert ours.throughput >= 0.9 * reference.throughput
    # A short queue: no adapter yields before a request is `starvation_age` old.
    assert ours.excess(2) <= mix.starvation_age + mix.load


def test_the_play_is_the_same_each_time() -> None:
    mix = replace(CROWDED, requests=150)
    one, other = play(mix), play(mix)
    assert [(wait.began, wait.ended) for wait in one.waits] == [
        (wait.began, wait.ended) for wait in other.waits
    ]
    assert one.loads == other.loads


def test_the_bound_of_loads_by_hand() -> None:
    """Four adapters in turn on one slot, with 10 s between any two requests.

    The fair time of each is 110.07 / 12 s. An adapter that stays between its requests takes
    40 - 2 × 110.07 / 12 = 21.7 s of the 110.07 s that there are: five of the eight times it can.
    """
    demands = [Demand(number % 4, 1, 10.0 * number) for number in range(12)]
    served = patient(list_of(demands, 4, slots=1))
    assert served.loads == 12
    assert served.seconds == pytest.approx(110.07)
    assert least_loads(served) == 4 + 3


PATIENT: dict[str, float] = {"timeout": 10_000.0, "starvation_age": 10.0}


async def test_an_adapter_serves_what_was_queued_and_then_yields(tmp_path: Path) -> None:
    """Three were there with b's: it is overdue once four have ended, a quarter more.

    By then a has served three of the five that were queued when it got the slot.
    """
    source, clock = make_source(tmp_path, "a", "b", "c"), VirtualClock()
    one_slot: dict[str, Any] = PATIENT | {"max_slots": 1}
    async with opened(source, one_slot, ready="c", clock=clock) as (loader, scheduler):
        requests = [scheduler.submit(Request(id, 1, 1)) for id in "cabaaaa"]
        await until(lambda: all(map(loader.placement().find, "ab")))  # their files are here
        served = rows(await step(scheduler, sequences=1))
        clock.pass_until(11.0)
        await held(loader, "a")
        requests += [scheduler.submit(Request("a", 1, 1)) for _ in range(3)]
        while not all(request.done for request in requests):
            served += rows(await step(scheduler, sequences=1))
        assert "".join(str(id) for id, *_ in served) == "caaaaabaaa"


async def test_a_request_without_end_makes_room_amid_it_and_goes_on(tmp_path: Path) -> None:
    """After five times `starvation_age` without the end of a request; then its own turn comes."""
    source, clock = make_source(tmp_path, "a", "b"), VirtualClock()
    one_slot: dict[str, Any] = PATIENT | {"max_slots": 1}
    async with opened(source, one_slot, clock=clock) as (loader, scheduler):
        endless = scheduler.submit(Request("a", 1, MANY))
        await step(scheduler)
        await until(lambda: is_resident(loader, "a"))  # or it is taken for one that does not come
        other = scheduler.submit(Request("b", 1, 1))
        await until(lambda: loader.placement().find("b"))
        while clock.now < 50.0:
            assert not other.done
            assert rows(await step(scheduler))[0][0] == "a"
            clock.pass_until(clock.now + 1.0)
        await finish(scheduler, other)
        so_far = endless.generated
        batch = await step(scheduler)
        assert rows(batch) == [("a", so_far, 1, True)], "it keeps its tokens"
        endless.cancel()


async def test_an_adapter_that_does_not_come_makes_none_yield(tmp_path: Path) -> None:
    source, clock = make_source(tmp_path, "a", "silent"), VirtualClock()
    silence(source, "silent")
    one_slot: dict[str, Any] = PATIENT | {"max_slots": 1}
    async with opened(source, one_slot, ready="a", clock=clock) as (_, scheduler):
        silent = scheduler.submit(Request("silent", 1, 1))
        running = scheduler.submit(Request("a", 1, MANY))
        for _ in range(40):
            clock.pass_until(clock.now + 3.0)
            scheduler.submit(Request("a", 1, 1))
            assert len((await step(scheduler)).rows) == 2, "both are computed"
        running.cancel()
        silent.cancel()


async def test_slots_of_others_are_taken_as_by_any_load(tmp_path: Path) -> None:
    """Where all slots are leased outside of the scheduler, it has none to give."""
    source, clock = make_source(tmp_path, "a", "b"), VirtualClock()
    settings = PATIENT | {"max_slots": 1, "starvation_age": 0.05}
    async with opened(source, settings, clock=clock) as (loader, scheduler):
        lease = await loader.load("a")
        ticket = scheduler.submit(Request("b", 1, 1))
        await until(lambda: loader.placement().usage.waiting)
        await asyncio.sleep(0.1)
        assert state(loader, "a") == "resident"
        clock.pass_until(0.06)
        await until(lambda: state(loader, "a") == "leaving")
        assert loader.try_acquire("a") is None
        lease.release()
        await finish(scheduler, ticket)
