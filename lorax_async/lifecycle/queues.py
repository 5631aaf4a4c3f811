"""Rules 7 to 9: queues for slots, copies, held file pages and pinned images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from heapq import heappop, heappush
from typing import Any, Generic, TypeVar

from lorax_async.errors import CapacityError
from lorax_async.lifecycle.adapter_state import AdapterState, HostState, Urgency, WantedTier
from lorax_async.lifecycle.arena import Arena
from lorax_async.lifecycle.commands import CopyGroup, PopulatePages, TakeSlot
from lorax_async.lifecycle.residency import reload_cost
from lorax_async.lifecycle.rules import LifecycleRules
from lorax_async.lifecycle.transitions import SlotMove, SlotState, next_slot_state
from lorax_async.types import AdapterKey, MergedKey

_Order = TypeVar("_Order", bound=tuple[Any, ...])

_SLACK = 64
"""Entries that may be left over before they are looked for."""


class PriorityQueue(Generic[_Order]):
    """Sorted by urgency; of equals, the one whose urgency was told first comes first."""

    __slots__ = ("_entries", "_heap", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[AdapterKey, _Order] = {}
        # Entries of the heap count while they say what `_waiting` says; others are passed over.
        self._heap: list[tuple[_Order, int, AdapterKey]] = []
        self._entries = 0

    def update(self, key: AdapterKey, urgency: _Order | None) -> None:
        """Let `key` wait with this urgency, or no longer (None)."""
        if urgency is None:
            self._waiting.pop(key, None)
        elif self._waiting.get(key) != urgency:
            self._waiting[key] = urgency
            self._entries += 1
            heappush(self._heap, (urgency, self._entries, key))
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
        """Drop what is passed over once it is the most: a head that stays would keep it."""
        if len(self._heap) <= 2 * len(self._waiting) + _SLACK:
            return
        counting: dict[AdapterKey, tuple[_Order, int, AdapterKey]] = {}
        for entry in sorted(self._heap):
            urgency, _, key = entry
            if self._waiting.get(key) == urgency:
                counting.setdefault(key, entry)
        self._heap = list(counting.values())

    def adopt(self, other: PriorityQueue[_Order]) -> None:
        """Become an independent queue in the state of `other`."""
        self._waiting = other._waiting.copy()
        self._heap = other._heap.copy()
        self._entries = other._entries


class SlotHolders:
    """As they were when they were last noted.

    Attributes
    ----------
    pinned
        Whoever asks for room must fit beside them.
    going
        Told to leave, unloaded, or DRAINING.
    spare
        Could be told to leave, and would be gone at once.
    """

    def __init__(self) -> None:
        self.pinned: dict[AdapterKey, AdapterState] = {}
        self.going: dict[AdapterKey, AdapterState] = {}
        self.spare: dict[AdapterKey, AdapterState] = {}
        self._seen: dict[AdapterKey, tuple[SlotState, bool, bool, bool]] = {}

    def note(self, life: AdapterState) -> bool:
        """Look at `life` again; whether anything changed that matters to who waits for a slot."""
        if life.grant is None:
            changed = self._seen.pop(life.key, None) is not None
            for kept in (self.pinned, self.going, self.spare):
                kept.pop(life.key, None)
            return changed
        now = (life.slot, life.departing, life.pins > 0, life.leases > 0)
        if self._seen.get(life.key) == now:
            return False
        self._seen[life.key] = now
        _keep(self.pinned, life, wanted=life.pins > 0)
        _keep(self.going, life, wanted=is_going(life))
        _keep(self.spare, life, wanted=may_go(life) and not life.leases)
        return True


def is_going(life: AdapterState) -> bool:
    return life.departing or life.slot is SlotState.DRAINING


def may_go(life: AdapterState) -> bool:
    return life.slot is SlotState.RESIDENT and not (life.departing or life.pins)


def _keep(kept: dict[AdapterKey, AdapterState], life: AdapterState, *, wanted: bool) -> None:
    if wanted:
        kept[life.key] = life
    else:
        kept.pop(life.key, None)


_LAST: Urgency = (True, float("inf"))
"""What was demoted makes way for every wish."""


class HostTierQueue:
    """Adapters that want the host tier; rule 7. Only the head is served, and one at a time.

    `states` are all adapters by key; `level` is what a level of priority is worth, in seconds.
    """

    def __init__(
        self, rules: LifecycleRules, states: Mapping[AdapterKey, AdapterState], *, level: float
    ) -> None:
        self._rules = rules
        self._budget = rules.host
        self._states = states
        self._level = level
        self.line: PriorityQueue[Urgency] = PriorityQueue()

    def update(self, life: AdapterState) -> None:
        """Let the queue see that `life` has changed."""
        waits = life.wants_host and not self._rules.closing
        named = waits and life.waiters.has_tier(WantedTier.HOST)
        urgency = life.waiters.urgency(self._level) if named else _LAST
        self.line.update(life.key, urgency if waits else None)

    def settle_head(self) -> AdapterState | None:
        """Populate, refuse or make room for the head; returns the adapter that changed, if any."""
        key = self.line.head
        if key is None or self._budget.populating is not None:
            return None
        head = self._states[key]
        assert head.needs is not None
        nbytes = head.needs.held_nbytes
        if nbytes > self._budget.nbytes:
            return self._refuse(head, nbytes)
        if nbytes > self._budget.free:
            return self._make_room(nbytes)
        self._budget.claim(key, nbytes, reload_cost(head.needs))
        head.host = HostState.POPULATING
        self._budget.populating = key
        head.demoted = False
        self._rules.command(PopulatePages(key, head.attempt))
        return head

    def _refuse(self, head: AdapterState, nbytes: int) -> AdapterState:
        head.demoted = False
        waiting = [waiter.id for waiter in head.waiters.of_tiers({WantedTier.HOST})]
        problem = f"it needs {nbytes:,} bytes of a host tier of {self._budget.nbytes:,}"
        error = CapacityError(f"{problem}; raise host_bytes", retryable=False)
        self._rules.fail(head, error, waiting)
        return head

    def _make_room(self, nbytes: int) -> AdapterState | None:
        """Wait for what is being released, else let the next one go."""
        leaving = sum(self._budget.held[key] for key in self._budget.leaving)
        if self._budget.free + leaving >= nbytes:
            return None
        for key in self._budget.policy.ranked():
            life = self._states[key]
            if life.host is HostState.HELD and self._budget.held[key]:
                self._rules.release_host(life, evicted=True)
                return life
        return None


class PinnedImages:
    """Page-locked memory with adapters as they lie on the device, so that a reload reads no file.

    An image is given to whoever is given a slot, and stays when the slot goes.
    """

    def __init__(self, rules: LifecycleRules, states: Mapping[AdapterKey, AdapterState]) -> None:
        self._rules = rules
        self._budget = rules.images
        self._states = states

    def claim(self, life: AdapterState) -> None:
        """An image for `life`, if those that nothing is copied from or to can make room for it."""
        assert life.needs is not None
        if life.image is not None:
            self._budget.policy.use(life.key)
            return
        if not self._budget.arena.nbytes:
            return
        sizes = life.needs.group_nbytes
        staying = [other for other in self._holders() if not _is_idle(other)]
        taken = [extent for other in staying for extent in other.image or ()]
        arena = Arena(self._budget.arena.nbytes, self._budget.alignment)
        if not arena.reserve(taken).can_allocate(sizes):
            return
        while (extents := self._budget.arena.allocate(sizes)) is None:
            oldest = next(other for other in self._holders() if _is_idle(other))
            self._budget.drop(oldest, evicted=True)
            self._rules.touched.append(oldest)
        self._budget.give(life, extents, reload_cost(life.needs))

    def _holders(self) -> list[AdapterState]:
        return [self._states[key] for key in self._budget.policy.ranked()]


def _is_idle(life: AdapterState) -> bool:
    return life.slot is not SlotState.FILLING and not life.copying


_Wish = tuple[AdapterKey, float, bool]

COPIES_AHEAD = 8
"""In flight for each I/O thread: enough that a busy loop does not let the threads run dry."""

IN_FLIGHT_BYTES = 32 << 20
"""Of one adapter; more only where that is less than every thread has at hand."""


class SlotQueue:
    """Adapters that want a slot and hold none. Only the head is served: the larger would starve.

    `states` are all adapters by key; `starvation_age` and `min_residency` as for `Pace`.
    """

    def __init__(
        self,
        rules: LifecycleRules,
        states: dict[AdapterKey, AdapterState],
        images: PinnedImages,
        *,
        starvation_age: float,
        min_residency: float,
    ) -> None:
        self.now = 0.0
        self.line: PriorityQueue[Urgency] = PriorityQueue()
        self._rules = rules
        self._residency = rules.residency
        self._images = images
        self._states = states
        self._starvation_age = starvation_age
        self._min_residency = min_residency
        self.holders = SlotHolders()
        self._no_room: tuple[_Wish, float] | None = None
        """A wish that found none, and when time alone may make some; until a holder changes."""

    def update(self, life: AdapterState) -> None:
        """Let the queue see that `life` has changed."""
        waits = life.slot is SlotState.NONE and life.wants_slot and not self._rules.closing
        urgency = life.waiters.urgency(self._starvation_age) if waits else None
        self.line.update(life.key, urgency)
        if self.holders.note(life):
            self._no_room = None

    def settle_head(self) -> AdapterState | None:
        """Grant, refuse or make room for the head; returns the adapter that changed, if any."""
        head = self._head
        if head is None or head.needs is None:
            return self._take_back()
        if self._waits_still(head):
            return None
        grant = self._residency.claim(head.key, head.needs)
        if grant is not None:
            head.slot = next_slot_state(head.slot, SlotMove.SLOT_GRANTED)
            head.grant = grant
            head.demoted = False
            self._images.claim(head)
            self._rules.host.use(head.key)
            self._rules.command(TakeSlot(head.key, grant, head.waiters.oldest))
            return head
        sizes = head.needs.group_nbytes
        pinned = [life.grant for life in self.holders.pinned.values() if life.grant]
        if not self._residency.fits_beside(pinned, sizes):
            error = self._too_large(sizes, pinned=len(pinned))
            self._rules.fail(head, error, head.waiters.for_slot)
            return head
        victim = self._make_room(head, sizes)
        if victim is None:
            self._no_room = (_pending_load(head), self._next_chance(head))
        return victim

    def _waits_still(self, head: AdapterState) -> bool:
        return (
            self._no_room is not None
            and self._no_room[0] == _pending_load(head)
            and self.now < self._no_room[1]
        )

    def _take_back(self) -> AdapterState | None:
        """Nobody waits for a slot: whoever was told to leave, and is leased, need not."""
        if self._rules.closing:
            return None
        for life in self.holders.going.values():
            if life.leaving and life.leases and life.slot is SlotState.RESIDENT:
                life.leaving = False
                if not life.departing:
                    self._rules.notify_stays(life)
                return life
        return None

    @property
    def next_tick(self) -> float | None:
        """When the head, if it waits, will be past its age, or somebody may be picked for it."""
        head = self._head
        if head is None:
            return None
        waits = self._no_room is not None and self._no_room[0] == _pending_load(head)
        due = self._no_room[1] if self._no_room and waits else self._next_chance(head)
        return due if self.now < due < float("inf") else None

    def _next_chance(self, head: AdapterState) -> float:
        due = [self._starves_at(head)]
        if self._min_residency:
            due += [self._evictable_at(life) for life in self.holders.spare.values()]
        return min((time for time in due if self.now < time), default=float("inf"))

    def _make_room(self, head: AdapterState, sizes: tuple[int, ...]) -> AdapterState | None:
        """Wait for what drains, else pick a victim, in the order of the policy.

        Who is told to go and still leased may take long, or stay: it is waited for, and not
        another one told, only if nobody could go now.
        """
        going = list(self.holders.going.values())
        free_soon = [life.grant for life in going if life.grant and not life.leases]
        if self._residency.fits_after(free_soon, sizes):
            return None
        victim = self._unused()
        if victim is None:
            if self._residency.fits_after([life.grant for life in going if life.grant], sizes):
                return None
            if self.now >= self._starves_at(head):
                victim = next((life for life in self._ranked() if may_go(life)), None)
        if victim is not None:
            self._rules.leave(victim)
        return victim

    @property
    def _head(self) -> AdapterState | None:
        key = self.line.head
        return None if key is None else self._states[key]

    def _ranked(self) -> Iterator[AdapterState]:
        return (self._states[key] for key in self._residency.ranked())

    def _unused(self) -> AdapterState | None:
        """The first that could go now, if any."""
        if not any(self.now >= self._evictable_at(life) for life in self.holders.spare.values()):
            return None
        spare = (life for life in self._ranked() if life.key in self.holders.spare)
        return next((life for life in spare if self.now >= self._evictable_at(life)), None)

    def _evictable_at(self, life: AdapterState) -> float:
        return life.resident_since + self._min_residency

    def _starves_at(self, life: AdapterState) -> float:
        if not life.waiters.has_foreground:
            return float("inf")
        return life.waiters.oldest + self._starvation_age

    def _too_large(self, sizes: tuple[int, ...], *, pinned: int) -> CapacityError:
        beside = f" beside {pinned} pinned adapters" if pinned else ""
        remedy = (
            "unpin some, or raise device_bytes or max_slots" if pinned else "raise device_bytes"
        )
        return CapacityError(
            f"it needs {sum(sizes):,} bytes of a device arena of "
            f"{self._residency.arena.nbytes:,}{beside}; {remedy}",
            retryable=pinned > 0,
        )


def _pending_load(head: AdapterState) -> _Wish:
    return head.key, head.waiters.oldest, head.waiters.has_foreground


class CopyQueue:
    """Adapters with groups that can be copied and are not submitted yet.

    They share the way to the device by bytes (self-clocked fair queueing): each has its turn when
    it would have moved its next group had all moved equally much, so that a large adapter does not
    hold up small ones, and small ones do not starve it. `turn` is how far those have come whose
    copies are done: what is in flight when somebody arrives counts against who moves it.
    """

    def __init__(self, rules: LifecycleRules) -> None:
        self.turn = 0
        self._rules = rules
        self._least = max(1, rules.residency.copies_free // COPIES_AHEAD)
        self._queue: dict[AdapterKey, AdapterState] = {}
        self._line: PriorityQueue[tuple[bool, int, int]] = PriorityQueue()

    def update(self, life: AdapterState) -> None:
        """Let the queue see that `life` has changed."""
        if life.slot is not SlotState.FILLING or not life.fetched & ~life.submitted:
            self._queue.pop(life.key, None)
            self._line.update(life.key, None)
            return
        if life.key not in self._queue:
            life.copy_turn = max(life.copy_turn, self.turn)
            self._queue[life.key] = life
        self._line.update(life.key, _copy_order(life) if self._may_add(life) else None)

    def submit(self) -> None:
        """Submit while there is room: foreground first, then whoever's turn is next."""
        residency = self._rules.residency
        while residency.copies_free and (key := self._line.head) is not None:
            life = self._queue[key]
            group = life.next_copy
            assert life.grant is not None
            life.submitted |= 1 << group
            life.copying += 1
            life.copy_turn += life.grant.extents[group].nbytes
            residency.copies_free -= 1
            image = life.image[group] if life.image is not None else None
            warm = bool(life.imaged >> group & 1)
            self._rules.command(CopyGroup(life.key, life.grant, group, image, warm))
            self.update(life)

    def copied(self, life: AdapterState) -> None:
        """One of the copies of `life` ended."""
        life.copying -= 1
        self._rules.residency.copies_free += 1
        if life.slot is not SlotState.DRAINING and life.needs is not None:
            self.turn = max(self.turn, life.copy_turn - life.copying * life.needs.largest)
            self.update(life)

    def _may_add(self, life: AdapterState) -> bool:
        """Whoever comes next must not find the way full of one adapter's large groups.

        Nor all threads at work on a merge, which is computed as it is copied.
        """
        assert life.needs is not None
        if isinstance(life.key, MergedKey):
            return not life.copying
        return life.copying < max(self._least, IN_FLIGHT_BYTES // life.needs.largest)


def _copy_order(life: AdapterState) -> tuple[bool, int, int]:
    foreground = life.leases > 0 or life.waiters.has_foreground
    if life.grant is None or life.needs is None:
        return (not foreground, 0, 0)
    return (not foreground, life.copy_turn + life.needs.largest, life.grant.slot.generation)
