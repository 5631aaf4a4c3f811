"""Waiters for adapters, pins and unloads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from lorax_async.errors import AdapterInUseError, AdapterTimeoutError
from lorax_async.events import Hit
from lorax_async.lifecycle.adapter_state import SlotGrant, Waiter, WantedTier
from lorax_async.lifecycle.commands import Command
from lorax_async.lifecycle.lifecycle import Lifecycle
from lorax_async.lifecycle.transitions import FileState, SlotState
from lorax_async.runtime.leases import Lease, LeaseTable
from lorax_async.runtime.telemetry import Telemetry
from lorax_async.types import AdapterKey, TensorsKey


@dataclass(frozen=True, slots=True)
class PendingLoad:
    """One waiter for an adapter; `future` resolves to its lease, or None for a prefetch."""

    key: AdapterKey
    waiter: int
    future: asyncio.Future[Lease | None]


class WaiterTable:
    """Adds and removes waiters, leases and pins in the lifecycle.

    `execute` carries out the commands that it returns. `raise_priority` is called with each key
    that has a new foreground waiter. `in_memory` returns whether a host copy of an adapter's
    tensors exists.
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
        self._pins: dict[object, tuple[AdapterKey, SlotGrant]] = {}
        self.in_memory: Callable[[AdapterKey], bool] = lambda key: False  # noqa: ARG005

    def begin(
        self, key: AdapterKey, tier: WantedTier, *, foreground: bool = True, priority: int = 0
    ) -> PendingLoad:
        """Add a waiter for the adapter at `tier`; await its future, or `abandon` it."""
        hit = self._nearest_tier(key) if foreground else None
        waiter, future = self._lease_table.add_waiter()
        since = asyncio.get_running_loop().time()
        self._execute(self._lifecycle.want(key, Waiter(waiter, tier, since, foreground, priority)))
        if hit is not None:
            self._raise_priority(key)
            state = self._lifecycle.states.get(key)
            filling = state is not None and state.slot is SlotState.FILLING
            stage = "copy" if filling else self._lifecycle.stage(key)
            self._telemetry.count_hit(key, hit, stage)
        return PendingLoad(key, waiter, future)

    def _nearest_tier(self, key: AdapterKey) -> Hit:
        state = self._lifecycle.states.get(key)
        if state is not None and state.slot is SlotState.RESIDENT and not state.departing:
            return "device"
        if self.in_memory(key) or (state is not None and state.in_host):
            return "host"
        opened = state is not None and state.file is FileState.PRESENT
        return "disk" if opened or isinstance(key, TensorsKey) else "source"

    def abandon(self, pending_load: PendingLoad) -> None:
        """Withdraw the waiter, and end its lease if it got one. Idempotent."""
        self._lease_table.drop_waiter(pending_load.waiter)
        self._execute(self._lifecycle.withdraw(pending_load.key, pending_load.waiter))
        future = pending_load.future
        if future.done() and not future.cancelled() and future.exception() is None:
            lease = future.result()
            if lease is not None:
                lease.end()

    def try_lease(self, key: AdapterKey) -> Lease | None:
        """Return a lease if the adapter is resident, else None."""
        if self._lifecycle.take_lease(key) is None:
            return None
        self._telemetry.hits["device"] += 1
        return self._lease_table.new_lease(key)

    def share(self, lease: Lease) -> Lease:
        """Return another lease on the same slot occupancy; raise if `lease` is not usable."""
        lease.check()
        self._lifecycle.add_lease(lease.occupancy.key)
        shared = self._lease_table.new_lease(lease.occupancy.key)
        shared.stale = lease.stale
        if lease.promise is not None:
            lease.promise.join(shared)
        return shared

    def pin(self, name: object, lease: Lease) -> bool:
        """Pin the leased adapter for `name`, in place of its earlier pin.

        Return False, without effect, if the adapter is leaving.
        """
        lease.check()
        key, grant = lease.occupancy.key, lease.occupancy.grant
        if self._pins.get(name) == (key, grant):
            return True
        if not self._lifecycle.pin(key):
            return False
        self.unpin(name)
        self._pins[name] = (key, grant)
        return True

    def pinning_names(self, matches: Callable[[object], bool]) -> list[object]:
        """Return the names with a pin for which `matches` is true."""
        return [name for name in self._pins if matches(name)]

    def unpin(self, name: object) -> bool:
        """Remove the pin of `name`; return whether it had one."""
        pinned = self._pins.pop(name, None)
        if pinned is None:
            return False
        self._execute(self._lifecycle.unpin(*pinned))
        return True

    async def unload(self, key: AdapterKey, seconds: float) -> None:
        """Wait at most `seconds` until the adapter has left device and host memory.

        Raise `AdapterInUseError` if it is still leased then, `AdapterTimeoutError` if it is busy
        otherwise; it stays in both cases.
        """
        for name in [name for name, (pinned, _) in self._pins.items() if pinned == key]:
            del self._pins[name]
        gone = self._lease_table.add_unload(key)
        self._execute(self._lifecycle.unload(key))
        try:
            async with asyncio.timeout(seconds):
                await gone
        except TimeoutError:
            if gone.cancelled():  # else the unload ended in the same turn of the loop
                raise self._unload_error(key, seconds) from None
        finally:
            if self._lease_table.drop_unload(key, gone):
                self._execute(self._lifecycle.withdraw_unload(key))

    def _unload_error(
        self, key: AdapterKey, seconds: float
    ) -> AdapterInUseError | AdapterTimeoutError:
        holders = sorted(
            lease.holder or "no task" for lease in self._lease_table.leases.get(key, ())
        )
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
