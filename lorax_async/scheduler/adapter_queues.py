"""All adapters with requests: their queues, versions, loads and slots."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import InitVar, dataclass
from math import ceil, inf
from operator import attrgetter

from lorax_async.errors import IntegrityError, InternalError, LoaderClosedError, LoraxError
from lorax_async.events import Event, Failed, LayerReady, Leaving, Resident, SlotGranted, SlotId
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.planning.batch_plan import SlotOccupant, SlotRef
from lorax_async.scheduler.admission import EngineSlots
from lorax_async.scheduler.estimates import LoadEstimate, LoadProfile
from lorax_async.scheduler.look_ahead import LoadQueue, LookAhead, resolve_queue
from lorax_async.scheduler.requests import AdapterQueue, Clock, Ticket, TimerHandle
from lorax_async.types import AdapterKey, Ref, RemoteKey, expected_digest


class SlotRecords:
    """The occupants of all slots and the arrival of their layers, from the loader's events."""

    def __init__(self, clock: Clock) -> None:
        self.occupants: dict[int, SlotOccupant] = {}
        """The occupant of each slot. Its rank is 0 until `adopt`."""
        self._clock = clock
        self._profiles: defaultdict[str, LoadProfile] = defaultdict(LoadProfile)
        """By kind of adapter key: local files, remote, in memory."""
        self._arrivals: dict[int, LoadEstimate] = {}
        self._leaving: set[SlotId] = set()

    def record(self, event: Event, slot: SlotId) -> None:
        match event:
            case SlotGranted():
                profile = self._profiles[type(event.key).__name__]
                arrival = LoadEstimate(event.layers, event.nbytes, self._clock.time(), profile)
                self._arrivals[slot.index] = arrival
                self._leaving = {other for other in self._leaving if other.index != slot.index}
                self.occupants[slot.index] = SlotOccupant(slot.generation, 0)
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
        self.occupants[slot.index] = SlotOccupant(slot.generation, handle.rank)
        if handle.resident:
            return None
        if slot.index not in self._arrivals:
            profile = self._profiles[type(handle.key).__name__]
            arrival = LoadEstimate(handle.layers, handle.nbytes, self._clock.time(), profile)
            arrival.skip(sum(handle.is_ready(layer) for layer in handle.layers))
            self._arrivals[slot.index] = arrival
        return self._arrivals[slot.index]


@dataclass(eq=False)
class AdapterQueues:
    """All adapters with requests.

    A request is computed with the version that its ref means when it enters, as of a look at most
    `revalidate` seconds old. Where the look is older, the request enters a new queue, which asks
    the source first; if the version is the same, its requests join those of the old queue.

    `on_change` is called when there may be rows to compute; `on_requeue` for each request of an
    adapter that has lost its slot; `on_blocked_slot` for an adapter of a batch in flight in whose
    slot no layers arrive while others wait for one.
    """

    loader: AdapterLoader
    clock: Clock
    ahead: InitVar[LookAhead]
    patience: float
    places: EngineSlots
    on_change: Callable[[], None]
    on_requeue: Callable[[Ticket], None]
    on_blocked_slot: Callable[[AdapterQueue], None]

    def __post_init__(self, ahead: LookAhead) -> None:
        self.slots = SlotRecords(self.clock)
        self.slot_holders: dict[AdapterQueue, None] = {}
        """The adapters with a slot, and the base if it has requests."""
        self.dropped: list[Ticket] = []
        """Begun requests that restart: the engine must forget their keys and values."""
        self.fair_times = FairTimes(self.patience)
        self._turns = SlotTurns(self.patience)
        self._given = 0
        """Slots that were released since the last batch, and not granted again."""
        self._queues: dict[AdapterQueue, None] = {}
        """All queues, those of replaced versions too."""
        self._current: dict[Ref | None, AdapterQueue] = {}
        """The queue that new requests for a ref join."""
        self._checks: dict[AdapterQueue, asyncio.Task[None]] = {}
        """The queues that ask their source which version to load."""
        self._by_key: dict[AdapterKey, list[AdapterQueue]] = {}
        self._alarm: TimerHandle | None = None
        self._last_stall_check = -inf
        self._waiting = LoadQueue(
            self.loader,
            ahead,
            self.patience,
            self.clock,
            slots_held=lambda: sum(holder.handle is not None for holder in self.slot_holders),
            granted=self._granted,
            failed=self._load_failed,
        )
        self._unsubscribe = self.loader.subscribe(self._on_event)

    # -- requests ----------------------------------------------------------------------------------

    def enter(self, ticket: Ticket) -> None:
        """Add a request. If the loader refuses its ref at once, raise that and add none."""
        queue = self._current.get(ticket.ref)
        if queue is not None and self._is_current(queue):
            ticket.client = self.places.client_of(ticket.request.client)
            queue.add(ticket)
            self._waiting.update(queue)
        else:
            handle = None if ticket.ref is None else self.loader.try_acquire(ticket.ref)
            ticket.client = self.places.client_of(ticket.request.client)
            self._open_queue([ticket], handle, queue)
        self.on_change()

    def _open_queue(
        self,
        tickets: Sequence[Ticket],
        handle: AdapterHandle | None,
        predecessor: AdapterQueue | None,
    ) -> None:
        """Add requests for one ref in a queue of their own, which new requests for it join."""
        if predecessor is None:
            tokens = min((other.tokens for other in self._queues), default=0)
        else:
            tokens = predecessor.tokens
        ref = tickets[0].ref
        queue = AdapterQueue(ref, tokens, predecessor)
        self._queues[queue] = None
        self._current[ref] = queue
        for ticket in tickets:
            queue.add(ticket)
        if ref is None:
            self.slot_holders[queue] = None
        elif handle is not None:
            self._adopt(queue, handle)
        elif self._may_be_resident(ref):
            # Ask first: it may need no slot, and must not queue behind adapters that do.
            check = asyncio.create_task(self._check(queue), name="lorax load check")
            self._checks[queue] = check
            check.add_done_callback(lambda _: self._checks.pop(queue, None))
        else:
            self._add_waiting(queue)

    def stop_streaming(
        self, adapter_queues: Iterable[AdapterQueue], handles: Collection[AdapterHandle | None]
    ) -> None:
        """Let adapters whose layers arrived too late for a batch join none before all are here."""
        for queue in adapter_queues:
            if queue.handle in handles:
                queue.may_stream = False

    def preempt(self, ticket: Ticket) -> None:
        """Take the request's place for another one; it restarts from its first token."""
        ticket.position = 0
        self.places.vacate(ticket)
        self._waiting.update(ticket.queue)

    def charge(self, ticket: Ticket, tokens: int) -> None:
        """Count computed tokens of a request that is not done."""
        ticket.queue.tokens += tokens
        if ticket.client is not None:
            ticket.client.tokens += tokens

    @property
    def has_ready(self) -> bool:
        """Whether a request of a ready adapter could be computed at once."""
        ready = (queue for queue in self.slot_holders if queue.is_ready and not queue.leaving)
        return any(queue.waiting(1, inf) for queue in ready)

    def leave(self, ticket: Ticket) -> None:
        """Remove a request that is done. Call once per request."""
        queue = ticket.queue
        queue.tickets.remove(ticket)
        queue.progress_at = self.clock.time()
        self._count_end(ticket)
        if queue.tickets:
            self._waiting.update(queue)
        else:
            self._retire(queue)

    def release_batch(self, adapter_queues: Iterable[AdapterQueue]) -> None:
        """Release the adapters of a completed batch."""
        self._given = 0
        for queue in adapter_queues:
            queue.batch_count -= 1
            if queue.batch_count:
                continue
            if not queue.tickets:
                self._release(queue)
            elif queue.leaving:
                self._reevaluate(queue)
        self._release_stalled()

    def fail(self, queue: AdapterQueue, error: LoraxError) -> None:
        """Fail the adapter's requests with `error`; others are not affected."""
        tickets, queue.tickets = queue.tickets, []
        for ticket in tickets:
            self._count_end(ticket)
        self._retire(queue)
        for ticket in tickets:
            ticket.end(error.located(id=queue.id))
        self.on_change()

    def _count_end(self, ticket: Ticket) -> None:
        self.places.leave(ticket)
        self.fair_times.leave(ticket, self.clock.time())

    def _retire(self, queue: AdapterQueue) -> None:
        """Remove a queue without requests; a new request starts a new queue."""
        self._queues.pop(queue, None)
        if self._current.get(queue.ref) is queue:
            if queue.predecessor in self._queues:
                self._current[queue.ref] = queue.predecessor
            else:
                del self._current[queue.ref]
        check = self._checks.get(queue)
        if check is not None:
            check.cancel()
        self._waiting.remove(queue)
        if not queue.batch_count:
            self._release(queue)

    # -- versions ----------------------------------------------------------------------------------

    def _is_current(self, queue: AdapterQueue) -> bool:
        """Return whether a new request for the queue's ref may join it.

        The version of a first load is compared with the ref's when the load gets its slot.
        """
        if queue.ref is None or queue.version is None:
            return True
        return self.loader.current_key(queue.ref) == queue.version

    def _may_be_resident(self, ref: Ref) -> bool:
        """Return whether the adapter had a slot when its meaning was last looked up."""
        if self.loader.current_key(ref) is not None:
            return False  # the version is known, and `try_acquire` did not find it
        found = self.loader.placement().find(ref)
        return found is not None and found.slot is not None

    async def _check(self, queue: AdapterQueue) -> None:
        """Ask the source which version the queue's ref means, and give it to its requests."""
        assert queue.ref is not None
        try:
            key, late = await resolve_queue(self.loader, queue, queue.ref)
        except LoraxError as error:
            self.fail(queue, error)
            return
        except Exception as error:  # noqa: BLE001 - the requests raise it
            self.fail(queue, InternalError.caused_by(error, "a look at its version failed"))
            return
        before = queue.predecessor
        if before in self._queues and before.version == key:
            self._remove_late(queue, late)
            self._return_requests(queue, before)
            self._enter_again(late, before)
        else:
            # A key names no digest: it is compared before the first lease.
            ref = key if expected_digest(queue.ref) is None else queue.ref
            handle = self.loader.try_acquire(ref)
            if handle is not None:
                self._give(queue, handle, late)
            else:
                self._add_waiting(queue)  # it asks again when it gets its slot
        self.on_change()

    def _return_requests(self, queue: AdapterQueue, predecessor: AdapterQueue) -> None:
        """Move all requests to the predecessor, whose version they mean too."""
        tickets, queue.tickets = queue.tickets, []
        for ticket in tickets:
            predecessor.add(ticket)
        self._retire(queue)
        self._waiting.update(predecessor)

    @staticmethod
    def _remove_late(queue: AdapterQueue, late: Sequence[Ticket]) -> None:
        """Take out the requests that entered too late for the answer about their version."""
        for ticket in late:
            queue.tickets.remove(ticket)

    def _enter_again(self, late: Sequence[Ticket], queue: AdapterQueue) -> None:
        """Ask anew for requests that were removed from `queue`, or from one that joined it."""
        if late:
            self._open_queue(late, None, queue)

    def _add_waiting(
        self,
        queue: AdapterQueue,
        *,
        needs_file: bool = False,
        failure: tuple[AdapterKey, LoraxError] | None = None,
    ) -> None:
        """Queue it for a slot."""
        self._waiting.add(queue, needs_file=needs_file, failure=failure)
        self._schedule_stall_check()

    # -- slots -------------------------------------------------------------------------------------

    def _granted(self, queue: AdapterQueue, handle: AdapterHandle, late: Sequence[Ticket]) -> None:
        self._waiting.remove(queue)
        self._given = max(0, self._given - 1)
        self._give(queue, handle, late)
        self.on_change()

    def _give(self, queue: AdapterQueue, handle: AdapterHandle, late: Sequence[Ticket]) -> None:
        """Let a queue have its slot, without the requests that entered too late for its version."""
        self._remove_late(queue, late)
        self._adopt(queue, handle)
        self._enter_again(late, queue)

    def _adopt(self, queue: AdapterQueue, handle: AdapterHandle) -> None:
        slot = handle.slot
        queue.handle, queue.place = handle, SlotRef(slot.index, slot.generation)
        queue.version, queue.predecessor = handle.key, None
        queue.may_stream = True
        queue.granted_at = queue.progress_at = self.clock.time()
        queue.yields = False
        queue.quantum = max(ticket.order[1] for ticket in queue.tickets)
        queue.leaving = self.slots.is_leaving(slot)
        queue.arrival = self.slots.adopt(handle)
        self.slot_holders[queue] = None
        self._by_key.setdefault(handle.key, []).append(queue)
        self._reevaluate(queue)
        self._schedule_stall_check()

    def _release(self, queue: AdapterQueue) -> None:
        """Release its slot, if it has one. Idempotent."""
        self.slot_holders.pop(queue, None)
        handle, queue.handle, queue.arrival = queue.handle, None, None
        if handle is None:
            return
        others = self._by_key[handle.key]
        others.remove(queue)
        if not others:
            del self._by_key[handle.key]
        handle.release()
        self._turns.record(self.clock.time() - queue.granted_at)
        self._given += 1
        self._waiting.note_release()

    def _send_back(self, queue: AdapterQueue, *, needs_file: bool = False) -> None:
        """Release its slot for others; queue it for another slot."""
        self._release(queue)
        for ticket in queue.tickets:
            self.on_requeue(ticket)
        self._add_waiting(queue, needs_file=needs_file)

    # -- events ------------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        if event.slot is not None:
            self.slots.record(event, event.slot)
        for queue in tuple(self._by_key.get(event.key, ())):
            if isinstance(event, LayerReady | Resident):
                queue.leaving = queue.leaving and not isinstance(event, Resident)
                self.on_change()
            elif isinstance(event, Failed | Leaving):
                queue.leaving = queue.leaving or isinstance(event, Leaving)
                # The event precedes the change of the slot.
                asyncio.get_running_loop().call_soon(self._reevaluate, queue)

    def _reevaluate(self, queue: AdapterQueue) -> None:
        """Fail it if its weights are bad or the loader is closed; release its slot if leaving."""
        self.check_integrity([queue])
        if queue.handle is None:
            return
        if queue.handle.released:
            self.fail(queue, LoaderClosedError("the loader was closed"))
        elif queue.leaving and queue.tickets and not queue.batch_count:
            self._send_back(queue)

    def reevaluate_all(self) -> None:
        """Apply changes without an event: a wrong digest, a closed loader."""
        for queue in tuple(self.slot_holders):
            self._reevaluate(queue)

    def check_integrity(self, adapter_queues: Iterable[AdapterQueue]) -> None:
        """Fail or reload the adapters whose weights turned out to be bad."""
        for queue in adapter_queues:
            handle = queue.handle
            if handle is None:
                continue
            try:
                handle.require_sound()
            except LoraxError as error:
                if queue.reloaded or not _may_have_changed(queue, handle, error):
                    self.fail(queue, error)
                else:
                    self._reload(queue, error, (handle.key, error))

    def _load_failed(self, queue: AdapterQueue, error: LoraxError) -> None:
        """Fail its requests, but restart those that can be computed with another version."""
        if queue.has_started and any(not ticket.generated for ticket in queue.tickets):
            self._reload(queue, error)
        else:
            self.fail(queue, error)

    def _reload(
        self,
        queue: AdapterQueue,
        error: LoraxError,
        failure: tuple[AdapterKey, LoraxError] | None = None,
    ) -> None:
        """Move its requests to a queue for another version; fail those that have tokens.

        Results of batches in flight no longer count for the moved requests. With `failure`, load
        only if that version's files have changed.
        """
        tickets, queue.tickets = queue.tickets, []
        self._retire(queue)
        again = self._current.get(queue.ref)
        opened = again is None
        if again is None:
            again = AdapterQueue(queue.ref, queue.tokens)
            again.reloaded = True
        for ticket in tickets:
            if ticket.generated:
                self._count_end(ticket)
                ticket.end(error.located(id=queue.id))
                continue
            if ticket.begun:
                self.dropped.append(ticket)
            ticket.position = 0
            self.places.vacate(ticket)
            again.add(ticket)
            self.on_requeue(ticket)
        if not opened:
            self._waiting.update(again)
        elif again.tickets:
            self._queues[again] = None
            self._current[queue.ref] = again
            self._add_waiting(again, failure=failure)
        self.on_change()

    def yield_slot(self) -> None:
        """Preempt an idle slot holder if no request can start and all begun ones wait for slots.

        An adapter that has yielded keeps its next slot for `patience`: the begun requests may not
        be ready to take it.
        """
        holders = [holder for holder in self.slot_holders if holder.handle is not None]
        since = self.clock.time() - self.patience
        candidates = [holder for holder in holders if holder.yielded_at <= since]
        if candidates and not any(holder.begun for holder in holders):
            queue = max(candidates, key=attrgetter("urgency"))
            queue.yielded_at = self.clock.time()
            self._send_back(queue)

    def share_slots(self) -> None:
        """Let adapters yield whose slots overdue requests need, and end the turns that are over."""
        now, patience = self.clock.time(), self._turns.patience
        holders = [holder for holder in self.slot_holders if holder.handle is not None]
        staying = [holder for holder in holders if not holder.leaving]
        overdue = self._waiting.count_overdue(
            lambda ticket: self.fair_times.is_overdue(ticket, now, patience), len(holders)
        )
        missing = overdue - (len(holders) - len(staying)) - self._given
        # Requests that have begun keep their places: without a free one, no other could begin.
        self._turns.share(staying, missing, now, may_interrupt=self.places.free >= 1)
        for holder in staying:
            if not holder.batch_count and (holder.leaving or not holder.has_turn):
                self._send_back(holder)

    # -- slots in which no layers arrive -----------------------------------------------------------

    def _schedule_stall_check(self) -> None:
        """Set the timer at which a slot without new layers is released for waiting adapters."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        due = min((latest for _, latest in self._streaming()), default=None)
        if due is not None and len(self._waiting):
            when = max(due, self._last_stall_check) + self.patience
            self._alarm = self.clock.call_at(when, self._release_stalled)

    def _release_stalled(self) -> None:
        now = self.clock.time()
        for queue, latest in self._streaming():
            if now < latest + self.patience or not len(self._waiting):
                continue
            if queue.batch_count:
                self._last_stall_check = now
                self.on_blocked_slot(queue)
            else:
                self._send_back(queue, needs_file=True)
        self._schedule_stall_check()

    def _streaming(self) -> list[tuple[AdapterQueue, float]]:
        """Return the streaming adapters, each with the time of its latest layer."""
        return [
            (queue, queue.arrival.latest)
            for queue in self.slot_holders
            if queue.arrival is not None and not queue.is_ready
        ]

    # -- the end -----------------------------------------------------------------------------------

    async def close(self, error: LoraxError) -> None:
        """Fail all requests and release all slots, also those of batches in flight."""
        self._unsubscribe()
        if self._alarm is not None:
            self._alarm.cancel()
        for queue in tuple(self._queues):
            self.fail(queue, error)
        for queue in tuple(self.slot_holders):
            self._release(queue)
        if self._checks:
            await asyncio.wait(tuple(self._checks.values()))
        await self._waiting.close()


def _may_have_changed(queue: AdapterQueue, handle: AdapterHandle, error: LoraxError) -> bool:
    """Return whether local files may have been replaced since they were read.

    A key or a digest names one version: a changed file cannot satisfy it.
    """
    local = bool(handle.key.files) and not isinstance(handle.key, RemoteKey)
    fixed_version = (
        isinstance(queue.ref, AdapterKey) or getattr(queue.ref, "digest", None) is not None
    )
    return local and not fixed_version and isinstance(error, IntegrityError)


# -- turns: which adapters give their slots to others, fairly and for few loads --------------------

FAIR_TIMES = 1.25
"""Fair times after which a request is overdue.

The mean wait is about one fair time. If adapters yielded earlier, each load would serve fewer
requests; if later, some requests would wait for more than two.
"""

USUAL_TURNS = 5
"""Usual turns without the end of a request after which an adapter may lose its slot early.

A mean bounds its tail: at most one turn in five lasts as long, however lengths are distributed.
"""

_WEIGHT = 0.1
"""The latest turn's weight in the moving average."""


class FairTimes:
    """Which requests are overdue.

    The fair time of a request is the length of the queue up to it, by urgency, divided by the
    throughput: the time in which as many requests end. It is measured in ended requests, so that it
    needs no estimate. No request is overdue whose age, by urgency, is below `level` seconds.
    """

    def __init__(self, level: float) -> None:
        self._level = level
        self._orders: list[tuple[float, int]] = []
        """Of all requests that are not done, sorted."""
        self._ended = 0
        self._last_end = -inf

    def enter(self, ticket: Ticket) -> None:
        """Add a request, once; set its `overdue_end`."""
        place = bisect_left(self._orders, ticket.order)
        self._orders.insert(place, ticket.order)
        ticket.overdue_end = self._ended + ceil(FAIR_TIMES * (place + 1))

    def leave(self, ticket: Ticket, now: float) -> None:
        """Count the end of a request. No effect if it did not enter."""
        place = bisect_left(self._orders, ticket.order)
        if place < len(self._orders) and self._orders[place] == ticket.order:
            del self._orders[place]
            self._ended += 1
            self._last_end = now

    def is_overdue(self, ticket: Ticket, now: float, patience: float) -> bool:
        """Return whether it has waited for `FAIR_TIMES`.

        It is overdue too if it has waited for `patience` seconds in which no request ended.
        """
        since = ticket.order[0]
        stuck = now - max(since, self._last_end) >= patience
        return stuck or (self._ended >= ticket.overdue_end and now - since >= self._level)


class SlotTurns:
    """The turns of adapters: each keeps its slot from a grant until it gives it to others.

    An adapter with requests keeps its slot until requests of another one are overdue. Then those
    that have had theirs longest yield: only requests begin that were queued when the turn began. A
    turn ends with the last of these, or earlier if none ends for `patience` seconds.
    """

    def __init__(self, level: float) -> None:
        self._level = level
        self._usual = 0.0
        self._ended = 0

    def record(self, seconds: float) -> None:
        """Add a turn that ended."""
        self._ended += 1
        self._usual += max(_WEIGHT, 1 / self._ended) * (seconds - self._usual)

    @property
    def patience(self) -> float:
        """Seconds without the end of a request; a usual turn counts as `level` seconds at least."""
        return USUAL_TURNS * max(self._level, self._usual)

    def share(
        self, holders: Sequence[AdapterQueue], overdue: int, now: float, *, may_interrupt: bool
    ) -> None:
        """Let the first `overdue` of the holders, which are in the order of their grants, yield.

        With `may_interrupt`, those of which no request ends leave at once.
        """
        stuck_since = now - self.patience
        for number, holder in enumerate(holders):
            holder.yields = number < overdue
            stuck = holder.progress_at <= stuck_since
            holder.leaving = may_interrupt and holder.yields and stuck
