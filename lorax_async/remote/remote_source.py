"""The `Source` of remote adapters, and what it is made of."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Lock, RLock
from typing import Any, NamedTuple, TypeVar

from lorax_async.cache.base import Cache, CacheEntry, EntryRecord
from lorax_async.cache.disk_cache import OwnCache
from lorax_async.concurrency import FetchControl, WorkerThreads
from lorax_async.config import Checking, Limits, LoaderConfig
from lorax_async.errors import (
    IntegrityError,
    InternalError,
    InvalidAdapterIdError,
    LoaderClosedError,
)
from lorax_async.files import LocalPages, Reader
from lorax_async.formats.spans import ByteSpan
from lorax_async.http.range_engine import RangeEngine
from lorax_async.http.settings import HttpSettings
from lorax_async.ids import HubRepository, LocalFolder, Place, StoreFolder, WebFolder, parse_ref
from lorax_async.remote.base import AdapterMetadata, AllowRules, Backend, unwanted_error
from lorax_async.remote.hub import HubBackend, StandardHubCache, TieredCache, endpoint_in_use
from lorax_async.remote.object_stores import StoreBackend
from lorax_async.remote.opening import (
    MAX_KEYS,
    AdapterOpener,
    VersionResolver,
    cache_key,
    close_unused,
)
from lorax_async.remote.readers import (
    EntryReader,
    FetchReader,
    ReopenedReader,
    entry_gone,
    hold_entry,
    sha256_of_entry,
    stored_folder,
    verification_of,
)
from lorax_async.remote.web import WebBackend
from lorax_async.sources.base import AdapterFile, PinnedPages, StoredFolder
from lorax_async.tracing.recorder import Tracer
from lorax_async.types import UNCHECKED, AdapterKey, AdapterRef, RemoteKey, Verification
from lorax_async.urls import parse_url

T = TypeVar("T")


class RemoteParts(NamedTuple):
    """What a remote source works with; `close`, which blocks, ends it."""

    resolver: VersionResolver
    opener: AdapterOpener
    workers: WorkerThreads
    close: Callable[[], None]


class RemoteSource:
    """A `Source` of adapters that backends find, whose keys are `RemoteKey`s.

    Parameters
    ----------
    make
        Makes the parts, at the first use. It may block: it reads certificates.
    limits
        Limits of an adapter's files.
    verify
        When digests are checked: see `LoaderConfig.verify`.
    """

    def __init__(
        self, make: Callable[[], RemoteParts], *, limits: Limits, verify: Checking
    ) -> None:
        self._make = make
        self._limits = limits
        self._verify: Checking = verify
        self._lock = Lock()
        self._parts: RemoteParts | None = None
        self._closed = False
        self._records: OrderedDict[RemoteKey, EntryRecord] = OrderedDict()
        """The record opened last for each key: its plan fits these bytes only."""

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        return await (await self._connect()).resolver.resolve(parse_ref(ref))

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:
        remote = _remote(key)
        file = await (await self._connect()).opener.open(remote, control)
        if isinstance(file.reader, EntryReader):
            self._remember(remote, file.reader.entry.record)
        else:
            self._records.pop(remote, None)
        return file

    async def metadata(self, key: AdapterKey) -> AdapterMetadata:
        """Fetch config and headers of a resolved adapter, and nothing else."""
        opener = (await self._connect()).opener
        return await opener.metadata(_remote(key), FetchControl())

    def reopen(self, key: AdapterKey) -> Reader:
        parts, remote = self._connect_blocking(), _remote(key)

        def open() -> EntryReader:
            return EntryReader(self._entry(parts, remote), cache_key(remote), self._limits)

        return ReopenedReader(open)

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[ByteSpan]],
        arrived: Callable[[int], None],
        control: FetchControl,
    ) -> Verification:
        reader = file.reader
        if isinstance(reader, FetchReader):
            entry = await reader.take_fetch().bring(groups, arrived, control)
            self._remember(reader.key, entry.record)
            reader.adopt(entry)
            return self._verification(entry)
        if not isinstance(reader, EntryReader):
            raise InternalError(f"a remote source cannot bring the bytes of a {type(reader)}")
        if control.cancelled:
            raise unwanted_error()
        for group in range(len(groups)):
            arrived(group)
        await self._check(reader)
        return self._verification(reader.entry)

    def folder(self, key: AdapterKey, reader: Reader) -> StoredFolder:
        return stored_folder(key, reader)

    async def digest(self, key: AdapterKey) -> str:
        parts = await self._connect()
        entry = await parts.workers.run(partial(self._entry, parts, _remote(key)), close_unused)
        try:
            return await sha256_of_entry(entry, parts.workers.threads)
        finally:
            entry.close()

    async def populate(self, key: AdapterKey) -> PinnedPages:
        parts = await self._connect()
        run = parts.workers.run
        entry = await run(partial(self._entry, parts, _remote(key)), close_unused)
        try:  # an entry that is removed meanwhile looks like a replaced one
            pages = await run(partial(hold_entry, entry), LocalPages.close)
            try:
                for start in pages.starts:
                    await run(partial(pages.populate, start))
                await run(pages.settle)
            except BaseException:
                await parts.workers.finish(pages.close)
                raise
        finally:
            entry.close()
        return pages

    def close(self) -> None:
        """End the parts. Blocks. Idempotent."""
        with self._lock:
            parts, self._parts, self._closed = self._parts, None, True
        if parts is not None:
            parts.close()

    async def _connect(self) -> RemoteParts:
        """Return the parts; make them in a thread."""
        parts = self._parts
        if parts is None:
            parts = await asyncio.get_running_loop().run_in_executor(None, self._connect_blocking)
        return parts

    def _connect_blocking(self) -> RemoteParts:
        """Return the parts. The first call may block."""
        with self._lock:
            if self._closed:
                raise LoaderClosedError("the loader is closed")
            if self._parts is None:
                self._parts = self._make()
            return self._parts

    def _remember(self, key: RemoteKey, record: EntryRecord) -> None:
        self._records[key] = record
        self._records.move_to_end(key)
        if len(self._records) > MAX_KEYS:
            self._records.popitem(last=False)

    def _entry(self, parts: RemoteParts, key: RemoteKey) -> CacheEntry:
        """Open the entry of a key. Raise `EvictedError` if it is gone. Blocks."""
        entry = parts.resolver.cache().open(cache_key(key))
        if entry is None:
            raise entry_gone()
        record = self._records.get(key)
        if record is not None and record.contradicts(entry.record.files):
            entry.close()  # another process fetched it again, and its source had other bytes
            raise entry_gone()
        return entry

    def _verification(self, entry: CacheEntry) -> Verification:
        return UNCHECKED if self._verify == "none" else verification_of(entry.record)

    async def _check(self, reader: EntryReader) -> None:
        """Hash an entry and compare it with the digests that publication recorded."""
        if self._verify == "none":
            return
        parts = await self._connect()

        def open_checked() -> CacheEntry | None:
            return parts.resolver.cache().open(reader.key, check=True)

        entry = await parts.workers.run(open_checked, close_unused)
        if entry is None:
            same = False
        else:  # what was hashed must be what is read, not the copy of another tier
            same = entry.folder == reader.entry.folder and entry.record == reader.entry.record
            entry.close()
        if not same:
            raise IntegrityError("it changed in the disk cache since it was stored; load it again")


def _remote(key: AdapterKey) -> RemoteKey:
    if not isinstance(key, RemoteKey):
        raise InternalError(f"{key} is not from a remote source")
    return key


CACHE_THREADS = 4
QUERY_THREADS = 8
"""Each query to the hub takes two; a host that does not answer keeps them for long."""

STORE_THREADS = 32
"""For each kind of store. No bucket uses more than `BUCKET_CALLS` of them."""


class BackendRegistry:
    """The cache, and backends by kind of place, each made at its first use. All methods block.

    `close` ends the backends and their threads, but not the loader's own cache, `own`.
    """

    def __init__(self, config: LoaderConfig, engine: RangeEngine, own: OwnCache) -> None:
        self._config = config
        self._engine = engine
        self._own = own
        self._lock = RLock()
        self._made: dict[str, Any] = {}
        self._closing: list[Callable[[], None]] = []

    def backend(self, place: Place) -> Backend[Any]:
        with self._lock:
            match place:
                case HubRepository():
                    return self._hub()
                case StoreFolder(scheme):
                    return self._once(scheme, partial(self._make_store, scheme))
                case WebFolder():
                    rules, limits = AllowRules(self._config.allow), self._config.limits
                    return self._once("web", partial(WebBackend, self._engine, rules, limits))
                case LocalFolder():
                    raise InvalidAdapterIdError("a local folder has no remote source")

    def cache(self) -> Cache:
        """Return the cache of all remote adapters."""
        if self._config.hub_cache == "off":
            return self._own.get()
        with self._lock:
            return self._once("cache", self._make_tiered_cache)

    def close(self) -> None:
        for close in self._closing:
            close()

    def _once(self, name: str, make: Callable[[], T]) -> T:
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made

    def _threads(self, kind: str, count: int) -> ThreadPoolExecutor:
        """Make a pool for one backend: a hub that does not answer delays no store."""
        pool = ThreadPoolExecutor(count, f"lorax-query-{kind}")
        self._closing.append(pool.shutdown)
        return pool

    def _hub(self) -> HubBackend:
        def make() -> HubBackend:
            endpoint, allow = endpoint_in_use(self._config.hub_endpoint), self._config.allow
            rules = AllowRules(allow, named=(parse_url(endpoint).origin,))
            threads = self._threads("hub", QUERY_THREADS)
            return HubBackend(endpoint=endpoint, rules=rules, threads=threads, allow=allow)

        return self._once("hub", make)

    def _make_store(self, scheme: str) -> StoreBackend:
        store = StoreBackend(self._threads(scheme, STORE_THREADS), AllowRules(self._config.allow))
        self._closing.append(store.close)
        return store

    def _make_tiered_cache(self) -> TieredCache:
        def own_scope() -> str | None:
            with self._lock:
                hub = self._hub()
            return hub.own_scope()

        return TieredCache(StandardHubCache(self._config.hub_cache_dir, own_scope), self._own.get())


def make_remote_source(
    config: LoaderConfig, own: OwnCache, tracer: Tracer | None = None
) -> RemoteSource:
    """Return a remote source that makes its threads and connections at its first use.

    The caller closes it, and then the loader's own cache, `own`.
    """

    def make() -> RemoteParts:
        engine = RangeEngine(HttpSettings(connections=config.connections), tracer=tracer)
        workers = WorkerThreads(CACHE_THREADS)
        backends = BackendRegistry(config, engine, own)
        resolver = VersionResolver(
            *(backends.backend, backends.cache, workers),
            offline=config.offline,
            fresh=config.revalidate,
        )
        opener = AdapterOpener(
            resolver, engine, workers, limits=config.limits, verify=config.verify
        )

        def close() -> None:
            engine.close()
            workers.close()
            backends.close()

        return RemoteParts(resolver, opener, workers, close)

    return RemoteSource(make, limits=config.limits, verify=config.verify)


@contextmanager
def open_remote_source(config: LoaderConfig) -> Iterator[RemoteSource]:
    """Yield a remote source with a cache of its own, without a loader."""
    own = OwnCache(config)
    source = make_remote_source(config, own)
    try:
        yield source
    finally:
        source.close()
        own.close()
