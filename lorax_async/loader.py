"""`AdapterLoader`, the API for an embedding server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from os import PathLike
from typing import Any, Self, TypeVar, Unpack, overload

import torch

from lorax_async import layouts
from lorax_async.concurrency import Lifetime, context_call
from lorax_async.config import LoaderConfig
from lorax_async.devices.base import Device, PointerTables
from lorax_async.devices.base_copies import BaseCopies
from lorax_async.errors import (
    ConfigError,
    InvalidAdapterIdError,
    LoraxError,
    UsageError,
    shorten_repr,
)
from lorax_async.events import CallEvent, Event
from lorax_async.formats.peft_config import GivenConfig, write_config
from lorax_async.handle import AdapterHandle, current_task_name
from lorax_async.lifecycle.adapter_state import WantedTier
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.sharding import shard_layout
from lorax_async.runtime.acquire import Prefetch
from lorax_async.runtime.assembly import Assembly
from lorax_async.runtime.folders import AdapterFolder
from lorax_async.runtime.leases import Lease
from lorax_async.runtime.placement import TIERS, Placement, TierName
from lorax_async.sources.base import Source
from lorax_async.telemetry import LoadCall, Statistics, Tracer, name_of
from lorax_async.tracing import TRACE_LIMIT, Trace
from lorax_async.types import (
    AdapterId,
    AdapterKey,
    AdapterRef,
    IdOptions,
    Ref,
    as_ref,
    as_refs,
    text_of,
)

E = TypeVar("E", bound=Event | CallEvent)


class AdapterLoader:
    """Loads LoRA adapters for one base model onto one device without blocking the event loop.

    Use it as an async context manager. It belongs to the event loop and the process that entered
    it; from other threads, use `asyncio.run_coroutine_threadsafe`.

    Parameters
    ----------
    layout
        The base model's modules; see `lorax_async.layouts`.
    config
        The settings; `loader.config` has them resolved.
    source, device
        Of your own, or doubles for tests (`lorax_async.testing`); None for the config's.

    Raises
    ------
    ConfigError
        If the platform is not Linux, or settings contradict each other or the layout.
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
        if not isinstance(layout, ModelLayout):
            raise ConfigError(
                f"the first argument is a ModelLayout, not {shorten_repr(layout)}; for the folder"
                " or the hub id of a base model, use AdapterLoader.from_pretrained, for a model in"
                " memory layouts.from_module"
            )
        for name, double in (("device", device), ("source", source)):
            if isinstance(double, str):
                raise ConfigError(
                    f"{name}={double!r}: this takes an object of your own; use"
                    " LoaderConfig(device=…), and name sources in ids"
                )
        self.layout = layout
        self.config = _config_or_default(config).resolved(layout.dtype)
        self._sharding = shard_layout(layout, self.config.shard)
        self.held_layout = self._sharding.held
        """The layout with the sizes of the config's shard."""
        self._source = source
        self._device = device
        self._lifetime = Lifetime("loader", "async with AdapterLoader(…) as loader")

    # -- life -------------------------------------------------------------------------------------

    @classmethod
    @context_call
    async def from_pretrained(
        cls,
        base: str | PathLike[str],
        config: LoaderConfig | None = None,
        *,
        dtype: layouts.Dtype = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Return an open loader for the base model in a folder, or of a hub id.

        `async with AdapterLoader.from_pretrained(base) as loader` closes it at the end; after
        `await`, call `close`. The config.json is read, or downloaded from the config's hub, in a
        thread; other parameters and errors are those of `layouts.from_pretrained`.
        """
        config = _config_or_default(config)
        layout = await asyncio.to_thread(
            layouts.from_pretrained,
            *(base, dtype),
            revision=revision,
            token=token,
            endpoint=config.hub_endpoint,
            offline=config.offline,
        )
        loader = cls(layout, config)
        return await loader.__aenter__()

    async def __aenter__(self) -> Self:
        async with self._lifetime.entering():
            self._assembly = Assembly(
                self._sharding, self.config, self._source, self._device, self._lifetime.check_open
            )
            await self._assembly.open()
        self._driver, self._acquiring = self._assembly.driver, self._assembly.acquiring
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, *, timeout: float | None = None) -> None:
        """Fail waiters, wait `timeout` seconds for leases, revoke the others, end all threads.

        Idempotent; goes on if the caller is cancelled.
        """
        await self._lifetime.close(lambda: self._assembly.close(self.config.seconds(timeout)))

    @property
    def closed(self) -> bool:
        """Whether the loader is closed or closing."""
        return self._lifetime.closed

    def __del__(self) -> None:
        if hasattr(self, "_lifetime"):
            self._lifetime.warn_if_unclosed()

    # -- loading ----------------------------------------------------------------------------------

    @context_call
    async def load(
        self,
        adapter_id: AdapterId,
        *,
        timeout: float | None = None,
        priority: int = 0,
        **options: Unpack[IdOptions],
    ) -> AdapterHandle:
        """Wait until every layer is on the device; return a handle, which is a lease.

        `async with loader.load(…) as handle` releases it at the end; after `await`, call `release`.

        Parameters
        ----------
        adapter_id
            A `pathlib.Path`, a string (`org/name` on the hub, a URL, or a path below
            `local_roots`: docs/sources.md), an `AdapterRef`, or an `AdapterKey` from this loader.
            Equal requests share one load.
        timeout
            Seconds; None for the config's.
        priority
            Higher priorities get slots first.
        **options
            `source`, `revision` and `token` are as in `AdapterRef`, for a string.
            `digest` is the expected sha256 of the weights in hexadecimal. The call waits for the
            comparison (local files are hashed once for it). A mismatch is an `IntegrityError`, of
            this call alone if the adapter is in use already.
            With `allow_stale`, if the source is unreachable, the version that it named last is
            taken, if the cache has it (with a `token`: and it is public); `handle.stale` is True
            then.

        Raises
        ------
        AdapterError, CapacityError, UsageError
            See docs/errors.md. Nothing stays allocated.
        """
        ref = as_ref(adapter_id, **options)
        return await self._acquire(ref, WantedTier.DEVICE, timeout, priority)

    @asynccontextmanager
    async def stream(
        self,
        adapter_id: AdapterId,
        *,
        timeout: float | None = None,
        priority: int = 0,
        preempt: bool = True,
        **options: Unpack[IdOptions],
    ) -> AsyncIterator[AdapterHandle]:
        """Yield a handle as soon as the adapter has its slot; its layers follow in order.

        `await handle.layer_ready(k)` before using layer k. Parameters and errors are those of
        `load`. With a digest, this waits for all bytes as `load` does. With `preempt=False` the
        call waits for a slot until an adapter is idle, and lets none in use leave, however long
        that takes.
        """
        ref = as_ref(adapter_id, **options)
        handle = await self._acquire(ref, WantedTier.STREAM, timeout, priority, preempts=preempt)
        try:
            yield handle
        finally:
            handle.release()

    @context_call
    async def fetch(
        self, adapter_id: AdapterId, *, timeout: float | None = None, **options: Unpack[IdOptions]
    ) -> AdapterFolder:
        """Wait until the adapter's files are on disk and checked, without loading them.

        The result is a lease on their folder: no process removes it from the cache before the lease
        is released. Fetches and loads of one adapter share one download. The adapter is not
        compared with the base model. A local adapter's folder is returned as it is.

        Parameters are those of `load`, and so are errors; a partial download stays, to be resumed.
        Raise `UsageError` for tensors, which have no folder.
        """
        self._lifetime.check_open()
        ref = as_ref(adapter_id, **options)
        return await self._assembly.store.folders.fetch(ref, self.config.seconds(timeout))

    def try_acquire(self, adapter_id: AdapterId) -> AdapterHandle | None:
        """Return a handle if the adapter is resident, else None. No I/O, no waiting.

        Return None too if the ref has a digest that is not known to match, or if its meaning was
        last looked up more than `LoaderConfig.revalidate` seconds ago (`revalidate_files` for local
        folders): then `load` it.
        """
        self._lifetime.check_open()
        ref = as_ref(adapter_id)
        lease = self._acquiring.try_lease(ref)
        return self._handle(ref, lease) if lease is not None else None

    async def _acquire(
        self,
        ref: Ref,
        tier: WantedTier,
        timeout: float | None,
        priority: int,
        *,
        preempts: bool = True,
    ) -> AdapterHandle:
        self._lifetime.check_open()
        seconds = self.config.seconds(timeout)
        name = "stream" if tier is WantedTier.STREAM else "load"
        with LoadCall(self._driver.telemetry, name, ref):
            lease = await self._acquiring.acquire(
                ref, tier, seconds, priority=priority, preempts=preempts
            )
        assert lease is not None  # this tier has leases
        return self._handle(ref, lease)

    def _handle(self, ref: Ref, lease: Lease) -> AdapterHandle:
        lease.holder = current_task_name()
        driver, config = self._driver, self.config
        share, timeout = driver.lease_table.share, config.timeout
        return AdapterHandle(
            text_of(ref), lease, driver.device, self.layout, timeout, share, config.shard
        )

    async def resolve(self, adapter_id: AdapterId, *, timeout: float | None = None) -> AdapterKey:
        """Return the version that the id means now: look at its files, or ask its source.

        A source's answer is reused for `LoaderConfig.revalidate` seconds. Raise what `load` raises
        while it resolves an id.
        """
        self._lifetime.check_open()
        resolver = self._assembly.store.resolver
        return await resolver.resolve_within(as_ref(adapter_id), self.config.seconds(timeout))

    def current_key(self, adapter_id: AdapterId) -> AdapterKey | None:
        """Return the version that the id means if `try_acquire` may use it, else None. No I/O.

        None: `resolve` the id, whose meaning is unknown or was looked up too long ago.
        """
        self._lifetime.check_open()
        return self._assembly.store.resolver.recent(as_ref(adapter_id))

    # -- room -------------------------------------------------------------------------------------

    def prefetch(
        self,
        ids: AdapterId | Iterable[AdapterId],
        *,
        tier: TierName = "device",
        priority: int = 0,
        timeout: float | None = None,
    ) -> Prefetch:
        """Start to load one adapter or several in the background; take no lease.

        They come after all waiting loads; `priority` and `timeout` are as for `load`, among
        prefetches. `tier` is "disk" (files on disk and checked), "host" (in memory; held there,
        within `host_bytes`, if they are below an immutable `LocalRoot`), or "device". If host
        memory or the device cannot hold all of them, beside pinned adapters, the first to be opened
        stay; `left_out` of the result has the others. None is left out of the disk cache, whose
        room is shared with other processes: it drops others, by its policy.

        Raise `UsageError` for the tier "host" without `host_bytes`.
        """
        self._lifetime.check_open()
        wanted = TIERS.get(tier)
        if wanted is None:
            raise UsageError(f"a tier is one of {', '.join(TIERS)}, not {shorten_repr(tier)}")
        if wanted is WantedTier.HOST and not self.config.host_bytes:
            raise UsageError(
                "host_bytes=0 lets the host tier hold nothing; raise LoaderConfig(host_bytes=…), or"
                " prefetch to 'disk'"
            )
        seconds = self.config.seconds(timeout)
        return self._acquiring.prefetch(as_refs(ids), wanted, seconds, priority)

    async def pin(
        self, adapter_id: AdapterId, *, timeout: float | None = None, priority: int = 0
    ) -> None:
        """Load the adapter and keep it on the device until `unpin` or `unload`.

        A pin belongs to the id: pinning it again after the adapter was saved again moves the pin.
        Raise what `load` raises.
        """
        self._lifetime.check_open()
        ref, seconds = as_ref(adapter_id), self.config.seconds(timeout)
        with LoadCall(self._driver.telemetry, "pin", ref):
            await self._acquiring.pin(ref, seconds, priority=priority)

    def unpin(self, adapter_id: AdapterId) -> bool:
        """Let the adapter be evicted again; return whether this id had a pin."""
        self._lifetime.check_open()
        return self._driver.pins.unpin(as_ref(adapter_id))

    async def unload(self, adapter_id: AdapterId, *, timeout: float | None = None) -> None:
        """Remove the adapter from device and host memory and end its pins, those of all ids.

        Its files stay.

        An adapter from tensors is discarded; its id then means a source's adapter again.

        Wait at most `timeout` seconds (None: the config's) for leases; new loads of the adapter
        wait meanwhile. No effect if the loader does not know the adapter.

        Raise `AdapterInUseError` if it is still leased then, with the holders' tasks, or
        `AdapterTimeoutError` if it could not be removed in time. The adapter stays in both cases.
        """
        self._lifetime.check_open()
        ref, seconds = as_ref(adapter_id), self.config.seconds(timeout)
        key = self._assembly.store.resolver.known(ref)
        if key is None:
            return
        try:
            self._driver.pins.drop(key)
            await self._driver.waiter_table.unload(key, seconds)
        except LoraxError as error:
            raise error.located(id=text_of(ref)) from None
        self._assembly.tensor_adapters.unassign(ref, key)

    # -- tensors -----------------------------------------------------------------------------------

    @context_call
    async def load_tensors(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        config: GivenConfig,
        *,
        timeout: float | None = None,
        priority: int = 0,
    ) -> AdapterHandle:
        """Load an adapter from tensors, and make `name` its id.

        Its bytes stay in host memory, within `memory_bytes`, until `unload(name)` or `replace`.
        On the device it is loaded and evicted like others.

        Parameters
        ----------
        name
            The id, for every caller; it hides a source's adapter of the same id.
        tensors
            By PEFT's names in a file (`peft.get_peft_model_state_dict`), on any device, in F32, F16
            or BF16. They are copied in a thread: do not write to them before the call returns.
        config
            A dict as in `adapter_config.json`, or a `peft.LoraConfig`.
        timeout, priority
            As for `load`.

        Raises
        ------
        AdapterError, CapacityError, UsageError
            As `load` does; `CapacityError` also if there is no room within `memory_bytes`,
            `IntegrityError` if a tensor was written to meanwhile, `UsageError` if the name means
            other tensors (equal ones are shared). The name then keeps its meaning.
        """
        self._lifetime.check_open()
        if not isinstance(name, str) or not name:
            raise InvalidAdapterIdError("a name for tensors is a non-empty str")
        ref = AdapterRef(name)
        return await self._load_tensors(ref, tensors, config, timeout, priority, replaces=False)

    @context_call
    async def replace(
        self,
        adapter_id: AdapterId,
        tensors: Mapping[str, torch.Tensor],
        config: GivenConfig,
        *,
        timeout: float | None = None,
        priority: int = 0,
    ) -> AdapterHandle:
        """Make an id mean these tensors in place of its adapter, from a source or from tensors.

        They are loaded beside the old version. Once they are resident, new requests for the id and
        its pins change to them in one step. Holders and waiters keep the old version, which leaves
        after the last of them. Calls for one id take effect in the order in which they began.

        The id is a `str`, a `pathlib.Path` or an `AdapterRef`, loaded before or not; without a
        token, it is replaced for every token. Other parameters and errors are those of
        `load_tensors`; raise `CapacityError` also if there is no room beside a pinned old version.
        The id then keeps its meaning.
        """
        self._lifetime.check_open()
        ref = as_ref(adapter_id)
        if not isinstance(ref, AdapterRef):
            raise UsageError("a key names fixed bytes; replace an id")
        return await self._load_tensors(ref, tensors, config, timeout, priority, replaces=True)

    async def _load_tensors(
        self,
        ref: AdapterRef,
        tensors: Mapping[str, torch.Tensor],
        config: GivenConfig,
        timeout: float | None,
        priority: int,
        *,
        replaces: bool,
    ) -> AdapterHandle:
        seconds = self.config.seconds(timeout)
        try:
            content = write_config(config)
        except LoraxError as error:
            raise error.located(id=ref.text) from None
        lease = await self._assembly.tensor_adapters.load(
            ref, tensors, content, seconds, priority=priority, replaces=replaces
        )
        return self._handle(ref, lease)

    # -- inspection --------------------------------------------------------------------------------

    @property
    def device(self) -> Device:
        self._lifetime.check_open()
        return self._driver.device

    @property
    def tables(self) -> PointerTables:
        """The device's tables, which kernels read: a row per module, a column per slot."""
        return self.device

    @property
    def base_copies(self) -> BaseCopies:
        """What copies of the base's weights in adapters' files are compared with."""
        self._lifetime.check_open()
        return self._assembly.base_copies

    def placement(self) -> Placement:
        """Return a view of where adapters are, of their last events, and of the budgets' use.

        Of a closed loader, too: nothing is in use then.
        """
        self._lifetime.check_readable()
        driver, assembly = self._driver, self._assembly
        return Placement(
            driver.lifecycle.states,
            driver.map_tasks.maps,
            assembly.copies.sizes,
            assembly.store.resolver,
            driver.telemetry.story,
            assembly.usage,
        )

    def statistics(self) -> Statistics:
        """Return totals since the loader was opened; of a closed loader, the last ones."""
        self._lifetime.check_readable()
        return self._assembly.statistics()

    @overload
    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]: ...

    @overload
    def subscribe(self, callback: Callable[[E], None], kind: type[E]) -> Callable[[], None]: ...

    def subscribe(
        self, callback: Callable[[Any], None], kind: type[Any] = Event
    ) -> Callable[[], None]:
        """Call `callback` with every event of class `kind`; return a function that unsubscribes.

        Events come in order, on the loop: of adapters by default, of calls with `CallEvent`.
        """
        self._lifetime.check_open()
        if not callable(callback):
            raise UsageError(f"a callback is a function of one event, not {shorten_repr(callback)}")
        return self._driver.telemetry.subscribe(callback, kind)

    @property
    def tracer(self) -> Tracer:
        """The tracer to which the loader and its engines report while a trace is recorded."""
        return self._assembly.store.tracer

    def trace(self, *, limit: int = TRACE_LIMIT) -> Trace:
        """Return a trace that records spans of all work within `with loader.trace() as trace:`.

        Several traces may record at once. `limit` spans are kept, of about 500 bytes each, and as
        many again of "compute", of which a pass has some per layer. Beyond it the oldest are
        dropped and counted.
        """
        self._lifetime.check_open()
        occupancies = self._driver.lease_table.occupancies

        def names_by_slot() -> dict[int, str]:
            return {held.grant.slot.index: name_of(key) for key, held in occupancies.items()}

        return Trace(self._assembly.store.tracer, limit, names_by_slot)


def _config_or_default(config: LoaderConfig | None) -> LoaderConfig:
    if not isinstance(config, LoaderConfig | None):
        raise ConfigError(f"config must be LoaderConfig(…), not {shorten_repr(config)}")
    return config or LoaderConfig()
