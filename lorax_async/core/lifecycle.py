"""Decides everything about adapters: outcomes and wishes go in, commands come out.

Each public method takes one outcome or one change of interest, lets `Settling` take every decision
that follows from it (rules 1 to 9 of docs/architecture.md), and returns the commands in the order
in which the driver must carry them out. Nothing here waits, reads a clock or touches a device.
"""

from __future__ import annotations

from lorax_async.adapter import AdapterKey
from lorax_async.core.commands import Command, TellReady
from lorax_async.core.life import Grant, HostState, Life, Needs
from lorax_async.core.settling import Budgets, Pace, Settling
from lorax_async.core.transitions import (
    FileMove,
    FileState,
    SlotMove,
    SlotState,
    next_file_state,
    next_slot_state,
)
from lorax_async.core.undisturbed import undisturbed
from lorax_async.core.waiters import Tier, Waiter
from lorax_async.errors import LoraxError, Stage


@undisturbed
class Lifecycle:
    """The state of all adapters of one loader, within its budgets."""

    def __init__(self, budgets: Budgets, pace: Pace | None = None) -> None:
        self.budgets = budgets
        self.deciding = False
        """A method of this is running."""
        self._settling = Settling(budgets, pace or Pace())
        self._decisions = self._settling.decisions
        self.lives = self._settling.lives

    # -- interest ---------------------------------------------------------------------------------

    def want(self, key: AdapterKey, waiter: Waiter) -> list[Command]:
        self.note_time(max(self._settling.slots.now, waiter.since))
        life = self._settling.life(key)
        if waiter.tier is Tier.HOST and life.needs is not None and not life.needs.holdable:
            self._read_ahead_again(life)
        if waiter.tier >= Tier.STREAM and waiter.foreground and life.grant is not None:
            self._decisions.touch(life)
        life.waiters.add(waiter)
        return self._settling.settle(life)

    def withdraw(self, key: AdapterKey, waiter: int) -> list[Command]:
        """One waiter goes; nobody else's wish changes."""
        life = self.lives.get(key)
        if life is None or not life.waiters.remove(waiter):
            return []
        return self._settling.settle(life)

    def take_lease(self, key: AdapterKey) -> Grant | None:
        """A lease on an adapter that is resident now, without waiting."""
        life = self.lives.get(key)
        if life is None or not self._decisions.reached(life, Tier.DEVICE):
            return None
        life.leases += 1
        self._decisions.touch(life)
        self._settling.slots.update(life)
        return life.grant

    def add_lease(self, key: AdapterKey) -> None:
        """One more lease beside one that is held."""
        self.lives[key].leases += 1

    def end_lease(self, key: AdapterKey, *, in_use: bool = False) -> list[Command]:
        """A lease ends; `in_use` if a kernel that started under it still runs."""
        life = self.lives[key]
        life.leases -= 1
        life.uses += in_use
        return self._settling.settle(life)

    def end_use(self, key: AdapterKey) -> list[Command]:
        life = self.lives[key]
        life.uses -= 1
        return self._settling.settle(life)

    def pin(self, key: AdapterKey) -> bool:
        """Keep what is leased, whoever wants its room. False if it is leaving already."""
        life = self.lives[key]
        if not self._decisions.reached(life, Tier.DEVICE):
            return False
        life.pins += 1
        self._settling.slots.update(life)
        return True

    def unpin(self, key: AdapterKey, grant: Grant) -> list[Command]:
        """Take back one pin; without effect if the pins on this grant have ended."""
        life = self.lives.get(key)
        if life is None or life.grant is not grant or not life.pins:
            return []
        life.pins -= 1
        return self._settling.settle(life)

    def unload(self, key: AdapterKey) -> list[Command]:
        """Let it leave device and host; whoever waits for it waits on. Answers TellUnloaded."""
        life = self._settling.life(key)
        life.unloads += 1
        life.pins = 0
        self._decisions.tell_leaving(life)
        return self._settling.settle(life)

    def withdraw_unload(self, key: AdapterKey) -> list[Command]:
        """One who waited for it to be gone waits no longer; it stays if that was the last."""
        life = self.lives.get(key)
        if life is None or not life.unloads:
            return []
        life.unloads -= 1
        if not life.departing:
            self._decisions.tell_stays(life)
        return self._settling.settle(life)

    def forget(self, key: AdapterKey) -> list[Command]:
        """Its bytes are kept nowhere any more; without effect unless it is idle."""
        return self._settling.forget(key)

    def close(self, error: LoraxError) -> list[Command]:
        """Fail all waiters and claim nothing from here on."""
        self._decisions.closing = True
        for life in self.lives.values():
            life.pins = 0
            self._decisions.fail(life, error)
        return self._settling.settle(*self.lives.values())

    @property
    def at_rest(self) -> bool:
        """Nothing is in flight and no slot is held."""
        return all(life.at_rest for life in self.lives.values())

    # -- outcomes of a fetch ----------------------------------------------------------------------

    def header_checked(self, key: AdapterKey, attempt: int, needs: Needs) -> list[Command]:
        life = self._current(key, attempt)
        if life is None:
            return []
        life.file = next_file_state(life.file, FileMove.HEADER_CHECKED)
        if life.file is FileState.FETCHING:
            life.needs = needs
        return self._settling.settle(life)

    def span_fetched(self, key: AdapterKey, attempt: int, group: int) -> list[Command]:
        life = self._current(key, attempt)
        if life is None:
            return []
        life.file = next_file_state(life.file, FileMove.SPAN_FETCHED)
        if life.file is FileState.FETCHING:
            life.fetched |= 1 << group
        return self._settling.settle(life)

    def published(self, key: AdapterKey, attempt: int) -> list[Command]:
        life = self._current(key, attempt)
        if life is None:
            return []
        life.file = next_file_state(life.file, FileMove.PUBLISHED)
        life.fetch_running = False
        if life.file is FileState.PRESENT:
            life.fetched = life.all_groups
        return self._settling.settle(life)

    def fetch_failed(self, key: AdapterKey, attempt: int, error: LoraxError) -> list[Command]:
        """The fetch ended without the file; what came of it is unverified and must not be used."""
        life = self._current(key, attempt)
        if life is None:
            return []
        unverified = life.file is FileState.FETCHING
        life.file = next_file_state(life.file, FileMove.FETCH_FAILED)
        life.fetch_running = False
        if unverified:
            self._decisions.distrust(life, error)
        return self._settling.settle(life)

    def populated(self, key: AdapterKey, attempt: int) -> list[Command]:
        life = self._current(key, attempt)
        if life is None:
            return []
        life.file = next_file_state(life.file, FileMove.POPULATED)
        self.budgets.host.populating = None
        life.host = HostState.HELD
        return self._settling.settle(life)

    def released(self, key: AdapterKey, attempt: int) -> list[Command]:
        """The file's pages are no longer held."""
        life = self._current(key, attempt)
        if life is None:
            return []
        life.file = next_file_state(life.file, FileMove.RELEASED)
        self._end_host(life)
        return self._settling.settle(life)

    def lost(self, key: AdapterKey, attempt: int, error: LoraxError) -> list[Command]:
        """Populating found the file gone or changed."""
        life = self._current(key, attempt)
        if life is None:
            return []
        self._decisions.lose(life, error)
        self.budgets.host.populating = None
        self.budgets.host.pick(key, evicted=False)
        self._end_host(life)
        return self._settling.settle(life)

    def _end_host(self, life: Life) -> None:
        self.budgets.host.release(life.key)
        life.host = HostState.NONE

    def _read_ahead_again(self, life: Life) -> None:
        """What is not held may have gone from memory; a new wish reads it ahead anew."""
        if life.host is HostState.HELD:
            life.host = HostState.NONE

    # -- outcomes of a copy -----------------------------------------------------------------------

    def copy_done(self, key: AdapterKey, group: int) -> list[Command]:
        life = self.lives[key]
        last = life.done | 1 << group == life.all_groups
        life.slot = next_slot_state(
            life.slot, SlotMove.LAST_COPY_DONE if last else SlotMove.COPY_DONE
        )
        self._settling.copies.copied(life)
        if life.image is not None:
            life.imaged |= 1 << group
        if life.slot is SlotState.DRAINING:
            return self._settling.settle(life)
        if last:
            life.resident_since = self._settling.slots.now
        life.done |= 1 << group
        self._raise_watermark(life)
        if life.slot is SlotState.FILLING:
            return self._settling.next_copies()
        return self._settling.settle(life)

    def copy_failed(
        self, key: AdapterKey, error: LoraxError, *, file_lost: bool = False
    ) -> list[Command]:
        """A copy failed; `file_lost` if the file was the cause (the outcome Lost, in one step)."""
        life = self.lives[key]
        was_filling = life.slot is SlotState.FILLING
        after = next_slot_state(life.slot, SlotMove.COPY_FAILED)
        if file_lost:
            next_file_state(life.file, FileMove.LOST)
        self._settling.copies.copied(life)
        if was_filling:
            self._decisions.fail(life, error, life.waiters.for_slot)
            self._decisions.tell_broken(life, error)
            self._decisions.drain(life, after)
        if file_lost:
            self._decisions.lose(life, error)
        return self._settling.settle(life)

    def wiped(self, key: AdapterKey) -> list[Command]:
        """Nothing is left of what a slot held when it broke."""
        life = self.lives[key]
        life.slot = next_slot_state(life.slot, SlotMove.WIPED)
        life.broken = life.wiping = False
        return self._settling.settle(life)

    # -- time -------------------------------------------------------------------------------------

    def note_time(self, now: float) -> None:
        """What happens from here on happens at `now`, in seconds of the loop's clock."""
        self._settling.slots.now = now

    def tick(self, now: float) -> list[Command]:
        """Let waiting wishes grow older."""
        self.note_time(now)
        return self._settling.settle()

    @property
    def next_tick(self) -> float | None:
        """When time alone will change a decision: call `tick` then."""
        return self._settling.slots.next_tick

    def stage(self, key: AdapterKey) -> Stage:
        """Where the adapter is, in the words of errors and statistics."""
        life = self.lives.get(key)
        return life.stage if life is not None else "fetch"

    # -- steps that several outcomes share ---------------------------------------------------------

    def _current(self, key: AdapterKey, attempt: int) -> Life | None:
        """The adapter, if this attempt is its latest."""
        life = self.lives[key]
        return life if life.attempt == attempt else None

    def _raise_watermark(self, life: Life) -> None:
        before = life.watermark
        while life.done >> life.watermark & 1:
            life.watermark += 1
        if life.watermark > before and life.grant is not None:
            last = life.slot is SlotState.RESIDENT
            self._decisions.command(TellReady(life.key, life.grant, life.watermark, last))
