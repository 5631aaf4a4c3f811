"""Decisions about one adapter at a time: rules 1 to 7, and the moves that several rules share."""

from __future__ import annotations

from lorax_async.core.life import (
    BreakSlot,
    CancelFetch,
    ClearColumn,
    Command,
    Fail,
    Fetch,
    Life,
    Populate,
    Serve,
    TellLeaving,
)
from lorax_async.core.residency import Residency
from lorax_async.core.transitions import (
    FileMove,
    FileState,
    SlotMove,
    SlotState,
    next_file_state,
    next_slot_state,
)
from lorax_async.core.waiters import Tier
from lorax_async.errors import LoraxError


class Decisions:
    """Takes the decisions that are due for one adapter; collects the commands they need."""

    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        self.closing = False
        self._commands: list[Command] = []

    def command(self, command: Command) -> None:
        self._commands.append(command)

    def take_commands(self) -> list[Command]:
        commands, self._commands = self._commands, []
        return commands

    def settle(self, life: Life) -> None:
        """Apply rules 1 to 7 until nothing changes. A rule returns whether it changed something."""
        while (
            self._serve(life)
            or self._slot_unwanted(life)
            or self._evicted(life)
            or self._slot_quiesced(life)
            or self._file_unwanted(life)
            or self.file_quiesced(life)
            or self._fetch(life)
            or self._populate(life)
        ):
            pass

    def reached(self, life: Life, tier: Tier) -> bool:
        if tier >= Tier.STREAM and (life.leaving or self.closing):
            return False
        if life.slot is SlotState.RESIDENT:
            return True
        if tier is Tier.STREAM:
            return life.slot is SlotState.FILLING
        if tier is Tier.DEVICE or life.file is not FileState.PRESENT:
            return False
        return tier is Tier.DISK or life.populated

    def _serve(self, life: Life) -> bool:
        """Rule 1. A foreground wish for the device becomes a lease; a prefetch just leaves."""
        tiers = {tier for tier, _ in life.waiters.kinds if self.reached(life, tier)}
        served = life.waiters.of_tiers(tiers) if tiers else []
        for waiter in served:
            life.waiters.remove(waiter.id)
            leases = waiter.tier >= Tier.STREAM and waiter.foreground
            if leases:
                life.leases += 1
                self.residency.touch(life.key)
            self.command(Serve(life.key, waiter.id, life.grant if leases else None))
        return bool(served)

    def _slot_unwanted(self, life: Life) -> bool:
        """Rule 2."""
        if life.slot is not SlotState.FILLING or life.leases:
            return False
        if life.wants_slot and not life.leaving:
            return False
        self.drain(life, next_slot_state(life.slot, SlotMove.UNWANTED))
        return True

    def _evicted(self, life: Life) -> bool:
        """Rule 3; rule 8 picks by marking `leaving`."""
        if life.slot is not SlotState.RESIDENT or life.leases:
            return False
        if not (life.leaving or self.closing):
            return False
        self.drain(life, next_slot_state(life.slot, SlotMove.EVICTED))
        return True

    def _slot_quiesced(self, life: Life) -> bool:
        """Rule 4. The column is cleared before anybody else can be given the slot or its bytes."""
        if life.slot is not SlotState.DRAINING or life.grant is None:
            return False
        if life.copying or life.uses or life.leases:
            return False
        life.slot = next_slot_state(life.slot, SlotMove.QUIESCED)
        self.command(ClearColumn(life.key, life.grant))
        self.residency.release(life.key, life.grant)
        life.grant = None
        life.submitted.clear()
        life.done.clear()
        life.watermark = 0
        life.leaving = False
        return True

    def _file_unwanted(self, life: Life) -> bool:
        """Rule 5. With all spans here the fetch finishes: unverified bytes may be leased."""
        if life.file is not FileState.FETCHING or life.has_interest:
            return False
        if life.needs is not None and len(life.fetched) == life.groups:
            return False
        life.file = next_file_state(life.file, FileMove.UNWANTED)
        self.command(CancelFetch(life.key, life.attempt))
        return True

    def file_quiesced(self, life: Life) -> bool:
        """Rule 4."""
        if life.file is not FileState.ENDING:
            return False
        if life.fetch_running or life.populating or life.copying:
            return False
        life.file = next_file_state(life.file, FileMove.QUIESCED)
        life.needs = None
        life.fetched.clear()
        life.populated = False
        return True

    def _fetch(self, life: Life) -> bool:
        """Rule 6."""
        if life.file is not FileState.ABSENT or not life.waiters or self.closing:
            return False
        if life.slot is SlotState.RESIDENT:
            return False
        life.file = next_file_state(life.file, FileMove.FETCH)
        life.attempt += 1
        life.fetch_running = True
        self.command(Fetch(life.key, life.attempt))
        return True

    def _populate(self, life: Life) -> bool:
        """Rule 7."""
        if life.file is not FileState.PRESENT or life.populated or life.populating:
            return False
        if not life.waiters.has_tier(Tier.HOST):
            return False
        life.populating = True
        self.command(Populate(life.key, life.attempt))
        return True

    def fail(self, life: Life, error: LoraxError, waiters: list[int] | None = None) -> None:
        failed = tuple([w.id for w in life.waiters] if waiters is None else waiters)
        for waiter in failed:
            life.waiters.remove(waiter)
        if failed:
            self.command(Fail(life.key, failed, error))

    def leave(self, life: Life) -> None:
        if not life.leaving and life.grant is not None:
            life.leaving = True
            self.command(TellLeaving(life.key, life.grant))

    def drain(self, life: Life, state: SlotState) -> None:
        self.leave(life)
        life.slot = state

    def tell_broken(self, life: Life, error: LoraxError) -> None:
        assert life.grant is not None
        self.command(BreakSlot(life.key, life.grant, error))

    def break_slot(self, life: Life, error: LoraxError, states: tuple[SlotState, ...]) -> None:
        if life.slot in states:
            self.tell_broken(life, error)
            self.drain(life, next_slot_state(life.slot, SlotMove.FILE_FAILED))

    def lose(self, life: Life, error: LoraxError) -> None:
        was_present = life.file is FileState.PRESENT
        life.file = next_file_state(life.file, FileMove.LOST)
        if was_present:
            self.fail(life, error)
            self.break_slot(life, error, (SlotState.FILLING,))
