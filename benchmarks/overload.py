"""More requests than an engine serves: the scheduler, in virtual time, beside a patient one.

`play` runs an `AdapterScheduler` over a real loader, on a loop whose time is virtual. `patient` is
a simulation of a few rules, which shares no code with it; `least_loads` bounds any scheduler.
"""

from __future__ import annotations

import asyncio
import json
import random
import selectors
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import cache
from heapq import heappop, heappush
from itertools import count, pairwise
from math import inf
from typing import Any, TypeVar, TypeVarTuple

import torch
from safetensors.torch import save

from lorax_async.config import LoaderConfig
from lorax_async.devices.base import CopyTicket, StagedPiece
from lorax_async.devices.cpu import CpuDevice
from lorax_async.events import Event, SlotGranted
from lorax_async.lifecycle.arena import Extent
from lorax_async.loader import AdapterLoader
from lorax_async.planning.layout import ModelLayout, Module, Parallelism
from lorax_async.scheduler.requests import Request, Ticket
from lorax_async.scheduler.scheduler import AdapterScheduler
from lorax_async.testing import FakeSource

THINK = 0.01
"""Seconds from a user's answer to the next request."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

PASS = 0.02
"""Seconds of a pass, however many rows it has: decoding is bound by memory."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A request for an adapter that generates `tokens`. It comes at `at` or later."""

    adapter: int
    tokens: int
    at: float = 0.0
    client: str | None = None


@dataclass(frozen=True, slots=True)
class Mix:
    """Who asks for what, of which server.

    A user's next request comes when the one before has ended. The play ends when `requests` have.
    `load` are the seconds from a slot to the adapter in it.
    """

    users: Callable[[], list[Iterator[Demand]]]
    requests: int
    adapters: int = 60
    slots: int = 8
    places: int | None = 32
    rows: int = 64
    load: float = 0.05
    starvation_age: float = 1.0


@dataclass(slots=True, eq=False)
class Wait:
    """One request: when it came, how many were there at that moment, and what became of it."""

    demand: Demand
    came: float
    queue: int
    began: float = inf
    ended: float = inf


@dataclass(slots=True)
class Outcome:
    """How a mix was served."""

    mix: Mix
    loads: int = 0
    seconds: float = 0.0
    waits: list[Wait] = field(default_factory=list)

    def add(self, demand: Demand, now: float, there: int) -> Wait:
        """Add a request; it counts for those of the same moment, too."""
        wait = Wait(demand, now, there)
        self.waits.append(wait)
        for other in reversed(self.waits):
            if other.came < now:
                break
            other.queue = there
        return wait

    @property
    def ended(self) -> int:
        return sum(wait.ended < inf for wait in self.waits)

    @property
    def loads_per_request(self) -> float:
        return self.loads / self.ended

    @property
    def throughput(self) -> float:
        """Requests per second."""
        return self.ended / self.seconds

    def fair(self, wait: Wait) -> float:
        """The fair time of a request: those that were there when it came ÷ throughput."""
        return wait.queue / self.throughput

    def waited(self, wait: Wait) -> float:
        """Seconds until its first batch, or until the end of the play."""
        return min(wait.began, self.seconds) - wait.came

    @property
    def longest(self) -> float:
        """The longest wait, in fair times."""
        return max(self.waited(wait) / self.fair(wait) for wait in self.waits)

    def excess(self, fair_times: float) -> float:
        """The seconds by which a request waited longer than that, at most."""
        return max(self.waited(wait) - fair_times * self.fair(wait) for wait in self.waits)


# -- the scheduler in virtual time -------------------------------------------------------------


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop that does not sleep: where only time would pass, it jumps to the next timer.

    `is_busy` says whether threads still work; the loop waits for them first. Calls for an executor
    run at once on the loop, so that each play has the same order of events.
    """

    def __init__(self) -> None:
        super().__init__(_JumpingSelector(self))
        self.now = 0.0
        self.is_busy: Callable[[], bool] = lambda: False

    def time(self) -> float:
        return self.now

    def run_in_executor(
        self, _: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        future = self.create_future()
        future.set_result(func(*args))  # none fails in a play
        return future


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        loop = self._loop
        while True:
            busy = loop.is_busy()
            events = super().select(0)
            if events or (timeout is not None and timeout <= 0):
                return events
            if busy:
                events = super().select(0.001)
                if events:
                    return events
            elif timeout is None:  # a thread that ends, or nothing any more
                events = super().select(10)
                if not events:
                    raise AssertionError("nothing happens any more")
                return events
            else:
                loop.now += timeout
                return []


class VirtualClock:
    """The scheduler's clock, of the loop's time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.time = loop.time
        self.call_at = loop.call_at


class SlowDevice(CpuDevice):
    """Its copies end `seconds` of the loop's time after they were submitted, one after the other.

    None ends at the moment of another timer: which is first would depend on the threads.
    """

    def __init__(self, layout: ModelLayout, seconds: float, **sizes: Any) -> None:
        super().__init__(layout, dtype="F32", **sizes)
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._last_end = 0.0
        self.pending = 0

    def copy(self, piece: StagedPiece | None, rows: Any, extent: Extent, slot: int) -> CopyTicket:
        super().copy(piece, rows, extent, slot)
        ticket: CopyTicket = Future()
        ticket.set_running_or_notify_cancel()
        self._loop.call_soon_threadsafe(self._submit, ticket)
        return ticket

    def _submit(self, ticket: CopyTicket) -> None:
        self.pending += 1
        self._last_end = max(self._loop.time() + self._seconds, self._last_end) + 1e-6
        self._loop.call_at(self._last_end, self._end, ticket)

    def _end(self, ticket: CopyTicket) -> None:
        self.pending -= 1
        ticket.set_result(None)


_NAME = "model.layers.0.self_attn.q_proj"
_LAYOUT = ModelLayout((Module(_NAME, 32, 32, 0, Parallelism.COLUMN),), 1, "F32", "model.")


@cache
def _files() -> tuple[bytes, bytes]:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    prefix = f"base_model.model.{_NAME}"
    a, b = torch.ones(4, 32), torch.ones(32, 4)
    weights = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    return json.dumps(config).encode(), save(weights)


def play(mix: Mix) -> Outcome:
    """Let an `AdapterScheduler` serve the mix."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(_play(mix))


async def _play(mix: Mix) -> Outcome:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    source = FakeSource()
    for number in range(mix.adapters):
        source.put(str(number), *_files())
    device = SlowDevice(_LAYOUT, mix.load, nbytes=mix.slots << 14, slots=mix.slots)
    config = LoaderConfig(
        max_slots=mix.slots,
        device_bytes=mix.slots << 14,
        host_bytes=0,
        staging_bytes=1 << 20,
        io_threads=1,
        timeout=1e6,
        starvation_age=mix.starvation_age,
        revalidate_files=1e6,  # no real time counts
    )
    outcome = Outcome(mix)

    def count_loads(event: Event) -> None:
        outcome.loads += isinstance(event, SlotGranted)

    async with AdapterLoader(_LAYOUT, config, source=source, device=device) as loader:
        states = loader._assembly.driver.lifecycle.states

        def is_busy() -> bool:
            copying = sum(state.copying for state in states.values())
            return copying > device.pending or any(state.wiping for state in states.values())

        loop.is_busy = is_busy
        loader.subscribe(count_loads)
        clock: Any = VirtualClock(loop)
        async with AdapterScheduler(loader, max_begun=mix.places, clock=clock) as scheduler:
            await _Engine(mix, scheduler, outcome).run()
    return outcome


class _Engine:
    """Computes batch after batch until enough requests have ended."""

    def __init__(self, mix: Mix, scheduler: AdapterScheduler, outcome: Outcome) -> None:
        self._mix = mix
        self._scheduler = scheduler
        self._outcome = outcome
        self._waiting: dict[Ticket, tuple[Wait, Iterator[Demand]]] = {}
        self._loop = asyncio.get_running_loop()
        self._timers: list[asyncio.TimerHandle] = []

    async def run(self) -> None:
        for user in self._mix.users():
            self._next(user)
        while self._outcome.ended < self._mix.requests:
            batch = await self._scheduler.next_batch(4096, self._mix.rows)
            for row in batch.rows:
                wait, _ = self._waiting[row.ticket]
                wait.began = min(wait.began, self._loop.time())
            await asyncio.sleep(PASS)
            self._scheduler.complete(batch)
            for row in batch.rows:
                if row.ticket.done:
                    assert row.ticket.error is None
                    wait, user = self._waiting.pop(row.ticket)
                    wait.ended = self._loop.time()
                    self._next(user)
        self._outcome.seconds = self._loop.time()
        for timer in self._timers:
            timer.cancel()

    def _next(self, user: Iterator[Demand]) -> None:
        demand = next(user, None)
        if demand is None:
            return
        now = self._loop.time()
        due = max(demand.at, now + THINK if now else 0.0)
        if due <= now:
            self._submit(demand, user)
        else:
            self._timers.append(self._loop.call_at(due, self._submit, demand, user))

    def _submit(self, demand: Demand, user: Iterator[Demand]) -> None:
        request = Request(str(demand.adapter), 1, demand.tokens, client=demand.client)
        ticket = self._scheduler.submit(request)
        wait = self._outcome.add(demand, self._loop.time(), len(self._waiting) + 1)
        self._waiting[ticket] = wait, user


# -- a patient loader --------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Row:
    """A request that has begun."""

    wait: Wait
    user: Iterator[Demand]
    left: int


class Patient:
    """Serves all that waits for an adapter before it gives its slot away, in the order of arrival.

    It is bounded by fairness: for each adapter without a slot whose first request has waited for
    the fair time, the one that has had its slot longest begins no request that came after it got
    that slot. A second request of an adapter that has half of the places waits for others.
    """

    def __init__(self, mix: Mix) -> None:
        self._mix = mix
        self._outcome = Outcome(mix)
        self._now = 0.0
        self._coming: list[tuple[float, int, Demand, Iterator[Demand]]] = []
        self._numbers = count()
        self._queues: dict[int, deque[tuple[Wait, Iterator[Demand]]]] = {}
        self._granted: dict[int, float] = {}
        """When each adapter in a slot got it, the first one first."""
        self._yielding: set[int] = set()
        self._rows: list[_Row] = []
        self._there = self._ended = 0

    def run(self) -> Outcome:
        for user in self._mix.users():
            self._next(user)
        while self._ended < self._mix.requests:
            self._arrive()
            self._grant()
            self._begin()
            if self._rows:
                self._compute()
            else:
                due = [time + self._mix.load for time in self._granted.values()]
                due += [self._coming[0][0]] if self._coming else []
                self._now = min(time for time in due if time > self._now)
        self._outcome.seconds = self._now
        return self._outcome

    def _next(self, user: Iterator[Demand]) -> None:
        demand = next(user, None)
        if demand is not None:
            due = max(demand.at, self._now + THINK if self._now else 0.0)
            heappush(self._coming, (due, next(self._numbers), demand, user))

    def _arrive(self) -> None:
        while self._coming and self._coming[0][0] <= self._now + 1e-9:
            _, _, demand, user = heappop(self._coming)
            self._there += 1
            wait = self._outcome.add(demand, self._now, self._there)
            self._queues.setdefault(demand.adapter, deque()).append((wait, user))

    def _grant(self) -> None:
        slotless = sorted(
            (queue[0][0].came, adapter)
            for adapter, queue in self._queues.items()
            if queue and adapter not in self._granted
        )
        overdue = sum(self._is_overdue(self._queues[adapter][0][0]) for _, adapter in slotless)
        self._yielding = set(list(self._granted)[:overdue])
        computing = {row.wait.demand.adapter for row in self._rows}
        idle = [
            adapter
            for adapter in self._granted
            if adapter not in computing and not self._may_begin(adapter)
        ]
        for _, adapter in slotless:
            if len(self._granted) == self._mix.slots:
                if not idle:
                    break
                del self._granted[idle.pop(0)]
            self._granted[adapter] = self._now
            self._outcome.loads += 1

    def _is_overdue(self, wait: Wait) -> bool:
        throughput = self._ended / self._now if self._now else 0.0
        return (self._now - wait.came) * throughput > wait.queue

    def _may_begin(self, adapter: int) -> bool:
        queue = self._queues.get(adapter)
        if not queue:
            return False
        return adapter not in self._yielding or queue[0][0].came <= self._granted[adapter]

    def _begin(self) -> None:
        places = self._mix.rows if self._mix.places is None else self._mix.places
        while len(self._rows) < places:
            held = Counter(row.wait.demand.adapter for row in self._rows)
            ready = [
                (held[adapter] >= places // 2, self._queues[adapter][0][0].came, adapter)
                for adapter, granted in self._granted.items()
                if granted + self._mix.load <= self._now + 1e-9 and self._may_begin(adapter)
            ]
            if not ready:
                break
            wait, user = self._queues[min(ready)[2]].popleft()
            wait.began = self._now
            self._rows.append(_Row(wait, user, wait.demand.tokens))

    def _compute(self) -> None:
        self._now += PASS
        rows, self._rows = self._rows, []
        for row in rows:
            row.left -= 1
            if row.left:
                self._rows.append(row)
                continue
            row.wait.ended = self._now
            self._ended += 1
            self._there -= 1
            self._next(row.user)


def patient(mix: Mix) -> Outcome:
    """Let a patient loader serve the mix."""
    return Patient(mix).run()


def least_loads(outcome: Outcome) -> int:
    """Return a bound: the loads of any scheduler for these requests, if none waits too long.

    An adapter that is not loaded between two of its requests keeps its slot from the beginning of
    the first to the coming of the second: for their distance at least, less twice the fair time.
    All slots together have slots × seconds for that; the shortest distances take least of it.
    """
    came: dict[int, list[Wait]] = {}
    for wait in outcome.waits:
        if wait.began < inf:
            came.setdefault(wait.demand.adapter, []).append(wait)
    distances = [
        max(0.0, other.came - one.came - 2 * outcome.fair(one))
        for waits in came.values()
        for one, other in pairwise(waits)
    ]
    left, loads = outcome.mix.slots * outcome.seconds, len(came)
    for distance in sorted(distances):
        left -= distance
        loads += left < 0
    return loads


# -- mixes ---------------------------------------------------------------------------------------


def returning(
    users: int, weights: Sequence[float], lengths: Sequence[int], seed: int = 0
) -> Callable[[], list[Iterator[Demand]]]:
    """Users who each ask again when they have their answer, for any adapter by weight."""

    def user(number: int) -> Iterator[Demand]:
        draw = random.Random(f"{seed} {number}")
        while True:
            yield Demand(draw.choices(range(len(weights)), weights)[0], draw.choice(lengths))

    return lambda: [user(number) for number in range(users)]


def passing(
    rate: float, seconds: float, weights: Sequence[float], lengths: Sequence[int], seed: int = 0
) -> list[Demand]:
    """Requests that come at a rate for some seconds, each of a user of its own."""
    draw, now, demands = random.Random(seed), 0.0, list[Demand]()
    while (now := now + draw.expovariate(rate)) < seconds:
        adapter = draw.choices(range(len(weights)), weights)[0]
        demands.append(Demand(adapter, draw.choice(lengths), now))
    return demands


def each_of_its_own(demands: Sequence[Demand]) -> Callable[[], list[Iterator[Demand]]]:
    return lambda: [iter([demand]) for demand in demands]


def zipf(adapters: int, exponent: float = 1.0) -> list[float]:
    return [1 / number**exponent for number in range(1, adapters + 1)]


EQUAL = [1.0] * 60

CROWDED = Mix(returning(120, EQUAL, [50]), 500)
"""60 adapters of equal demand on 8 slots, and more requests than places."""
