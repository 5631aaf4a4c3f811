"""Who gets the device's slots, and whose copy goes next: rules 8 and 9."""

from __future__ import annotations

from collections.abc import Iterator

from lorax_async.adapter import AdapterKey, MergedKey
from lorax_async.core.commands import Copy, TakeSlot
from lorax_async.core.decisions import Decisions
from lorax_async.core.holders import Holders, may_go
from lorax_async.core.host_tier import Images
from lorax_async.core.life import Life
from lorax_async.core.line import Line
from lorax_async.core.transitions import SlotMove, SlotState, next_slot_state
from lorax_async.core.waiters import Urgency
from lorax_async.errors import CapacityError

_Wish = tuple[AdapterKey, float, bool]

COPIES_AHEAD = 8
"""In flight for each I/O thread: enough that a busy loop does not let the threads run dry."""

IN_FLIGHT_BYTES = 32 << 20
"""Of one adapter; more only where that is less than every thread has at hand."""


class SlotQueue:
    """Adapters that want a slot and hold none. Only the head is served: the larger would starve.

    `lives` are all adapters by key; `starvation_age` and `min_residency` as for `Pace`.
    """

    def __init__(
        self,
        decisions: Decisions,
        lives: dict[AdapterKey, Life],
        images: Images,
        *,
        starvation_age: float,
        min_residency: float,
    ) -> None:
        self.now = 0.0
        self.line: Line[Urgency] = Line()
        self._decisions = decisions
        self._residency = decisions.residency
        self._images = images
        self._lives = lives
        self._starvation_age = starvation_age
        self._min_residency = min_residency
        self.holders = Holders()
        self._no_room: tuple[_Wish, float] | None = None
        """A wish that found none, and when time alone may make some; until a holder changes."""

    def update(self, life: Life) -> None:
        """Let the queue see that `life` has changed."""
        waits = life.slot is SlotState.NONE and life.wants_slot and not self._decisions.closing
        urgency = life.waiters.urgency(self._starvation_age) if waits else None
        self.line.update(life.key, urgency)
        if self.holders.note(life):
            self._no_room = None

    def settle_head(self) -> Life | None:
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
            self._decisions.host.use(head.key)
            self._decisions.command(TakeSlot(head.key, grant, head.waiters.oldest))
            return head
        sizes = head.needs.group_nbytes
        pinned = [life.grant for life in self.holders.pinned.values() if life.grant]
        if not self._residency.fits_beside(pinned, sizes):
            error = self._too_large(sizes, pinned=len(pinned))
            self._decisions.fail(head, error, head.waiters.for_slot)
            return head
        victim = self._make_room(head, sizes)
        if victim is None:
            self._no_room = (_wish(head), self._next_chance(head))
        return victim

    def _waits_still(self, head: Life) -> bool:
        return (
            self._no_room is not None
            and self._no_room[0] == _wish(head)
            and self.now < self._no_room[1]
        )

    def _take_back(self) -> Life | None:
        """Nobody waits for a slot: whoever was told to leave, and is leased, need not."""
        if self._decisions.closing:
            return None
        for life in self.holders.going.values():
            if life.leaving and life.leases and life.slot is SlotState.RESIDENT:
                life.leaving = False
                if not life.departing:
                    self._decisions.tell_stays(life)
                return life
        return None

    @property
    def next_tick(self) -> float | None:
        """When the head, if it waits, will be past its age, or somebody may be picked for it."""
        head = self._head
        if head is None:
            return None
        waits = self._no_room is not None and self._no_room[0] == _wish(head)
        due = self._no_room[1] if self._no_room and waits else self._next_chance(head)
        return due if self.now < due < float("inf") else None

    def _next_chance(self, head: Life) -> float:
        due = [self._starves_at(head)]
        if self._min_residency:
            due += [self._evictable_at(life) for life in self.holders.spare.values()]
        return min((time for time in due if self.now < time), default=float("inf"))

    def _make_room(self, head: Life, sizes: tuple[int, ...]) -> Life | None:
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
            self._decisions.leave(victim)
        return victim

    @property
    def _head(self) -> Life | None:
        key = self.line.head
        return None if key is None else self._lives[key]

    def _ranked(self) -> Iterator[Life]:
        return (self._lives[key] for key in self._residency.ranked())

    def _unused(self) -> Life | None:
        """The first that could go now, if any."""
        if not any(self.now >= self._evictable_at(life) for life in self.holders.spare.values()):
            return None
        spare = (life for life in self._ranked() if life.key in self.holders.spare)
        return next((life for life in spare if self.now >= self._evictable_at(life)), None)

    def _evictable_at(self, life: Life) -> float:
        return life.resident_since + self._min_residency

    def _starves_at(self, life: Life) -> float:
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


def _wish(head: Life) -> _Wish:
    return head.key, head.waiters.oldest, head.waiters.has_foreground


class CopyQueue:
    """Adapters with groups that can be copied and are not submitted yet.

    They share the way to the device by bytes (self-clocked fair queueing): each has its turn when
    it would have moved its next group had all moved equally much, so that a large adapter does not
    hold up small ones, and small ones do not starve it. `turn` is how far those have come whose
    copies are done: what is in flight when somebody arrives counts against who moves it.
    """

    def __init__(self, decisions: Decisions) -> None:
        self.turn = 0
        self._decisions = decisions
        self._least = max(1, decisions.residency.copies_free // COPIES_AHEAD)
        self._queue: dict[AdapterKey, Life] = {}
        self._line: Line[tuple[bool, int, int]] = Line()

    def update(self, life: Life) -> None:
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
        residency = self._decisions.residency
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
            self._decisions.command(Copy(life.key, life.grant, group, image, warm))
            self.update(life)

    def copied(self, life: Life) -> None:
        """One of the copies of `life` ended."""
        life.copying -= 1
        self._decisions.residency.copies_free += 1
        if life.slot is not SlotState.DRAINING and life.needs is not None:
            self.turn = max(self.turn, life.copy_turn - life.copying * life.needs.largest)
            self.update(life)

    def _may_add(self, life: Life) -> bool:
        """Whoever comes next must not find the way full of one adapter's large groups.

        Nor all threads at work on a merge, which is computed as it is copied.
        """
        assert life.needs is not None
        if isinstance(life.key, MergedKey):
            return not life.copying
        return life.copying < max(self._least, IN_FLIGHT_BYTES // life.needs.largest)


def _copy_order(life: Life) -> tuple[bool, int, int]:
    foreground = life.leases > 0 or life.waiters.has_foreground
    if life.grant is None or life.needs is None:
        return (not foreground, 0, 0)
    return (not foreground, life.copy_turn + life.needs.largest, life.grant.slot.generation)
