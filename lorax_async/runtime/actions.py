"""What each command of the lifecycle makes happen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorax_async.adapter import AdapterKey
from lorax_async.core import commands
from lorax_async.core.commands import Command
from lorax_async.core.life import Life
from lorax_async.core.transitions import FileState, SlotState
from lorax_async.errors import InternalError, LoraxError
from lorax_async.events import Event, Failed, LayerReady, Leaving, Resident, SlotGranted, SlotId
from lorax_async.io.ports import Device
from lorax_async.runtime.calls import kind_of
from lorax_async.runtime.copies import Copies
from lorax_async.runtime.files import Files
from lorax_async.runtime.journal import Journal
from lorax_async.runtime.tenants import Tenants
from lorax_async.tracing.recorder import Stays


class Actions:
    """Carries out single commands, on the loop, without waiting.

    `lives` are the lifecycle's, to be looked at only; `clock` gives the time of events in seconds.
    """

    def __init__(
        self,
        lives: Mapping[AdapterKey, Life],
        *,
        device: Device,
        files: Files,
        tenants: Tenants,
        copies: Copies,
        journal: Journal,
        clock: Callable[[], float],
    ) -> None:
        self._lives = lives
        self._device = device
        self._files = files
        self._tenants = tenants
        self._copies = copies
        self._journal = journal
        self._clock = clock
        self._stays = Stays(journal.tracer)

    def carry_out(self, command: Command) -> None:  # noqa: C901, PLR0912, PLR0915 - a case per command
        key = command.key
        match command:
            case commands.Copy():
                self._copies.start(command)
            case commands.TellReady():
                self._tell_ready(command)
            case commands.Serve():
                self._tenants.serve(key, command.waiter, command.grant)
            case commands.Fetch():
                self._journal.count("fetches")
                kinds = self._lives[key].waiters.kinds
                urgent = any(foreground for _, foreground in kinds)
                self._files.start_fetch(key, command.attempt, urgent=urgent)
            case commands.CancelFetch():
                self._files.cancel_fetch(key)
            case commands.Populate():
                self._files.start_populate(key, command.attempt)
            case commands.Release():
                self._files.start_release(key, command.attempt)
            case commands.TakeSlot():
                self._take_slot(command)
            case commands.Wipe():
                self._copies.wipe(command)
            case commands.ClearColumn():
                self._clear_column(command)
            case commands.Fail():
                self._fail(command)
            case commands.BreakSlot():
                self._tell_failed(key, command.error)
                self._tenants.tenancy(key).fail(self._located(key, command.error))
            case commands.TellLeaving():
                self._journal.count("departures")
                self._stays.leaving(command.grant.slot.index)
                self.tell(Leaving, key, slot=command.grant.slot)
            case commands.TellStays():
                if self._tenants.tenancy(key).complete:  # else it is told with the last layer
                    self.tell(Resident, key, slot=command.grant.slot)
            case commands.TellUnloaded():
                self._tenants.unloaded(key)
            case commands.Drop():
                self._files.forget(key)
            case commands.Forget():
                self._files.forget(key)
                self._journal.forget(key)
            case _:
                raise InternalError(f"no way to carry out {command}")

    def _take_slot(self, command: commands.TakeSlot) -> None:
        self._journal.granted(command.key, command.since, self._clock())
        plan, life = self._files.plans[command.key], self._lives[command.key]
        tenancy = self._tenants.move_in(
            command.key,
            command.grant,
            plan,
            self._files.verifications.get(command.key),
            lambda: life.has_arrived,
        )
        self._stays.granted(command.grant.slot.index, command.key, plan.nbytes)
        self.tell(
            SlotGranted,
            command.key,
            slot=command.grant.slot,
            nbytes=plan.nbytes,
            layers=tenancy.layers,
        )

    def _clear_column(self, command: commands.ClearColumn) -> None:
        try:
            self._device.clear_column(command.grant.slot.index)
        finally:  # the slot is no longer the adapter's, whatever the device says
            self._stays.left(command.grant.slot.index)
            self._tenants.move_out(command.key)
            self._journal.shorten(command.key)
            self.close_idle_reader(command.key)

    def _fail(self, command: commands.Fail) -> None:
        self._tell_failed(command.key, command.error)
        self._tenants.fail(command.waiters, self._located(command.key, command.error))

    def _tell_failed(self, key: AdapterKey, error: LoraxError) -> None:
        """Once, though waiters and lease holders are told apart."""
        latest = self._journal.story(key)[-1:]
        if latest and isinstance(latest[0], Failed) and latest[0].error is error:
            return
        self._journal.failed(kind_of(error))
        life = self._lives.get(key)
        grant = life.grant if life is not None else None
        if grant is not None:
            self._stays.failed(grant.slot.index, error)
        self.tell(Failed, key, slot=grant.slot if grant else None, error=error)

    def _located(self, key: AdapterKey, error: LoraxError) -> LoraxError:
        life = self._lives.get(key)  # it may be forgotten by now: a close ends all at once
        attempt = life.attempt if life is not None else 0
        return error.located(key=key, attempt=attempt, story=self._journal.story(key))

    def _tell_ready(self, command: commands.TellReady) -> None:
        tenancy = self._tenants.tenancy(command.key)
        slot = command.grant.slot
        self._stays.ready(slot.index, tenancy.layers, command.watermark, last=command.last)
        tenancy.advance(command.watermark)
        if self._journal.has_subscribers:
            layer = tenancy.layers[command.watermark - 1]
            self.tell(LayerReady, command.key, slot=slot, layer=layer)
        if command.last:
            self._journal.count("loads")
            self.tell(Resident, command.key, slot=slot)
            life = self._lives.get(command.key)
            if life is not None and life.told:  # or that would say that it stays
                self.tell(Leaving, command.key, slot=slot)
            self.close_idle_reader(command.key)

    def close_idle_reader(self, key: AdapterKey) -> None:
        """Descriptors are held while bytes are read, and no longer."""
        life = self._lives.get(key)
        busy = life is not None and (
            life.file is FileState.FETCHING or life.slot is SlotState.FILLING or life.copying
        )
        if not busy:
            self._files.close_reader(key)

    def tell(self, kind: type[Event], key: AdapterKey, **news: Any) -> None:
        life = self._lives.get(key)
        attempt = life.attempt if life is not None else 0
        slot: SlotId | None = news.pop("slot", None)
        self._journal.tell(kind(key, slot, attempt, self._clock(), **news))
