"""All adapters with requests: their queues, loads and slots."""

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
from lorax_async.types import MAX_SECONDS, AdapterKey, Ref, RemoteKey


def urgency(since: float, priority: int, deadline: float, level: float) -> float:
    """Return a request's sort key, in seconds; lower is more urgent. It stays while it waits.

    The key is `since`, the time of arrival, less `level` seconds per level of priority. A deadline
    less than `level` seconds away (also a time) counts as if the request had arrived earlier. A
    request that arrives later by more than the difference in levels is behind: none starves.
    """
    return min(since, deadline - level) - priority * level


class LoadTarget(Enum):
    """How far to load an adapter while its requests wait."""

    LOAD = "load"
    """Load in the foreground."""
    DEVICE = "device"
    """Prefetch onto the device, if there is room."""
    HOST = "host"
    """Prefetch into host memory."""


@dataclass(frozen=True, slots=True)
class LookAhead:
    """How many queued adapters to load or prefetch.

    `loads` adapters load in the foreground; with prefetched ones at most `slots` are on the device;
    `hints` more are prefetched into host memory.
    """

    loads: int
    slots: int
    hints: int

    def targets(self, slots_held: int) -> list[LoadTarget]:
        """Return the targets of the first queued adapters while others hold `slots_held` slots."""
        spare = max(0, self.slots - slots_held - self.loads)
        return [
            *[LoadTarget.LOAD] * self.loads,
            *[LoadTarget.DEVICE] * spare,
            *[LoadTarget.HOST] * self.hints,
        ]


class SlotRecords:
    """The occupants of all slots and the arrival of their layers, from the loader's events.

    Attributes
    ----------
    lease_table
        The occupant of each slot. Its rank is 0 until `adopt`.
    """

    def __init__(self, clock: Clock) -> None:
        self.lease_table: dict[int, SlotOccupant] = {}
        self._clock = clock
        self._profiles = LoadProfiles()
        self._arrivals: dict[int, LoadEstimate] = {}
        self._leaving: set[SlotId] = set()

    def record(self, event: Event, slot: SlotId) -> None:
        match event:
            case SlotGranted():
                profile = self._profiles.of(type(event.key).__name__)
                arrival = LoadEstimate(event.layers, event.nbytes, self._clock.time(), profile)
                self._arrivals[slot.index] = arrival
                self._leaving = {other for other in self._leaving if other.index != slot.index}
                self.lease_table[slot.index] = SlotOccupant(slot.generation, 0)
            case LayerReady():
                if slot.index in self._arrivals:
                    self._arrivals[slot.index].record(event.layer, self._clock.time())
            case Resident():
                self._arrivals.pop(slot.index, None)
                self._leaving.discard(slot)
            case Leaving():
                self._leaving.add(slot)

    def is_leaving(self, slot: SlotId) -> bool:
        return slot in self._leaving

    def adopt(self, handle: AdapterHandle) -> LoadEstimate | None:
        """Record a lease; return the expected arrival of its layers, None if it is resident.

        For a load that began before the subscription, earlier arrival times are unknown.
        """
        slot = handle.slot
        self.lease_table[slot.index] = SlotOccupant(slot.generation, handle.rank)
        if handle.resident:
            return None
        if slot.index not in self._arrivals:
            profile = self._profiles.of(type(handle.key).__name__)
            arrival = LoadEstimate(handle.layers, handle.nbytes, self._clock.time(), profile)
            arrival.skip(sum(handle.is_ready(layer) for layer in handle.layers))
            self._arrivals[slot.index] = arrival
        return self._arrivals[slot.index]


_HINTS: dict[LoadTarget, TierName] = {LoadTarget.DEVICE: "device", LoadTarget.HOST: "host"}


class LoadTask:
    """The load of one adapter without a slot.

    `place` is its sort key in the queue. `needs_file` marks an adapter that lost a slot in which no
    layer arrived: fetch its file before it gets a slot again. `failure` is the version that failed
    in its slot, with the error: load it again only if its files have changed.
    """

    def __init__(
        self,
        adapter_queue: AdapterQueue,
        number: int,
        *,
        needs_file: bool,
        failure: tuple[AdapterKey, LoraxError] | None = None,
    ) -> None:
        self.adapter_queue = adapter_queue
        self.failure = failure
        self.place: tuple[Urgency, int] = (adapter_queue.urgency, number)
        self.needs_file = needs_file
        self.tasks: set[asyncio.Task[None]] = set()
        self.since = 0.0
        self.priority = 0
        self.hints: dict[TierName, Prefetch] = {}


class LoadQueue:
    """The adapters without a slot, by urgency.

    The first ones are loaded in the foreground, the next ones prefetched. An adapter that has been
    loading for `patience` seconds no longer counts among the first, so that an unresponsive source
    does not hold up the others. `granted` and `failed` report the end of a load; `slots_held`
    returns the number of adapters with slots.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        ahead: LookAhead,
        patience: float,
        clock: Clock,
        *,
        slots_held: Callable[[], int],
        granted: Callable[[AdapterQueue, AdapterHandle], None],
        failed: Callable[[AdapterQueue, LoraxError], None],
    ) -> None:
        self._loader = loader
        self._ahead = ahead
        self._patience = patience
        self._clock = clock
        self._slots_held = slots_held
        self._granted = granted
        self._failed = failed
        self._queue: list[tuple[tuple[Urgency, int], LoadTask]] = []
        self._load_tasks: dict[AdapterQueue, LoadTask] = {}
        self._numbers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm: TimerHandle | None = None
        self._look_scheduled = False

    def __len__(self) -> int:
        return len(self._queue)

    def add(
        self,
        adapter_queue: AdapterQueue,
        *,
        needs_file: bool = False,
        failure: tuple[AdapterKey, LoraxError] | None = None,
    ) -> None:
        """Add an adapter; with `needs_file`, fetch its file before it gets a slot."""
        self._numbers += 1
        load_task = LoadTask(adapter_queue, self._numbers, needs_file=needs_file, failure=failure)
        self._load_tasks[adapter_queue] = load_task
        insort(self._queue, (load_task.place, load_task))
        if failure is not None:
            self._start_load(load_task)
        if needs_file:
            self._hint(load_task, "disk")
        self.schedule_look()

    def update(self, adapter_queue: AdapterQueue) -> None:
        """Follow a change of the adapter's urgency or priority."""
        load_task = self._load_tasks.get(adapter_queue)
        if load_task is None:
            return
        if load_task.place[0] != adapter_queue.urgency:
            self._take_out(load_task)
            load_task.place = (adapter_queue.urgency, load_task.place[1])
            insort(self._queue, (load_task.place, load_task))
            self.schedule_look()
        if load_task.tasks and adapter_queue.priority > load_task.priority:
            self._start_load(load_task)  # beside the load of lower priority

    def remove(self, adapter_queue: AdapterQueue) -> None:
        """Remove an adapter and cancel its loads. Idempotent."""
        load_task = self._load_tasks.pop(adapter_queue, None)
        if load_task is None:
            return
        self._take_out(load_task)
        for task in load_task.tasks:
            task.cancel()
        for hint in load_task.hints.values():
            hint.cancel()
        self.schedule_look()

    def _take_out(self, load_task: LoadTask) -> None:
        del self._queue[bisect_left(self._queue, load_task.place, key=itemgetter(0))]

    async def close(self) -> None:
        """Wait for the cancelled loads. The queue must be empty."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    # -- looking ahead -----------------------------------------------------------------------------

    def schedule_look(self) -> None:
        """Call `_look` once for all changes in one turn of the loop."""
        if not self._look_scheduled:
            self._look_scheduled = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """Load or prefetch the first adapters of the queue."""
        self._look_scheduled = False
        now = self._clock.time()
        targets = self._ahead.targets(self._slots_held())
        counting = (load_task for _, load_task in self._queue if self._counts(load_task, now))
        first = list(islice(counting, len(targets)))
        for load_task, target in zip(first, targets, strict=False):
            self._bring(load_task, target)
        self._set_alarm(min((task.since for task in first if task.tasks), default=None))

    def _counts(self, load_task: LoadTask, now: float) -> bool:
        """Return whether it counts among the first: not if its source is unresponsive."""
        late = load_task.tasks and now >= load_task.since + self._patience
        return not late and not load_task.needs_file

    def _bring(self, load_task: LoadTask, target: LoadTarget) -> None:
        if load_task.tasks:
            return
        if target is LoadTarget.LOAD:
            self._start_load(load_task)
        else:
            self._hint(load_task, _HINTS[target])

    def _set_alarm(self, since: float | None) -> None:
        """Look again when the load that started at `since` exceeds `patience`."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None
        if since is not None:
            self._alarm = self._clock.call_at(since + self._patience, self._look)

    # -- loads and hints ---------------------------------------------------------------------------

    def _start_load(self, load_task: LoadTask) -> None:
        if not load_task.tasks:
            load_task.since = self._clock.time()
        load_task.priority = load_task.adapter_queue.priority
        task = asyncio.get_running_loop().create_task(self._load(load_task), name="lorax load")
        load_task.tasks.add(task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, load_task: LoadTask) -> None:
        """Wait for a slot, without a timeout: requests have deadlines of their own."""
        ref, priority = load_task.adapter_queue.ref, load_task.priority
        assert ref is not None
        try:
            if load_task.failure is not None and not await self._loader.has_changed(
                ref, *load_task.failure
            ):
                self._fail(load_task, load_task.failure[1])
                return
            lease = self._loader.stream(ref, timeout=MAX_SECONDS, priority=priority)
            async with lease as streaming:
                handle = streaming.clone()
        except LoraxError as error:
            self._fail(load_task, error)
        except Exception as problem:  # noqa: BLE001 - the requests raise it
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
        """Start the load when a prefetch ends, for the slot or for its error.

        An adapter that needs its file fails with the prefetch, except for a timeout: requests have
        deadlines of their own.
        """
        if self._load_tasks.get(load_task.adapter_queue) is not load_task:
            return
        for error in hint.errors.values():
            if load_task.needs_file and not isinstance(error, AdapterTimeoutError):
                self._fail(load_task, error)
                return
        load_task.needs_file = False
        if not load_task.tasks:
            self._start_load(load_task)


class AdapterQueues:
    """All adapters with requests.

    `on_change` is called when there may be rows to compute; `on_requeue` for each request of an
    adapter that has lost its slot; `on_blocked_slot` for an adapter of a batch in flight in whose
    slot no layers arrive while others wait for one.

    Attributes
    ----------
    slots
        The occupants of the device's slots.
    slot_holders
        The adapters with a slot, and the base if it has requests.
    places
        The engine's places.
    dropped
        Begun requests that restart: the engine must forget their keys and values.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        clock: Clock,
        ahead: LookAhead,
        patience: float,
        places: EngineSlots,
        *,
        on_change: Callable[[], None],
        on_requeue: Callable[[Ticket], None],
        on_blocked_slot: Callable[[AdapterQueue], None],
    ) -> None:
        self.slots = SlotRecords(clock)
        self.slot_holders: dict[AdapterQueue, None] = {}
        self.places = places
        self.dropped: list[Ticket] = []
        self._loader = loader
        self._clock = clock
        self._patience = patience
        self._on_change = on_change
        self._on_requeue = on_requeue
        self._on_blocked_slot = on_blocked_slot
        self._adapter_queues: dict[Ref | None, AdapterQueue] = {}
        self._by_key: dict[AdapterKey, list[AdapterQueue]] = {}
        self._alarm: TimerHandle | None = None
        self._last_stall_check = -inf
        self._waiting = LoadQueue(
            loader,
            ahead,
            patience,
            clock,
            slots_held=lambda: sum(holder.handle is not None for holder in self.slot_holders),
            granted=self._granted,
            failed=self.fail,
        )
        self._unsubscribe = loader.subscribe(self._on_event)

    # -- requests ----------------------------------------------------------------------------------

    def enter(self, ticket: Ticket) -> None:
        """Add a request. If `AdapterLoader.try_acquire` raises, raise that and add none."""
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
                self.slot_holders[adapter_queue] = None
            else:
                self._waiting.add(adapter_queue)
                self._schedule_stall_check()
        self._on_change()

    def queue_of(self, ticket: Ticket) -> AdapterQueue:
        """Return the queue of a request that is not done."""
        return self._adapter_queues[ticket.ref]

    def begin(self, adapter_queue: AdapterQueue, ticket: Ticket) -> None:
        """Give the request a place of the engine."""
        self.places.take(adapter_queue, ticket)

    def requeue(self, ticket: Ticket) -> None:
        """Take the request's place: its adapter arrived too late, and may not stream again."""
        self._adapter_queues[ticket.ref].may_stream = False
        self.places.vacate(ticket)

    def preempt(self, ticket: Ticket) -> None:
        """Take the request's place for another one; it restarts from its first token."""
        ticket.progress.restart()
        self.places.vacate(ticket)
        self._waiting.update(self._adapter_queues[ticket.ref])

    def charge(self, ticket: Ticket, tokens: int) -> None:
        """Count computed tokens of a request that is not done."""
        self._adapter_queues[ticket.ref].tokens += tokens
        if ticket.client is not None:
            ticket.client.tokens += tokens

    @property
    def has_ready(self) -> bool:
        """Whether a request of a ready adapter could be computed at once."""
        ready = (
            adapter_queue
            for adapter_queue in self.slot_holders
            if adapter_queue.is_ready and not adapter_queue.leaving
        )
        return any(adapter_queue.waiting(1, inf) for adapter_queue in ready)

    def leave(self, ticket: Ticket) -> None:
        """Remove a request that is done. Call once per request."""
        adapter_queue = self._adapter_queues[ticket.ref]
        adapter_queue.remove(ticket)
        self.places.leave(ticket)
        if adapter_queue.tickets:
            self._waiting.update(adapter_queue)
        else:
            self._retire(adapter_queue)

    def release_batch(self, adapter_queues: Iterable[AdapterQueue]) -> None:
        """Release the adapters of a completed batch."""
        for adapter_queue in adapter_queues:
            adapter_queue.batch_count -= 1
            if adapter_queue.batch_count:
                continue
            if not adapter_queue.tickets:
                self._release(adapter_queue)
            elif adapter_queue.leaving:
                self._settle(adapter_queue)
        self._release_stalled()

    def fail(self, adapter_queue: AdapterQueue, error: LoraxError) -> None:
        """Fail the adapter's requests with `error`; others are not affected."""
        tickets, adapter_queue.tickets = adapter_queue.tickets, []
        for ticket in tickets:
            self.places.leave(ticket)
        self._retire(adapter_queue)
        for ticket in tickets:
            ticket.end(error.located(id=adapter_queue.id))
        self._on_change()

    def _retire(self, adapter_queue: AdapterQueue) -> None:
        """Remove a queue without requests; a new request starts a new queue."""
        if self._adapter_queues.get(adapter_queue.ref) is adapter_queue:
            del self._adapter_queues[adapter_queue.ref]
        self._waiting.remove(adapter_queue)
        if not adapter_queue.batch_count:
            self._release(adapter_queue)

    # -- slots -------------------------------------------------------------------------------------

    def _granted(self, adapter_queue: AdapterQueue, handle: AdapterHandle) -> None:
        self._waiting.remove(adapter_queue)
        self._adopt(adapter_queue, handle)
        self._on_change()

    def _adopt(self, adapter_queue: AdapterQueue, handle: AdapterHandle) -> None:
        slot = handle.slot
        adapter_queue.handle, adapter_queue.place = handle, SlotRef(slot.index, slot.generation)
        adapter_queue.may_stream = True
        adapter_queue.leaving = self.slots.is_leaving(slot)
        adapter_queue.arrival = self.slots.adopt(handle)
        self.slot_holders[adapter_queue] = None
        self._by_key.setdefault(handle.key, []).append(adapter_queue)
        self._settle(adapter_queue)
        self._schedule_stall_check()

    def _release(self, adapter_queue: AdapterQueue) -> None:
        """Release its slot, if it has one. Idempotent."""
        self.slot_holders.pop(adapter_queue, None)
        handle, adapter_queue.handle, adapter_queue.arrival = adapter_queue.handle, None, None
        if handle is None:
            return
        others = self._by_key[handle.key]
        others.remove(adapter_queue)
        if not others:
            del self._by_key[handle.key]
        handle.release()
        self._waiting.schedule_look()

    def _send_back(self, adapter_queue: AdapterQueue, *, needs_file: bool = False) -> None:
        """Release its slot for others; queue it for another slot."""
        self._release(adapter_queue)
        for ticket in adapter_queue.tickets:
            self._on_requeue(ticket)
        self._waiting.add(adapter_queue, needs_file=needs_file)
        self._schedule_stall_check()

    # -- events ------------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        if event.slot is not None:
            self.slots.record(event, event.slot)
        for adapter_queue in tuple(self._by_key.get(event.key, ())):
            self._apply(adapter_queue, event)

    def _apply(self, adapter_queue: AdapterQueue, event: Event) -> None:
        if isinstance(event, LayerReady | Resident):
            adapter_queue.leaving = adapter_queue.leaving and not isinstance(event, Resident)
            self._on_change()
        elif isinstance(event, Failed | Leaving):
            adapter_queue.leaving = adapter_queue.leaving or isinstance(event, Leaving)
            # The event precedes the change of the slot.
            asyncio.get_running_loop().call_soon(self._settle, adapter_queue)

    def _settle(self, adapter_queue: AdapterQueue) -> None:
        """Fail it if its weights are bad or the loader is closed; release its slot if leaving."""
        self.check_integrity([adapter_queue])
        if adapter_queue.handle is None:
            return
        if adapter_queue.handle.released:
            self.fail(adapter_queue, LoaderClosedError("the loader was closed"))
        elif adapter_queue.leaving and adapter_queue.tickets and not adapter_queue.batch_count:
            self._send_back(adapter_queue)

    def settle_all(self) -> None:
        """Apply changes without an event: a wrong digest, a closed loader."""
        for adapter_queue in tuple(self.slot_holders):
            self._settle(adapter_queue)

    def check_integrity(self, adapter_queues: Iterable[AdapterQueue]) -> None:
        """Fail or reload the adapters whose weights turned out to be bad."""
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
        """Move its requests to a new queue for another version; fail those that have tokens.

        Results of batches in flight no longer count for the moved requests.
        """
        tickets, adapter_queue.tickets = adapter_queue.tickets, []
        again = AdapterQueue(adapter_queue.ref, adapter_queue.tokens)
        again.reloaded = True
        self._retire(adapter_queue)
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
            self._on_requeue(ticket)
        if again.tickets:
            self._adapter_queues[adapter_queue.ref] = again
            self._waiting.add(again, failure=(key, error))
            self._schedule_stall_check()
        self._on_change()

    def yield_slot(self) -> None:
        """Preempt an idle slot holder if no request can start and all begun ones wait for slots.

        An adapter that has yielded keeps its next slot for `patience`: the begun requests may not
        be ready to take it.
        """
        holders = [holder for holder in self.slot_holders if holder.handle is not None]
        since = self._clock.time() - self._patience
        candidates = [holder for holder in holders if holder.yielded_at <= since]
        if candidates and not any(holder.begun for holder in holders):
            adapter_queue = max(candidates, key=attrgetter("urgency"))
            adapter_queue.yielded_at = self._clock.time()
            self._send_back(adapter_queue)

    # -- slots in which no layers arrive -----------------------------------------------------------

    def _schedule_stall_check(self) -> None:
        """Set the timer at which a slot without new layers is released for waiting adapters."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        due = min((latest for _, latest in self._streaming()), default=None)
        if due is not None and len(self._waiting):
            when = max(due, self._last_stall_check) + self._patience
            self._alarm = self._clock.call_at(when, self._release_stalled)

    def _release_stalled(self) -> None:
        now = self._clock.time()
        for adapter_queue, latest in self._streaming():
            if now < latest + self._patience or not len(self._waiting):
                continue
            if adapter_queue.batch_count:
                self._last_stall_check = now
                self._on_blocked_slot(adapter_queue)
            else:
                self._send_back(adapter_queue, needs_file=True)
        self._schedule_stall_check()

    def _streaming(self) -> list[tuple[AdapterQueue, float]]:
        """Return the streaming adapters, each with the time of its latest layer."""
        return [
            (adapter_queue, adapter_queue.arrival.latest)
            for adapter_queue in self.slot_holders
            if adapter_queue.arrival is not None and not adapter_queue.is_ready
        ]

    # -- the end -----------------------------------------------------------------------------------

    async def close(self, error: LoraxError) -> None:
        """Fail all requests and release all slots, also those of batches in flight."""
        self._unsubscribe()
        if self._alarm is not None:
            self._alarm.cancel()
        for adapter_queue in tuple(self._adapter_queues.values()):
            self.fail(adapter_queue, error)
        for adapter_queue in tuple(self.slot_holders):
            self._release(adapter_queue)
        await self._waiting.close()


def _may_have_changed(
    adapter_queue: AdapterQueue, handle: AdapterHandle, error: LoraxError
) -> bool:
    """Return whether local files may have been replaced since they were read.

    A key or a digest names one version: a changed file cannot satisfy it.
    """
    local = bool(handle.key.files) and not isinstance(handle.key, RemoteKey)
    fixed_version = (
        isinstance(adapter_queue.ref, AdapterKey)
        or getattr(adapter_queue.ref, "digest", None) is not None
    )
    return local and not fixed_version and isinstance(error, IntegrityError)
