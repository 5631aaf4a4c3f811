"""`AdapterLoader`: what an embedding server calls."""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from lorax_async.adapter import AdapterId, AdapterKey, AdapterRef, as_ref
from lorax_async.config import LoaderConfig
from lorax_async.core.layout import ModelLayout
from lorax_async.core.transitions import SlotState
from lorax_async.core.waiters import Tier
from lorax_async.errors import (
    AdapterTimeoutError,
    ConfigError,
    LoaderClosedError,
    LoraxError,
    UsageError,
)
from lorax_async.events import Event
from lorax_async.handle import AdapterHandle
from lorax_async.io.inbox import running_loop
from lorax_async.io.ports import Device, Source
from lorax_async.runtime.driver import Wish
from lorax_async.runtime.journal import AdapterResidency, Statistics
from lorax_async.runtime.machinery import Machinery
from lorax_async.runtime.tenancy import Lease


class AdapterLoader:
    """Loads LoRA adapters for one base model onto one device, beside whatever the loop does.

    Parameters
    ----------
    layout
        The base model's modules; see `lorax_async.layouts`.
    config
        The settings; `loader.config` shows them resolved.
    source, device
        Stand-ins for tests (`lorax_async.io.fakes`); None takes what the config names.

    Raises
    ------
    ConfigError
        On another platform than Linux, or for settings that do not fit each other.

    Use it as an async context manager. It belongs to the event loop and the process that entered
    it; other threads reach it by `asyncio.run_coroutine_threadsafe`.
    """

    def __init__(
        self,
        layout: ModelLayout,
        config: LoaderConfig | None = None,
        *,
        source: Source | None = None,
        device: Device | None = None,
    ) -> None:
        if sys.platform != "linux":
            raise ConfigError("lorax_async runs on Linux only")
        self.layout = layout
        self.config = (config or LoaderConfig()).resolved(layout.dtype)
        self._source = source
        self._device = device
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._closing: asyncio.Task[None] | None = None

    # -- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._loop is not None:
            raise UsageError("the loader was entered before; make a new one")
        self._loop = asyncio.get_running_loop()
        self._machinery = Machinery(self.layout, self.config, self._source, self._device)
        try:
            await self._machinery.open()
        except BaseException:
            self._loop = None
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self, *, timeout: float | None = None) -> None:
        """Fail whoever waits, wait `timeout` seconds for leases, revoke the rest, end all threads.

        Idempotent; cancelling the caller does not stop it.
        """
        self._check_loop()
        assert self._loop is not None
        if self._closing is None:
            seconds = self.config.seconds(timeout)
            self._closing = self._loop.create_task(
                self._machinery.close(seconds), name="lorax close"
            )
        await asyncio.shield(self._closing)

    def __del__(self) -> None:
        if getattr(self, "_loop", None) is not None and self._closing is None:
            warnings.warn(
                "an AdapterLoader was never closed; use `async with`", ResourceWarning, stacklevel=2
            )

    # -- loading ----------------------------------------------------------------------------------

    async def load(
        self,
        adapter_id: AdapterId,
        *,
        source: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> AdapterHandle:
        """Wait until every layer is on the device; the handle is a lease.

        Parameters
        ----------
        adapter_id
            A `pathlib.Path`, a string (a path below `local_roots`), an `AdapterRef`, or the key of
            an adapter met before. Equal requests share one load.
        source, revision, token
            As in `AdapterRef`, for a string.
        timeout
            Seconds; None takes the config's.
        priority
            Of two that wait for room, the higher one is served first.

        Raises
        ------
        AdapterError, CapacityError, UsageError
            See docs/errors.md. Nothing is left behind.
        """
        ref = as_ref(adapter_id, source, revision, token)
        return await self._acquire(ref, Tier.DEVICE, timeout, priority)

    @asynccontextmanager
    async def stream(
        self,
        adapter_id: AdapterId,
        *,
        source: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> AsyncIterator[AdapterHandle]:
        """As `load`, entered once the adapter has its slot: its layers follow, in order.

        `await handle.layer_ready(k)` before layer k is used.
        """
        ref = as_ref(adapter_id, source, revision, token)
        handle = await self._acquire(ref, Tier.STREAM, timeout, priority)
        try:
            yield handle
        finally:
            handle.release()

    def try_acquire(self, adapter_id: AdapterId) -> AdapterHandle | None:
        """A lease if the adapter is resident now, else None. Touches no file and never waits."""
        self._check_open()
        ref = as_ref(adapter_id)
        key = self._known_key(ref)
        lease = self._machinery.driver.try_lease(key) if key is not None else None
        return self._handle(_text(ref), lease) if lease is not None else None

    async def _acquire(
        self, ref: AdapterRef | AdapterKey, tier: Tier, timeout: float | None, priority: int
    ) -> AdapterHandle:
        self._check_open()
        driver = self._machinery.driver
        seconds = self.config.seconds(timeout)
        key = ref if isinstance(ref, AdapterKey) else None
        wish: Wish | None = None
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                if isinstance(ref, AdapterRef):
                    key = await self._machinery.resolver.resolve(ref)
                    self._check_open()
                assert key is not None
                wish = driver.begin(key, tier, priority=priority)
                lease = await driver.granted(wish)
        except BaseException as error:
            late = deadline.expired() and isinstance(error, TimeoutError)
            problem = self._timed_out(ref, key, seconds) if late else error
            if wish is not None:
                driver.abandon(wish)
            if isinstance(problem, LoraxError):
                raise problem.located(id=_text(ref)) from problem.__cause__
            raise
        assert lease is not None
        return self._handle(_text(ref), lease)

    def _known_key(self, ref: AdapterRef | AdapterKey) -> AdapterKey | None:
        return ref if isinstance(ref, AdapterKey) else self._machinery.resolver.known(ref)

    def _timed_out(
        self, ref: AdapterRef | AdapterKey, key: AdapterKey | None, seconds: float
    ) -> AdapterTimeoutError:
        """Where the adapter is now, before the wish for it is withdrawn."""
        driver = self._machinery.driver
        life = None if key is None else driver.lifecycle.lives.get(key)
        return AdapterTimeoutError(
            f"it was not ready within {seconds:g} s",
            id=_text(ref),
            key=key,
            attempt=life.attempt if life is not None else 0,
            stage="resolve" if key is None else driver.lifecycle.stage(key),
            story=() if key is None else driver.journal.story(key),
        )

    def _handle(self, id: str, lease: Lease) -> AdapterHandle:
        lease.holder = _task_name()
        return AdapterHandle(
            id, lease, self._machinery.driver.device, self.layout, self.config.timeout
        )

    # -- looking ----------------------------------------------------------------------------------

    @property
    def device(self) -> Device:
        """The device, with the tables that kernels read."""
        self._check_open()
        return self._machinery.driver.device

    def residency(self) -> Mapping[AdapterKey, AdapterResidency]:
        """The adapters that hold a slot."""
        self._check_open()
        return {
            key: AdapterResidency(
                "leaving" if life.leaving else life.slot.value,
                life.grant.slot,
                sum(extent.nbytes for extent in life.grant.extents),
                life.leases,
            )
            for key, life in self._machinery.driver.lifecycle.lives.items()
            if life.slot is not SlotState.NONE and life.grant is not None
        }

    def statistics(self) -> Statistics:
        """Totals since the loader was opened."""
        self._check_open()
        return self._machinery.driver.journal.statistics()

    def story(self, adapter_id: AdapterId) -> tuple[Event, ...]:
        """The last events of one adapter, oldest first."""
        self._check_open()
        key = self._known_key(as_ref(adapter_id))
        return () if key is None else self._machinery.driver.journal.story(key)

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` with every event, on the loop; returns what ends that."""
        self._check_open()
        return self._machinery.driver.journal.subscribe(callback)

    # -- checks -----------------------------------------------------------------------------------

    def _check_loop(self) -> None:
        if self._loop is None:
            raise UsageError("enter the loader first: `async with AdapterLoader(…) as loader`")
        if os.getpid() != self._pid:
            raise UsageError("the loader belongs to the process that made it; make one per process")
        if running_loop() is not self._loop:
            raise UsageError(
                "the loader belongs to the event loop that entered it; "
                "from a thread use asyncio.run_coroutine_threadsafe"
            )

    def _check_open(self) -> None:
        self._check_loop()
        if self._closing is not None:
            raise LoaderClosedError("the loader is closed")


def _text(ref: AdapterRef | AdapterKey) -> str:
    return ref.text if isinstance(ref, AdapterRef) else str(ref)


def _task_name() -> str:
    task = asyncio.current_task()
    return task.get_name() if task is not None else ""
