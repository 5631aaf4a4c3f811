"""`AdapterLoader`: what an embedding server calls."""

from __future__ import annotations

import asyncio
import sys
import warnings
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from lorax_async.adapter import AdapterId, AdapterKey, Ref, as_ref, text_of
from lorax_async.config import LoaderConfig
from lorax_async.core.layout import ModelLayout
from lorax_async.core.sharding import shard_layout
from lorax_async.core.waiters import Tier
from lorax_async.errors import ConfigError, LoaderClosedError, LoraxError, UsageError
from lorax_async.handle import AdapterHandle, current_task_name
from lorax_async.io.ports import Device, Source
from lorax_async.looking import Looking
from lorax_async.runtime.fetches import AdapterFolder
from lorax_async.runtime.home import Home
from lorax_async.runtime.machinery import Machinery
from lorax_async.runtime.prefetch import Prefetch
from lorax_async.runtime.tenancy import Lease
from lorax_async.runtime.whereabouts import TIERS, TierName
from lorax_async.tensor_calls import TensorCalls


class AdapterLoader(TensorCalls, Looking):
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
        self._home = Home()
        self._closing: asyncio.Task[None] | None = None

    # -- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._home.enter()
        try:
            self._machinery = Machinery(self._sharding, self.config, self._source, self._device)
            await self._machinery.open(self._check_open)
        except BaseException:
            self._home.leave()
            raise
        self._driver, self._acquiring = self._machinery.driver, self._machinery.acquiring
        self._home.settle()
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
        loop = self._home.check()
        if self._closing is None:
            seconds = self.config.seconds(timeout)
            self._closing = loop.create_task(self._machinery.close(seconds), name="lorax close")
        await asyncio.shield(self._closing)

    @property
    def closed(self) -> bool:
        """Whether it was closed, or is closing."""
        return self._closing is not None

    def __del__(self) -> None:
        home = getattr(self, "_home", None)
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
        return await self._acquire(ref, Tier.DEVICE, timeout, priority)

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
        handle = await self._acquire(ref, Tier.STREAM, timeout, priority)
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
        return await self._machinery.fetching.fetch(ref, self.config.seconds(timeout))

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
        self, ref: Ref, tier: Tier, timeout: float | None, priority: int
    ) -> AdapterHandle:
        self._check_open()
        seconds = self.config.seconds(timeout)
        name = "stream" if tier is Tier.STREAM else "load"
        with self._driver.interest.calls.one(name, ref):
            lease = await self._acquiring.lease(ref, tier, seconds, priority=priority)
        return self._handle(ref, lease)

    def _handle(self, ref: Ref, lease: Lease) -> AdapterHandle:
        lease.holder = current_task_name()
        share, timeout = self._driver.interest.share, self.config.timeout
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
        return self._machinery.prefetch(refs, wanted, seconds, priority)

    async def pin(
        self, adapter_id: AdapterId, *, timeout: float | None = None, priority: int = 0
    ) -> None:
        """Load the adapter and keep it on the device until `unpin` or `unload`, leased or not.

        A pin belongs to the id: pinning it again after it was re-saved moves the pin. Raises as
        `load` does.
        """
        self._check_open()
        ref, seconds = as_ref(adapter_id), self.config.seconds(timeout)
        with self._driver.interest.calls.one("pin", ref):
            await self._acquiring.pin(ref, seconds, priority=priority)

    def unpin(self, adapter_id: AdapterId) -> bool:
        """Let the adapter be evicted again. Whether this id had pinned it."""
        self._check_open()
        return self._driver.interest.unpin(as_ref(adapter_id))

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
            await self._driver.interest.unload(key, seconds)
        except LoraxError as error:
            raise error.located(id=text_of(ref)) from None
        self._machinery.giving.take_back(ref, key)

    # -- checks -----------------------------------------------------------------------------------

    def _check_open(self) -> None:
        self._home.check()
        if self._closing is not None:
            raise LoaderClosedError("the loader is closed")
