"""Rules 1 to 6, which decide about one adapter, and the moves that several rules share."""

from __future__ import annotations

from lorax_async.errors import LoraxError
from lorax_async.lifecycle import commands
from lorax_async.lifecycle.adapter_state import AdapterState, HostState, WantedTier
from lorax_async.lifecycle.commands import Command
from lorax_async.lifecycle.residency import HostBudget, ImageBudget, Residency
from lorax_async.lifecycle.transitions import (
    FileMove,
    FileState,
    SlotMove,
    SlotState,
    next_file_state,
    next_slot_state,
)
from lorax_async.types import AdapterKey


class LifecycleRules:
    """Apply rules 1 to 6 to one adapter and collect the commands.

    `states` are those of all adapters. `touched` holds others that lost memory to this one and must
    be settled too.
    """

    def __init__(self, residency: Residency, host: HostBudget, images: ImageBudget) -> None:
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
        """Apply rules 1 to 6 until none changes the state. Each rule returns whether it did."""
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
        near = state.has_whole_image or state.host in (HostState.POPULATING, HostState.HELD)
        state.demoted = holdable and not (near or state.unloads or self.closing)
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
        state.demoted = False
        if state.image is not None and not state.copying and state.slot is not SlotState.FILLING:
            self.images.drop(state)
        if state.host is not HostState.HELD:
            return False
        if state.is_held:
            self.release_host(state)
        else:
            state.host = HostState.NONE  # only read ahead: there is nothing to release
        return True

    def release_host(self, state: AdapterState, *, evicted: bool = False) -> None:
        self.host.mark_leaving(state.key, evicted=evicted)
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
