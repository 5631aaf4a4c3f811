"""What callers want of adapters, and what came of their calls."""

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

Found = Literal["device", "host", "disk", "source"]
"""The nearest tier that has all of an adapter when somebody asks for it: resident, in host memory,
opened before and still there, or none, so that its source is to be asked for its files."""

FOUND: tuple[Found, ...] = get_args(Found)


class CallWatcher(Protocol):
    """Who hears of single calls, on the loop."""

    def call(self, name: str, ref: Ref) -> AbstractContextManager[None]:
        """Entered in the caller's task, around all of the call."""

    def wished(self, key: AdapterKey, found: Found, stage: Stage) -> None:
        """In the task of whoever wants it: which adapter that is, where it was, where it is now.

        Whoever joins while it fills its slot is at "copy", also while bytes have yet to come.
        """

    def checked(self, key: AdapterKey) -> None:
        """It was opened, and its header is understood."""


def kind_of(error: LoraxError) -> tuple[str, str]:
    """The stage, or "none", and the class of an error."""
    return error.stage or "none", type(error).__name__


class CallCounter:
    """Counts; and tells one watcher, if there is one.

    `states` are the lifecycle's, to be looked at only. `in_memory` says of an adapter that was
    given as tensors whether its copy is in host memory.
    """

    def __init__(self, states: Mapping[AdapterKey, AdapterState]) -> None:
        self.hits: Counter[str] = Counter(dict.fromkeys(FOUND, 0))
        self.errors: Counter[tuple[str, str]] = Counter()
        self.in_memory: Callable[[AdapterKey], bool] = lambda key: False  # noqa: ARG005
        self.watcher: CallWatcher | None = None
        self._states = states

    @contextmanager
    def one(self, name: str, ref: Ref) -> Iterator[None]:
        """One call, by a caller who waits for its end."""
        watched = self._watched(name, ref)
        try:
            yield
        except BaseException as error:
            if isinstance(error, LoraxError):
                self.errors[kind_of(error)] += 1
            _tell(partial(watched.__exit__, type(error), error, error.__traceback__))
            raise
        _tell(partial(watched.__exit__, None, None, None))

    def found(self, key: AdapterKey) -> Found:
        """Count where an adapter is that somebody wants now."""
        found = self._where(key)
        self.hits[found] += 1
        return found

    def wished(self, key: AdapterKey, found: Found, stage: Stage) -> None:
        """The wish for it was begun; it is in that stage since."""
        if self.watcher is not None:
            life = self._states.get(key)
            filling = life is not None and life.slot is SlotState.FILLING
            _tell(partial(self.watcher.wished, key, found, "copy" if filling else stage))

    def checked(self, key: AdapterKey) -> None:
        if self.watcher is not None:
            _tell(partial(self.watcher.checked, key))

    def _watched(self, name: str, ref: Ref) -> ExitStack:
        """What the watcher has around the call, entered."""
        watcher, entered = self.watcher, ExitStack()
        if watcher is not None:
            _tell(lambda: entered.enter_context(watcher.call(name, ref)))
        return entered

    def _where(self, key: AdapterKey) -> Found:
        life = self._states.get(key)
        if life is not None and life.slot is SlotState.RESIDENT and not life.departing:
            return "device"
        if self.in_memory(key) or (life is not None and life.in_host):
            return "host"
        opened = life is not None and life.file is FileState.PRESENT
        return "disk" if opened or isinstance(key, TensorsKey) else "source"


def _tell(say: Callable[[], object]) -> None:
    """A watcher's faults are its own: what it is told of goes on."""
    try:
        say()
    except Exception:
        _logger.exception("who watches a loader's calls failed")


@dataclass(frozen=True, slots=True)
class LoadWish:
    """One caller's wish for an adapter; `future` gives its lease, or None to a prefetch."""

    key: AdapterKey
    waiter: int
    future: asyncio.Future[Lease | None]


class WaiterTable:
    """Turns calls into changes of interest; `execute` carries out what the lifecycle answers.

    `raise_priority` hears of each key that somebody waits for in the foreground.
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
    ) -> LoadWish:
        """Want the adapter as far as `tier`; to be followed by `granted` or `abandon`."""
        found = self.calls.found(key) if foreground else None
        waiter, future = self._lease_table.add_waiter()
        since = asyncio.get_running_loop().time()
        self._execute(self._lifecycle.want(key, Waiter(waiter, tier, since, foreground, priority)))
        if found is not None:
            self._raise_priority(key)
            self.calls.wished(key, found, self._lifecycle.stage(key))
        return LoadWish(key, waiter, future)

    async def granted(self, pending_load: LoadWish) -> Lease | None:
        """Wait until the wish comes true, or raise why it will not."""
        return await pending_load.future

    def abandon(self, pending_load: LoadWish) -> None:
        """Withdraw one wish and give back what it brought; the others stay. Idempotent."""
        self._lease_table.drop_waiter(pending_load.waiter)
        self._execute(self._lifecycle.withdraw(pending_load.key, pending_load.waiter))
        future = pending_load.future
        if future.done() and not future.cancelled() and future.exception() is None:
            lease = future.result()
            if lease is not None:
                lease.end()

    def try_lease(self, key: AdapterKey) -> Lease | None:
        """A lease on a resident adapter, at once."""
        if self._lifecycle.take_lease(key) is None:
            return None
        self.calls.hits["device"] += 1
        return self._lease_table.new_lease(key)

    def share(self, lease: Lease) -> Lease:
        """One more lease on the same stay in a slot. Raises if that one may not be used."""
        lease.check()
        self._lifecycle.add_lease(lease.occupancy.key)
        shared = self._lease_table.new_lease(lease.occupancy.key)
        shared.stale = lease.stale
        if lease.promise is not None:
            lease.promise.join(shared)
        return shared

    def pin(self, name: object, lease: Lease) -> bool:
        """Keep what is leased, on behalf of `name`, in place of what that pinned before.

        False if the adapter is leaving.
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

    def pinned(self, ours: Callable[[object], bool]) -> list[object]:
        """The names that have pinned something, of those that are `ours`."""
        return [name for name in self._pins if ours(name)]

    def unpin(self, name: object) -> bool:
        """Whether `name` had pinned something."""
        pinned = self._pins.pop(name, None)
        if pinned is None:
            return False
        self._execute(self._lifecycle.unpin(*pinned))
        return True

    async def unload(self, key: AdapterKey, seconds: float) -> None:
        """Wait until the adapter has left device and host memory, `seconds` at most.

        Raises `AdapterInUseError` if it is still leased then, and it stays.
        """
        for name in [name for name, (pinned, _) in self._pins.items() if pinned == key]:
            del self._pins[name]
        gone = self._lease_table.add_unload(key)
        self._execute(self._lifecycle.unload(key))
        try:
            async with asyncio.timeout(seconds):
                await gone
        except TimeoutError:
            if gone.cancelled():  # else it went in the same turn
                raise self._not_gone(key, seconds) from None
        finally:
            if self._lease_table.drop_unload(key, gone):
                self._execute(self._lifecycle.withdraw_unload(key))

    def _not_gone(self, key: AdapterKey, seconds: float) -> AdapterInUseError | AdapterTimeoutError:
        holders = sorted(
            lease.holder or "no task" for lease in self._lease_table.leases.get(key, ())
        )
        if not holders:
            problem = (
                f"it was not gone within {seconds:g} s: it is still copied, computed with or held"
            )
            return AdapterTimeoutError(problem, key=key, stage="ready")
        return AdapterInUseError(
            f"leases still held after {seconds:g} s: {len(holders)}, by {', '.join(holders)};"
            " release them, or unload with a longer timeout",
            key=key,
        )
