"""Waiters for adapters, pins and unloads, and the counts of calls."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args

from lorax_async.errors import AdapterInUseError, AdapterTimeoutError, LoraxError, Stage
from lorax_async.lifecycle.adapter_state import AdapterState, SlotGrant, Waiter, WantedTier
from lorax_async.lifecycle.commands import Command
from lorax_async.lifecycle.lifecycle import Lifecycle
from lorax_async.lifecycle.transitions import FileState, SlotState
from lorax_async.runtime.leases import Lease, LeaseTable
from lorax_async.types import AdapterKey, Ref, TensorsKey

_logger = logging.getLogger("lorax_async")

Hit = Literal["device", "host", "disk", "source"]
"""The nearest tier that has all of an adapter when a call wants it: resident, in host memory,
opened before and still on disk, or none, so that its source has to deliver it."""

HITS: tuple[Hit, ...] = get_args(Hit)


class CallWatcher(Protocol):
    """Receives single calls, on the loop."""

    def call(self, name: str, ref: Ref) -> AbstractContextManager[None]:
        """Return a context manager that is entered around the call, in the caller's task."""

    def wanted(self, key: AdapterKey, hit: Hit, stage: Stage) -> None:
        """Receive a call's adapter, its tier and its stage now, in the caller's task.

        The stage of an adapter that is filling its slot is "copy", also while bytes are fetched.
        """

    def checked(self, key: AdapterKey) -> None:
        """Receive that an adapter's header was checked."""


def kind_of(error: LoraxError) -> tuple[str, str]:
    """Return the stage, or "none", and the class of an error."""
    return error.stage or "none", type(error).__name__


class CallCounter:
    """Counts calls by hit and error, and notifies a watcher.

    `states` are the lifecycle's, read only. `in_memory` returns whether a host copy of the
    adapter's tensors exists.
    """

    def __init__(self, states: Mapping[AdapterKey, AdapterState]) -> None:
        self.hits: Counter[str] = Counter(dict.fromkeys(HITS, 0))
        self.errors: Counter[tuple[str, str]] = Counter()
        self.in_memory: Callable[[AdapterKey], bool] = lambda key: False  # noqa: ARG005
        self.watcher: CallWatcher | None = None
        self._states = states

    @contextmanager
    def one(self, name: str, ref: Ref) -> Iterator[None]:
        """Run one call of a waiting caller: count its error, notify the watcher."""
        watched = self._enter_watcher(name, ref)
        try:
            yield
        except BaseException as error:
            if isinstance(error, LoraxError):
                self.errors[kind_of(error)] += 1
            _notify(partial(watched.__exit__, type(error), error, error.__traceback__))
            raise
        _notify(partial(watched.__exit__, None, None, None))

    def count_hit(self, key: AdapterKey) -> Hit:
        """Count and return the nearest tier of an adapter that a call wants."""
        hit = self._nearest_tier(key)
        self.hits[hit] += 1
        return hit

    def wanted(self, key: AdapterKey, hit: Hit, stage: Stage) -> None:
        """Notify the watcher that a call waits for the adapter, which is in `stage`."""
        if self.watcher is not None:
            life = self._states.get(key)
            filling = life is not None and life.slot is SlotState.FILLING
            _notify(partial(self.watcher.wanted, key, hit, "copy" if filling else stage))

    def checked(self, key: AdapterKey) -> None:
        if self.watcher is not None:
            _notify(partial(self.watcher.checked, key))

    def _enter_watcher(self, name: str, ref: Ref) -> ExitStack:
        watcher, entered = self.watcher, ExitStack()
        if watcher is not None:
            _notify(lambda: entered.enter_context(watcher.call(name, ref)))
        return entered

    def _nearest_tier(self, key: AdapterKey) -> Hit:
        life = self._states.get(key)
        if life is not None and life.slot is SlotState.RESIDENT and not life.departing:
            return "device"
        if self.in_memory(key) or (life is not None and life.in_host):
            return "host"
        opened = life is not None and life.file is FileState.PRESENT
        return "disk" if opened or isinstance(key, TensorsKey) else "source"


def _notify(call: Callable[[], object]) -> None:
    """Call a watcher; log its exceptions, which must not fail the watched call."""
    try:
        call()
    except Exception:
        _logger.exception("a loader's call watcher failed")


@dataclass(frozen=True, slots=True)
class PendingLoad:
    """One waiter for an adapter; `future` resolves to its lease, or None for a prefetch."""

    key: AdapterKey
    waiter: int
    future: asyncio.Future[Lease | None]


class WaiterTable:
    """Adds and removes waiters, leases and pins in the lifecycle.

    `execute` carries out the commands that it returns. `raise_priority` is called with each key
    that has a new foreground waiter.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        lease_table: LeaseTable,
        execute: Callable[[list[Command]], None],
        raise_priority: Callable[[AdapterKey], None],
    ) -> None:
        self._lifecycle = lifecycle
        self._lease_table = lease_table
        self._execute = execute
        self._raise_priority = raise_priority
        self._pins: dict[object, tuple[AdapterKey, SlotGrant]] = {}
        self.calls = CallCounter(lifecycle.states)

    def begin(
        self, key: AdapterKey, tier: WantedTier, *, foreground: bool = True, priority: int = 0
    ) -> PendingLoad:
        """Add a waiter for the adapter at `tier`; await its future, or `abandon` it."""
        hit = self.calls.count_hit(key) if foreground else None
        waiter, future = self._lease_table.add_waiter()
        since = asyncio.get_running_loop().time()
        self._execute(self._lifecycle.want(key, Waiter(waiter, tier, since, foreground, priority)))
        if hit is not None:
            self._raise_priority(key)
            self.calls.wanted(key, hit, self._lifecycle.stage(key))
        return PendingLoad(key, waiter, future)

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
        self.calls.hits["device"] += 1
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
