"""`AdapterLoader`: what an embedding server calls."""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Self

import torch

from lorax_async.concurrency import running_loop
from lorax_async.config import LoaderConfig
from lorax_async.devices.base import Device
from lorax_async.errors import (
    ConfigError,
    InvalidAdapterIdError,
    LoaderClosedError,
    LoraxError,
    UsageError,
)
from lorax_async.events import Event
from lorax_async.formats.peft_config import GivenConfig, write_config
from lorax_async.handle import AdapterHandle, current_task_name
from lorax_async.lifecycle.adapter_state import WantedTier
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.sharding import shard_layout
from lorax_async.runtime.acquire import Prefetch
from lorax_async.runtime.assembly import Assembly
from lorax_async.runtime.folders import AdapterFolder
from lorax_async.runtime.leases import Lease, LeaseTable
from lorax_async.runtime.placement import TIERS, AdapterResidency, Placement, TierName
from lorax_async.runtime.telemetry import Statistics, Usage
from lorax_async.runtime.waiters import CallWatcher
from lorax_async.sources.base import Source
from lorax_async.tracing.recorder import Tracer, name_of
from lorax_async.tracing.trace import TRACE_LIMIT, Trace
from lorax_async.types import AdapterId, AdapterKey, AdapterRef, Ref, as_ref, text_of


class LoopAffinity:
    """Remembers the loop that entered, and refuses all others."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._ready = False
        self._pid = os.getpid()

    def enter(self) -> None:
        if self.loop is not None:
            raise UsageError("the loader was entered before; make a new one")
        self.loop = asyncio.get_running_loop()

    def settle(self) -> None:
        """Everything is there: from here on it may be used."""
        self._ready = True

    def leave(self) -> None:
        """Entering came to nothing."""
        self.loop = None

    def check(self) -> asyncio.AbstractEventLoop:
        """The loop, if this is the one. Raises `UsageError`."""
        if self.loop is None or not self._ready:
            raise UsageError("enter the loader first: `async with AdapterLoader(…) as loader`")
        if os.getpid() != self._pid:
            raise UsageError("the loader belongs to the process that made it; make one per process")
        if running_loop() is not self.loop:
            raise UsageError(
                "the loader belongs to the event loop that entered it; "
                "from a thread use asyncio.run_coroutine_threadsafe"
            )
        return self.loop


def _slot_names(lease_table: LeaseTable) -> dict[int, str]:
    """What a trace calls the adapters that have slots, by the slots' numbers."""
    return {slot: name_of(key) for slot, key in lease_table.in_slots().items()}


class AdapterLoader:
    """Loads LoRA adapters for one base model onto one device, beside whatever the loop does.

    Parameters
    ----------
    layout
        The base model's modules; see `lorax_async.layouts`.
    config
        The settings; `loader.config` shows them resolved.
    source, device
        Stand-ins for tests (`lorax_async.testing`); None takes what the config names.

    Raises
    ------
    ConfigError
        On another platform than Linux, or for settings that do not fit each other or the layout.

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
        self._sharding = shard_layout(layout, self.config.shard)
        self.held_layout = self._sharding.held
        """The layout's modules in the sizes that the config's shard has."""
        self._source = source
        self._device = device
        self._affinity = LoopAffinity()
        self._closing: asyncio.Task[None] | None = None

    # -- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._affinity.enter()
        try:
            self._assembly = Assembly(self._sharding, self.config, self._source, self._device)
            await self._assembly.open(self._check_open)
        except BaseException:
            self._affinity.leave()
            raise
        self._driver, self._acquiring = self._assembly.driver, self._assembly.acquiring
        self._affinity.settle()
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
        loop = self._affinity.check()
        if self._closing is None:
            seconds = self.config.seconds(timeout)
            self._closing = loop.create_task(self._assembly.close(seconds), name="lorax close")
        await asyncio.shield(self._closing)

    @property
    def closed(self) -> bool:
        """Whether it was closed, or is closing."""
        return self._closing is not None

    def __del__(self) -> None:
        home = getattr(self, "_affinity", None)
        if home is not None and home.loop is not None and self._closing is None:
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
        digest: str | None = None,
        allow_stale: bool = False,
        timeout: float | None = None,
        priority: int = 0,
    ) -> AdapterHandle:
        """Wait until every layer is on the device; the handle is a lease.

        Parameters
        ----------
        adapter_id
            A `pathlib.Path`, a string (`org/name` on the hub, a URL, or a path below
            `local_roots`: docs/sources.md), an `AdapterRef`, the key of an adapter met before, or a
            `Merge` of several. Equal requests share one load.
        source, revision, token
            As in `AdapterRef`, for a string.
        digest
            What the weights come to, as sha256 in hexadecimal. The call waits until they were held
            against it (local ones are hashed for that, once); others are an `IntegrityError`, of
            this call alone where the adapter is in use already.
        allow_stale
            Where the source cannot be asked, take the version that it last named, if that is in the
            cache; then `handle.stale` is True.
        timeout
            Seconds; None takes the config's.
        priority
            Of two that wait for room, the higher one is served first.

        Raises
        ------
        AdapterError, CapacityError, UsageError
            See docs/errors.md. Nothing is left behind.
        """
        ref = as_ref(adapter_id, source, revision, token, digest, allow_stale=allow_stale)
        return await self._acquire(ref, WantedTier.DEVICE, timeout, priority)

    @asynccontextmanager
    async def stream(
        self,
        adapter_id: AdapterId,
        *,
        source: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        digest: str | None = None,
        allow_stale: bool = False,
        timeout: float | None = None,
        priority: int = 0,
    ) -> AsyncIterator[AdapterHandle]:
        """As `load`, entered once the adapter has its slot: its layers follow, in order.

        `await handle.layer_ready(k)` before layer k is used. A digest is compared when all bytes
        are here: if they are others, the handle, and its clones, fail from then on.
        """
        ref = as_ref(adapter_id, source, revision, token, digest, allow_stale=allow_stale)
        handle = await self._acquire(ref, WantedTier.STREAM, timeout, priority)
        try:
            yield handle
        finally:
            handle.release()

    async def fetch(
        self,
        adapter_id: AdapterId,
        *,
        source: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        digest: str | None = None,
        allow_stale: bool = False,
        timeout: float | None = None,
    ) -> AdapterFolder:
        """Wait until the adapter's files are on this machine's disk and checked; nothing is loaded.

        The result is a lease on their folder: the cache, of this or another process, keeps it until
        the lease is released. Calls for one adapter, and loads of it, share one download. Whether
        the adapter fits the base model is not asked.

        Parameters
        ----------
        adapter_id, source, revision, token, digest, allow_stale, timeout
            As for `load`. A local adapter is its own folder.

        Raises
        ------
        AdapterError, CapacityError
            As `load` does. Nothing is left behind but what a later download goes on from.
        UsageError
            The id means a merge, or tensors: these are in no folder.
        """
        self._check_open()
        ref = as_ref(adapter_id, source, revision, token, digest, allow_stale=allow_stale)
        return await self._assembly.fetching.fetch(ref, self.config.seconds(timeout))

    def try_acquire(self, adapter_id: AdapterId) -> AdapterHandle | None:
        """A lease if the adapter is resident now, else None. Touches no file and never waits.

        With a digest, also None unless the weights are known to have it. Of what lies elsewhere,
        None once its source was not asked for `LoaderConfig.revalidate` seconds: `load` asks it.
        """
        self._check_open()
        ref = as_ref(adapter_id)
        lease = self._acquiring.try_lease(ref)
        return self._handle(ref, lease) if lease is not None else None

    async def _acquire(
        self, ref: Ref, tier: WantedTier, timeout: float | None, priority: int
    ) -> AdapterHandle:
        self._check_open()
        seconds = self.config.seconds(timeout)
        name = "stream" if tier is WantedTier.STREAM else "load"
        with self._driver.waiter_table.calls.one(name, ref):
            lease = await self._acquiring.lease(ref, tier, seconds, priority=priority)
        return self._handle(ref, lease)

    def _handle(self, ref: Ref, lease: Lease) -> AdapterHandle:
        lease.holder = current_task_name()
        share, timeout = self._driver.waiter_table.share, self.config.timeout
        device, shard = self._driver.device, self.config.shard
        return AdapterHandle(text_of(ref), lease, device, self.layout, timeout, share, shard)

    async def has_changed(self, adapter_id: AdapterId, key: AdapterKey, error: LoraxError) -> bool:
        """Return whether `error` came of local files that were saved again since they were `key`.

        `load` finds out itself, and loads once more; this is for callers of `stream`, whose handle
        fails with the error. If so, wait until the files are at rest.
        """
        self._check_open()
        return await self._acquiring.has_changed(as_ref(adapter_id), key, error)

    # -- room -------------------------------------------------------------------------------------

    def prefetch(
        self,
        ids: AdapterId | Iterable[AdapterId],
        *,
        tier: TierName = "device",
        priority: int = 0,
        timeout: float | None = None,
    ) -> Prefetch:
        """Begin to bring adapters nearer, after everybody who waits for one; take no lease.

        Parameters
        ----------
        ids
            One, or several.
        tier
            How near: "disk" (the files are here and checked), "host" (in memory, held there within
            `host_bytes` if they lie below an immutable `LocalRoot`), "device".
        priority, timeout
            As for `load`, among prefetches.
        """
        self._check_open()
        wanted = TIERS.get(tier)
        if wanted is None:
            raise UsageError(f"a tier is one of {', '.join(TIERS)}, not {tier!r}")
        seconds = self.config.seconds(timeout)
        several = (ids,) if isinstance(ids, AdapterId) else ids
        refs = [as_ref(id) for id in several]
        return self._assembly.prefetch(refs, wanted, seconds, priority)

    async def pin(
        self, adapter_id: AdapterId, *, timeout: float | None = None, priority: int = 0
    ) -> None:
        """Load the adapter and keep it on the device until `unpin` or `unload`, leased or not.

        A pin belongs to the id: pinning it again after it was re-saved moves the pin. Raises as
        `load` does.
        """
        self._check_open()
        ref, seconds = as_ref(adapter_id), self.config.seconds(timeout)
        with self._driver.waiter_table.calls.one("pin", ref):
            await self._acquiring.pin(ref, seconds, priority=priority)

    def unpin(self, adapter_id: AdapterId) -> bool:
        """Let the adapter be evicted again. Whether this id had pinned it."""
        self._check_open()
        return self._driver.waiter_table.unpin(as_ref(adapter_id))

    async def unload(self, adapter_id: AdapterId, *, timeout: float | None = None) -> None:
        """Take the adapter from device and host memory; its files stay. Ends its pins.

        What was given as tensors has no files and is gone; its id means what a source has by it.

        Waits for leases, `timeout` seconds at most (None: the config's). New loads of it wait
        meanwhile. Without effect on an adapter that this loader does not know.

        Raises
        ------
        AdapterInUseError
            It is still leased; the error names the holders' tasks, and the adapter stays.
        AdapterTimeoutError
            It is not, and could not be let go in time: it stays, too.
        """
        self._check_open()
        ref, seconds = as_ref(adapter_id), self.config.seconds(timeout)
        key = self._acquiring.known(ref)
        if key is None:
            return
        try:
            await self._driver.waiter_table.unload(key, seconds)
        except LoraxError as error:
            raise error.located(id=text_of(ref)) from None
        self._assembly.tensor_adapters.take_back(ref, key)

    # -- tensors -----------------------------------------------------------------------------------

    async def load_tensors(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: GivenConfig,
        *,
        timeout: float | None = None,
        priority: int = 0,
    ) -> AdapterHandle:
        """Load an adapter from tensors; from here on `name` is an id that means it.

        Its bytes are kept until `unload(name)` or a `replace`: in host memory, within
        `memory_bytes`, or, once newer ones need the room and with `spill`, in the disk cache. On
        the device it comes and goes as others do.

        Parameters
        ----------
        name
            Comes before what a source has by the same id, for a `str` id of every caller.
        tensors
            By the names that PEFT gives them in a file (`peft.get_peft_model_state_dict`), on any
            device, in F32, F16 or BF16. They are copied as they are, in a thread: write to them
            again when the call is through.
        config
            A dict as in `adapter_config.json`, or a `peft.LoraConfig`.
        timeout, priority
            As for `load`.

        Raises
        ------
        AdapterError, CapacityError, UsageError
            As `load` does; `CapacityError` also if `memory_bytes` has no room and others cannot
            make any, `IntegrityError` if a tensor was written to meanwhile, `UsageError` if the
            name means other tensors (equal ones join). The name then means what it did.
        """
        self._check_open()
        if not isinstance(name, str) or not name:
            raise InvalidAdapterIdError("a name for tensors is a str that is not empty")
        return await self._give(
            AdapterRef(name), tensors, config, timeout, priority=priority, replaces=False
        )

    async def replace(
        self,
        adapter_id: AdapterId,
        tensors: Mapping[str, torch.Tensor],
        config: GivenConfig,
        *,
        timeout: float | None = None,
        priority: int = 0,
    ) -> AdapterHandle:
        """Let an id mean these tensors instead of what it means, be that of a source or of memory.

        They are loaded beside the old version. Once they are resident, and in one step, every new
        request for the id is one for them, and its pins are theirs. Who holds or waits for the old
        version keeps it; it leaves when nobody does any more. Calls for one id come to pass in the
        order in which they began.

        Parameters
        ----------
        adapter_id
            A `str`, a `pathlib.Path` or an `AdapterRef`, whether or not it was loaded before. What
            is replaced without a token is replaced for every token.
        tensors, config, timeout, priority
            As for `load_tensors`.

        Raises
        ------
        AdapterError, CapacityError, UsageError
            As `load_tensors` does. The id then means what it did. `CapacityError` also if there is
            no room beside an old version that is pinned.
        """
        self._check_open()
        ref = as_ref(adapter_id)
        if not isinstance(ref, AdapterRef):
            raise UsageError("a key or a Merge says which bytes it is; replace an id")
        return await self._give(ref, tensors, config, timeout, priority=priority, replaces=True)

    async def _give(
        self,
        ref: AdapterRef,
        tensors: Mapping[str, torch.Tensor],
        config: GivenConfig,
        timeout: float | None,
        *,
        priority: int,
        replaces: bool,
    ) -> AdapterHandle:
        seconds = self.config.seconds(timeout)
        try:
            content = write_config(config)
        except LoraxError as error:
            raise error.located(id=ref.text) from None
        tensor_adapters = self._assembly.tensor_adapters
        lease = await tensor_adapters.give(
            ref, tensors, content, seconds, priority=priority, replaces=replaces
        )
        return self._handle(ref, lease)

    # -- looking -----------------------------------------------------------------------------------

    @property
    def device(self) -> Device:
        """The device, with the tables that kernels read."""
        self._check_open()
        return self._driver.device

    def residency(self, *, nearest: int | None = None) -> Mapping[AdapterKey, AdapterResidency]:
        """Where the adapters are that are anywhere, and what each takes.

        Parameters
        ----------
        nearest
            At most so many: those on the device first, then those in host memory.
        """
        self._check_open()
        return self._whereabouts().all(nearest)

    def whereabouts(self, adapter_id: AdapterId) -> AdapterResidency | None:
        """Where one adapter is, as `residency` has it; None where it is nowhere."""
        self._check_open()
        key = self._acquiring.known(as_ref(adapter_id))
        return None if key is None else self._whereabouts().of(key)

    def _whereabouts(self) -> Placement:
        driver, given = self._driver, self._assembly.given
        return Placement(driver.lifecycle.states, driver.files.holds, given)

    def statistics(self) -> Statistics:
        """Totals since the loader was opened."""
        self._check_open()
        return self._assembly.statistics()

    def usage(self) -> Usage:
        """What is taken of each budget now."""
        self._check_open()
        return self._assembly.usage()

    def story(self, adapter_id: AdapterId) -> tuple[Event, ...]:
        """The last events of one adapter, oldest first."""
        self._check_open()
        key = self._acquiring.known(as_ref(adapter_id))
        return () if key is None else self._driver.telemetry.story(key)

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` with every event, on the loop; returns what ends that."""
        self._check_open()
        return self._driver.telemetry.subscribe(callback)

    @property
    def tracer(self) -> Tracer:
        """What the loader's parts, and engines, report to while a trace is recorded."""
        return self._assembly.tracer

    def trace(self, *, limit: int = TRACE_LIMIT) -> Trace:
        """Record what happens when, from `with loader.trace() as trace:` to the block's end.

        Several may be recorded at once, and one for as long as the loader is open.

        Parameters
        ----------
        limit
            Spans that are kept, of about 500 bytes; and as many of "compute", of which each pass
            has some for each layer. Beyond it the oldest go, and are counted.
        """
        self._check_open()
        return Trace(self._assembly.tracer, limit, partial(_slot_names, self._driver.lease_table))

    def last_numbers(self) -> tuple[Statistics, Usage]:
        """`statistics` and `usage`, also once the loader is closed: the last ones, then.

        On the loader's loop, or from any thread once that loop is closed.
        """
        return self._assembly.statistics(), self._assembly.usage()

    def watch_calls(self, watcher: CallWatcher) -> Callable[[], None]:
        """Tell `watcher` of each call of `load`, `stream` and `pin`; returns what ends that.

        Raises `UsageError` if there is one: it can be one only.
        """
        self._check_open()
        calls = self._driver.waiter_table.calls
        if calls.watcher is not None:
            raise UsageError("the loader's calls are watched already")
        calls.watcher = watcher

        def leave() -> None:
            if calls.watcher is watcher:
                calls.watcher = None

        return leave

    # -- checks -----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        self._affinity.check()
        if self._closing is not None:
            raise LoaderClosedError("the loader is closed")
