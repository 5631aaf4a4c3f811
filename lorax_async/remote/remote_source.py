"""Adapters that are elsewhere: resolved by backends, fetched by ranges, kept in a cache."""

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

from lorax_async.cache.base import Cache, CacheEntry
from lorax_async.cache.disk_cache import OwnCache
from lorax_async.cache.records import EntryRecord
from lorax_async.concurrency import FetchControl, WorkerThreads
from lorax_async.config import Checking, Limits, LoaderConfig
from lorax_async.errors import (
    IntegrityError,
    InternalError,
    InvalidAdapterIdError,
    LoaderClosedError,
)
from lorax_async.files import Reader
from lorax_async.formats import spans
from lorax_async.http.range_engine import RangeEngine
from lorax_async.http.settings import Address, HttpSettings
from lorax_async.http.urls import Origin, Url, parse_url
from lorax_async.ids.allow import Allow, OriginPlace, is_address
from lorax_async.ids.grammar import DEFAULT_PORTS, checked_host, folder_path
from lorax_async.remote.base import Backend
from lorax_async.remote.hub import HubLocator
from lorax_async.remote.hub_cache import StandardHubCache, TieredCache, standard_folder
from lorax_async.remote.hub_calls import endpoint_in_use
from lorax_async.remote.metadata import AdapterMetadata, nobody_waits
from lorax_async.remote.object_stores import StoreBackend
from lorax_async.remote.opening import AdapterOpener, cache_key, close_opened
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
from lorax_async.sources.local_weights import LocalPages, ReadAhead
from lorax_async.tracing.recorder import Tracer
from lorax_async.types import UNCHECKED, AdapterKey, AdapterRef, RemoteKey, Verification

_PRIVATE = [
    ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
]
"""RFC 1918, 6598 and 4193: neither loopback nor link-local."""


class AllowRules:
    """`Rules` made of the operator's entries.

    - The first request goes where an "https" or "http" entry allows it, or to a named origin.
    - A redirect also leads to any https URL. No other host than a named one or one of an entry (and
      there only below its prefix) may have an address that is not public.

    Parameters
    ----------
    allow
        Entries for other schemes than "https" and "http" count for nothing here.
    named
        Origins that are allowed as they are, whatever their addresses, for the operator has named
        them: the hub's endpoint, or that of a store.
    """

    def __init__(self, allow: Sequence[Allow] = (), named: Collection[Origin] = ()) -> None:
        self._entries = tuple(entry for entry in allow if entry.scheme in DEFAULT_PORTS)
        self._named = frozenset(_place(origin) for origin in named)

    def allows(self, url: Url, hop: int) -> bool:
        return (hop > 0 and url.secure) or self._is_named(url) or bool(self._covering(url))

    def allows_address(self, url: Url, address: Address) -> bool:
        return self._is_named(url) or any(_admits(entry, address) for entry in self._covering(url))

    def _is_named(self, url: Url) -> bool:
        return _place(url.origin) in self._named

    def _covering(self, url: Url) -> list[Allow]:
        reach = OriginPlace(*_place(url.origin), _path(url))
        return [entry for entry in self._entries if entry.covers(reach)]


def _place(origin: Origin) -> tuple[str, str, int | None]:
    """As entries spell it; a host that could be none of theirs stays as it is."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    try:
        host = checked_host(host)
    except InvalidAdapterIdError:
        host = origin.host
    own = origin.port == DEFAULT_PORTS[origin.scheme]
    return origin.scheme, host, None if own else origin.port


def _path(url: Url) -> str:
    """Below the host; "" where a server might read it in two ways, so that no prefix fits it."""
    try:
        return folder_path(url.target.partition("?")[0])[1:]
    except InvalidAdapterIdError:
        return ""


def _admits(entry: Allow, address: Address) -> bool:
    """Whether the entry's host may be this address, which is no public one."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    plain = mapped or address
    if entry.host == "localhost":
        return plain.is_loopback
    if is_address(entry.host):
        return plain == ip_address(entry.host)
    return entry.private and any(plain in network for network in _PRIVATE)


class RemoteSource:
    """A `Source` of what locators find, whose keys are `RemoteKey`s.

    Parameters
    ----------
    resolving, opening
        Which version an id names; how it is opened.
    limits
        What of a stranger's adapter is accepted.
    verify
        What digests are for: see `LoaderConfig.verify`.
    """

    def __init__(
        self,
        resolving: VersionResolver,
        opening: AdapterOpener,
        workers: WorkerThreads,
        *,
        limits: Limits,
        verify: Checking,
    ) -> None:
        self._resolving = resolving
        self._opening = opening
        self._workers = workers
        self._limits = limits
        self._verify: Checking = verify
        self._records: OrderedDict[RemoteKey, EntryRecord] = OrderedDict()
        """What was opened last by each key: its plan goes with these bytes, and no others."""

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        return await self._resolving.resolve(ref)

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:
        remote = _remote(key)
        file = await self._opening.open(remote, control)
        if isinstance(file.reader, EntryReader):
            self._remember(remote, file.reader.entry.record)
        else:
            self._records.pop(remote, None)
        return file

    async def metadata(self, key: AdapterKey, control: FetchControl) -> AdapterMetadata:
        """Config and headers of an adapter that was resolved, for who wants no more of it."""
        return await self._opening.metadata(_remote(key), control)

    def reopen(self, key: AdapterKey) -> Reader:
        return ReopenedReader(partial(self._reader, _remote(key)))

    def _remember(self, key: RemoteKey, record: EntryRecord) -> None:
        self._records[key] = record
        self._records.move_to_end(key)
        if len(self._records) > MAX_KEYS:
            self._records.popitem(last=False)

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[spans.ByteSpan]],
        arrived: Callable[[int], None],
        control: FetchControl,
    ) -> Verification:
        reader = file.reader
        if isinstance(reader, FetchReader):
            entry = await reader.taken().bring(groups, arrived, control)
            self._remember(reader.key, entry.record)
            reader.adopt(entry)
            return self._verification(entry)
        if not isinstance(reader, EntryReader):
            raise InternalError(f"a remote source cannot bring the bytes of a {type(reader)}")
        if control.ended:
            raise nobody_waits()
        for group in range(len(groups)):
            arrived(group)
        await self._check(reader)
        return self._verification(reader.entry)

    def folder(self, key: AdapterKey, reader: Reader) -> StoredFolder:
        return stored_folder(key, reader)

    async def digest(self, key: AdapterKey) -> str:
        remote = _remote(key)
        entry = await self._workers.run(partial(self._entry, remote), close_opened)
        try:
            return await sha256_of_entry(entry, self._workers.threads)
        finally:
            entry.close()

    async def populate(self, key: AdapterKey) -> PinnedPages:
        entry = await self._workers.run(partial(self._entry, _remote(key)), close_opened)
        try:  # who is removed meanwhile looks as if he was replaced
            hold = await self._workers.run(partial(hold_entry, entry), _close_hold)
            try:
                if isinstance(hold, LocalPages):
                    for start in hold.starts:
                        await self._workers.run(partial(hold.populate, start))
                    await self._workers.run(hold.settle)
            except BaseException:
                await self._workers.finish(hold.close)
                raise
        finally:
            entry.close()
        return hold

    def _entry(self, key: RemoteKey) -> CacheEntry:
        """Blocks. Raises `EvictedError`."""
        entry = self._opening.cache(key).open(cache_key(key))
        if entry is None:
            raise entry_gone()
        record = self._records.get(key)
        if record is not None and record.contradicts(entry.record.files):
            entry.close()  # another process has fetched it anew, and its source had other bytes
            raise entry_gone()
        return entry

    def _reader(self, key: RemoteKey) -> EntryReader:
        """Blocks."""
        return EntryReader(self._entry(key), cache_key(key), self._limits)

    def _verification(self, entry: CacheEntry) -> Verification:
        return UNCHECKED if self._verify == "none" else verification_of(entry.record)

    async def _check(self, reader: EntryReader) -> None:
        """Hash what was published before, against what it came to then."""
        if self._verify == "none":
            return

        def checked() -> CacheEntry | None:
            return self._opening.cache(reader.key).open(reader.key, check=True)

        entry = await self._workers.run(checked, close_opened)
        if entry is None:
            raise IntegrityError("it changed in the disk cache since it was stored; load it again")
        entry.close()


def _remote(key: AdapterKey) -> RemoteKey:
    if not isinstance(key, RemoteKey):
        raise InternalError(f"{key} is not from a remote source")
    return key


def _close_hold(hold: LocalPages | ReadAhead) -> None:
    hold.close()


CACHE_THREADS = 4
ASKING_THREADS = 8
"""Each query to a hub or a store takes two; a host that does not answer keeps them for long."""

STORE_THREADS = 32
"""For each kind of store. No bucket has more than `BUCKET_CALLS` of them."""


class BackendRegistry:
    """Locators and caches by kind of source, each made at its first use. All methods block.

    `close` ends what it made, not the loader's own cache, `own`.
    """

    def __init__(self, config: LoaderConfig, engine: RangeEngine, own: OwnCache) -> None:
        self._config = config
        self._engine = engine
        self._own = own
        self._lock = RLock()
        self._made: dict[str, Any] = {}
        self._pools: list[ThreadPoolExecutor] = []
        self._closing: list[Callable[[], None]] = []

    def locator(self, kind: str) -> Backend:
        """Of "hub", "s3", "gs", "az", "https" or "http"."""
        if kind == "hub":
            return self._hub()
        return self._store(kind) if kind in {"s3", "gs", "az"} else self._web()

    def cache(self, kind: str) -> Cache:
        """Return where adapters of that kind are kept."""
        tiered = kind == "hub" and self._config.hub_cache != "off"
        return self._once("tiered cache", self._tiered) if tiered else self._own.get()

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

    def _threads(self, kind: str, count: int = ASKING_THREADS) -> ThreadPoolExecutor:
        """Make a pool of its own: a hub that does not answer delays no store."""
        made = ThreadPoolExecutor(count, f"lorax-asking-{kind}")
        self._pools.append(made)
        return made

    def _hub(self) -> HubLocator:
        def make() -> HubLocator:
            endpoint = endpoint_in_use(self._config.hub_endpoint)
            rules = AllowRules(self._config.allow, named=(parse_url(endpoint).origin,))
            threads = self._threads("hub")
            return HubLocator(
                endpoint=endpoint, rules=rules, threads=threads, allow=self._config.allow
            )

        found: HubLocator = self._once("hub", make)
        return found

    def _store(self, kind: str) -> StoreBackend:
        def make() -> StoreBackend:
            threads = self._threads(kind, STORE_THREADS)
            made = StoreBackend(threads, AllowRules(self._config.allow))
            self._closing.append(made.close)
            return made

        found: StoreBackend = self._once(kind, make)
        return found

    def _web(self) -> WebBackend:
        def make() -> WebBackend:
            rules = AllowRules(self._config.allow)
            return WebBackend(self._engine, rules, self._config.limits)

        found: WebBackend = self._once("web", make)
        return found

    def _tiered(self) -> TieredCache:
        config = self._config
        hub = StandardHubCache(config.hub_cache_dir or standard_folder(), self._hub().own_scope)
        return TieredCache(hub, self._own.get())


class _RemoteParts(NamedTuple):
    """What there is to end."""

    source: RemoteSource
    engine: RangeEngine
    workers: WorkerThreads
    backends: BackendRegistry

    def close(self) -> None:
        self.engine.close()
        self.workers.close()
        self.backends.close()


class LazyRemoteSource:
    """The `Source` of adapters that are not local. Who never asks for one pays nothing for it.

    What it makes ends with `close`; the loader's own cache, `own`, is somebody else's to end.
    """

    def __init__(self, config: LoaderConfig, own: OwnCache, tracer: Tracer | None = None) -> None:
        self._config = config
        self._tracer = tracer
        self._own = own
        self._making = Lock()
        self._made: _RemoteParts | None = None
        self._closed = False

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        return await (await self._source()).resolve(ref)

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:
        return await (await self._source()).open(key, control)

    async def metadata(self, key: AdapterKey) -> AdapterMetadata:
        """As of `RemoteSource`."""
        return await (await self._source()).metadata(key, FetchControl())

    def reopen(self, key: AdapterKey) -> Reader:
        return self._make().source.reopen(key)

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[spans.ByteSpan]],
        arrived: Callable[[int], None],
        control: FetchControl,
    ) -> Verification:
        return await (await self._source()).bring(file, groups, arrived, control)

    def folder(self, key: AdapterKey, reader: Reader) -> StoredFolder:
        return stored_folder(key, reader)

    async def digest(self, key: AdapterKey) -> str:
        return await (await self._source()).digest(key)

    async def populate(self, key: AdapterKey) -> PinnedPages:
        return await (await self._source()).populate(key)

    def close(self) -> None:
        """Blocks. Idempotent."""
        with self._making:
            made, self._made, self._closed = self._made, None, True
        if made is not None:
            made.close()

    async def _source(self) -> RemoteSource:
        made = self._made
        if made is None:
            # Certificates are read, and threads begin.
            made = await asyncio.get_running_loop().run_in_executor(None, self._make)
        return made.source

    def _make(self) -> _RemoteParts:
        with self._making:
            if self._closed:
                raise LoaderClosedError("the loader is closed")
            if self._made is None:
                self._made = _made(self._config, self._own, self._tracer)
            return self._made


@contextmanager
def lazy_remote_source(config: LoaderConfig) -> Iterator[LazyRemoteSource]:
    """For who has no loader to share a cache with."""
    own = OwnCache(config)
    elsewhere = LazyRemoteSource(config, own)
    try:
        yield elsewhere
    finally:
        elsewhere.close()
        own.close()


def _made(config: LoaderConfig, own: OwnCache, tracer: Tracer | None) -> _RemoteParts:
    engine = RangeEngine(HttpSettings(connections=config.connections), tracer=tracer)
    workers = WorkerThreads(CACHE_THREADS)
    backends = BackendRegistry(config, engine, own)
    known = ResolutionCache(config.revalidate, time.monotonic)
    resolving = VersionResolver(
        *(backends.locator, backends.cache, known, workers),
        offline=config.offline,
        fresh=config.revalidate,
    )
    limits, verify = config.limits, config.verify
    opening = AdapterOpener(
        *(resolving, known, backends.cache, engine, workers), limits=limits, verify=verify
    )
    source = RemoteSource(resolving, opening, workers, limits=limits, verify=verify)
    return _RemoteParts(source, engine, workers, backends)
