"""Make every decision about adapters: outcomes and changes of interest in, commands out.

Each public method takes one outcome or one change of interest, applies rules 1 to 9 of
docs/lifecycle.md, and returns the commands in the order in which the driver must execute them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar

from lorax_async.errors import LoraxError, Stage
from lorax_async.lifecycle.adapter_state import (
    AdapterState,
    FileMove,
    FileState,
    GroupSizes,
    HostState,
    SlotGrant,
    SlotMove,
    SlotState,
    Waiter,
    WantedTier,
    next_file_state,
    next_slot_state,
)
from lorax_async.lifecycle.commands import Command, CopyGroups, ForgetAdapter, NotifyReady
from lorax_async.lifecycle.policies import EvictionPolicy
from lorax_async.lifecycle.residency import ImageBudget, Residency
from lorax_async.lifecycle.rules import CopyQueue, LifecycleRules, LifecycleTimes, SlotQueue
from lorax_async.types import AdapterKey

_T = TypeVar("_T")


def non_reentrant(owner: type[_T]) -> type[_T]:
    """Set `deciding` while a public method of an instance runs.

    The interpreter may run a finalizer at any allocation. A finalizer that ends a lease must see
    that a decision is in progress, and defer.
    """

    def mark(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def marked(self: Any, *args: Any, **kwargs: Any) -> Any:
            before, self.deciding = self.deciding, True
            try:
                return method(self, *args, **kwargs)
            finally:
                self.deciding = before

        return marked

    for name, method in tuple(vars(owner).items()):
        if isinstance(method, FunctionType) and not name.startswith("_"):
            setattr(owner, name, mark(method))
    return owner


MAX_WEIGHT = 262_144
"""The limit for all idle adapters together, in rows of plans: about 60 MB."""

OWN_WEIGHT = 8
"""The weight of an adapter besides its plan: about 2 KB."""


class IdleAdapters:
    """Idle adapters, the longest idle first. A shared plan counts once.

    At most `limit` are remembered, fewer if their plans are large.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.weight = 0
        """In rows of plans."""
        self._entries: dict[AdapterKey, GroupSizes | None] = {}
        self._sharing: dict[int, int] = {}

    def add(self, key: AdapterKey, needs: GroupSizes | None) -> None:
        """Add an idle adapter. Adapters that share a plan pass the same `needs` object."""
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
        """The adapter to forget, if a limit is exceeded."""
        if len(self._entries) > self._limit or self.weight > MAX_WEIGHT:
            return next(iter(self._entries))
        return None


@dataclass(frozen=True, slots=True)
class Budgets:
    """The budgets of the device and of pinned images, and the ranking of files in the host tier."""

    device: Residency
    host: EvictionPolicy
    images: ImageBudget


@non_reentrant
class Lifecycle:
    """The state of all adapters of one loader, and the decisions about them."""

    def __init__(self, budgets: Budgets, times: LifecycleTimes) -> None:
        self.budgets = budgets
        self.deciding = False
        """Whether a public method is running."""
        self._rules = LifecycleRules(budgets.device, budgets.host, budgets.images)
        self.states = self._rules.states
        self._slots = SlotQueue(self._rules, times)
        self._copies = CopyQueue(self._rules)
        self._idle = IdleAdapters(times.max_idle)

    # -- interest ---------------------------------------------------------------------------------

    def want(self, key: AdapterKey, waiter: Waiter) -> list[Command]:
        self.note_time(max(self._slots.now, waiter.since))
        state = self._state(key)
        if waiter.tier is WantedTier.HOST and state.host is HostState.HELD and not state.is_held:
            state.host = HostState.NONE  # read it ahead again: its pages may have left memory
        if waiter.tier >= WantedTier.STREAM and waiter.foreground and state.grant is not None:
            self._rules.touch(state)
        state.waiters.add(waiter)
        return self._settle(state)

    def withdraw(self, key: AdapterKey, waiter: int) -> list[Command]:
        """Remove one waiter; without effect if it is gone already."""
        state = self.states.get(key)
        if state is None or not state.waiters.remove(waiter):
            return []
        return self._settle(state)

    def take_lease(self, key: AdapterKey) -> SlotGrant | None:
        """Lease an adapter that is resident now; return None if it is not."""
        state = self.states.get(key)
        if state is None or not self._rules.has_reached(state, WantedTier.DEVICE):
            return None
        state.leases += 1
        self._rules.touch(state)
        self._slots.lease_began(state)
        return state.grant

    def add_lease(self, key: AdapterKey) -> None:
        """Add a lease beside one that is held."""
        self.states[key].leases += 1

    def end_lease(self, key: AdapterKey, *, in_use: bool = False) -> list[Command]:
        """End a lease; `in_use` if a kernel that started under it still runs."""
        state = self.states[key]
        state.leases -= 1
        state.uses += in_use
        return self._settle_unless_resting(state)

    def end_use(self, key: AdapterKey) -> list[Command]:
        state = self.states[key]
        state.uses -= 1
        return self._settle_unless_resting(state)

    def pin(self, key: AdapterKey) -> list[Command] | None:
        """Pin a leased adapter, also one that was to be evicted. Return None if it must go."""
        state = self.states[key]
        must_go = state.unloads > 0 or self._rules.closing
        if must_go or state.slot is not SlotState.RESIDENT:
            return None
        # If it left all the same, pins that wait for few slots would take them from each other
        # forever. Once the lease ends, rule 8 looks for another adapter.
        state.leaving = False
        self._rules.notify_stays(state)
        state.pins += 1
        self._settle_state(state)
        return self._rules.take_commands()

    def unpin(self, key: AdapterKey, grant: SlotGrant) -> list[Command]:
        """Remove one pin; without effect if the pins on this grant have ended."""
        state = self.states.get(key)
        if state is None or state.grant is not grant or not state.pins:
            return []
        state.pins -= 1
        return self._settle(state)

    def unload(self, key: AdapterKey) -> list[Command]:
        """Remove the adapter from device and host; waiters stay. Ends with `NotifyUnloaded`."""
        state = self._state(key)
        state.unloads += 1
        state.pins = 0
        self._rules.notify_leaving(state)
        return self._settle(state)

    def withdraw_unload(self, key: AdapterKey) -> list[Command]:
        """Withdraw one call of `unload`. The adapter stays if that was the last."""
        state = self.states.get(key)
        if state is None or not state.unloads:
            return []
        state.unloads -= 1
        if not state.departing:
            self._rules.notify_stays(state)
        return self._settle(state)

    def forget(self, key: AdapterKey) -> list[Command]:
        """Forget an adapter, as its bytes no longer exist; without effect unless it is idle."""
        state = self.states.get(key)
        if state is not None and state.is_idle:
            self._forget(key)
        return self._rules.take_commands()

    def close(self, error: LoraxError) -> list[Command]:
        """Fail all waiters, and claim nothing from now on."""
        self._rules.closing = True
        for state in self.states.values():
            state.pins = 0
            self._rules.fail(state, error)
        return self._settle(*self.states.values())

    @property
    def at_rest(self) -> bool:
        """Whether no work is in flight and no slot is occupied."""
        return all(state.at_rest for state in self.states.values())

    # -- outcomes of a fetch ----------------------------------------------------------------------

    def header_checked(
        self, key: AdapterKey, attempt: int, needs: GroupSizes, *, cached: bool = False
    ) -> list[Command]:
        """Record the sizes of the groups; `cached` if the bytes seem to be in memory."""
        state = self._current(key, attempt)
        if state is None:
            return []
        state.file = next_file_state(state.file, FileMove.HEADER_CHECKED)
        if state.file is FileState.FETCHING:
            state.needs, state.is_fast = needs, cached
        return self._settle(state)

    def span_fetched(self, key: AdapterKey, attempt: int, *groups: int) -> list[Command]:
        state = self._current(key, attempt)
        if state is None:
            return []
        state.file = next_file_state(state.file, FileMove.SPAN_FETCHED)
        if state.file is FileState.FETCHING:
            for group in groups:
                state.fetched |= 1 << group
        return self._settle(state)

    def published(self, key: AdapterKey, attempt: int) -> list[Command]:
        state = self._current(key, attempt)
        if state is None:
            return []
        state.file = next_file_state(state.file, FileMove.PUBLISHED)
        state.fetch_running = False
        if state.file is FileState.PRESENT:
            state.fetched = state.all_groups
        return self._settle(state)

    def fetch_failed(self, key: AdapterKey, attempt: int, error: LoraxError) -> list[Command]:
        """End a fetch without a file: its bytes are unverified and must not be used."""
        state = self._current(key, attempt)
        if state is None:
            return []
        unverified = state.file is FileState.FETCHING
        state.file = next_file_state(state.file, FileMove.FETCH_FAILED)
        state.fetch_running = False
        if unverified:
            self._rules.reject_fetched(state, error)
        return self._settle(state)

    def populated(self, key: AdapterKey, attempt: int) -> list[Command]:
        state = self._current(key, attempt)
        if state is None:
            return []
        state.file = next_file_state(state.file, FileMove.POPULATED)
        state.host = HostState.HELD
        return self._settle(state)

    def release_pages(self, key: AdapterKey) -> list[Command]:
        """Release an adapter's pages, which the host tier has picked for eviction."""
        state = self.states[key]
        self._rules.release_host(state)
        return self._settle(state)

    def released(
        self, key: AdapterKey, attempt: int, error: LoraxError | None = None
    ) -> list[Command]:
        """Record that nothing is in host memory; fail its waiters with `error`, if there is one."""
        state = self._current(key, attempt)
        if state is None:
            return []
        state.file = next_file_state(state.file, FileMove.RELEASED)
        state.host = HostState.NONE
        if error is not None:
            waiting = [waiter.id for waiter in state.waiters.of_tiers({WantedTier.HOST})]
            self._rules.fail(state, error, waiting)
        return self._settle(state)

    def lost(self, key: AdapterKey, attempt: int, error: LoraxError) -> list[Command]:
        """Record that populating found the file missing or changed."""
        state = self._current(key, attempt)
        if state is None:
            return []
        self._rules.lose(state, error)
        state.host = HostState.NONE
        return self._settle(state)

    # -- outcomes of a copy -----------------------------------------------------------------------

    def copy_done(self, *copies: CopyGroups, fast: bool) -> list[Command]:
        """End runs of one grant; `fast` if they were as fast as from memory."""
        state = self.states[copies[0].key]
        state.is_fast = fast
        done = state.done
        for copy in copies:
            for group in copy.groups:
                done |= 1 << group
        last = done == state.all_groups
        state.slot = next_slot_state(
            state.slot, SlotMove.LAST_COPY_DONE if last else SlotMove.COPY_DONE
        )
        self._copies.copied(state, *copies)
        if state.image is not None:
            state.imaged |= done & ~state.done
        if state.slot is SlotState.DRAINING:
            return self._settle(state)
        if last:
            state.resident_since = self._slots.now
        state.done = done
        before = state.watermark
        while state.done >> state.watermark & 1:
            state.watermark += 1
        if state.watermark > before and state.grant is not None:
            self._rules.command(NotifyReady(state.key, state.grant, state.watermark))
        if state.slot is SlotState.FILLING:
            # The outcome frees a copy and changes nothing else.
            self._copies.submit()
            return self._rules.take_commands()
        return self._settle(state)

    def copy_failed(
        self, copy: CopyGroups, error: LoraxError, *, file_lost: bool = False
    ) -> list[Command]:
        """End a copy that failed; `file_lost` if the file was the cause (also applies `lost`)."""
        state = self.states[copy.key]
        was_filling = state.slot is SlotState.FILLING
        after = next_slot_state(state.slot, SlotMove.COPY_FAILED)
        if file_lost:
            next_file_state(state.file, FileMove.LOST)
        self._copies.copied(state, copy)
        if was_filling:
            self._rules.fail(state, error, state.waiters.slot_waiter_ids)
            self._rules.notify_broken(state, error)
            self._rules.drain(state, after)
        if file_lost:
            self._rules.lose(state, error)
        return self._settle(state)

    def wiped(self, key: AdapterKey) -> list[Command]:
        state = self.states[key]
        state.slot = next_slot_state(state.slot, SlotMove.WIPED)
        state.broken = state.wiping = False
        return self._settle(state)

    # -- time -------------------------------------------------------------------------------------

    def note_time(self, now: float) -> None:
        """Set the time of what follows, in seconds of the loop's clock."""
        self._slots.now = now

    def tick(self, now: float) -> list[Command]:
        """Decide again, because waiters have become older."""
        self.note_time(now)
        return self._settle()

    @property
    def next_tick(self) -> float | None:
        """The time at which `tick` is due, if time by itself will change a decision."""
        return self._slots.next_tick

    def stage(self, key: AdapterKey) -> Stage:
        """Return the stage of the load, as errors and statistics name it."""
        state = self.states.get(key)
        return state.stage if state is not None else "fetch"

    # -- decisions ---------------------------------------------------------------------------------

    def _current(self, key: AdapterKey, attempt: int) -> AdapterState | None:
        """Return the adapter's state if `attempt` is its latest, else None."""
        state = self.states[key]
        return state if state.attempt == attempt else None

    def _state(self, key: AdapterKey) -> AdapterState:
        """Return the state of `key`, creating it if needed."""
        state = self.states.get(key)
        if state is None:
            state = self.states[key] = AdapterState(key)
        return state

    def _settle(self, *states: AdapterState) -> list[Command]:
        """Make every decision that is due, for these adapters, then for the heads of the queues."""
        for state in states:
            self._settle_state(state)
        while touched := self._next_touched():
            self._settle_state(touched)
        self._copies.submit()
        while (key := self._idle.next_to_forget) is not None:
            self._forget(key)
        return self._rules.take_commands()

    def _settle_unless_resting(self, state: AdapterState) -> list[Command]:
        """Settle after the end of a use, unless the adapter stays and none waits for its slot."""
        stays = state.slot is SlotState.RESIDENT and state.file is FileState.PRESENT
        if not stays or state.departing or self._rules.closing or self._slots.queue.head:
            return self._settle(state)
        if not state.leases:
            self._slots.last_lease_ended(state)
        return []

    def _next_touched(self) -> AdapterState | None:
        if self._rules.touched:
            return self._rules.touched.pop()
        return self._slots.settle_head()

    def _settle_state(self, state: AdapterState) -> None:
        self._rules.settle(state)
        self._slots.update(state)
        self._copies.update(state)
        if state.is_idle:
            self._idle.add(state.key, state.needs)
        else:
            self._idle.discard(state.key)

    def _forget(self, key: AdapterKey) -> None:
        self._idle.discard(key)
        state = self.states.pop(key)
        state.file = next_file_state(state.file, FileMove.DROPPED)
        self._rules.command(ForgetAdapter(key))
