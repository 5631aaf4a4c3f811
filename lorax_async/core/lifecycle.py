"""Decides everything about adapters: outcomes and wishes go in, commands come out.

Each public method takes one outcome or one change of interest, lets `_settle` take every decision
that follows from it (rules 1 to 9 of docs/architecture.md), and returns the commands in the order
in which the driver must carry them out. Nothing here waits, reads a clock or touches a device.
"""

from __future__ import annotations

from lorax_async.adapter import AdapterKey
from lorax_async.core.decisions import Decisions
from lorax_async.core.life import Command, Drop, Forget, Grant, Life, Needs, TellReady
from lorax_async.core.queues import CopyQueue, SlotQueue
from lorax_async.core.residency import Residency
from lorax_async.core.transitions import (
    FileMove,
    FileState,
    SlotMove,
    SlotState,
    next_file_state,
    next_slot_state,
)
from lorax_async.core.waiters import Tier, Waiter
from lorax_async.errors import LoraxError, Stage

MAX_IDLE_WEIGHT = 262_144
"""Of adapters without slot and waiter, in rows of their plans: some 60 MB in all."""


class Lifecycle:
    """The state of all adapters of one loader.

    Parameters
    ----------
    residency
        The device's budget.
    starvation_age
        Seconds after which a waiting foreground wish stops new leases on a resident adapter.
    max_idle
        Adapters without slot and interest that are remembered.
    """

    def __init__(
        self, residency: Residency, *, starvation_age: float = 5.0, max_idle: int = 1024
    ) -> None:
        self.lives: dict[AdapterKey, Life] = {}
        self.residency = residency
        self._decisions = Decisions(residency)
        self._slots = SlotQueue(self._decisions, self.lives, starvation_age)
        self._copies = CopyQueue(self._decisions)
        self._max_idle = max_idle
        self._idle: dict[AdapterKey, int] = {}
        self._idle_weight = 0

    # -- interest ---------------------------------------------------------------------------------

    def want(self, key: AdapterKey, waiter: Waiter) -> list[Command]:
        life = self.lives.setdefault(key, Life(key))
        life.waiters.add(waiter)
        return self._settle(life)

    def withdraw(self, key: AdapterKey, waiter: int) -> list[Command]:
        """One waiter goes; nobody else's wish changes."""
        life = self.lives.get(key)
        if life is None or not life.waiters.remove(waiter):
            return []
        return self._settle(life)

    def take_lease(self, key: AdapterKey) -> Grant | None:
        """A lease on an adapter that is resident now, without waiting."""
        life = self.lives.get(key)
        if life is None or not self._decisions.reached(life, Tier.DEVICE):
            return None
        life.leases += 1
        self.residency.touch(key)
        return life.grant

    def end_lease(self, key: AdapterKey, *, in_use: bool = False) -> list[Command]:
        """A lease ends; `in_use` if a kernel that started under it still runs."""
        life = self.lives[key]
        life.leases -= 1
        life.uses += in_use
        return self._settle(life)

    def end_use(self, key: AdapterKey) -> list[Command]:
        life = self.lives[key]
        life.uses -= 1
        return self._settle(life)

    def close(self, error: LoraxError) -> list[Command]:
        """Fail all waiters and claim nothing from here on."""
        self._decisions.closing = True
        for life in self.lives.values():
            self._decisions.fail(life, error)
        return self._settle(*self.lives.values())

    @property
    def at_rest(self) -> bool:
        """Nothing is in flight and no slot is held."""
        return all(
            life.slot is SlotState.NONE and life.file in _RESTING for life in self.lives.values()
        )

    # -- outcomes of a fetch ----------------------------------------------------------------------

    def header_checked(self, key: AdapterKey, attempt: int, needs: Needs) -> list[Command]:
        life = self.lives[key]
        if attempt != life.attempt:
            return []
        life.file = next_file_state(life.file, FileMove.HEADER_CHECKED)
        if life.file is FileState.FETCHING:
            life.needs = needs
        return self._settle(life)

    def span_fetched(self, key: AdapterKey, attempt: int, group: int) -> list[Command]:
        life = self.lives[key]
        if attempt != life.attempt:
            return []
        life.file = next_file_state(life.file, FileMove.SPAN_FETCHED)
        if life.file is FileState.FETCHING:
            life.fetched.add(group)
        return self._settle(life)

    def published(self, key: AdapterKey, attempt: int) -> list[Command]:
        life = self.lives[key]
        if attempt != life.attempt:
            return []
        life.file = next_file_state(life.file, FileMove.PUBLISHED)
        life.fetch_running = False
        if life.file is FileState.PRESENT:
            life.fetched.update(range(life.groups))
        return self._settle(life)

    def fetch_failed(self, key: AdapterKey, attempt: int, error: LoraxError) -> list[Command]:
        """The fetch ended without the file; what came of it is unverified and must not be used."""
        life = self.lives[key]
        if attempt != life.attempt:
            return []
        unverified = life.file is FileState.FETCHING
        life.file = next_file_state(life.file, FileMove.FETCH_FAILED)
        life.fetch_running = False
        if unverified:
            self._decisions.fail(life, error)
            self._decisions.break_slot(life, error, (SlotState.FILLING, SlotState.RESIDENT))
        return self._settle(life)

    def populated(self, key: AdapterKey, attempt: int) -> list[Command]:
        life = self.lives[key]
        if attempt != life.attempt:
            return []
        life.file = next_file_state(life.file, FileMove.POPULATED)
        life.populating = False
        life.populated = life.file is FileState.PRESENT
        return self._settle(life)

    def lost(self, key: AdapterKey, attempt: int, error: LoraxError) -> list[Command]:
        """Populating found the file gone or changed."""
        life = self.lives[key]
        if attempt != life.attempt:
            return []
        self._decisions.lose(life, error)
        life.populating = False
        return self._settle(life)

    # -- outcomes of a copy -----------------------------------------------------------------------

    def copy_done(self, key: AdapterKey, group: int) -> list[Command]:
        life = self.lives[key]
        last = len(life.done) + 1 == life.groups
        life.slot = next_slot_state(
            life.slot, SlotMove.LAST_COPY_DONE if last else SlotMove.COPY_DONE
        )
        self._count_copy(life)
        if life.slot is SlotState.DRAINING:
            return self._settle(life)
        life.done.add(group)
        self._raise_watermark(life)
        if life.slot is SlotState.FILLING:
            # Nothing but a place for a copy came free: no other rule can apply, and a load has
            # many of these.
            self._copies.submit()
            return self._decisions.take_commands()
        return self._settle(life)

    def copy_failed(
        self, key: AdapterKey, error: LoraxError, *, file_lost: bool = False
    ) -> list[Command]:
        """A copy failed; `file_lost` if the file was the cause (the outcome Lost, in one step)."""
        life = self.lives[key]
        was_filling = life.slot is SlotState.FILLING
        after = next_slot_state(life.slot, SlotMove.COPY_FAILED)
        if file_lost:
            next_file_state(life.file, FileMove.LOST)
        self._count_copy(life)
        if was_filling:
            self._decisions.fail(life, error, life.waiters.for_slot)
            self._decisions.tell_broken(life, error)
            self._decisions.drain(life, after)
        if file_lost:
            self._decisions.lose(life, error)
        return self._settle(life)

    # -- time -------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Command]:
        """Let waiting wishes grow older."""
        self._slots.now = now
        return self._settle()

    @property
    def next_tick(self) -> float | None:
        """When time alone will change a decision: call `tick` then."""
        return self._slots.next_tick

    def stage(self, key: AdapterKey) -> Stage:
        """Where the adapter is, in the words of errors and statistics."""
        life = self.lives.get(key)
        if life is None or life.needs is None:
            return "fetch"
        if life.slot is SlotState.FILLING:
            return "copy"
        return "ready" if life.slot is SlotState.RESIDENT else "queue"

    # -- settle -----------------------------------------------------------------------------------

    def _settle(self, *lives: Life) -> list[Command]:
        """Take every decision that is due, for these adapters, then for the heads of the queues."""
        for life in lives:
            self._settle_life(life)
        while (touched := self._slots.settle_head()) is not None:
            self._settle_life(touched)
        self._copies.submit()
        self._forget_oldest()
        return self._decisions.take_commands()

    def _settle_life(self, life: Life) -> None:
        self._decisions.settle(life)
        self._slots.update(life)
        self._copies.update(life)
        resting = life.slot is SlotState.NONE and life.file in _RESTING
        if resting and not (life.waiters or life.populating):
            self._remember(life)
        else:
            self._idle_weight -= self._idle.pop(life.key, 0)

    def _remember(self, life: Life) -> None:
        weight = life.needs.weight if life.needs is not None else 1
        self._idle_weight += weight - self._idle.get(life.key, 0)
        self._idle[life.key] = weight

    def _forget_oldest(self) -> None:
        while len(self._idle) > self._max_idle or self._idle_weight > MAX_IDLE_WEIGHT:
            key = next(iter(self._idle))
            self._idle_weight -= self._idle.pop(key)
            life = self.lives.pop(key)
            if life.file is FileState.PRESENT:
                life.file = next_file_state(life.file, FileMove.DROPPED)
                self._decisions.command(Drop(key))
                self._decisions.file_quiesced(life)
            life.file = next_file_state(life.file, FileMove.DROPPED)
            self._decisions.command(Forget(key))

    def _count_copy(self, life: Life) -> None:
        life.copying -= 1
        self.residency.copies_free += 1

    def _raise_watermark(self, life: Life) -> None:
        before = life.watermark
        while life.watermark in life.done:
            life.watermark += 1
        if life.watermark > before and life.grant is not None:
            last = life.slot is SlotState.RESIDENT
            self._decisions.command(TellReady(life.key, life.grant, life.watermark, last))


_RESTING = (FileState.ABSENT, FileState.PRESENT)
