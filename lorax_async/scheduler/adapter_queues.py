"""Adapters with requests: their queues, their loads, and their slots."""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from math import inf
from operator import attrgetter, itemgetter

from lorax_async.errors import (
    AdapterTimeoutError,
    IntegrityError,
    InternalError,
    LoaderClosedError,
    LoraxError,
)
from lorax_async.events import Event, Failed, LayerReady, Leaving, Resident, SlotGranted, SlotId
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.planning.batch_plan import SlotOccupant, SlotRef
from lorax_async.runtime.acquire import Prefetch
from lorax_async.runtime.placement import TierName
from lorax_async.scheduler.adapter_queue import AdapterQueue, LoadEstimate, LoadProfiles, Urgency
from lorax_async.scheduler.admission import EngineSlots
from lorax_async.scheduler.requests import Clock, Ticket, TimerHandle
from lorax_async.types import AdapterKey, Ref, RemoteKey
from lorax_async.validation import MAX_SECONDS


def urgency(since: float, priority: int, deadline: float, level: float) -> float:
    """The less, the sooner: a moment, in seconds, that does not change while one waits.

    It is when the request came. A level of priority counts as `level` seconds of waiting, and so
    does a deadline (a moment, too) that is less than these away, by what is missing. Whoever comes
    later by more than the levels between two is behind the other, so that nobody waits for ever.
    """
    return min(since, deadline - level) - priority * level


class LoadTarget(Enum):
    """How near an adapter is brought while its requests wait."""

    LOAD = "load"
    """Waited for in the foreground."""
    DEVICE = "device"
    """Hinted: onto the device, if there is room."""
    HOST = "host"
    """Hinted: into host memory."""


@dataclass(frozen=True, slots=True)
class LookAhead:
    """How far down the queue of adapters one looks.

    `loads` are waited for at a time; `slots` are on the device, these among them; `hints` more are
    brought into host memory.
    """

    loads: int
    slots: int
    hints: int

    def reaches(self, held: int) -> list[LoadTarget]:
        """Of the first adapters of the queue, in order, while `held` others are on the device."""
        spare = max(0, self.slots - held - self.loads)
        return [
            *[LoadTarget.LOAD] * self.loads,
            *[LoadTarget.DEVICE] * spare,
            *[LoadTarget.HOST] * self.hints,
        ]


class SlotRecords:
    """Every slot, whoever has it; what streams into one teaches how loads go.

    Attributes
    ----------
    tenants
        Who has which slot now; the rank of those only that were adopted.
    """

    def __init__(self, clock: Clock) -> None:
        self.lease_table: dict[int, SlotOccupant] = {}
        self._clock = clock
        self._profiles = LoadProfiles()
        self._arrivals: dict[int, LoadEstimate] = {}
        self._leaving: set[SlotId] = set()

    def heard(self, event: Event, slot: SlotId) -> None:
        match event:
            case SlotGranted():
                profile = self._profiles.of(type(event.key).__name__)
                arrival = LoadEstimate(event.layers, event.nbytes, self._clock.time(), profile)
                self._arrivals[slot.index] = arrival
                self._leaving = {each for each in self._leaving if each.index != slot.index}
                self.lease_table[slot.index] = SlotOccupant(slot.generation, 0)
            case LayerReady():
                if slot.index in self._arrivals:
                    self._arrivals[slot.index].note(event.layer, self._clock.time())
            case Resident():
                self._arrivals.pop(slot.index, None)
                self._leaving.discard(slot)
            case Leaving():
                self._leaving.add(slot)

    def is_leaving(self, slot: SlotId) -> bool:
        return slot in self._leaving

    def adopt(self, handle: AdapterHandle) -> LoadEstimate | None:
        """Somebody has it from now on. How it arrives, if it is not there.

        Of a load that began before anybody listened, less is known.
        """
        slot = handle.slot
        self.lease_table[slot.index] = SlotOccupant(slot.generation, handle.rank)
        if handle.resident:
            return None
        if slot.index not in self._arrivals:
            profile = self._profiles.of(type(handle.key).__name__)
            arrival = LoadEstimate(handle.layers, handle.nbytes, self._clock.time(), profile)
            arrival.missed(sum(handle.is_ready(layer) for layer in handle.layers))
            self._arrivals[slot.index] = arrival
        return self._arrivals[slot.index]


_HINTS: dict[LoadTarget, TierName] = {LoadTarget.DEVICE: "device", LoadTarget.HOST: "host"}


class LoadTask:
    """What is done for one guest that waits.

    `place` is that in the queue. It is `resting` if it had a slot in which nothing came: it is to
    have one again when its file is here. `broken` is the version that it had in its slot, and what
    was wrong with it: it is loaded once more if its files were changed.
    """

    def __init__(
        self,
        adapter_queue: AdapterQueue,
        number: int,
        *,
        resting: bool,
        broken: tuple[AdapterKey, LoraxError] | None = None,
    ) -> None:
        self.adapter_queue = adapter_queue
        self.broken = broken
        self.place: tuple[Urgency, int] = (adapter_queue.urgency, number)
        self.resting = resting
        self.wishes: set[asyncio.Task[None]] = set()
        self.since = 0.0
        self.priority = 0
        self.hints: dict[TierName, Prefetch] = {}


class LoadQueue:
    """The queue of guests without a slot.

    The first ones are loaded in the foreground, the next ones hinted. Who has been loaded for
    `patience` seconds counts no longer among the first ones, so that sources which do not answer
    hold up nobody else. `granted` and `failed` tell what came of a wish, `held` how many guests
    have slots.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        ahead: LookAhead,
        patience: float,
        clock: Clock,
        *,
        held: Callable[[], int],
        granted: Callable[[AdapterQueue, AdapterHandle], None],
        failed: Callable[[AdapterQueue, LoraxError], None],
    ) -> None:
        self._loader = loader
        self._ahead = ahead
        self._patience = patience
        self._clock = clock
        self._held = held
        self._granted = granted
        self._failed = failed
        self._line: list[tuple[tuple[Urgency, int], LoadTask]] = []
        self._load_tasks: dict[AdapterQueue, LoadTask] = {}
        self._numbers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm: TimerHandle | None = None
        self._looking = False

    def __len__(self) -> int:
        return len(self._line)

    def add(
        self,
        adapter_queue: AdapterQueue,
        *,
        resting: bool = False,
        broken: tuple[AdapterKey, LoraxError] | None = None,
    ) -> None:
        """It waits from now on; with `resting`, for its file first."""
        self._numbers += 1
        load_task = LoadTask(adapter_queue, self._numbers, resting=resting, broken=broken)
        self._load_tasks[adapter_queue] = load_task
        insort(self._line, (load_task.place, load_task))
        if broken is not None:
            self._pending_load(load_task)
        if resting:
            self._hint(load_task, "disk")
        self.look_soon()

    def update(self, adapter_queue: AdapterQueue) -> None:
        """Its requests are others now."""
        load_task = self._load_tasks.get(adapter_queue)
        if load_task is None:
            return
        if load_task.place[0] != adapter_queue.urgency:
            self._take_out(load_task)
            load_task.place = (adapter_queue.urgency, load_task.place[1])
            insort(self._line, (load_task.place, load_task))
            self.look_soon()
        if load_task.wishes and adapter_queue.priority > load_task.priority:
            self._pending_load(load_task)  # beside the other one, which is older

    def remove(self, adapter_queue: AdapterQueue) -> None:
        """It waits no longer. Idempotent."""
        load_task = self._load_tasks.pop(adapter_queue, None)
        if load_task is None:
            return
        self._take_out(load_task)
        for task in load_task.wishes:
            task.cancel()
        for hint in load_task.hints.values():
            hint.cancel()
        self.look_soon()

    def _take_out(self, load_task: LoadTask) -> None:
        del self._line[bisect_left(self._line, load_task.place, key=itemgetter(0))]

    async def close(self) -> None:
        """Nobody may be waiting any more. Returns when no task is left."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    # -- looking ahead -----------------------------------------------------------------------------

    def look_soon(self) -> None:
        """Once for all that changes in one turn of the loop."""
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """Bring the first ones nearer."""
        self._looking = False
        now = self._clock.time()
        reaches = self._ahead.reaches(self._held())
        counting = (load_task for _, load_task in self._line if self._counts(load_task, now))
        near = list(islice(counting, len(reaches)))
        for load_task, reach in zip(near, reaches, strict=False):
            self._reach(load_task, reach)
        self._set_alarm(min((each.since for each in near if each.wishes), default=None))

    def _counts(self, load_task: LoadTask, now: float) -> bool:
        """Whether it takes a place among the first: whose sources do not answer take none."""
        late = load_task.wishes and now >= load_task.since + self._patience
        return not late and not load_task.resting

    def _reach(self, load_task: LoadTask, reach: LoadTarget) -> None:
        if load_task.wishes:
            return
        if reach is LoadTarget.LOAD:
            self._pending_load(load_task)
        else:
            self._hint(load_task, _HINTS[reach])

    def _set_alarm(self, since: float | None) -> None:
        """The first to lose patience with is the one that is loaded since then."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None
        if since is not None:
            self._alarm = self._clock.call_at(since + self._patience, self._look)

    # -- loads and hints ---------------------------------------------------------------------------

    def _pending_load(self, load_task: LoadTask) -> None:
        if not load_task.wishes:
            load_task.since = self._clock.time()
        load_task.priority = load_task.adapter_queue.priority
        task = asyncio.get_running_loop().create_task(self._load(load_task), name="lorax wish")
        load_task.wishes.add(task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, load_task: LoadTask) -> None:
        """Until it has a slot. Its requests have deadlines of their own."""
        ref, priority = load_task.adapter_queue.ref, load_task.priority
        assert ref is not None
        try:
            if load_task.broken is not None and not await self._loader.has_changed(
                ref, *load_task.broken
            ):
                self._fail(load_task, load_task.broken[1])
                return
            stay = self._loader.stream(ref, timeout=MAX_SECONDS, priority=priority)
            async with stay as streaming:
                handle = streaming.clone()
        except LoraxError as error:
            self._fail(load_task, error)
        except Exception as problem:  # noqa: BLE001 - the requests must hear of it
            fault = InternalError(f"a load failed: {problem!r}", id=load_task.adapter_queue.id)
            fault.__cause__ = problem
            self._fail(load_task, fault)
        else:
            if self._load_tasks.get(load_task.adapter_queue) is load_task:
                self._granted(load_task.adapter_queue, handle)
            else:
                handle.release()

    def _fail(self, load_task: LoadTask, error: LoraxError) -> None:
        if self._load_tasks.get(load_task.adapter_queue) is load_task:
            self._failed(load_task.adapter_queue, error)

    def _hint(self, load_task: LoadTask, tier: TierName) -> None:
        if tier in load_task.hints:
            return
        ref = load_task.adapter_queue.ref
        assert ref is not None
        try:
            hint = self._loader.prefetch(ref, tier=tier, priority=load_task.adapter_queue.priority)
        except LoraxError as error:
            self._fail(load_task, error)
            return
        load_task.hints[tier] = hint
        if tier != "host":
            hint.task.add_done_callback(lambda _: self._hinted(load_task, hint))

    def _hinted(self, load_task: LoadTask, hint: Prefetch) -> None:
        """It is there, and the slot a matter of asking; or it is time to load it.

        Who rests has no other way, and ends with it; but for time, which is its requests' own.
        """
        if self._load_tasks.get(load_task.adapter_queue) is not load_task:
            return
        for error in hint.errors.values():
            if load_task.resting and not isinstance(error, AdapterTimeoutError):
                self._fail(load_task, error)
                return
        load_task.resting = False
        if not load_task.wishes:
            self._pending_load(load_task)


class AdapterQueues:
    """All guests.

    `changed` hears when there may be something to compute; `sent_back` of the requests of an
    adapter that has lost its slot; `in_the_way` of a guest in a batch that keeps a slot in vain.

    Attributes
    ----------
    slots
        What is known of the device's slots.
    held
        Guests that have slots, and the base if it has requests.
    places
        The engine's, and the requests that have them.
    dropped
        Requests that the engine has something of that it is to forget.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        clock: Clock,
        ahead: LookAhead,
        patience: float,
        places: EngineSlots,
        *,
        changed: Callable[[], None],
        sent_back: Callable[[Ticket], None],
        in_the_way: Callable[[AdapterQueue], None],
    ) -> None:
        self.slots = SlotRecords(clock)
        self.held: dict[AdapterQueue, None] = {}
        self.places = places
        self.dropped: list[Ticket] = []
        self._loader = loader
        self._clock = clock
        self._patience = patience
        self._changed = changed
        self._sent_back = sent_back
        self._in_the_way = in_the_way
        self._adapter_queues: dict[Ref | None, AdapterQueue] = {}
        self._by_key: dict[AdapterKey, list[AdapterQueue]] = {}
        self._alarm: TimerHandle | None = None
        self._looked = -inf
        self._waiting = LoadQueue(
            loader,
            ahead,
            patience,
            clock,
            held=lambda: sum(adapter_queue.handle is not None for adapter_queue in self.held),
            granted=self._granted,
            failed=self.fail,
        )
        self._unsubscribe = loader.subscribe(self._heard)

    # -- requests ----------------------------------------------------------------------------------

    def enter(self, ticket: Ticket) -> None:
        """One more request. Raises what `AdapterLoader.try_acquire` raises, and then has none."""
        adapter_queue = self._adapter_queues.get(ticket.ref)
        if adapter_queue is not None:
            ticket.client = self.places.client_of(ticket.request.client)
            adapter_queue.add(ticket)
            self._waiting.update(adapter_queue)
        else:
            handle = None if ticket.ref is None else self._loader.try_acquire(ticket.ref)
            least = min((other.tokens for other in self._adapter_queues.values()), default=0)
            adapter_queue = self._adapter_queues[ticket.ref] = AdapterQueue(ticket.ref, least)
            ticket.client = self.places.client_of(ticket.request.client)
            adapter_queue.add(ticket)
            if handle is not None:
                self._adopt(adapter_queue, handle)
            elif ticket.ref is None:
                self.held[adapter_queue] = None
            else:
                self._waiting.add(adapter_queue)
                self._watch()
        self._changed()

    def guest_of(self, ticket: Ticket) -> AdapterQueue:
        """Whose it is; it must not be done."""
        return self._adapter_queues[ticket.ref]

    def begin(self, adapter_queue: AdapterQueue, ticket: Ticket) -> None:
        """It is computed: the engine keeps something of it from now on."""
        self.places.take(adapter_queue, ticket)

    def begin_again(self, ticket: Ticket) -> None:
        """The engine keeps nothing of it, for its adapter did not come in time."""
        self._adapter_queues[ticket.ref].trusted = False
        self.places.vacate(ticket)

    def preempt(self, ticket: Ticket) -> None:
        """Take its place for another one; it waits to be computed from its first token on."""
        ticket.progress.restart()
        self.places.vacate(ticket)
        self._waiting.update(self._adapter_queues[ticket.ref])

    def charge(self, ticket: Ticket, tokens: int) -> None:
        """Note that so many tokens were computed of it; it must not be done."""
        self._adapter_queues[ticket.ref].tokens += tokens
        if ticket.client is not None:
            ticket.client.tokens += tokens

    @property
    def has_ready(self) -> bool:
        """Whether there are rows that wait for nothing but their turn."""
        ready = (
            adapter_queue
            for adapter_queue in self.held
            if adapter_queue.is_ready and not adapter_queue.leaving
        )
        return any(adapter_queue.waiting(1, inf) for adapter_queue in ready)

    def leave(self, ticket: Ticket) -> None:
        """It is done, for whatever reason; once."""
        adapter_queue = self._adapter_queues[ticket.ref]
        adapter_queue.remove(ticket)
        self.places.leave(ticket)
        if adapter_queue.tickets:
            self._waiting.update(adapter_queue)
        else:
            self._part(adapter_queue)

    def landed(self, adapter_queues: Iterable[AdapterQueue]) -> None:
        """A batch that they were in was completed."""
        for adapter_queue in adapter_queues:
            adapter_queue.flights -= 1
            if adapter_queue.flights:
                continue
            if not adapter_queue.tickets:
                self._release(adapter_queue)
            elif adapter_queue.leaving:
                self._settle(adapter_queue)
        self._relieve()

    def fail(self, adapter_queue: AdapterQueue, error: LoraxError) -> None:
        """What goes wrong with an adapter goes wrong with its requests, and with no other."""
        tickets, adapter_queue.tickets = adapter_queue.tickets, []
        for ticket in tickets:
            self.places.leave(ticket)
        self._part(adapter_queue)
        for ticket in tickets:
            ticket.end(error.located(id=adapter_queue.id))
        self._changed()

    def _part(self, adapter_queue: AdapterQueue) -> None:
        """It has no requests any more; new ones are another guest's."""
        if self._adapter_queues.get(adapter_queue.ref) is adapter_queue:
            del self._adapter_queues[adapter_queue.ref]
        self._waiting.remove(adapter_queue)
        if not adapter_queue.flights:
            self._release(adapter_queue)

    # -- slots -------------------------------------------------------------------------------------

    def _granted(self, adapter_queue: AdapterQueue, handle: AdapterHandle) -> None:
        self._waiting.remove(adapter_queue)
        self._adopt(adapter_queue, handle)
        self._changed()

    def _adopt(self, adapter_queue: AdapterQueue, handle: AdapterHandle) -> None:
        slot = handle.slot
        adapter_queue.handle, adapter_queue.place = handle, SlotRef(slot.index, slot.generation)
        adapter_queue.trusted = True
        adapter_queue.leaving = self.slots.is_leaving(slot)
        adapter_queue.arrival = self.slots.adopt(handle)
        self.held[adapter_queue] = None
        self._by_key.setdefault(handle.key, []).append(adapter_queue)
        self._settle(adapter_queue)
        self._watch()

    def _release(self, adapter_queue: AdapterQueue) -> None:
        """Give its slot back, if it has one. Idempotent."""
        self.held.pop(adapter_queue, None)
        handle, adapter_queue.handle, adapter_queue.arrival = adapter_queue.handle, None, None
        if handle is None:
            return
        others = self._by_key[handle.key]
        others.remove(adapter_queue)
        if not others:
            del self._by_key[handle.key]
        handle.release()
        self._waiting.look_soon()

    def _send_back(self, adapter_queue: AdapterQueue, *, resting: bool = False) -> None:
        """Others get its slot; it waits for another one."""
        self._release(adapter_queue)
        for ticket in adapter_queue.tickets:
            self._sent_back(ticket)
        self._waiting.add(adapter_queue, resting=resting)
        self._watch()

    # -- events ------------------------------------------------------------------------------------

    def _heard(self, event: Event) -> None:
        if event.slot is not None:
            self.slots.heard(event, event.slot)
        for adapter_queue in tuple(self._by_key.get(event.key, ())):
            self._tell(adapter_queue, event)

    def _tell(self, adapter_queue: AdapterQueue, event: Event) -> None:
        if isinstance(event, LayerReady | Resident):
            adapter_queue.leaving = adapter_queue.leaving and not isinstance(event, Resident)
            self._changed()
        elif isinstance(event, Failed | Leaving):
            adapter_queue.leaving = adapter_queue.leaving or isinstance(event, Leaving)
            # A slot breaks, and leaves, after that was told.
            asyncio.get_running_loop().call_soon(self._settle, adapter_queue)

    def _settle(self, adapter_queue: AdapterQueue) -> None:
        """Fail it if its weights are no good; let it go if it is to."""
        self.judge([adapter_queue])
        if adapter_queue.handle is None:
            return
        if adapter_queue.handle.released:
            self.fail(adapter_queue, LoaderClosedError("the loader was closed"))
        elif adapter_queue.leaving and adapter_queue.tickets and not adapter_queue.flights:
            self._send_back(adapter_queue)

    def check(self) -> None:
        """Settle what no event tells: a digest that is another, a loader that was closed."""
        for adapter_queue in tuple(self.held):
            self._settle(adapter_queue)

    def judge(self, adapter_queues: Iterable[AdapterQueue]) -> None:
        """Fail those whose weights turned out to be no good, or load them once more."""
        for adapter_queue in adapter_queues:
            handle = adapter_queue.handle
            if handle is None:
                continue
            try:
                handle.require_sound()
            except LoraxError as error:
                if adapter_queue.reloaded or not _may_have_changed(adapter_queue, handle, error):
                    self.fail(adapter_queue, error)
                else:
                    self._reload(adapter_queue, handle.key, error)

    def _reload(self, adapter_queue: AdapterQueue, key: AdapterKey, error: LoraxError) -> None:
        """Let its requests wait for another version, if there is one, unless they have tokens.

        They are another guest's from now on: nothing counts that is being computed of them.
        """
        tickets, adapter_queue.tickets = adapter_queue.tickets, []
        again = AdapterQueue(adapter_queue.ref, adapter_queue.tokens)
        again.reloaded = True
        self._part(adapter_queue)
        for ticket in tickets:
            if ticket.generated:
                self.places.leave(ticket)
                ticket.end(error.located(id=adapter_queue.id))
                continue
            if ticket.begun:
                self.dropped.append(ticket)
            ticket.progress.restart()
            self.places.vacate(ticket)
            again.add(ticket)
            self._sent_back(ticket)
        if again.tickets:
            self._adapter_queues[adapter_queue.ref] = again
            self._waiting.add(again, broken=(key, error))
            self._watch()
        self._changed()

    def make_way(self) -> None:
        """Nobody may begin. Where all who have begun wait for slots, they get one held in vain.

        Who gave way keeps what it gets next: those who have begun may not be ready to take it.
        """
        held = [adapter_queue for adapter_queue in self.held if adapter_queue.handle is not None]
        since = self._clock.time() - self._patience
        in_vain = [adapter_queue for adapter_queue in held if adapter_queue.gave_way <= since]
        if in_vain and not any(adapter_queue.begun for adapter_queue in held):
            adapter_queue = max(in_vain, key=attrgetter("urgency"))
            adapter_queue.gave_way = self._clock.time()
            self._send_back(adapter_queue)

    # -- slots in which nothing comes --------------------------------------------------------------

    def _watch(self) -> None:
        """While others wait, a slot is not for who gets nothing in it."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        due = min((latest for _, latest in self._streaming()), default=None)
        if due is not None and len(self._waiting):
            when = max(due, self._looked) + self._patience
            self._alarm = self._clock.call_at(when, self._relieve)

    def _relieve(self) -> None:
        now = self._clock.time()
        for adapter_queue, latest in self._streaming():
            if now < latest + self._patience or not len(self._waiting):
                continue
            if adapter_queue.flights:
                self._looked = now
                self._in_the_way(adapter_queue)
            else:
                self._send_back(adapter_queue, resting=True)
        self._watch()

    def _streaming(self) -> list[tuple[AdapterQueue, float]]:
        """Guests whose layers are to come, and when something of them came last."""
        return [
            (adapter_queue, adapter_queue.arrival.latest)
            for adapter_queue in self.held
            if adapter_queue.arrival is not None and not adapter_queue.is_ready
        ]

    # -- the end -----------------------------------------------------------------------------------

    async def close(self, error: LoraxError) -> None:
        """Fail all requests and give all slots back, those of batches under way, too."""
        self._unsubscribe()
        if self._alarm is not None:
            self._alarm.cancel()
        for adapter_queue in tuple(self._adapter_queues.values()):
            self.fail(adapter_queue, error)
        for adapter_queue in tuple(self.held):
            self._release(adapter_queue)
        await self._waiting.close()


def _may_have_changed(
    adapter_queue: AdapterQueue, handle: AdapterHandle, error: LoraxError
) -> bool:
    """Return whether it is worth asking: its files are local, and what was read is not them.

    A digest that the caller gave is the caller's own word: others are refused.
    """
    local = bool(handle.key.files) and not isinstance(handle.key, RemoteKey)
    own = (
        isinstance(adapter_queue.ref, AdapterKey)
        or getattr(adapter_queue.ref, "digest", None) is not None
    )
    return local and not own and isinstance(error, IntegrityError)
