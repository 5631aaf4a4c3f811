"""The nine rules, the moves that several of them share, and the queues.

Rules 1 to 7 decide about one adapter; rules 8 and 9 about the heads of the queues for slots and
copies.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Generic, TypeVar

from lorax_async.errors import CapacityError, LoraxError
from lorax_async.lifecycle import commands
from lorax_async.lifecycle.adapter_state import (
    AdapterState,
    FileMove,
    FileState,
    HostState,
    SlotMove,
    SlotState,
    Urgency,
    WantedTier,
    next_file_state,
    next_slot_state,
)
from lorax_async.lifecycle.arena import Arena
from lorax_async.lifecycle.commands import Command, CopyGroups, PopulatePages, TakeSlot
from lorax_async.lifecycle.policies import EvictionPolicy
from lorax_async.lifecycle.residency import ImageBudget, Residency, reload_cost
from lorax_async.types import AdapterKey


class LifecycleRules:
    """Apply rules 1 to 7 to one adapter and collect the commands.

    `states` are those of all adapters. `touched` holds others that lost memory to this one and must
    be settled too.
    """

    def __init__(self, residency: Residency, host: EvictionPolicy, images: ImageBudget) -> None:
        self.residency = residency
        self.host = host
        self.images = images
        self.closing = False
        self.states: dict[AdapterKey, AdapterState] = {}
        self.touched: list[AdapterState] = []
        self._commands: list[Command] = []

    def command(self, command: Command) -> None:
        self._commands.append(command)

    def take_commands(self) -> list[Command]:
        taken, self._commands = self._commands, []
        return taken

    def settle(self, state: AdapterState) -> None:
        """Apply rules 1 to 7 until none changes the state. Each rule returns whether it did."""
        while (
            self._serve(state)
            or self._drain_unwanted_slot(state)
            or self._evict(state)
            or self._free_quiesced_slot(state)
            or self._drop_unwanted_host(state)
            or self._finish_unload(state)
            or self._cancel_unwanted_fetch(state)
            or self.free_quiesced_file(state)
            or self._fetch(state)
            or self._populate(state)
        ):
            pass

    def has_reached(self, state: AdapterState, tier: WantedTier) -> bool:
        if tier >= WantedTier.STREAM and (state.departing or self.closing):
            return False
        if state.slot is SlotState.RESIDENT:
            return True
        if tier is WantedTier.STREAM:
            return state.slot is SlotState.FILLING
        if tier is WantedTier.DEVICE or state.file is not FileState.PRESENT:
            return False
        return tier is WantedTier.DISK or state.in_host

    def _serve(self, state: AdapterState) -> bool:
        """Rule 1. Serve waiters whose tier is reached; a foreground one for a slot gets a lease."""
        tiers = {tier for tier, _ in state.waiters.kinds if self.has_reached(state, tier)}
        served = state.waiters.of_tiers(tiers) if tiers else []
        for waiter in served:
            state.waiters.remove(waiter.id)
            leases = waiter.tier >= WantedTier.STREAM and waiter.foreground
            state.leases += leases
            grant = state.grant if leases else None
            self.command(commands.ServeWaiter(state.key, waiter.id, grant))
        return bool(served)

    def touch(self, state: AdapterState) -> None:
        """Count a use of the slot, and of the host copies behind it."""
        self.residency.policy.use(state.key)
        if state.is_held:
            self.host.use(state.key)
        if state.image is not None:
            self.images.policy.use(state.key)

    def _drain_unwanted_slot(self, state: AdapterState) -> bool:
        """Rule 2. Drain a slot that is filling without lease or waiter."""
        if state.slot is not SlotState.FILLING or state.leases:
            return False
        if state.wants_slot and not state.departing:
            return False
        self.drain(state, next_slot_state(state.slot, SlotMove.UNWANTED))
        return True

    def _evict(self, state: AdapterState) -> bool:
        """Rule 3. Drain a slot marked `leaving` by rule 8; keep the adapter in host memory."""
        if state.slot is not SlotState.RESIDENT or state.leases or state.pins:
            return False
        if not (state.departing or self.closing):
            return False
        holdable = state.needs is not None and state.needs.holdable
        near = state.has_whole_image or state.host is not HostState.NONE
        if holdable and not (near or state.unloads or self.closing):
            state.host = HostState.WANTED
        self.drain(state, next_slot_state(state.slot, SlotMove.EVICTED))
        return True

    def _free_quiesced_slot(self, state: AdapterState) -> bool:
        """Rule 4. Free a drained slot. Its column is cleared before the slot can be granted again.

        Zero a broken slot first, but not while a kernel may be reading it.
        """
        if state.slot is not SlotState.DRAINING or state.grant is None:
            return False
        if state.copying or state.uses or state.leases:
            return False
        if state.broken:
            if not state.wiping:
                state.wiping = True
                self.command(commands.WipeExtents(state.key, state.grant))
            return False
        state.slot = next_slot_state(state.slot, SlotMove.QUIESCED)
        self.command(commands.ClearColumn(state.key, state.grant))
        self.residency.release(state.key, state.grant, evicted=state.leaving)
        state.vacate()
        return True

    def _drop_unwanted_host(self, state: AdapterState) -> bool:
        """Rule 7, second half. Release host memory that must go regardless of waiters."""
        unloaded = state.unloads > 0 and state.slot is SlotState.NONE
        gone = unloaded or self.closing or state.file is FileState.ENDING
        if not gone:
            return False
        if state.image is not None and not state.copying and state.slot is not SlotState.FILLING:
            self.images.drop(state)
        if state.host in (HostState.NONE, HostState.RELEASING):
            return False
        if state.host is HostState.POPULATING or state.is_held:
            self.release_host(state)
        else:
            state.host = HostState.NONE  # wanted, or only read ahead: there is nothing to release
        return True

    def release_host(self, state: AdapterState) -> None:
        state.host = HostState.RELEASING
        self.command(commands.ReleasePages(state.key, state.attempt))

    def _finish_unload(self, state: AdapterState) -> bool:
        """Finish an unload once nothing is left in memory. Waiters may then claim again."""
        if not state.unloads or state.slot is not SlotState.NONE:
            return False
        if state.host is not HostState.NONE or state.image is not None:
            return False
        state.unloads = 0
        self.command(commands.NotifyUnloaded(state.key))
        return True

    def _cancel_unwanted_fetch(self, state: AdapterState) -> bool:
        """Rule 5. Cancel a fetch without interest, unless all its spans have arrived.

        A complete one must finish verifying, because its bytes may be leased.
        """
        if state.file is not FileState.FETCHING or state.has_interest:
            return False
        if state.has_arrived:
            return False
        state.file = next_file_state(state.file, FileMove.UNWANTED)
        self.command(commands.CancelFetch(state.key, state.attempt))
        return True

    def free_quiesced_file(self, state: AdapterState) -> bool:
        """Rule 4. Free the state of a file that is ENDING, once no work uses it."""
        if state.file is not FileState.ENDING:
            return False
        if state.fetch_running or state.copying or state.host is not HostState.NONE:
            return False
        self.images.drop(state)
        state.file = next_file_state(state.file, FileMove.QUIESCED)
        state.needs = None
        state.fetched = 0
        return True

    def _fetch(self, state: AdapterState) -> bool:
        """Rule 6. Start a fetch for a waiter."""
        if state.file is not FileState.ABSENT or not state.waiters or self.closing:
            return False
        if state.slot is SlotState.RESIDENT:
            return False
        state.file = next_file_state(state.file, FileMove.FETCH)
        state.attempt += 1
        state.fetch_running = True
        self.command(commands.StartFetch(state.key, state.attempt))
        return True

    def _populate(self, state: AdapterState) -> bool:
        """Rule 7, first half. Give a file that a waiter or demotion wants to the host tier."""
        if state.file is not FileState.PRESENT or state.unloads or self.closing:
            return False
        demoted = state.host is HostState.WANTED
        asked = state.host is HostState.NONE and state.waiters.has_tier(WantedTier.HOST)
        if not (demoted or asked):
            return False
        state.host = HostState.POPULATING
        self.command(PopulatePages(state.key, state.attempt, demoted))
        return True

    def fail(
        self, state: AdapterState, error: LoraxError, waiters: list[int] | None = None
    ) -> None:
        failed = tuple([w.id for w in state.waiters] if waiters is None else waiters)
        for waiter in failed:
            state.waiters.remove(waiter)
        if failed:
            self.command(commands.FailWaiters(state.key, failed, error))

    def leave(self, state: AdapterState) -> None:
        """Mark a slot for eviction: it takes no new lease and ends with its last one."""
        state.leaving = True
        self.notify_leaving(state)

    def notify_leaving(self, state: AdapterState) -> None:
        if state.grant is not None and not state.leave_notified:
            state.leave_notified = True
            self.command(commands.NotifyLeaving(state.key, state.grant))

    def notify_stays(self, state: AdapterState) -> None:
        """Take back `notify_leaving`: neither eviction nor an unload asks for the slot."""
        if self.closing or state.slot not in (SlotState.FILLING, SlotState.RESIDENT):
            return
        if state.grant is not None and state.leave_notified:
            state.leave_notified = False
            self.command(commands.NotifyStays(state.key, state.grant))

    def drain(self, state: AdapterState, slot_state: SlotState) -> None:
        self.notify_leaving(state)
        state.slot = slot_state
        state.pins = 0

    def notify_broken(self, state: AdapterState, error: LoraxError) -> None:
        assert state.grant is not None
        state.broken = True
        self.command(commands.BreakSlot(state.key, state.grant, error))

    def break_slot(
        self, state: AdapterState, error: LoraxError, states: tuple[SlotState, ...]
    ) -> None:
        if state.slot in states:
            self.notify_broken(state, error)
            self.drain(state, next_slot_state(state.slot, SlotMove.FILE_FAILED))

    def reject_fetched(self, state: AdapterState, error: LoraxError) -> None:
        """Discard the bytes of a fetch that failed: none may be used or kept."""
        self.fail(state, error)
        if state.slot is SlotState.DRAINING:
            state.broken = True  # not leased any more, but its bytes are still there
        self.break_slot(state, error, (SlotState.FILLING, SlotState.RESIDENT))

    def lose(self, state: AdapterState, error: LoraxError) -> None:
        was_present = state.file is FileState.PRESENT
        state.file = next_file_state(state.file, FileMove.LOST)
        if was_present:
            self.fail(state, error)
            self.break_slot(state, error, (SlotState.FILLING,))


_Order = TypeVar("_Order", bound=tuple[Any, ...])

_SLACK = 64
"""Stale heap entries to tolerate before a sweep."""


class PriorityQueue(Generic[_Order]):
    """Adapters by urgency; of equal ones, the first to be updated comes first."""

    def __init__(self) -> None:
        self._waiting: dict[AdapterKey, _Order] = {}
        # A heap entry is valid while `_waiting` has the same urgency; others are skipped.
        self._heap: list[tuple[_Order, int, AdapterKey]] = []
        self._entries = 0

    def update(self, key: AdapterKey, urgency: _Order | None) -> None:
        """Set the urgency of `key`; None removes it."""
        if urgency is None:
            self._waiting.pop(key, None)
        elif self._waiting.get(key) != urgency:
            self._waiting[key] = urgency
            self._entries += 1
            heappush(self._heap, (urgency, self._entries, key))
            if len(self._heap) > 2 * len(self._waiting) + _SLACK:
                self._sweep()

    @property
    def head(self) -> AdapterKey | None:
        while self._heap:
            urgency, _, key = self._heap[0]
            if self._waiting.get(key) == urgency:
                return key
            heappop(self._heap)
        return None

    def _sweep(self) -> None:
        """Drop stale entries once they dominate: behind a head that stays, none is popped."""
        counting: dict[AdapterKey, tuple[_Order, int, AdapterKey]] = {}
        for entry in sorted(self._heap):
            if self._waiting.get(entry[2]) == entry[0]:
                counting.setdefault(entry[2], entry)
        self._heap = list(counting.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleTimes:
    """The time limits and memory limit of decisions.

    A foreground waiter that is `starvation_age` seconds old, and preempts, stops new leases on a
    resident adapter; one level of priority counts as this many seconds of waiting. A resident
    adapter is not evicted for `min_residency` seconds, unless a waiter starves. `max_idle` idle
    adapters are remembered.
    """

    starvation_age: float = 5.0
    min_residency: float = 0.0
    max_idle: int = 16_384


class SlotHolders:
    """Slot holders by what matters for making room, as of their last update."""

    def __init__(self) -> None:
        self.pinned: dict[AdapterKey, AdapterState] = {}
        self.leaving: dict[AdapterKey, AdapterState] = {}
        """Marked for eviction, being unloaded, or DRAINING."""
        self.evictable: dict[AdapterKey, AdapterState] = {}
        """Can be evicted at once: RESIDENT, without a lease or pin."""
        self._seen: dict[AdapterKey, tuple[SlotState, bool, bool]] = {}

    def update(self, state: AdapterState) -> bool:
        """Classify `state` again. Return whether a waiting adapter may now get a slot."""
        if state.grant is None:
            changed = self._seen.pop(state.key, None) is not None
            for kept in (self.pinned, self.leaving, self.evictable):
                kept.pop(state.key, None)
            return changed
        now = (state.slot, state.departing, state.pins > 0)
        evictable = is_evictable(state) and not state.leases
        if self._seen.get(state.key) == now:
            if evictable == (state.key in self.evictable):
                return False
        else:
            self._seen[state.key] = now
            _set_member(self.pinned, state, wanted=state.pins > 0)
            leaving = state.departing or state.slot is SlotState.DRAINING
            _set_member(self.leaving, state, wanted=leaving)
        _set_member(self.evictable, state, wanted=evictable)
        return True


def is_evictable(state: AdapterState) -> bool:
    return state.slot is SlotState.RESIDENT and not (state.departing or state.pins)


def _set_member(kept: dict[AdapterKey, AdapterState], state: AdapterState, *, wanted: bool) -> None:
    if wanted:
        kept[state.key] = state
    else:
        kept.pop(state.key, None)


class PinnedImages:
    """Adapters in pinned memory, in the device's format, so that a reload reads no file.

    An image is claimed with a slot and outlives it.
    """

    def __init__(self, rules: LifecycleRules) -> None:
        self._rules = rules
        self._budget = rules.images

    def claim(self, state: AdapterState) -> None:
        """Claim an image for `state` if evicting idle images makes room for it."""
        assert state.needs is not None
        if state.image is not None:
            self._budget.policy.use(state.key)
            return
        if not self._budget.arena.nbytes:
            return
        sizes = state.needs.group_nbytes
        staying = [other for other in self._holders() if not _is_idle(other)]
        taken = [extent for other in staying for extent in other.image or ()]
        arena = Arena(self._budget.arena.nbytes, self._budget.alignment)
        if not arena.reserve(taken).can_allocate(sizes):
            return
        while (extents := self._budget.arena.allocate(sizes)) is None:
            oldest = next(other for other in self._holders() if _is_idle(other))
            self._budget.drop(oldest, evicted=True)
            self._rules.touched.append(oldest)
        self._budget.assign(state, extents, reload_cost(state.needs))

    def _holders(self) -> list[AdapterState]:
        return [self._rules.states[key] for key in self._budget.policy.ranked()]


def _is_idle(state: AdapterState) -> bool:
    return state.slot is not SlotState.FILLING and not state.copying


_HeadIdentity = tuple[AdapterKey, float, bool, float]

COPIES_AHEAD = 16
"""Runs in flight per I/O thread: enough to keep the threads busy while the loop is not."""

IN_FLIGHT_BYTES = 32 << 20
"""Bytes that one adapter may have in flight; at least one run per I/O thread is allowed."""

FAST_IN_FLIGHT_BYTES = 128 << 20
"""The same for an adapter in memory, whole if it can be: the threads would outrun the loop.

All together may have as many. A prefetch waits while they have `IN_FLIGHT_BYTES`: a load that comes
then may have to wait for them.
"""

RUN_BYTES = 16 << 20
"""Bytes of a run of groups, which one thread copies: two to four milliseconds from memory."""


class SlotQueue:
    """Rule 8: the adapters that want a slot. Only the head is served, so large ones get room."""

    def __init__(self, rules: LifecycleRules, times: LifecycleTimes) -> None:
        self.now = 0.0
        self.queue: PriorityQueue[Urgency] = PriorityQueue()
        self._rules = rules
        self._residency = rules.residency
        self._images = PinnedImages(rules)
        self._states = rules.states
        self._times = times
        self.holders = SlotHolders()
        self._blocked: tuple[_HeadIdentity, float] | None = None
        """A head without room, and when time by itself may make some. Reset if a holder changes."""

    def update(self, state: AdapterState) -> None:
        waits = state.slot is SlotState.NONE and state.wants_slot and not self._rules.closing
        urgency = state.waiters.urgency(self._times.starvation_age) if waits else None
        self.queue.update(state.key, urgency)
        if self.holders.update(state):
            self._blocked = None

    def lease_began(self, state: AdapterState) -> None:
        """Update the holders after a lease on a resident adapter, which changed nothing else."""
        self.holders.evictable.pop(state.key, None)

    def last_lease_ended(self, state: AdapterState) -> None:
        """Update the holders after the last lease on one that stays; none waits for a slot."""
        if not state.pins:
            self.holders.evictable[state.key] = state
            self._blocked = None  # the adapter that was may come back

    def settle_head(self) -> AdapterState | None:
        """Grant, refuse or make room for the head. Return the adapter that changed, if any."""
        head = self._head
        if head is None or head.needs is None:
            return self._cancel_eviction()
        due = self._blocked_until(head)
        if due is not None and self.now < due:
            return None
        grant = self._residency.claim(head.key, head.needs)
        if grant is not None:
            head.slot = next_slot_state(head.slot, SlotMove.SLOT_GRANTED)
            head.grant = grant
            if head.host is HostState.WANTED:
                head.host = HostState.NONE
            elif head.is_held:
                self._rules.host.use(head.key)
            self._images.claim(head)
            self._rules.command(TakeSlot(head.key, grant, head.waiters.oldest))
            return head
        sizes = head.needs.group_nbytes
        staying = [state.grant for state in self._staying(head) if state.grant]
        if not self._residency.fits_beside(staying, sizes):
            error = self._no_room_error(sizes, len(self.holders.pinned), len(staying))
            self._rules.fail(head, error, head.waiters.slot_waiter_ids)
            return head
        victim = self._make_room(head, sizes)
        if victim is None:
            self._blocked = (_head_identity(head), self._next_attempt_at(head))
        return victim

    def _blocked_until(self, head: AdapterState) -> float | None:
        blocked = self._blocked
        return blocked[1] if blocked and blocked[0] == _head_identity(head) else None

    def _cancel_eviction(self) -> AdapterState | None:
        """Keep a leased adapter that is leaving, as no adapter waits for its slot."""
        if self._rules.closing:
            return None
        for state in self.holders.leaving.values():
            if state.leaving and state.leases and state.slot is SlotState.RESIDENT:
                state.leaving = False
                if not state.departing:
                    self._rules.notify_stays(state)
                return state
        return None

    @property
    def next_tick(self) -> float | None:
        """When the head will starve, or another holder becomes evictable; None if never."""
        head = self._head
        if head is None:
            return None
        due = self._blocked_until(head)
        if due is None:
            due = self._next_attempt_at(head)
        return due if self.now < due < float("inf") else None

    def _next_attempt_at(self, head: AdapterState) -> float:
        due = [self._starves_at(head)]
        if self._times.min_residency:
            due += [self._evictable_at(state) for state in self.holders.evictable.values()]
        return min((time for time in due if self.now < time), default=float("inf"))

    def _make_room(self, head: AdapterState, sizes: tuple[int, ...]) -> AdapterState | None:
        """Wait for draining slots if they suffice, else pick a victim in the policy's order.

        A leaving adapter with leases may take long, or stay. Rely on it only if no holder can be
        evicted at once.
        """
        going = list(self.holders.leaving.values())
        free_soon = [state.grant for state in going if state.grant and not state.leases]
        if self._residency.fits_after(free_soon, sizes):
            return None
        victim = self._first_evictable(head)
        if victim is None:
            if self._residency.fits_after([state.grant for state in going if state.grant], sizes):
                return None
            if self.now >= self._starves_at(head):
                victim = next(filter(is_evictable, self._holders_ranked()), None)
        if victim is not None:
            self._rules.leave(victim)
        return victim

    @property
    def _head(self) -> AdapterState | None:
        key = self.queue.head
        return None if key is None else self._states[key]

    def _holders_ranked(self) -> Iterator[AdapterState]:
        return (self._states[key] for key in self._residency.policy.ranked())

    def _staying(self, head: AdapterState) -> Collection[AdapterState]:
        """Return the holders that do not make room for `head`: pinned, or of its prefetch."""
        spared = head.waiters.spared
        if not spared:
            return self.holders.pinned.values()
        siblings = {key: self._states[key] for key in spared if key in self._states}
        return (siblings | self.holders.pinned).values()

    def _first_evictable(self, head: AdapterState) -> AdapterState | None:
        """Return the first of the ranking that can be evicted for `head` now, if any."""
        spared = head.waiters.spared
        return next((each for each in self._evictable_ranked() if each.key not in spared), None)

    def _evictable_ranked(self) -> Iterator[AdapterState]:
        evictable = self.holders.evictable
        if any(self.now >= self._evictable_at(state) for state in evictable.values()):
            for state in self._holders_ranked():
                if state.key in evictable and self.now >= self._evictable_at(state):
                    yield state

    def _evictable_at(self, state: AdapterState) -> float:
        return state.resident_since + self._times.min_residency

    def _starves_at(self, state: AdapterState) -> float:
        return state.waiters.oldest_preempting + self._times.starvation_age

    def _no_room_error(self, sizes: tuple[int, ...], pinned: int, staying: int) -> CapacityError:
        """Return the error of an adapter that does not fit, or not beside those that stay."""
        arena, slots = self._residency.arena, self._residency.max_slots
        need = f"it needs {sum(sizes):,} bytes of a device arena of {arena.nbytes:,}"
        if not arena.can_hold(sizes):
            return CapacityError(f"{need}; raise device_bytes", retryable=False)
        if staying > pinned:
            return CapacityError(f"{need}, which has no room beside the others of its prefetch")
        if pinned == slots:
            full = "the only slot is" if slots == 1 else f"all {slots} slots are"
            return CapacityError(f"{full} pinned; unpin an adapter, or raise max_slots")
        adapters = "1 pinned adapter" if pinned == 1 else f"{pinned} pinned adapters"
        return CapacityError(
            f"{need}, which has no room beside {adapters}; unpin some, or raise device_bytes"
        )


def _head_identity(head: AdapterState) -> _HeadIdentity:
    waiters = head.waiters
    return head.key, waiters.oldest, bool(waiters.foreground), waiters.oldest_preempting


class CopyQueue:
    """Rule 9: the adapters with groups that can be copied and are not submitted.

    They share the bandwidth to the device by bytes (self-clocked fair queueing), so that a large
    adapter does not delay small ones, and small ones do not starve it. `virtual_time` follows the
    copies that are done: bytes in flight when an adapter arrives count against their owner.
    """

    def __init__(self, rules: LifecycleRules) -> None:
        self.virtual_time = 0
        self._last_tag = 0
        """The greatest tag of a run."""
        self._rules = rules
        self._threads = max(1, rules.residency.copies // COPIES_AHEAD)
        self._copying = self._copying_bytes = 0
        self._in_flight: dict[AdapterKey, AdapterState] = {}
        """The adapters with runs in flight."""
        self._foreground: dict[AdapterKey, bool] = {}
        """Whether each adapter with copies to submit was in the foreground at its last update."""
        self._queue: PriorityQueue[tuple[bool, int, int]] = PriorityQueue()

    def update(self, state: AdapterState) -> None:
        if state.slot is not SlotState.FILLING or not state.fetched & ~state.submitted:
            self._foreground.pop(state.key, None)
            self._queue.update(state.key, None)
            return
        foreground = _is_foreground(state)
        if self._foreground.get(state.key) != foreground:
            # It arrives, or a load joins the prefetch: no credit for the time before.
            state.service_tag = max(state.service_tag, self.virtual_time)
            self._foreground[state.key] = foreground
        self._queue.update(state.key, _copy_order(state) if self._may_submit(state) else None)

    def submit(self) -> None:
        """Submit copies while there is room: foreground first, then the least finish tag."""
        while (key := self._queue.head) is not None:
            state = self._rules.states[key]
            if not self._has_room(state):
                return
            groups = self._next_run(state)
            assert state.grant is not None
            nbytes = sum([state.grant.extents[group].nbytes for group in groups])
            for group in groups:
                state.submitted |= 1 << group
            state.copying += 1
            state.copying_bytes += nbytes
            state.service_tag += nbytes
            if state.copying == 1:
                self._in_flight[key] = state
            self._copying += 1
            self._copying_bytes += nbytes
            image = state.image[groups[0]] if state.image is not None else None
            warm = bool(state.imaged >> groups[0] & 1)
            tag = state.service_tag
            if not _is_foreground(state):  # no thread takes it before a load's that waits
                tag = max(tag, self._last_tag)
            self._last_tag = max(tag, self._last_tag)
            self._rules.command(CopyGroups(key, state.grant, groups, nbytes, tag, image, warm))
            self.update(state)

    def _has_room(self, state: AdapterState) -> bool:
        """Return whether another run may be in flight: `state` has to wait for its share only."""
        if self._copying >= self._rules.residency.copies:
            return False
        if _is_foreground(state):
            most, waits = FAST_IN_FLIGHT_BYTES, not state.copying
        else:
            most, waits = IN_FLIGHT_BYTES, False
            # Beside loads it may only use a thread that has nothing to do.
            loads = filter(_is_foreground, self._in_flight.values())
            if sum(load.copying for load in loads) >= self._threads:
                return False
        return waits or self._copying_bytes < most or self._copying < self._threads

    def _next_run(self, state: AdapterState) -> tuple[int, ...]:
        """Return the next groups for one thread; the last runs are short, so that none is idle.

        Return a single group if callers wait for each, if it has an image, or if it is read from a
        disk, which is fastest if the threads read close to each other.
        """
        if state.image is not None or not state.is_fast or state.streams:
            return state.next_copies(1, 0)
        left = (state.all_groups & ~state.submitted).bit_count()
        limit = _limit(state)
        room = min(self._rules.residency.run_bytes, limit // self._threads)
        room = min(room, limit - state.copying_bytes)
        return state.next_copies(max(1, left // self._threads), room)

    def copied(self, state: AdapterState, *copies: CopyGroups) -> None:
        """Record the end of runs of `state`."""
        nbytes = sum([copy.nbytes for copy in copies])
        state.copying -= len(copies)
        state.copying_bytes -= nbytes
        self._copying -= len(copies)
        self._copying_bytes -= nbytes
        if not state.copying:
            del self._in_flight[state.key]
        # Also of one that was cancelled: a series of them would hold up those that came before.
        self.virtual_time = max(self.virtual_time, state.service_tag - state.copying_bytes)
        if state.slot is not SlotState.DRAINING and state.needs is not None:
            self.update(state)

    def _may_submit(self, state: AdapterState) -> bool:
        """Return whether `state` may have another run in flight.

        One adapter's large groups must not delay the next one's.
        """
        assert state.needs is not None
        fits = state.copying_bytes + state.needs.largest <= _limit(state)
        return fits or state.copying < self._threads


def _is_foreground(state: AdapterState) -> bool:
    return state.leases > 0 or bool(state.waiters.foreground)


def _limit(state: AdapterState) -> int:
    """Return the bytes that the adapter may have in flight."""
    whole = state.is_fast and _is_foreground(state)
    return FAST_IN_FLIGHT_BYTES if whole else IN_FLIGHT_BYTES


def _copy_order(state: AdapterState) -> tuple[bool, int, int]:
    assert state.grant is not None
    assert state.needs is not None
    finish_tag = state.service_tag + state.needs.largest
    return not _is_foreground(state), finish_tag, state.grant.slot.generation
