"""Who gets the device's slots, and whose copy goes next: rules 8 and 9."""

from __future__ import annotations

from heapq import heappop, heappush

from lorax_async.adapter import AdapterKey
from lorax_async.core.decisions import Decisions
from lorax_async.core.life import Copy, Life, TakeSlot
from lorax_async.core.transitions import SlotMove, SlotState, next_slot_state
from lorax_async.core.waiters import Urgency
from lorax_async.errors import CapacityError


class SlotQueue:
    """Adapters that want a slot and hold none. Only the head is served: the larger would starve.

    `lives` are all adapters by key; `starvation_age` as for `Lifecycle`.
    """

    def __init__(
        self, decisions: Decisions, lives: dict[AdapterKey, Life], starvation_age: float
    ) -> None:
        self.now = 0.0
        self._decisions = decisions
        self._residency = decisions.residency
        self._lives = lives
        self._starvation_age = starvation_age
        self._waiting: dict[AdapterKey, Urgency] = {}
        # Entries of the heap count while they say what `_waiting` says; others are passed over.
        self._heap: list[tuple[Urgency, int, AdapterKey]] = []
        self._entries = 0

    def update(self, life: Life) -> None:
        """Let the queue see that `life` has changed."""
        waits = life.slot is SlotState.NONE and life.wants_slot and not self._decisions.closing
        if not waits:
            self._waiting.pop(life.key, None)
            return
        urgency = life.waiters.urgency
        if self._waiting.get(life.key) != urgency:
            self._waiting[life.key] = urgency
            self._entries += 1
            heappush(self._heap, (urgency, self._entries, life.key))

    def settle_head(self) -> Life | None:
        """Grant, refuse or make room for the head; returns the adapter that changed, if any."""
        head = self._head()
        if head is None or head.needs is None:
            return None
        sizes = head.needs.group_nbytes
        grant = self._residency.claim(head.key, sizes)
        if grant is not None:
            head.slot = next_slot_state(head.slot, SlotMove.SLOT_GRANTED)
            head.grant = grant
            self._decisions.command(TakeSlot(head.key, grant, head.waiters.urgency[2]))
            return head
        if not self._residency.fits_empty(sizes):
            self._decisions.fail(head, self._too_large(sizes), head.waiters.for_slot)
            return head
        return self._make_room(head, sizes)

    @property
    def next_tick(self) -> float | None:
        """When the head, if it waits, will be past its age."""
        head = self._head()
        if head is None:
            return None
        due = self._starves_at(head)
        return due if self.now < due < float("inf") else None

    def _make_room(self, head: Life, sizes: tuple[int, ...]) -> Life | None:
        """Wait for what drains, else pick a victim: the least recently used goes first."""
        holders = [self._lives[key] for key in self._residency.least_recent()]
        departing = [life.grant for life in holders if life.leaving and life.grant]
        if self._residency.fits_after(departing, sizes):
            return None
        residents = [
            life for life in holders if life.slot is SlotState.RESIDENT and not life.leaving
        ]
        victim = next((life for life in residents if not life.leases), None)
        if victim is None and residents and self.now >= self._starves_at(head):
            victim = residents[0]
        if victim is not None:
            self._decisions.leave(victim)
        return victim

    def _head(self) -> Life | None:
        while self._heap:
            urgency, _, key = self._heap[0]
            if self._waiting.get(key) == urgency:
                return self._lives[key]
            heappop(self._heap)
        return None

    def _starves_at(self, life: Life) -> float:
        background, _, since = life.waiters.urgency
        return float("inf") if background else since + self._starvation_age

    def _too_large(self, sizes: tuple[int, ...]) -> CapacityError:
        return CapacityError(
            f"it needs {sum(sizes):,} bytes of a device arena of "
            f"{self._residency.arena.nbytes:,}; raise device_bytes",
            retryable=False,
        )


class CopyQueue:
    """Adapters with groups that can be copied and are not submitted yet."""

    def __init__(self, decisions: Decisions) -> None:
        self._decisions = decisions
        self._queue: dict[AdapterKey, Life] = {}

    def update(self, life: Life) -> None:
        """Let the queue see that `life` has changed."""
        if life.slot is SlotState.FILLING and len(life.fetched) > len(life.submitted):
            self._queue.setdefault(life.key, life)
        else:
            self._queue.pop(life.key, None)

    def submit(self) -> None:
        """Submit while there is room: foreground first, then whoever has the fewest submitted,
        so that every adapter's first layers come soon.
        """
        residency = self._decisions.residency
        while self._queue and residency.copies_free:
            life = min(self._queue.values(), key=_copy_order)
            group = life.next_copy
            assert life.grant is not None
            life.submitted.add(group)
            life.copying += 1
            residency.copies_free -= 1
            self._decisions.command(Copy(life.key, life.grant, group))
            self.update(life)


def _copy_order(life: Life) -> tuple[bool, int, int]:
    foreground = life.leases > 0 or life.waiters.has_foreground
    generation = life.grant.slot.generation if life.grant else 0
    return (not foreground, len(life.submitted), generation)
