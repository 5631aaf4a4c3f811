"""The `Source` of remote adapters: resolved by backends, fetched by ranges, cached on disk."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from ipaddress import IPv6Address, ip_address, ip_network
from threading import Lock, RLock
from typing import Any, NamedTuple

from lorax_async.cache.base import Cache, CacheEntry, EntryRecord
from lorax_async.cache.disk_cache import OwnCache
from lorax_async.concurrency import FetchControl, WorkerThreads
from lorax_async.config import Checking, Limits, LoaderConfig
from lorax_async.errors import IntegrityError, InternalError, LoaderClosedError
from lorax_async.files import LocalPages, Reader
from lorax_async.formats import spans
from lorax_async.http.range_engine import RangeEngine
from lorax_async.http.settings import Address, HttpSettings
from lorax_async.ids import Allow, OriginPlace
from lorax_async.remote.base import Backend
from lorax_async.remote.hub import HubBackend, StandardHubCache, TieredCache, standard_folder
from lorax_async.remote.hub_calls import endpoint_in_use
from lorax_async.remote.metadata import AdapterMetadata, unwanted_error
from lorax_async.remote.object_stores import StoreBackend
from lorax_async.remote.opening import AdapterOpener, cache_key, close_unused
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
from lorax_async.remote.resolution import MAX_KEYS, ResolutionCache, VersionResolver
from lorax_async.remote.web import WebBackend
from lorax_async.sources.base import AdapterFile, PinnedPages, StoredFolder
from lorax_async.tracing.recorder import Tracer
from lorax_async.types import UNCHECKED, AdapterKey, AdapterRef, RemoteKey, Verification
from lorax_async.urls import (
    DEFAULT_PORTS,
    InvalidUrlError,
    Origin,
    Url,
    folder_path,
    is_address,
    parse_url,
)

_PRIVATE = [
    ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
]
"""Private networks by RFC 1918, 6598 and 4193, without loopback and link-local addresses."""


class AllowRules:
    """The `Rules` that the operator's entries make.

    - The first request may go where an "https" or "http" entry allows it, or to a named origin.
    - A redirect may lead to any https URL as well. Only hosts of named origins, and those of
      entries below their prefixes, may have addresses that are not public.

    Parameters
    ----------
    allow
        The operator's entries; those for other schemes than "https" and "http" are ignored.
    named
        Origins that the operator has named, allowed at any address: the endpoint of the hub or of a
        store.
    """

    def __init__(self, allow: Sequence[Allow] = (), named: Collection[Origin] = ()) -> None:
        self._entries = tuple(entry for entry in allow if entry.scheme in DEFAULT_PORTS)
        self._named = frozenset(named)

    def allows(self, url: Url, hop: int) -> bool:
        is_named = url.origin in self._named
        return (hop > 0 and url.secure) or is_named or bool(self._covering(url))

    def allows_address(self, url: Url, address: Address) -> bool:
        if url.origin in self._named:
            return True
        return any(_admits(entry, address) for entry in self._covering(url))

    def _covering(self, url: Url) -> list[Allow]:
        try:
            path = folder_path(url.target.partition("?")[0])[1:]
        except InvalidUrlError:
            path = ""  # it is ambiguous: no prefix covers it
        origin = url.origin
        place = OriginPlace(origin.scheme, origin.host, origin.explicit_port, path)
        return [entry for entry in self._entries if entry.covers(place)]


def _admits(entry: Allow, address: Address) -> bool:
    """Return whether the entry's host may have this address, which is not public."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    plain = mapped or address
    if entry.host == "localhost":
        return plain.is_loopback
    if is_address(entry.host):
        return plain == ip_address(entry.host)
    return entry.private and any(plain in network for network in _PRIVATE)


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
        return await (await self._connect()).resolver.resolve(ref)

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
        return ReopenedReader(partial(self._reader, self._connect_blocking(), _remote(key)))

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[spans.ByteSpan]],
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
        entry = parts.opener.cache(key).open(cache_key(key))
        if entry is None:
            raise entry_gone()
        record = self._records.get(key)
        if record is not None and record.contradicts(entry.record.files):
            entry.close()  # another process fetched it again, and its source had other bytes
            raise entry_gone()
        return entry

    def _reader(self, parts: RemoteParts, key: RemoteKey) -> EntryReader:
        """Open a reader of a key's entry. Blocks."""
        return EntryReader(self._entry(parts, key), cache_key(key), self._limits)

    def _verification(self, entry: CacheEntry) -> Verification:
        return UNCHECKED if self._verify == "none" else verification_of(entry.record)

    async def _check(self, reader: EntryReader) -> None:
        """Hash an entry and compare it with the digests that publication recorded."""
        if self._verify == "none":
            return
        parts = await self._connect()

        def open_checked() -> CacheEntry | None:
            return parts.opener.cache(reader.key).open(reader.key, check=True)

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
    """Backends and caches by kind of source, each made at its first use. All methods block.

    `close` ends the backends and their threads, but not the loader's own cache, `own`.
    """

    def __init__(self, config: LoaderConfig, engine: RangeEngine, own: OwnCache) -> None:
        self._config = config
        self._engine = engine
        self._own = own
        self._lock = RLock()
        self._made: dict[str, Any] = {}
        self._pools: list[ThreadPoolExecutor] = []
        self._closing: list[Callable[[], None]] = []

    def backend(self, kind: str) -> Backend:
        """Return the backend of "hub", "s3", "gs", "az", "https" or "http"."""
        if kind == "hub":
            return self._hub()
        return self._store(kind) if kind in {"s3", "gs", "az"} else self._web()

    def cache(self, kind: str) -> Cache:
        """Return the cache of the adapters of a kind of source."""
        tiered = kind == "hub" and self._config.hub_cache != "off"
        return self._once("tiered cache", self._tiered_cache) if tiered else self._own.get()

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()
        for close in reversed(self._closing):
            close()

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        with self._lock:
            if name not in self._made:
                self._made[name] = make()
            return self._made[name]

    def _threads(self, kind: str, count: int = QUERY_THREADS) -> ThreadPoolExecutor:
        """Make a pool for one backend: a hub that does not answer delays no store."""
        pool = ThreadPoolExecutor(count, f"lorax-query-{kind}")
        self._pools.append(pool)
        return pool

    def _hub(self) -> HubBackend:
        def make() -> HubBackend:
            endpoint = endpoint_in_use(self._config.hub_endpoint)
            rules = AllowRules(self._config.allow, named=(parse_url(endpoint).origin,))
            threads = self._threads("hub")
            return HubBackend(
                endpoint=endpoint, rules=rules, threads=threads, allow=self._config.allow
            )

        backend: HubBackend = self._once("hub", make)
        return backend

    def _store(self, kind: str) -> StoreBackend:
        def make() -> StoreBackend:
            threads = self._threads(kind, STORE_THREADS)
            store = StoreBackend(threads, AllowRules(self._config.allow))
            self._closing.append(store.close)
            return store

        backend: StoreBackend = self._once(kind, make)
        return backend

    def _web(self) -> WebBackend:
        def make() -> WebBackend:
            rules = AllowRules(self._config.allow)
            return WebBackend(self._engine, rules, self._config.limits)

        backend: WebBackend = self._once("web", make)
        return backend

    def _tiered_cache(self) -> TieredCache:
        config = self._config
        hub = StandardHubCache(config.hub_cache_dir or standard_folder(), self._hub().own_scope)
        return TieredCache(hub, self._own.get())


def make_remote_source(
    config: LoaderConfig, own: OwnCache, tracer: Tracer | None = None
) -> RemoteSource:
    """Return a remote source that makes its threads and connections at its first use.

    The caller closes it, and then the loader's own cache, `own`.
    """
    make = partial(_make_parts, config, own, tracer)
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


def _make_parts(config: LoaderConfig, own: OwnCache, tracer: Tracer | None) -> RemoteParts:
    engine = RangeEngine(HttpSettings(connections=config.connections), tracer=tracer)
    workers = WorkerThreads(CACHE_THREADS)
    backends = BackendRegistry(config, engine, own)
    known = ResolutionCache(config.revalidate, time.monotonic)
    resolver = VersionResolver(
        *(backends.backend, backends.cache, known, workers),
        offline=config.offline,
        fresh=config.revalidate,
    )
    opener = AdapterOpener(
        *(resolver, known, backends.cache, engine, workers),
        limits=config.limits,
        verify=config.verify,
    )

    def close() -> None:
        engine.close()
        workers.close()
        backends.close()

    return RemoteParts(resolver, opener, workers, close)
