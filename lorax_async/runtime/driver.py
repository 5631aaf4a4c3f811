"""The driver: executes the lifecycle's commands and returns their outcomes to it.

Commands become tasks (`FetchTasks`), copies in I/O threads (`CopyThreads`), and results for calls
that wait (`WaiterTable`) and leases (`LeaseTable`). An unexpected exception fails its adapter with
`InternalError`; it never reaches the embedding program.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Executor
from functools import partial
from itertools import count
from time import monotonic
from typing import Any, NamedTuple

import torch

from lorax_async.concurrency import Inbox, running_loop
from lorax_async.devices.transfer import CopyRun, CopyThreads, GroupTransfer
from lorax_async.errors import (
    AdapterFormatError,
    AdapterInUseError,
    AdapterTimeoutError,
    FetchError,
    InternalError,
    LoraxError,
    as_lorax_error,
)
from lorax_async.events import (
    BytesMoved,
    Event,
    Failed,
    Hit,
    LayerReady,
    Leaving,
    Resident,
    SlotFreed,
    SlotGranted,
    SlotId,
)
from lorax_async.lifecycle import commands
from lorax_async.lifecycle.adapter_state import FileState, SlotGrant, SlotState, Waiter, WantedTier
from lorax_async.lifecycle.commands import Command
from lorax_async.lifecycle.lifecycle import Lifecycle
from lorax_async.runtime.fetches import FetchTasks, Outcome, TransferPlanner
from lorax_async.runtime.host_tier import HostTier, MapTasks
from lorax_async.runtime.leases import Lease, LeaseTable, PinTable
from lorax_async.sources.base import Source
from lorax_async.telemetry import Telemetry
from lorax_async.types import AdapterKey, TensorsKey

UnloadCallback = Callable[[AdapterKey], None]
"""Called once the adapter has left device and host memory."""

FAST_BYTES_PER_SECOND = 1e9
"""Faster than a thread reads from most disks, and slower than from the page cache."""

_logger = logging.getLogger("lorax_async")


class Driver:
    """Executes the lifecycle's commands for one loader, on its event loop."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        *,
        source: Source,
        telemetry: Telemetry,
        transfer: GroupTransfer,
        planner: TransferPlanner,
        num_layers: int,
        io_threads: int,
        metadata_threads: Executor,
        images: torch.Tensor,
        host_bytes: int,
        starvation_age: float,
        before_use: bool = False,
    ) -> None:
        self.lifecycle = lifecycle
        self.device = transfer.device
        self.telemetry = telemetry
        self.lease_table = LeaseTable(lifecycle, num_layers, self._lease_ended, self._lease_quiet)
        self.files = FetchTasks(
            source=source,
            planner=planner,
            threads=metadata_threads,
            lifecycle=lifecycle,
            telemetry=telemetry,
            decide=self._decide_fetch,
            verified=self.lease_table.verified,
            before_use=before_use,
        )
        self.map_tasks = MapTasks(source, metadata_threads)
        self.host_tier = self.map_tasks.host_tier = HostTier(
            host_bytes, lifecycle, self.map_tasks, self._decide, level=starvation_age
        )
        self.waiter_table = WaiterTable(self)
        self.pins = PinTable(lifecycle, self.execute)
        self._loop = asyncio.get_running_loop()
        self._inbox: Inbox[Callable[[], None]] = Inbox(self._loop, self._report)
        self._copied: Inbox[CopyRun] = Inbox(self._loop, self._run_ended)
        self._copies = CopyThreads(
            transfer, self._copied, self._wiped, threads=io_threads, images=images
        )
        self._doubted: dict[AdapterKey, list[CopyRun]] = {}
        """Runs whose weights failed a check before it was known whether they are the source's."""
        self._commands: deque[Command] = deque()
        self._executing = self._reporting = self._unloading = False
        self._unload_callbacks: dict[AdapterKey, UnloadCallback] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._due: float | None = None
        self._rested = asyncio.Event()

    # -- ending ------------------------------------------------------------------------------------

    async def close(self, error: LoraxError, timeout: float) -> None:
        """Fail waiters with `error`, wait `timeout` seconds for leases, then revoke the others.

        Running kernels are waited for in any case: their memory cannot be reclaimed.
        """
        try:
            self.map_tasks.begin_close()
            self._execute(self.lifecycle.close(error))
            await self._vacate(timeout)
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
            self._copies.stop()
            await self.map_tasks.stop()
            await self.files.stop()

    def join(self) -> None:
        """Wait for the I/O threads after `close`. Blocks."""
        self._copies.join()

    async def _vacate(self, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout):
                await self._at_rest()
        except TimeoutError:
            for lease in [lease for held in self.lease_table.leases.values() for lease in held]:
                lease.end("the loader was closed")
            await self._at_rest()

    async def _at_rest(self) -> None:
        while not self.lifecycle.at_rest:
            self._rested.clear()
            await self._rested.wait()

    def forget(self, key: AdapterKey) -> None:
        """Drop all state of an idle adapter."""
        self._execute(self.lifecycle.forget(key))

    # -- unloading ---------------------------------------------------------------------------------

    def unload_when_idle(self, key: AdapterKey, unloaded: UnloadCallback) -> None:
        """Unload the adapter, now or after its last lease, pin and waiter."""
        self._unload_callbacks[key] = unloaded
        self._unload_idle()

    def keep(self, key: AdapterKey) -> None:
        """Cancel `unload_when_idle`."""
        self._unload_callbacks.pop(key, None)

    def _unload_idle(self) -> None:
        """Unload what has become idle. Called after every change of the lifecycle."""
        if not self._unload_callbacks or self._unloading:
            return
        self._unloading = True
        try:
            for key in tuple(self._unload_callbacks):
                life = self.lifecycle.states.get(key)
                if life is not None and (life.leases or life.pins or life.waiters):
                    continue
                if life is not None and life.takes_memory and not life.unloads:
                    self._execute(self.lifecycle.unload(key))
                if life is None or life.is_idle:
                    unloaded = self._unload_callbacks.pop(key, None)
                    if unloaded is not None:  # else a subscriber has called `keep`
                        unloaded(key)
        finally:
            self._unloading = False

    # -- outcomes ---------------------------------------------------------------------------------

    def _decide(self, key: AdapterKey, outcome: Outcome) -> None:
        """Execute what the lifecycle decides on an outcome; a bug in it fails this adapter only."""
        try:
            decided = outcome()
        except Exception as problem:
            _logger.exception("the lifecycle failed on an outcome")
            error = InternalError.caused_by(problem, "the lifecycle failed on an outcome", key=key)
            waiters = [waiter.id for waiter in self.lifecycle.states[key].waiters]
            for waiter in waiters:
                self._execute(self.lifecycle.withdraw(key, waiter))
            self.waiter_table.fail(waiters, error)
        else:
            self._execute(decided)

    def _run_ended(self, run: CopyRun) -> None:
        """Report a run of groups that ended, with those of its slot that are next in the inbox."""
        runs, following = [run], self._copied.items
        while run.error is None and following and following[0].slot is run.slot:
            if following[0].error is not None:
                break
            runs.append(following.popleft())
        copies, error = [run.command for run in runs], run.error
        key, slot = copies[0].key, copies[0].grant.slot
        staging_seconds = sum([run.staging_seconds for run in runs])
        copy_seconds = sum([run.copy_seconds for run in runs])
        self.lifecycle.note_time(self._loop.time())
        self.telemetry.add_time("stage", staging_seconds)
        self.telemetry.add_time("copy", copy_seconds)
        if error is None:
            nbytes = sum([copy.nbytes for copy in copies])
            groups = [group for copy in copies for group in copy.groups]
            converted = run.slot.plan.converted_bytes
            self.telemetry.add_bytes("stage", sum(map(converted.__getitem__, groups)))
            self.telemetry.add_bytes("copy", nbytes)
            if self.telemetry.has_subscribers:
                self._publish(BytesMoved, key, slot=slot, nbytes=nbytes)
            fast = nbytes > (staging_seconds + copy_seconds) * FAST_BYTES_PER_SECOND
            self._decide(key, partial(self.lifecycle.copy_done, *copies, fast=fast))
            return
        if isinstance(error, AdapterFormatError):
            self.files.refuse_weights(key, error)
            if self.files.is_fetching(key):
                self._doubted.setdefault(key, []).append(run)
                return
        self._fail_run(run, error)

    def _fail_run(self, run: CopyRun, error: LoraxError) -> None:
        key = run.command.key
        here = self.lifecycle.states[key].file is not FileState.FETCHING
        lost = here and isinstance(error, FetchError)
        self._decide(key, partial(self.lifecycle.copy_failed, run.command, error, file_lost=lost))

    def _decide_fetch(self, key: AdapterKey, outcome: Outcome) -> None:
        """Decide on an outcome of a fetch, and after its last one on runs that waited for it.

        If other bytes arrived than the source has, that is the error.
        """
        self._decide(key, outcome)
        if key in self._doubted and not self.files.is_fetching(key):
            for run in self._doubted.pop(key):
                assert run.error is not None
                self._fail_run(run, run.error)

    def _wiped(self, key: AdapterKey) -> None:
        self._on_loop(lambda: self._decide(key, partial(self.lifecycle.wiped, key)))

    def _lease_ended(self, lease: Lease, in_use: bool, soon: bool) -> None:
        def report() -> None:
            try:
                self.lease_table.end_lease(lease)
            finally:
                self._execute(self.lifecycle.end_lease(lease.occupancy.key, in_use=in_use))

        if soon:
            self._inbox.put(report)
        else:
            self._on_loop(report)

    def _lease_quiet(self, lease: Lease) -> None:
        self._on_loop(lambda: self._execute(self.lifecycle.end_use(lease.occupancy.key)))

    def _on_loop(self, report: Callable[[], None]) -> None:
        # Finalizers may run within any of these three, and so may a subscriber's calls.
        busy = self._reporting or self._executing or self.lifecycle.deciding
        if busy or running_loop() is not self._loop:
            self._inbox.put(report)
        else:
            self._report(report)

    def _report(self, report: Callable[[], None]) -> None:
        self._reporting = True
        try:
            report()
        finally:
            self._reporting = False

    # -- commands ---------------------------------------------------------------------------------

    def execute(self, decided: list[Command]) -> None:
        """Execute a caller's commands, and take the copies that ended, which may serve it."""
        self._execute(decided)
        self._copied.take()

    def _execute(self, decided: list[Command]) -> None:
        """Execute commands in order; those that a subscriber causes meanwhile come after them."""
        self._commands.extend(decided)
        if self._executing:
            return
        self._executing = True
        try:
            while self._commands:
                self._execute_one(self._commands.popleft())
        finally:
            self._executing = False
        self._unload_idle()
        self._set_alarm()
        self._rested.set()

    def _execute_one(self, command: Command) -> None:
        """Execute one command; a bug in it must not lose its outcome, nor stop the others."""
        try:
            self._perform(command)
        except Exception as problem:
            _logger.exception("executing %s failed", type(command).__name__)
            error = as_lorax_error(problem, f"{type(command).__name__} failed")
            if isinstance(command, commands.CopyGroups):
                self._commands += self.lifecycle.copy_failed(command, error)
            elif isinstance(command, commands.WipeExtents):
                self._commands += self.lifecycle.wiped(command.key)
            elif isinstance(command, commands.ServeWaiter):
                self.waiter_table.fail([command.waiter], error)
                if command.grant is not None:
                    self._commands += self.lifecycle.end_lease(command.key)
            elif isinstance(command, commands.PopulatePages):
                self.host_tier.waiting.pop(command.key, None)
                self._commands += self.lifecycle.lost(command.key, command.attempt, error)
            elif isinstance(command, commands.ReleasePages):
                self._commands += self.lifecycle.released(command.key, command.attempt)
            elif isinstance(command, commands.StartFetch):
                self._commands += self.lifecycle.fetch_failed(command.key, command.attempt, error)

    def _perform(self, command: Command) -> None:  # noqa: C901, PLR0912, PLR0915 - a case per command
        key = command.key
        match command:
            case commands.CopyGroups():
                self._copies.start(
                    command, self.lease_table.occupancies[key], self.files.reader(key)
                )
            case commands.NotifyReady():
                self._notify_ready(command)
            case commands.ServeWaiter():
                self.waiter_table.serve(key, command.waiter, command.grant)
            case commands.StartFetch():
                self.telemetry.count("fetches")
                kinds = self.lifecycle.states[key].waiters.kinds
                urgent = any(foreground for _, foreground in kinds)
                self.files.start_fetch(key, command.attempt, urgent=urgent)
            case commands.CancelFetch():
                self.files.cancel_fetch(key)
            case commands.PopulatePages():
                self.host_tier.populate(key, demoted=command.demoted)
            case commands.ReleasePages():
                self.host_tier.release(key)
            case commands.TakeSlot():
                self._take_slot(command)
            case commands.WipeExtents():
                self._copies.wipe(command)
            case commands.ClearColumn():
                self._clear_column(command)
            case commands.FailWaiters():
                self.waiter_table.fail(command.waiters, self._failed(key, command.error))
            case commands.BreakSlot():
                self.lease_table.occupancies[key].fail(self._failed(key, command.error))
            case commands.NotifyLeaving():
                self.telemetry.count("departures")
                self._publish(Leaving, key, slot=command.grant.slot)
            case commands.NotifyStays():
                if self.lease_table.occupancies[key].complete:  # else published with the last layer
                    self._publish(Resident, key, slot=command.grant.slot)
            case commands.NotifyUnloaded():
                self.waiter_table.unloaded(key)
            case commands.ForgetAdapter():
                self.files.forget(key)
                self.telemetry.forget(key)
            case _:
                raise InternalError(f"unknown command {command}")

    def _take_slot(self, command: commands.TakeSlot) -> None:
        key, grant, plan = command.key, command.grant, self.files.plans[command.key]
        self.telemetry.granted(key, command.since, monotonic())
        verification = self.files.verifications.get(key)
        occupancy = self.lease_table.occupy(key, grant, plan, verification)
        self._publish(
            SlotGranted, key, slot=grant.slot, nbytes=plan.nbytes, layers=occupancy.layers
        )

    def _clear_column(self, command: commands.ClearColumn) -> None:
        try:
            self.device.clear_column(command.grant.slot.index)
        finally:  # the slot is free even if the device raises
            self.lease_table.vacate(command.key)
            self.telemetry.shorten(command.key)
            self.files.close_idle_reader(command.key)
            if self.telemetry.has_subscribers:
                self._publish(SlotFreed, command.key, slot=command.grant.slot)

    def _failed(self, key: AdapterKey, error: LoraxError) -> LoraxError:
        """Return the error with its key, attempt and story; publish it first.

        It is published once, although waiters and lease holders fail by different commands.
        """
        latest = self.telemetry.story(key)[-1:]
        if not (latest and isinstance(latest[0], Failed) and latest[0].error is error):
            self.telemetry.count_failure(error)
            life = self.lifecycle.states.get(key)
            grant = life.grant if life is not None else None
            self._publish(Failed, key, slot=grant.slot if grant else None, error=error)
        story = self.telemetry.story(key)
        return error.located(key=key, attempt=self._attempt(key), story=story)

    def _notify_ready(self, command: commands.NotifyReady) -> None:
        occupancy = self.lease_table.occupancies[command.key]
        slot = command.grant.slot
        ready: list[Event] = []
        if self.telemetry.has_subscribers:
            for layer in occupancy.layers[occupancy.watermark : command.watermark]:
                ready.append(self._event(LayerReady, command.key, slot=slot, layer=layer))
                self.telemetry.note(ready[-1])  # before a pass sees the layer
        occupancy.advance(command.watermark)
        for event in ready:
            self.telemetry.publish(event)
        if occupancy.complete:
            self.telemetry.count("loads")
            if not self.files.is_fetching(command.key):  # else its digest may still be wrong
                self.lease_table.note_copied(command.key)
            self._publish(Resident, command.key, slot=slot)
            life = self.lifecycle.states.get(command.key)
            # After `Resident`, which alone would cancel it.
            if life is not None and life.leave_notified:
                self._publish(Leaving, command.key, slot=slot)
            self.files.close_idle_reader(command.key)

    def _publish(self, kind: type[Event], key: AdapterKey, **fields: Any) -> None:
        self.telemetry.publish(self._event(kind, key, **fields))

    def _event(
        self, kind: type[Event], key: AdapterKey, slot: SlotId | None = None, **fields: Any
    ) -> Event:
        return kind(key, slot, self._attempt(key), monotonic(), **fields)

    def _attempt(self, key: AdapterKey) -> int:
        life = self.lifecycle.states.get(key)  # None if closing has dropped its state
        return life.attempt if life is not None else 0

    def _set_alarm(self) -> None:
        """Set the one timer to the lifecycle's next deadline, if it has one."""
        due = self.lifecycle.next_tick
        if due == self._due:
            return
        self._due = due
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None if due is None else self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._alarm = self._due = None
        self._execute(self.lifecycle.tick(self._loop.time()))


# -- calls that wait -------------------------------------------------------------------------------


class PendingLoad(NamedTuple):
    """One waiter for an adapter; `future` resolves to its lease, or None for a prefetch."""

    key: AdapterKey
    waiter: int
    future: asyncio.Future[Lease | None]


class WaiterTable:
    """The calls that wait: for an adapter to reach a tier, or to leave the device. On the loop."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._numbers = count(1)
        self._loads: dict[int, asyncio.Future[Lease | None]] = {}
        self._unloads: dict[AdapterKey, list[asyncio.Future[None]]] = {}

    def __len__(self) -> int:
        return len(self._loads)

    def begin(
        self,
        key: AdapterKey,
        tier: WantedTier,
        *,
        foreground: bool = True,
        priority: int = 0,
        beside: Collection[AdapterKey] = (),
        preempts: bool = True,
    ) -> PendingLoad:
        """Add a waiter for the adapter at `tier`; await its future, or `abandon` it."""
        driver, loop = self._driver, asyncio.get_running_loop()
        hit = self._nearest_tier(key) if foreground else None
        pending = PendingLoad(key, next(self._numbers), loop.create_future())
        self._loads[pending.waiter] = pending.future
        waiter = Waiter(pending.waiter, tier, loop.time(), foreground, priority, beside, preempts)
        driver.execute(driver.lifecycle.want(key, waiter))
        if hit is not None:
            driver.files.raise_priority(key)
            state = driver.lifecycle.states.get(key)
            filling = state is not None and state.slot is SlotState.FILLING
            stage = "copy" if filling else driver.lifecycle.stage(key)
            driver.telemetry.count_hit(key, hit, stage)
        return pending

    def lease_resident(self, key: AdapterKey) -> Lease | None:
        """Return a lease without waiting if the adapter is resident now, else None."""
        lease = self._driver.lease_table.try_lease(key)
        if lease is not None:
            self._driver.files.raise_priority(key)
            self._driver.telemetry.count_hit(key, "device", "ready")
        return lease

    def _nearest_tier(self, key: AdapterKey) -> Hit:
        state = self._driver.lifecycle.states.get(key)
        if state is not None and state.slot is SlotState.RESIDENT and not state.departing:
            return "device"
        if isinstance(key, TensorsKey) or (state is not None and state.in_host):
            return "host"
        return "disk" if state is not None and state.file is FileState.PRESENT else "source"

    def abandon(self, pending: PendingLoad) -> None:
        """Withdraw the waiter, and end its lease if it got one. Idempotent."""
        self._loads.pop(pending.waiter, None)
        self._driver.execute(self._driver.lifecycle.withdraw(pending.key, pending.waiter))
        future = pending.future
        if future.done() and not future.cancelled() and future.exception() is None:
            lease = future.result()
            if lease is not None:
                lease.end()

    def serve(self, key: AdapterKey, waiter: int, grant: SlotGrant | None) -> None:
        """Give a waiter its lease, or None without `grant`; end the lease if it was cancelled."""
        lease = self._driver.lease_table.new_lease(key) if grant is not None else None
        future = self._loads.pop(waiter, None)
        if future is not None and not future.done():
            future.set_result(lease)
        elif lease is not None:
            lease.end()

    def fail(self, waiters: Iterable[int], error: LoraxError) -> None:
        for waiter in waiters:
            future = self._loads.pop(waiter, None)
            if future is not None and not future.done():
                future.set_exception(error.located())
                future.exception()  # a cancelled waiter does not retrieve it

    async def unload(self, key: AdapterKey, seconds: float) -> None:
        """Wait at most `seconds` until the adapter has left device and host memory.

        Raise `AdapterInUseError` if it is still leased then, `AdapterTimeoutError` if it is busy
        otherwise; it stays in both cases.
        """
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unloads.setdefault(key, []).append(gone)
        self._driver.execute(self._driver.lifecycle.unload(key))
        try:
            async with asyncio.timeout(seconds):
                await gone
        except TimeoutError:
            if gone.cancelled():  # else the unload ended in the same turn of the loop
                raise self._unload_error(key, seconds) from None
        finally:
            waiting = self._unloads.get(key, [])
            if gone in waiting:
                waiting.remove(gone)
                if not waiting:
                    del self._unloads[key]
                self._driver.execute(self._driver.lifecycle.withdraw_unload(key))

    def unloaded(self, key: AdapterKey) -> None:
        """Return from all calls of `unload`."""
        for gone in self._unloads.pop(key, ()):
            if not gone.done():
                gone.set_result(None)

    def _unload_error(self, key: AdapterKey, seconds: float) -> LoraxError:
        leases = self._driver.lease_table.leases.get(key, ())
        holders = sorted(lease.holder or "no task" for lease in leases)
        if not holders:
            problem = (
                f"it was not unloaded within {seconds:g} s: copies, kernels or holds have not ended"
            )
            return AdapterTimeoutError(problem, key=key, stage="ready")
        return AdapterInUseError(
            f"leases still held after {seconds:g} s: {len(holders)}, by {', '.join(holders)};"
            " release them, or unload with a longer timeout",
            key=key,
        )
