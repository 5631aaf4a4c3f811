"""Decisions about one adapter at a time: rules 1 to 6, and the moves that several rules share."""

from __future__ import annotations

from lorax_async.errors import LoraxError
from lorax_async.lifecycle.adapter_state import AdapterState, HostState, WantedTier
from lorax_async.lifecycle.commands import (
    BreakSlot,
    CancelFetch,
    ClearColumn,
    Command,
    FailWaiters,
    NotifyLeaving,
    NotifyStays,
    NotifyUnloaded,
    ReleasePages,
    ServeWaiter,
    StartFetch,
    WipeExtents,
)
from lorax_async.lifecycle.residency import HostBudget, ImageBudget, Residency
from lorax_async.lifecycle.transitions import (
    FileMove,
    FileState,
    SlotMove,
    SlotState,
    next_file_state,
    next_slot_state,
)


class LifecycleRules:
    """Takes the decisions that are due for one adapter; collects the commands they need.

    `touched` are others that lost something to it, and have to be settled too.
    """

    def __init__(self, residency: Residency, host: HostBudget, images: ImageBudget) -> None:
        self.residency = residency
        self.host = host
        self.images = images
        self.closing = False
        self.touched: list[AdapterState] = []
        self._commands: list[Command] = []

    def command(self, command: Command) -> None:
        self._commands.append(command)

    def take_commands(self) -> list[Command]:
        commands, self._commands = self._commands, []
        return commands

    def settle(self, life: AdapterState) -> None:
        """Apply rules 1 to 6 until nothing changes. A rule returns whether it changed something."""
        while (
            self._serve(life)
            or self._slot_unwanted(life)
            or self._evicted(life)
            or self._slot_quiesced(life)
            or self._host_unwanted(life)
            or self._unloaded(life)
            or self._file_unwanted(life)
            or self.file_quiesced(life)
            or self._fetch(life)
        ):
            pass

    def reached(self, life: AdapterState, tier: WantedTier) -> bool:
        if tier >= WantedTier.STREAM and (life.departing or self.closing):
            return False
        if life.slot is SlotState.RESIDENT:
            return True
        if tier is WantedTier.STREAM:
            return life.slot is SlotState.FILLING
        if tier is WantedTier.DEVICE or life.file is not FileState.PRESENT:
            return False
        return tier is WantedTier.DISK or life.in_host

    def _serve(self, life: AdapterState) -> bool:
        """Rule 1. A foreground wish for the device becomes a lease; a prefetch just leaves."""
        tiers = {tier for tier, _ in life.waiters.kinds if self.reached(life, tier)}
        served = life.waiters.of_tiers(tiers) if tiers else []
        for waiter in served:
            life.waiters.remove(waiter.id)
            leases = waiter.tier >= WantedTier.STREAM and waiter.foreground
            if leases:
                life.leases += 1
            self.command(ServeWaiter(life.key, waiter.id, life.grant if leases else None))
        return bool(served)

    def touch(self, life: AdapterState) -> None:
        """Somebody asked for what has a slot: that is a use of all that keeps it near."""
        self.residency.policy.use(life.key)
        self.host.use(life.key)
        if life.image is not None:
            self.images.policy.use(life.key)

    def _slot_unwanted(self, life: AdapterState) -> bool:
        """Rule 2."""
        if life.slot is not SlotState.FILLING or life.leases:
            return False
        if life.wants_slot and not life.departing:
            return False
        self.drain(life, next_slot_state(life.slot, SlotMove.UNWANTED))
        return True

    def _evicted(self, life: AdapterState) -> bool:
        """Rule 3; rule 8 picks by marking `leaving`. What was pushed out goes on in host memory."""
        if life.slot is not SlotState.RESIDENT or life.leases or life.pins:
            return False
        if not (life.departing or self.closing):
            return False
        holdable = life.needs is not None and life.needs.holdable
        near = life.has_whole_image or life.host in (HostState.POPULATING, HostState.HELD)
        life.demoted = holdable and not (near or life.unloads or self.closing)
        self.drain(life, next_slot_state(life.slot, SlotMove.EVICTED))
        return True

    def _slot_quiesced(self, life: AdapterState) -> bool:
        """Rule 4. The column is cleared before anybody else can be given the slot or its bytes.

        What broke is zeroed before that, and no earlier: a kernel may be reading it.
        """
        if life.slot is not SlotState.DRAINING or life.grant is None:
            return False
        if life.copying or life.uses or life.leases:
            return False
        if life.broken:
            if not life.wiping:
                life.wiping = True
                self.command(WipeExtents(life.key, life.grant))
            return False
        life.slot = next_slot_state(life.slot, SlotMove.QUIESCED)
        self.command(ClearColumn(life.key, life.grant))
        self.residency.release(life.key, life.grant, evicted=life.leaving)
        life.vacate()
        return True

    def _host_unwanted(self, life: AdapterState) -> bool:
        """Rule 7, its other half: what must go now goes whoever waits."""
        unloaded = life.unloads > 0 and life.slot is SlotState.NONE
        gone = unloaded or self.closing or life.file is FileState.ENDING
        if not gone:
            return False
        life.demoted = False
        if life.image is not None and not life.copying and life.slot is not SlotState.FILLING:
            self.images.drop(life)
        if life.host is not HostState.HELD:
            return False
        if life.is_held:
            self.release_host(life)
        else:
            life.host = HostState.NONE  # it was read ahead: there is nothing to let go
        return True

    def release_host(self, life: AdapterState, *, evicted: bool = False) -> None:
        self.host.pick(life.key, evicted=evicted)
        life.host = HostState.RELEASING
        self.command(ReleasePages(life.key, life.attempt))

    def _unloaded(self, life: AdapterState) -> bool:
        """Nothing is left of it in memory; whoever waits for it may claim again."""
        if not life.unloads or life.slot is not SlotState.NONE:
            return False
        if life.host is not HostState.NONE or life.image is not None:
            return False
        life.unloads = 0
        self.command(NotifyUnloaded(life.key))
        return True

    def _file_unwanted(self, life: AdapterState) -> bool:
        """Rule 5. With all spans here the fetch finishes: unverified bytes may be leased."""
        if life.file is not FileState.FETCHING or life.has_interest:
            return False
        if life.has_arrived:
            return False
        life.file = next_file_state(life.file, FileMove.UNWANTED)
        self.command(CancelFetch(life.key, life.attempt))
        return True

    def file_quiesced(self, life: AdapterState) -> bool:
        """Rule 4."""
        if life.file is not FileState.ENDING:
            return False
        if life.fetch_running or life.copying or life.host is not HostState.NONE:
            return False
        self.images.drop(life)
        life.file = next_file_state(life.file, FileMove.QUIESCED)
        life.needs = None
        life.fetched = 0
        return True

    def _fetch(self, life: AdapterState) -> bool:
        """Rule 6."""
        if life.file is not FileState.ABSENT or not life.waiters or self.closing:
            return False
        if life.slot is SlotState.RESIDENT:
            return False
        life.file = next_file_state(life.file, FileMove.FETCH)
        life.attempt += 1
        life.fetch_running = True
        self.command(StartFetch(life.key, life.attempt))
        return True

    def fail(self, life: AdapterState, error: LoraxError, waiters: list[int] | None = None) -> None:
        failed = tuple([w.id for w in life.waiters] if waiters is None else waiters)
        for waiter in failed:
            life.waiters.remove(waiter)
        if failed:
            self.command(FailWaiters(life.key, failed, error))

    def leave(self, life: AdapterState) -> None:
        """Pick the slot: it takes no new lease and goes with the last."""
        life.leaving = True
        self.notify_leaving(life)

    def notify_leaving(self, life: AdapterState) -> None:
        if life.grant is not None and not life.told:
            life.told = True
            self.command(NotifyLeaving(life.key, life.grant))

    def notify_stays(self, life: AdapterState) -> None:
        """Nobody wants it gone any more."""
        if self.closing or life.slot not in (SlotState.FILLING, SlotState.RESIDENT):
            return
        if life.grant is not None and life.told:
            life.told = False
            self.command(NotifyStays(life.key, life.grant))

    def drain(self, life: AdapterState, slot_state: SlotState) -> None:
        self.notify_leaving(life)
        life.slot = slot_state
        life.pins = 0

    def notify_broken(self, life: AdapterState, error: LoraxError) -> None:
        assert life.grant is not None
        life.broken = True
        self.command(BreakSlot(life.key, life.grant, error))

    def break_slot(
        self, life: AdapterState, error: LoraxError, states: tuple[SlotState, ...]
    ) -> None:
        if life.slot in states:
            self.notify_broken(life, error)
            self.drain(life, next_slot_state(life.slot, SlotMove.FILE_FAILED))

    def distrust(self, life: AdapterState, error: LoraxError) -> None:
        """Its fetch failed: nothing that came of it may be used, or stay."""
        self.fail(life, error)
        if life.slot is SlotState.DRAINING:
            life.broken = True  # nobody holds it any more, but there it is
        self.break_slot(life, error, (SlotState.FILLING, SlotState.RESIDENT))

    def lose(self, life: AdapterState, error: LoraxError) -> None:
        was_present = life.file is FileState.PRESENT
        life.file = next_file_state(life.file, FileMove.LOST)
        if was_present:
            self.fail(life, error)
            self.break_slot(life, error, (SlotState.FILLING,))
