"""Decides everything about adapters: outcomes and wishes go in, commands come out.

Each public method takes one outcome or one change of interest, takes every decision
that follows from it (rules 1 to 9 of docs/architecture.md), and returns the commands in the order
in which the driver must carry them out. Nothing here waits, reads a clock or touches a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar

from lorax_async.errors import LoraxError, Stage
from lorax_async.lifecycle.adapter_state import (
    AdapterState,
    GroupSizes,
    HostState,
    SlotGrant,
    Waiter,
    WantedTier,
)
from lorax_async.lifecycle.commands import Command, DropFile, ForgetAdapter, NotifyReady
from lorax_async.lifecycle.queues import CopyQueue, HostTierQueue, PinnedImages, SlotQueue
from lorax_async.lifecycle.residency import HostBudget, ImageBudget, Residency
from lorax_async.lifecycle.rules import LifecycleRules
from lorax_async.lifecycle.transitions import (
    FileMove,
    FileState,
    SlotMove,
    SlotState,
    next_file_state,
    next_slot_state,
)
from lorax_async.types import AdapterKey

_T = TypeVar("_T")


def non_reentrant(owner: type[_T]) -> type[_T]:
    """Let `deciding` be true while a public method of an object runs.

    The interpreter may run a finalizer at any allocation: one that ends a lease must see that the
    books are open, and come again later.
    """
    for name, method in tuple(vars(owner).items()):
        if isinstance(method, FunctionType) and not name.startswith("_"):
            setattr(owner, name, _alone(method))
    return owner


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, self.deciding = self.deciding, True
        try:
            return method(self, *args, **kwargs)
        finally:
            self.deciding = before

    return alone


MAX_WEIGHT = 262_144
"""Of all, in rows of plans: some 60 MB."""

OWN_WEIGHT = 8
"""What an adapter takes besides its plan: some 2 KB."""


class IdleAdapters:
    """In the order in which they came to rest. Plans that several share count once.

    `most` are remembered, and fewer if their plans are large.
    """

    __slots__ = ("_entries", "_most", "_sharing", "weight")

    def __init__(self, most: int) -> None:
        self._most = most
        self.weight = 0
        """In rows of plans."""
        self._entries: dict[AdapterKey, GroupSizes | None] = {}
        self._sharing: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[AdapterKey]:
        return iter(self._entries)

    def add(self, key: AdapterKey, needs: GroupSizes | None) -> None:
        """`key` rests; `needs` is that of its plan, the same object for a plan that is shared."""
        if key in self._entries:
            if self._entries[key] is needs:
                return
            self.discard(key)
        self._entries[key] = needs
        self.weight += OWN_WEIGHT
        if needs is not None:
            sharing = self._sharing.get(id(needs), 0)
            self._sharing[id(needs)] = sharing + 1
            self.weight += 0 if sharing else needs.weight

    def discard(self, key: AdapterKey) -> None:
        """`key` rests no longer, if it did."""
        if key not in self._entries:
            return
        needs = self._entries.pop(key)
        self.weight -= OWN_WEIGHT
        if needs is not None:
            self._sharing[id(needs)] -= 1
            if not self._sharing[id(needs)]:
                del self._sharing[id(needs)]
                self.weight -= needs.weight

    @property
    def next_to_forget(self) -> AdapterKey | None:
        """The first to be forgotten, if one has to be."""
        if len(self._entries) > self._most or self.weight > MAX_WEIGHT:
            return next(iter(self._entries))
        return None

    def adopt(self, other: IdleAdapters) -> None:
        """Become an independent one in the state of `other`."""
        self._entries = other._entries.copy()
        self._sharing = other._sharing.copy()
        self.weight = other.weight


@dataclass(frozen=True, slots=True)
class Budgets:
    """Of the device, of held file pages, and of page-locked images."""

    device: Residency
    host: HostBudget
    images: ImageBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleTimes:
    """How long what is decided may stand in the way of others.

    Attributes
    ----------
    starvation_age
        Seconds after which a waiting foreground wish stops new leases on a resident adapter, and
        what one level of priority is worth.
    min_residency
        Seconds for which a resident adapter is not evicted, unless somebody starves.
    max_idle
        Adapters without slot and interest that are remembered.
    """

    starvation_age: float = 5.0
    min_residency: float = 0.0
    max_idle: int = 16_384


@non_reentrant
class Lifecycle:
    """The state of all adapters of one loader, within its budgets."""

    def __init__(self, budgets: Budgets, pace: LifecycleTimes | None = None) -> None:
        self.budgets = budgets
        self.deciding = False
        """A method of this is running."""
        pace = pace or LifecycleTimes()
        self.states: dict[AdapterKey, AdapterState] = {}
        self._rules = LifecycleRules(budgets.device, budgets.host, budgets.images)
        self._slots = SlotQueue(
            self._rules,
            self.states,
            PinnedImages(self._rules, self.states),
            starvation_age=pace.starvation_age,
            min_residency=pace.min_residency,
        )
        self._host_queue = HostTierQueue(self._rules, self.states, level=pace.starvation_age)
        self._copies = CopyQueue(self._rules)
        self._idle = IdleAdapters(pace.max_idle)

    # -- interest ---------------------------------------------------------------------------------

    def want(self, key: AdapterKey, waiter: Waiter) -> list[Command]:
        self.note_time(max(self._slots.now, waiter.since))
        life = self._state(key)
        if waiter.tier is WantedTier.HOST and life.needs is not None and not life.needs.holdable:
            self._read_ahead_again(life)
        if waiter.tier >= WantedTier.STREAM and waiter.foreground and life.grant is not None:
            self._rules.touch(life)
        life.waiters.add(waiter)
        return self._settle(life)

    def withdraw(self, key: AdapterKey, waiter: int) -> list[Command]:
        """One waiter goes; nobody else's wish changes."""
        life = self.states.get(key)
        if life is None or not life.waiters.remove(waiter):
            return []
        return self._settle(life)

    def take_lease(self, key: AdapterKey) -> SlotGrant | None:
        """A lease on an adapter that is resident now, without waiting."""
        life = self.states.get(key)
        if life is None or not self._rules.reached(life, WantedTier.DEVICE):
            return None
        life.leases += 1
        self._rules.touch(life)
        self._slots.update(life)
        return life.grant

    def add_lease(self, key: AdapterKey) -> None:
        """One more lease beside one that is held."""
        self.states[key].leases += 1

    def end_lease(self, key: AdapterKey, *, in_use: bool = False) -> list[Command]:
        """A lease ends; `in_use` if a kernel that started under it still runs."""
        life = self.states[key]
        life.leases -= 1
        life.uses += in_use
        return self._settle(life)

    def end_use(self, key: AdapterKey) -> list[Command]:
        life = self.states[key]
        life.uses -= 1
        return self._settle(life)

    def pin(self, key: AdapterKey) -> bool:
        """Keep what is leased, whoever wants its room. False if it is leaving already."""
        life = self.states[key]
        if not self._rules.reached(life, WantedTier.DEVICE):
            return False
        life.pins += 1
        self._slots.update(life)
        return True

    def unpin(self, key: AdapterKey, grant: SlotGrant) -> list[Command]:
        """Take back one pin; without effect if the pins on this grant have ended."""
        life = self.states.get(key)
        if life is None or life.grant is not grant or not life.pins:
            return []
        life.pins -= 1
        return self._settle(life)

    def unload(self, key: AdapterKey) -> list[Command]:
        """Let it leave device and host; whoever waits for it waits on. Answers TellUnloaded."""
        life = self._state(key)
        life.unloads += 1
        life.pins = 0
        self._rules.notify_leaving(life)
        return self._settle(life)

    def withdraw_unload(self, key: AdapterKey) -> list[Command]:
        """One who waited for it to be gone waits no longer; it stays if that was the last."""
        life = self.states.get(key)
        if life is None or not life.unloads:
            return []
        life.unloads -= 1
        if not life.departing:
            self._rules.notify_stays(life)
        return self._settle(life)

    def forget(self, key: AdapterKey) -> list[Command]:
        """Its bytes are kept nowhere any more; without effect unless it is idle."""
        life = self.states.get(key)
        if life is not None and life.is_idle:
            self._forget(key)
        return self._rules.take_commands()

    def close(self, error: LoraxError) -> list[Command]:
        """Fail all waiters and claim nothing from here on."""
        self._rules.closing = True
        for life in self.states.values():
            life.pins = 0
            self._rules.fail(life, error)
        return self._settle(*self.states.values())

    @property
    def at_rest(self) -> bool:
        """Nothing is in flight and no slot is held."""
        return all(life.at_rest for life in self.states.values())

    # -- outcomes of a fetch ----------------------------------------------------------------------

    def header_checked(self, key: AdapterKey, attempt: int, needs: GroupSizes) -> list[Command]:
        life = self._current(key, attempt)
        if life is None:
            return []
        life.file = next_file_state(life.file, FileMove.HEADER_CHECKED)
        if life.file is FileState.FETCHING:
            life.needs = needs
        return self._settle(life)

    def span_fetched(self, key: AdapterKey, attempt: int, group: int) -> list[Command]:
        life = self._current(key, attempt)
        if life is None:
            return []
        life.file = next_file_state(life.file, FileMove.SPAN_FETCHED)
        if life.file is FileState.FETCHING:
            life.fetched |= 1 << group
        return self._settle(life)

    def published(self, key: AdapterKey, attempt: int) -> list[Command]:
        life = self._current(key, attempt)
        if life is None:
            return []
        life.file = next_file_state(life.file, FileMove.PUBLISHED)
        life.fetch_running = False
        if life.file is FileState.PRESENT:
            life.fetched = life.all_groups
        return self._settle(life)

    def fetch_failed(self, key: AdapterKey, attempt: int, error: LoraxError) -> list[Command]:
        """The fetch ended without the file; what came of it is unverified and must not be used."""
        life = self._current(key, attempt)
        if life is None:
            return []
        unverified = life.file is FileState.FETCHING
        life.file = next_file_state(life.file, FileMove.FETCH_FAILED)
        life.fetch_running = False
        if unverified:
            self._rules.distrust(life, error)
        return self._settle(life)

    def populated(self, key: AdapterKey, attempt: int) -> list[Command]:
        life = self._current(key, attempt)
        if life is None:
            return []
        life.file = next_file_state(life.file, FileMove.POPULATED)
        self.budgets.host.populating = None
        life.host = HostState.HELD
        return self._settle(life)

    def released(self, key: AdapterKey, attempt: int) -> list[Command]:
        """The file's pages are no longer held."""
        life = self._current(key, attempt)
        if life is None:
            return []
        life.file = next_file_state(life.file, FileMove.RELEASED)
        self._end_host(life)
        return self._settle(life)

    def lost(self, key: AdapterKey, attempt: int, error: LoraxError) -> list[Command]:
        """Populating found the file gone or changed."""
        life = self._current(key, attempt)
        if life is None:
            return []
        self._rules.lose(life, error)
        self.budgets.host.populating = None
        self.budgets.host.pick(key, evicted=False)
        self._end_host(life)
        return self._settle(life)

    def _end_host(self, life: AdapterState) -> None:
        self.budgets.host.release(life.key)
        life.host = HostState.NONE

    def _read_ahead_again(self, life: AdapterState) -> None:
        """What is not held may have gone from memory; a new wish reads it ahead anew."""
        if life.host is HostState.HELD:
            life.host = HostState.NONE

    # -- outcomes of a copy -----------------------------------------------------------------------

    def copy_done(self, key: AdapterKey, group: int) -> list[Command]:
        life = self.states[key]
        last = life.done | 1 << group == life.all_groups
        life.slot = next_slot_state(
            life.slot, SlotMove.LAST_COPY_DONE if last else SlotMove.COPY_DONE
        )
        self._copies.copied(life)
        if life.image is not None:
            life.imaged |= 1 << group
        if life.slot is SlotState.DRAINING:
            return self._settle(life)
        if last:
            life.resident_since = self._slots.now
        life.done |= 1 << group
        self._raise_watermark(life)
        if life.slot is SlotState.FILLING:
            return self._next_copies()
        return self._settle(life)

    def copy_failed(
        self, key: AdapterKey, error: LoraxError, *, file_lost: bool = False
    ) -> list[Command]:
        """A copy failed; `file_lost` if the file was the cause (the outcome Lost, in one step)."""
        life = self.states[key]
        was_filling = life.slot is SlotState.FILLING
        after = next_slot_state(life.slot, SlotMove.COPY_FAILED)
        if file_lost:
            next_file_state(life.file, FileMove.LOST)
        self._copies.copied(life)
        if was_filling:
            self._rules.fail(life, error, life.waiters.for_slot)
            self._rules.notify_broken(life, error)
            self._rules.drain(life, after)
        if file_lost:
            self._rules.lose(life, error)
        return self._settle(life)

    def wiped(self, key: AdapterKey) -> list[Command]:
        """Nothing is left of what a slot held when it broke."""
        life = self.states[key]
        life.slot = next_slot_state(life.slot, SlotMove.WIPED)
        life.broken = life.wiping = False
        return self._settle(life)

    # -- time -------------------------------------------------------------------------------------

    def note_time(self, now: float) -> None:
        """What happens from here on happens at `now`, in seconds of the loop's clock."""
        self._slots.now = now

    def tick(self, now: float) -> list[Command]:
        """Let waiting wishes grow older."""
        self.note_time(now)
        return self._settle()

    @property
    def next_tick(self) -> float | None:
        """When time alone will change a decision: call `tick` then."""
        return self._slots.next_tick

    def stage(self, key: AdapterKey) -> Stage:
        """Where the adapter is, in the words of errors and statistics."""
        life = self.states.get(key)
        return life.stage if life is not None else "fetch"

    # -- decisions ---------------------------------------------------------------------------------

    def _state(self, key: AdapterKey) -> AdapterState:
        """What is known of an adapter, from here on."""
        life = self.states.get(key)
        if life is None:
            life = self.states[key] = AdapterState(key)
        return life

    def _settle(self, *states: AdapterState) -> list[Command]:
        """Take every decision that is due, for these adapters, then for the heads of the queues."""
        for life in states:
            self._settle_state(life)
        while touched := self._next_touched():
            self._settle_state(touched)
        self._copies.submit()
        self._forget_oldest()
        return self._rules.take_commands()

    def _next_touched(self) -> AdapterState | None:
        if self._rules.touched:
            return self._rules.touched.pop()
        return self._slots.settle_head() or self._host_queue.settle_head()

    def _next_copies(self) -> list[Command]:
        """What is due when nothing but a place for a copy came free, as it often does."""
        self._copies.submit()
        return self._rules.take_commands()

    def _settle_state(self, life: AdapterState) -> None:
        self._rules.settle(life)
        self._slots.update(life)
        self._host_queue.update(life)
        self._copies.update(life)
        if life.is_idle:
            self._idle.add(life.key, life.needs)
        else:
            self._idle.discard(life.key)

    def _forget_oldest(self) -> None:
        while (key := self._idle.next_to_forget) is not None:
            self._forget(key)

    def _forget(self, key: AdapterKey) -> None:
        self._idle.discard(key)
        life = self.states.pop(key)
        if life.file is FileState.PRESENT:
            life.host = HostState.NONE
            life.file = next_file_state(life.file, FileMove.DROPPED)
            self._rules.command(DropFile(key))
            self._rules.file_quiesced(life)
        life.file = next_file_state(life.file, FileMove.DROPPED)
        self._rules.command(ForgetAdapter(key))

    # -- steps that several outcomes share ---------------------------------------------------------

    def _current(self, key: AdapterKey, attempt: int) -> AdapterState | None:
        """The adapter, if this attempt is its latest."""
        life = self.states[key]
        return life if life.attempt == attempt else None

    def _raise_watermark(self, life: AdapterState) -> None:
        before = life.watermark
        while life.done >> life.watermark & 1:
            life.watermark += 1
        if life.watermark > before and life.grant is not None:
            last = life.slot is SlotState.RESIDENT
            self._rules.command(NotifyReady(life.key, life.grant, life.watermark, last))
