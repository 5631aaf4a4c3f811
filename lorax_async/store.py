"""`AdapterStore`, the API for programs that need an adapter's files, not its tensors."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Self, Unpack

from lorax_async.concurrency import Lifetime, PrioritySemaphore, context_call
from lorax_async.config import StoreConfig
from lorax_async.errors import ConfigError, shorten_repr
from lorax_async.ids import origin_of
from lorax_async.runtime.acquire import BACKGROUND, BACKGROUND_SECONDS, Prefetch
from lorax_async.runtime.assembly import StoreParts
from lorax_async.runtime.folders import AdapterFolder, StoredAdapter, StoreStatistics
from lorax_async.sources.base import Source
from lorax_async.types import AdapterId, AdapterKey, IdOptions, Ref, as_ref, as_refs


class AdapterStore:
    """Keeps adapters as verified PEFT folders on disk, for an engine that reads files.

        async with AdapterStore(StoreConfig()) as store:
            async with store.checkout("org/sql-adapter") as folder:
                engine.add_lora(folder.path)

    It needs no base model and no device. Several processes may share its cache. It belongs to the
    event loop and the process that entered it.

    Parameters
    ----------
    config
        The settings.
    source
        A `FolderSource` of your own, for tests; None for the config's.

    Raises
    ------
    ConfigError
        If the platform is not Linux.
    """

    def __init__(self, config: StoreConfig | None = None, *, source: Source | None = None) -> None:
        if sys.platform != "linux":
            raise ConfigError("lorax_async runs on Linux only")
        if not isinstance(config, StoreConfig | None):
            raise ConfigError(f"config must be StoreConfig(…), not {shorten_repr(config)}")
        self.config = config or StoreConfig()
        self._source = source
        self._lifetime = Lifetime("store", "async with AdapterStore(…) as store")

    async def __aenter__(self) -> Self:
        async with self._lifetime.entering():
            self._parts = StoreParts(self.config, self._source, self._lifetime.check_open)
            self._turns = PrioritySemaphore(BACKGROUND, BACKGROUND_SECONDS)
            self._prefetches: set[Prefetch] = set()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, *, timeout: float | None = None) -> None:
        """Fail calls, wait `timeout` seconds for leases, then end those left and all threads.

        Idempotent; goes on if the caller is cancelled.
        """
        await self._lifetime.close(lambda: self._close(self.config.seconds(timeout)))

    async def _close(self, timeout: float) -> None:
        prefetches = tuple(self._prefetches)
        for prefetch in prefetches:
            prefetch.cancel()
        await self._parts.close(timeout)
        await asyncio.gather(*(hint.task for hint in prefetches), return_exceptions=True)

    @property
    def closed(self) -> bool:
        """Whether the store is closed or closing."""
        return self._lifetime.closed

    def __del__(self) -> None:
        if hasattr(self, "_lifetime"):
            self._lifetime.warn_if_unclosed()

    @context_call
    async def checkout(
        self, adapter_id: AdapterId, *, timeout: float | None = None, **options: Unpack[IdOptions]
    ) -> AdapterFolder:
        """Return a lease on the folder with the adapter's files, downloaded if necessary.

        The call is a coroutine that waits until the files are on disk and checked; `async with`
        awaits it, and releases the folder at the end. No process evicts the folder before that.
        Calls for one adapter share one download, also with other processes. A local adapter's
        folder is returned as it is.

        Parameters and errors are those of `AdapterLoader.load`, except that the adapter is not
        compared with a base model. Tensors, which have no folder, are a `UsageError`.
        After an error or a cancellation, what was downloaded stays, to be resumed.
        """
        self._lifetime.check_open()
        ref = as_ref(adapter_id, **options)
        return await self._parts.folders.fetch(ref, self.config.seconds(timeout))

    async def resolve(self, adapter_id: AdapterId, *, timeout: float | None = None) -> AdapterKey:
        """Return the version that the id means now, as `AdapterLoader.resolve` does."""
        self._lifetime.check_open()
        return await self._parts.resolver.resolve_within(
            as_ref(adapter_id), self.config.seconds(timeout)
        )

    def current_key(self, adapter_id: AdapterId) -> AdapterKey | None:
        """Return the version that the id means if its last look-up still counts, else None.

        No I/O. After None, call `resolve`. `StoreConfig.revalidate` and `revalidate_files` say how
        long a look-up counts.
        """
        self._lifetime.check_open()
        return self._parts.resolver.recent(as_ref(adapter_id))

    def prefetch(
        self, ids: AdapterId | Iterable[AdapterId], *, timeout: float | None = None
    ) -> Prefetch:
        """Start to download one adapter or several in the background; take no lease.

        A few at a time, with the connections that checkouts leave free. A checkout joins the
        download that it finds. The result need not be awaited; errors are raised there only. Its
        `left_out` is empty: the cache, shared with other processes, drops others by its policy.
        """
        self._lifetime.check_open()
        refs = as_refs(ids)
        seconds = self.config.seconds(timeout)

        async def fetch(ref: Ref) -> bool:
            async with self._turns.turn(0, origin_of(ref)):
                folder = await self._parts.folders.fetch(ref, seconds, urgent=False)
            folder.release()
            return True

        prefetch = Prefetch(refs, fetch)
        self._prefetches.add(prefetch)
        prefetch.task.add_done_callback(lambda _: self._prefetches.discard(prefetch))
        return prefetch

    def placement(self) -> Mapping[str, StoredAdapter]:
        """Return what became of the last call for each adapter, by the id that callers use.

        A copy, without I/O. The 16,384 ids that were used last are remembered.
        """
        self._lifetime.check_readable()
        return MappingProxyType(self._parts.folders.placement())

    def statistics(self) -> StoreStatistics:
        """Return totals of the downloads since the store was opened; after `close`, the last ones.

        No I/O. Unlike the other calls, it may come from any thread, as that of a scrape.
        """
        if not hasattr(self, "_parts"):
            self._lifetime.check_loop()  # raises
        return self._parts.folders.statistics
