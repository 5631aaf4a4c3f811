"""The `Source` of remote adapters, and what it is made of."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

from lorax_async.cache.base import CacheEntry
from lorax_async.cache.disk_cache import DiskCache
from lorax_async.concurrency import FetchControl, ThreadPool, WorkerThreads
from lorax_async.config import Checking, StoreConfig
from lorax_async.errors import IntegrityError, InvalidAdapterIdError, LoaderClosedError
from lorax_async.files import Reader, sha256_of
from lorax_async.formats.peft_names import WEIGHTS_FILE
from lorax_async.formats.spans import ByteSpan
from lorax_async.http.range_downloader import RangeDownloader
from lorax_async.http.settings import HttpSettings
from lorax_async.ids import STORES, LocalFolder, Location, parse_ref
from lorax_async.lifecycle.policies import policy
from lorax_async.lru import remember
from lorax_async.remote.base import AdapterMetadata, AllowRules, Backend, unwanted_error
from lorax_async.remote.hub import HubBackend, StandardHubCache, parse_endpoint
from lorax_async.remote.object_stores import StoreBackend
from lorax_async.remote.opening import (
    MAX_KEYS,
    AdapterOpener,
    VersionResolver,
    cache_key,
    close_unused,
)
from lorax_async.remote.readers import EntryReader, FetchReader, ReopenedReader, entry_gone
from lorax_async.remote.web import WebBackend
from lorax_async.sources.base import AdapterFile, StoredFolder
from lorax_async.telemetry import Tracer
from lorax_async.types import UNCHECKED, AdapterKey, AdapterRef, RemoteKey, Verification


class RemoteParts(NamedTuple):
    """What a remote source works with; `close`, which blocks, ends it."""

    resolver: VersionResolver
    opener: AdapterOpener
    workers: WorkerThreads
    close: Callable[[], None]


class RemoteSource:
    """A `Source` of adapters that backends find, whose keys are `RemoteKey`s.

    `make` makes its parts, at the first use, in a thread: it may block.
    """

    def __init__(self, make: Callable[[], RemoteParts], *, verify: Checking) -> None:
        self.cache: DiskCache | None = None
        """None before the first use; kept after `close`, for statistics."""
        self._make = make
        self._verify: Checking = verify
        self._lock = Lock()
        self._parts: RemoteParts | None = None
        self._closed = False
        self._seen: OrderedDict[RemoteKey, CacheEntry] = OrderedDict()
        """Those opened last, maybe closed: plans, and what was checked, are of these only."""

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        return await (await self._connect()).resolver.resolve(parse_ref(ref))

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:
        remote, parts = _remote(key), await self._connect()
        file = await parts.opener.open(remote, control)
        if isinstance(file.reader, EntryReader):
            remember(self._seen, remote, file.reader.entry, MAX_KEYS)
        else:
            self._seen.pop(remote, None)
        return file

    async def metadata(self, key: AdapterKey) -> AdapterMetadata:
        """Fetch config and headers of a resolved adapter, and nothing else."""
        opener = (await self._connect()).opener
        return await opener.fetch_metadata(_remote(key), FetchControl())

    def reopen(self, key: AdapterKey) -> Reader:
        parts, remote = self._connect_blocking(), _remote(key)

        def open() -> EntryReader:
            entry = self._entry(parts, remote, check=self._verify == "always")
            seen = self._seen.get(remote)
            if seen is not None and seen.identities != entry.identities:
                entry.close()  # they were touched since: a new fetch checks them
                raise entry_gone()
            return EntryReader(entry, cache_key(remote))

        return ReopenedReader(open)

    async def fetch_groups(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[ByteSpan]],
        arrived: Callable[[int], None],
        control: FetchControl,
    ) -> Verification:
        reader = file.reader
        if isinstance(reader, FetchReader):
            entry = await reader.fetch_groups(groups, arrived, control)
            remember(self._seen, reader.key, entry, MAX_KEYS)
            return self._verification(entry)
        assert isinstance(reader, EntryReader)
        if control.cancelled:
            raise unwanted_error()
        if self._verify == "always" or not (self._verify == "none" or reader.entry.is_verified):
            for group in range(len(groups)):
                arrived(group)
            if self._verify == "stream" and control.urgent and groups:
                await reader.wait_until_read(groups)  # hashing would take a core from the copies
            await self._check(reader)
        return self._verification(reader.entry)

    async def folder(
        self, key: AdapterKey, file: AdapterFile, control: FetchControl
    ) -> StoredFolder:
        parts, reader = await self._connect(), file.reader
        assert isinstance(reader, EntryReader | FetchReader)
        assert reader.entry is not None, "it was fetched"
        nbytes = await parts.opener.add_tokenizer(_remote(key), file, control)
        return StoredFolder(reader.entry.folder, reader.entry.record.nbytes + nbytes)

    async def digest(self, key: AdapterKey) -> str:
        """See `Source`: the recorded digest, or else the files' own now."""
        parts = await self._connect()
        entry = await parts.workers.run(partial(self._entry, parts, _remote(key)), close_unused)
        with closing(entry):
            digest = entry.record.weights.digest
            if digest.kind != "git-sha1":
                return digest.value
            with closing(entry.reader(WEIGHTS_FILE)) as reader:
                return await sha256_of(reader, parts.workers)

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
                raise LoaderClosedError("the remote source is closed")
            if self._parts is None:
                self._parts = self._make()
                self.cache = self._parts.resolver.cache
            return self._parts

    def _entry(self, parts: RemoteParts, key: RemoteKey, *, check: bool = False) -> CacheEntry:
        """Open the entry of a key; hash it with `check`. Blocks.

        Raise `EvictedError` if it is gone, or has other bytes.
        """
        entry = parts.resolver.cache.open(cache_key(key), check=check)
        if entry is None:
            raise entry_gone()
        seen = self._seen.get(key)
        if seen is not None and seen.record.contradicts(entry.record.files):
            entry.close()  # another process fetched it again, and its source had other bytes
            raise entry_gone()
        return entry

    def _verification(self, entry: CacheEntry) -> Verification:
        """Return the digest of the weights, and who vouched for it, as publication recorded it."""
        if self._verify == "none":
            return UNCHECKED
        digest = entry.record.weights.digest
        return Verification(digest.kind, digest.value)

    async def _check(self, reader: EntryReader) -> None:
        """Hash an entry and compare it with the digests that publication recorded."""
        parts, same = await self._connect(), False
        open_checked = partial(parts.resolver.cache.open, reader.key, check=True)
        entry = await parts.workers.run(open_checked, close_unused)
        if entry is not None:  # what was hashed must be what is read, not the hub cache's copy
            same = entry.folder == reader.entry.folder and entry.record == reader.entry.record
            entry.close()
        if not same:
            raise IntegrityError("it changed in the disk cache since it was stored; load it again")


def _remote(key: AdapterKey) -> RemoteKey:
    assert isinstance(key, RemoteKey), "the router chooses the source by it"
    return key


CACHE_THREADS = 4
QUERY_THREADS = 8
"""Each query to the hub takes two; a host that does not answer keeps them for long."""

STORE_THREADS = 32
"""For each kind of store. No bucket uses more than `BUCKET_CALLS` of them."""


class Backends:
    """The backends by scheme, each made with the first id of its kind, with threads of its own.

    So a hub that does not answer delays no store. `close` ends the threads.
    """

    def __init__(
        self, config: StoreConfig, downloader: RangeDownloader, workers: WorkerThreads
    ) -> None:
        self._config = config
        self._downloader = downloader
        self._workers = workers
        self._making = Lock()
        self._made: dict[str, Backend[Any]] = {}
        self._pools: list[ThreadPool] = []

    async def find(self, location: Location) -> Backend[Any]:
        """Return the backend of a location."""
        if isinstance(location, LocalFolder):
            raise InvalidAdapterIdError("a local folder has no remote source")
        scheme = location.scheme
        if (made := self._made.get(scheme)) is not None:
            return made
        return await self._workers.run(partial(self.make, scheme))

    def make(self, scheme: str) -> Backend[Any]:
        """Return a scheme's backend. The first call blocks: huggingface_hub is slow to import."""
        with self._making:
            if scheme not in self._made:
                self._made[scheme] = self._new(scheme)
            return self._made[scheme]

    def own_scope(self) -> str | None:
        """See `HubBackend.own_scope`."""
        hub = self.make("hub")
        assert isinstance(hub, HubBackend)
        return hub.own_scope()

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()
        for backend in self._made.values():
            if isinstance(backend, StoreBackend):
                backend.close()

    def _new(self, scheme: str) -> Backend[Any]:
        config = self._config
        if scheme == "hub":
            endpoint = parse_endpoint(config.hub_endpoint)  # raises, so before there are threads
            threads = self._threads(scheme, QUERY_THREADS)
            return HubBackend(
                endpoint=endpoint,
                threads=threads,
                allow=config.allow,
                convert_bin=config.convert_bin,
            )
        if scheme in STORES:
            threads = self._threads(scheme, STORE_THREADS)
            return StoreBackend(threads, config.allow, convert_bin=config.convert_bin)
        rules, convert_bin = AllowRules(config.allow), config.convert_bin
        return WebBackend(self._downloader, rules, config.limits, convert_bin=convert_bin)

    def _threads(self, name: str, count: int) -> ThreadPool:
        self._pools.append(ThreadPool(count, f"lorax-query-{name}"))
        return self._pools[-1]


def make_remote_source(config: StoreConfig, tracer: Tracer | None = None) -> RemoteSource:
    """Return a remote source that makes its cache, threads and connections at its first use."""

    def make() -> RemoteParts:
        folder = config.cache_folder  # raises without a home, so before there are threads
        downloader = RangeDownloader(HttpSettings(connections=config.connections), tracer=tracer)
        workers = WorkerThreads(CACHE_THREADS)
        backends = Backends(config, downloader, workers)
        hub_cache = None
        if config.hub_cache != "off":
            hub_cache = StandardHubCache(config.hub_cache_dir, backends.own_scope)
        cache = DiskCache(folder, config.cache_bytes, policy(config.eviction), hub_cache)
        resolver = VersionResolver(
            *(backends.find, cache, workers), offline=config.offline, fresh=config.revalidate
        )
        limits, verify = config.limits, config.verify
        opener = AdapterOpener(resolver, downloader, workers, limits=limits, verify=verify)

        def close() -> None:
            downloader.close()
            workers.shutdown()
            backends.close()

        return RemoteParts(resolver, opener, workers, close)

    return RemoteSource(make, verify=config.verify)
