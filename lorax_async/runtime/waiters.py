"""Calls that wait: for an adapter to reach a tier, or to leave the device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from itertools import count

from lorax_async.errors import AdapterInUseError, AdapterTimeoutError, LoraxError
from lorax_async.events import Hit
from lorax_async.lifecycle.adapter_state import FileState, SlotGrant, SlotState, Waiter, WantedTier
from lorax_async.lifecycle.commands import Command
from lorax_async.lifecycle.lifecycle import Lifecycle
from lorax_async.runtime.leases import Lease, LeaseTable
from lorax_async.telemetry import Telemetry
from lorax_async.types import AdapterKey, TensorsKey


@dataclass(frozen=True, slots=True)
class PendingLoad:
    """One waiter for an adapter; `future` resolves to its lease, or None for a prefetch."""

    key: AdapterKey
    waiter: int
    future: asyncio.Future[Lease | None]


class WaiterTable:
    """The waiters of a loader, and their futures. On the loop.

    `execute` carries out the lifecycle's commands. `raise_priority` is called with each key that
    has a new foreground waiter. `in_memory` returns whether a host copy of an adapter's tensors
    exists.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        lease_table: LeaseTable,
        telemetry: Telemetry,
        execute: Callable[[list[Command]], None],
        raise_priority: Callable[[AdapterKey], None],
    ) -> None:
        self._lifecycle = lifecycle
        self._lease_table = lease_table
        self._telemetry = telemetry
        self._execute = execute
        self._raise_priority = raise_priority
        self._numbers = count(1)
        self._loads: dict[int, asyncio.Future[Lease | None]] = {}
        self._unloads: dict[AdapterKey, list[asyncio.Future[None]]] = {}
        self.in_memory: Callable[[AdapterKey], bool] = lambda key: False  # noqa: ARG005

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
        hit = self._nearest_tier(key) if foreground else None
        loop = asyncio.get_running_loop()
        pending = PendingLoad(key, next(self._numbers), loop.create_future())
        self._loads[pending.waiter] = pending.future
        waiter = Waiter(pending.waiter, tier, loop.time(), foreground, priority, beside, preempts)
        self._execute(self._lifecycle.want(key, waiter))
        if hit is not None:
            self._raise_priority(key)
            state = self._lifecycle.states.get(key)
            filling = state is not None and state.slot is SlotState.FILLING
            stage = "copy" if filling else self._lifecycle.stage(key)
            self._telemetry.count_hit(key, hit, stage)
        return pending

    def lease_resident(self, key: AdapterKey) -> Lease | None:
        """Return a lease without waiting if the adapter is resident now, else None."""
        lease = self._lease_table.try_lease(key)
        if lease is not None:
            self._raise_priority(key)
            self._telemetry.count_hit(key, "device", "ready")
        return lease

    def _nearest_tier(self, key: AdapterKey) -> Hit:
        state = self._lifecycle.states.get(key)
        if state is not None and state.slot is SlotState.RESIDENT and not state.departing:
            return "device"
        if self.in_memory(key) or (state is not None and state.in_host):
            return "host"
        opened = state is not None and state.file is FileState.PRESENT
        return "disk" if opened or isinstance(key, TensorsKey) else "source"

    def abandon(self, pending: PendingLoad) -> None:
        """Withdraw the waiter, and end its lease if it got one. Idempotent."""
        self._loads.pop(pending.waiter, None)
        self._execute(self._lifecycle.withdraw(pending.key, pending.waiter))
        future = pending.future
        if future.done() and not future.cancelled() and future.exception() is None:
            lease = future.result()
            if lease is not None:
                lease.end()

    def serve(self, key: AdapterKey, waiter: int, grant: SlotGrant | None) -> None:
        """Give a waiter its lease, or None without `grant`; end the lease if it was cancelled."""
        lease = self._lease_table.new_lease(key) if grant is not None else None
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
        self._execute(self._lifecycle.unload(key))
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
                self._execute(self._lifecycle.withdraw_unload(key))

    def unloaded(self, key: AdapterKey) -> None:
        """Return from all calls of `unload`."""
        for gone in self._unloads.pop(key, ()):
            if not gone.done():
                gone.set_result(None)

    def _unload_error(self, key: AdapterKey, seconds: float) -> LoraxError:
        leases = self._lease_table.leases.get(key, ())
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
