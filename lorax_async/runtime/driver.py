"""The only bridge between deciding and doing.

Commands of the lifecycle become named tasks (`Files`), copies in I/O threads, and news for waiters
and leases (`Tenants`); what comes back goes into the lifecycle as outcomes. An exception that
escapes fails its adapter with `InternalError`; it never reaches the embedding program.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from time import monotonic

import torch

from lorax_async.adapter import AdapterKey
from lorax_async.core import commands
from lorax_async.core.commands import Command
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.core.transfer_plan import TransferPlan
from lorax_async.core.transitions import FileState
from lorax_async.errors import AdapterFormatError, FetchError, InternalError, LoraxError
from lorax_async.events import BytesMoved
from lorax_async.io.inbox import Inbox, running_loop
from lorax_async.io.ports import Device, Source
from lorax_async.io.transfer import Transfer
from lorax_async.runtime.actions import Actions
from lorax_async.runtime.copies import Copies, CopyOutcome
from lorax_async.runtime.files import Files
from lorax_async.runtime.interest import Interest
from lorax_async.runtime.journal import Journal
from lorax_async.runtime.planning import Planner
from lorax_async.runtime.retiring import Retiring
from lorax_async.runtime.tenancy import Lease
from lorax_async.runtime.tenants import Tenants
from lorax_async.tracing.recorder import Tracer

_logger = logging.getLogger("lorax_async")


class Driver:
    """Carries out what the lifecycle decides, for one loader on one event loop."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        *,
        source: Source,
        device: Device,
        transfer: Transfer,
        planner: Planner,
        num_layers: int,
        io_threads: int,
        metadata_threads: Executor,
        images: torch.Tensor,
        tracer: Tracer,
        before_use: bool = False,
    ) -> None:
        self.lifecycle = lifecycle
        self.device = device
        self.journal = Journal(tracer)
        self.files = Files(
            source, planner, metadata_threads, self, self.journal, before_use=before_use
        )
        self.tenants = Tenants(num_layers, self._lease_ended, self._lease_quiet)
        self.interest = Interest(lifecycle, self.tenants, self._hear_and_obey, self.files.hasten)
        self.retiring = Retiring(lifecycle, self._obey)
        self._loop = asyncio.get_running_loop()
        self._inbox: Inbox[Callable[[], None]] = Inbox(self._loop, self._tell)
        self._copies = Copies(
            self.files,
            self.tenants,
            transfer,
            self._copied,
            self._wiped,
            threads=io_threads,
            low_water=lifecycle.budgets.device.copies_free // 2,
            images=images,
        )
        self._actions = Actions(
            lifecycle.lives,
            device=device,
            files=self.files,
            tenants=self.tenants,
            copies=self._copies,
            journal=self.journal,
            clock=monotonic,
        )
        self._commands: deque[Command] = deque()
        self._obeying = self._telling = False
        self._alarm: asyncio.TimerHandle | None = None
        self._due: float | None = None
        self._rested = asyncio.Event()

    # -- ending ------------------------------------------------------------------------------------

    async def close(self, error: LoraxError, timeout: float) -> None:
        """Fail waiters, wait for leases, revoke those that are left at the deadline.

        A kernel that still runs is waited for in any case: its memory cannot be taken back.
        """
        try:
            self.files.begin_close()
            self._obey(self.lifecycle.close(error))
            await self._vacate(timeout)
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
            self._copies.stop()
            await self.files.stop()

    def join(self) -> None:
        """Wait for the I/O threads after `close`. Blocks."""
        self._copies.join()

    async def _vacate(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self._at_rest()
        except TimeoutError:
            for lease in [lease for held in self.tenants.leases.values() for lease in held]:
                lease.end("the loader was closed")
            await self._at_rest()

    async def _at_rest(self) -> None:
        while not self.lifecycle.at_rest:
            self._rested.clear()
            await self._rested.wait()

    def forget(self, key: AdapterKey) -> None:
        """Know nothing of an adapter that is idle."""
        self._obey(self.lifecycle.forget(key))

    # -- outcomes ---------------------------------------------------------------------------------

    def header_checked(
        self, key: AdapterKey, attempt: int, plan: TransferPlan, *, holdable: bool
    ) -> None:
        self.journal.checked(key, monotonic())
        self.interest.calls.checked(key)
        needs = plan.needs(holdable=holdable)
        self._decide(key, lambda: self.lifecycle.header_checked(key, attempt, needs))

    def span_fetched(self, key: AdapterKey, attempt: int, group: int) -> None:
        self._decide(key, lambda: self.lifecycle.span_fetched(key, attempt, group))

    def published(self, key: AdapterKey, attempt: int) -> None:
        self.tenants.verified(key, self.files.verifications[key])
        self._decide(key, lambda: self.lifecycle.published(key, attempt))
        self._actions.close_idle_reader(key)

    def fetch_failed(self, key: AdapterKey, attempt: int, error: LoraxError) -> None:
        self._decide(key, lambda: self.lifecycle.fetch_failed(key, attempt, error))

    def populated(self, key: AdapterKey, attempt: int) -> None:
        self._decide(key, lambda: self.lifecycle.populated(key, attempt))

    def released(self, key: AdapterKey, attempt: int) -> None:
        self._decide(key, lambda: self.lifecycle.released(key, attempt))

    def lost(self, key: AdapterKey, attempt: int, error: LoraxError) -> None:
        self._decide(key, lambda: self.lifecycle.lost(key, attempt, error))

    def _decide(self, key: AdapterKey, decide: Callable[[], list[Command]]) -> None:
        """Let an outcome have its consequences; a fault of ours in it fails this adapter alone."""
        try:
            decided = decide()
        except Exception as problem:
            _logger.exception("an outcome of an adapter was not understood")
            error = InternalError(f"an outcome was not understood: {problem!r}", key=key)
            error.__cause__ = problem
            waiters = [waiter.id for waiter in self.lifecycle.lives[key].waiters]
            for waiter in waiters:
                self._obey(self.lifecycle.withdraw(key, waiter))
            self.tenants.fail(waiters, error)
        else:
            self._obey(decided)

    def _copied(self, outcome: CopyOutcome) -> None:
        key = outcome.command.key
        self.lifecycle.note_time(self._loop.time())
        self.journal.spent("stage", outcome.staging_seconds, outcome.staged_nbytes)
        self.journal.spent("copy", outcome.copy_seconds, outcome.nbytes if not outcome.error else 0)
        if outcome.error is None:
            self.journal.count("bytes_moved", outcome.nbytes)
            if self.journal.has_subscribers:
                self._actions.tell(
                    BytesMoved, key, slot=outcome.command.grant.slot, nbytes=outcome.nbytes
                )
            self._decide(key, lambda: self.lifecycle.copy_done(key, outcome.command.group))
        else:
            error = outcome.error
            here = self.lifecycle.lives[key].file is not FileState.FETCHING
            lost = here and isinstance(error, FetchError)
            if isinstance(error, AdapterFormatError):
                self.files.refuse_weights(key, error)
            self._decide(key, lambda: self.lifecycle.copy_failed(key, error, file_lost=lost))

    def _wiped(self, key: AdapterKey) -> None:
        self._on_loop(lambda: self._decide(key, lambda: self.lifecycle.wiped(key)))

    def _lease_ended(self, lease: Lease, in_use: bool, soon: bool) -> None:
        def tell() -> None:
            try:
                self.tenants.end_lease(lease)
            finally:
                self._obey(self.lifecycle.end_lease(lease.tenancy.key, in_use=in_use))

        if soon:
            self._inbox.put(tell)
        else:
            self._on_loop(tell)

    def _lease_quiet(self, lease: Lease) -> None:
        self._on_loop(lambda: self._obey(self.lifecycle.end_use(lease.tenancy.key)))

    def _on_loop(self, tell: Callable[[], None]) -> None:
        # A finalizer may run in the midst of any of these, and a subscriber's call within one.
        busy = self._telling or self._obeying or self.lifecycle.deciding
        if busy or running_loop() is not self._loop:
            self._inbox.put(tell)
        else:
            self._tell(tell)

    def _tell(self, tell: Callable[[], None]) -> None:
        self._telling = True
        try:
            tell()
        finally:
            self._telling = False

    # -- commands ---------------------------------------------------------------------------------

    def _hear_and_obey(self, decided: list[Command]) -> None:
        """A caller is here: what has been copied meanwhile concerns it."""
        self._obey(decided)
        self._copies.hear()

    def _obey(self, decided: list[Command]) -> None:
        """Carry out commands in order. What a subscriber causes meanwhile comes after them."""
        self._commands.extend(decided)
        if self._obeying:
            return
        self._obeying = True
        try:
            while self._commands:
                self._carry_out(self._commands.popleft())
        finally:
            self._obeying = False
        self.retiring.look()
        self._set_alarm()
        self._rested.set()

    def _carry_out(self, command: Command) -> None:
        """A fault of ours in one command must not leave an outcome out, nor stop the others."""
        try:
            self._actions.carry_out(command)
        except Exception as problem:
            _logger.exception("carrying out %s failed", type(command).__name__)
            error = InternalError(f"{type(command).__name__} failed: {problem!r}")
            error.__cause__ = problem
            if isinstance(command, commands.Copy):
                self._commands += self.lifecycle.copy_failed(command.key, error)
            elif isinstance(command, commands.Wipe):
                self._commands += self.lifecycle.wiped(command.key)
            elif isinstance(command, commands.Serve):
                self.tenants.fail([command.waiter], error)
                if command.grant is not None:
                    self._commands += self.lifecycle.end_lease(command.key)
            elif isinstance(command, commands.Populate):
                self._commands += self.lifecycle.lost(command.key, command.attempt, error)
            elif isinstance(command, commands.Release):
                self._commands += self.lifecycle.released(command.key, command.attempt)
            elif isinstance(command, commands.Fetch):
                failed = self.lifecycle.fetch_failed(command.key, command.attempt, error)
                self._commands += failed

    def _set_alarm(self) -> None:
        """One timer for the head of the queue; adapters that do not wait have none."""
        due = self.lifecycle.next_tick
        if due == self._due:
            return
        self._due = due
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None if due is None else self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._alarm = self._due = None
        self._obey(self.lifecycle.tick(self._loop.time()))
