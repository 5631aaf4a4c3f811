"""Adapters that lie elsewhere: resolved by locators, fetched by ranges, kept in a cache."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic

from lorax_async.adapter import AdapterKey, AdapterRef, RemoteKey
from lorax_async.config import Limits, Verify
from lorax_async.core import runs
from lorax_async.core.cache_names import CacheKey
from lorax_async.core.file_digest import Digest
from lorax_async.core.header import header_size
from lorax_async.errors import IntegrityError, InternalError
from lorax_async.io.cache.failures import CrowdedError
from lorax_async.io.cache.ports import CacheDownload, CacheEntry, CacheFile
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.ports import AdapterFile, Demand, Hold, Reader
from lorax_async.io.remote.beginning import Beginning
from lorax_async.io.remote.cached import (
    EntryHold,
    EntryReader,
    FetchReader,
    ReopenedReader,
    config_of,
    gone,
    held,
    verification_of,
)
from lorax_async.io.remote.fetch import Fetch, begun
from lorax_async.io.remote.jobs import nobody_waits
from lorax_async.io.remote.known import Known
from lorax_async.io.remote.ports import WEAK, Located, RemoteFile
from lorax_async.io.remote.resolving import Caches, Resolving
from lorax_async.io.remote.workers import Workers
from lorax_async.io.sources.local import read_prefix
from lorax_async.verification import UNCHECKED, Verification

PATIENCE_SECONDS = 10.0
"""Somebody else's download that got no byte for so long is not waited for any more."""

_POLL_SECONDS = 0.02
_IDLE_SECONDS = 0.5


class RemoteSource:
    """A `Source` of what locators find, whose keys are `RemoteKey`s.

    Parameters
    ----------
    resolving, known
        Which version an id names; what sources have told.
    caches
        Where files are kept, by the kind of source.
    engine
        What fetches them.
    limits
        What of a stranger's adapter is accepted.
    verify
        What digests are for: see `LoaderConfig.verify`.
    """

    def __init__(
        self,
        resolving: Resolving,
        known: Known,
        caches: Caches,
        engine: RangeEngine,
        workers: Workers,
        *,
        limits: Limits,
        verify: Verify,
    ) -> None:
        self._resolving = resolving
        self._known = known
        self._caches = caches
        self._engine = engine
        self._workers = workers
        self._limits = limits
        self._verify: Verify = verify
        self._beginning = Beginning(engine, limits)
        self._idle: Counter[RemoteKey] = Counter()

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        return await self._resolving.resolve(ref)

    async def open(self, key: AdapterKey, demand: Demand) -> AdapterFile:
        remote = _remote(key)
        found = await self._begun(remote, demand)
        if isinstance(found, CacheEntry):
            return await self._workers.run(
                partial(self._opened, remote, found), lambda file: file.reader.close()
            )
        try:
            located, origin = await self._resolving.located(remote), self._known.origin(remote)
            digest = None if origin is None else origin.ref.digest
            file = await self._fetching(remote, located, found, digest, demand)
        except BaseException as error:
            await self._workers.run(partial(_end, found, error))
            raise
        self._known.used(remote)
        return file

    def reopen(self, key: AdapterKey) -> Reader:
        remote = _remote(key)
        return ReopenedReader(partial(self._entry, remote), _cache_key(remote))

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[runs.Span]],
        arrived: Callable[[int], None],
        demand: Demand,
    ) -> Verification:
        """With "before_use", nothing arrives before all is checked."""
        tell = _nobody if self._verify == "before_use" else arrived
        reader = file.reader
        if isinstance(reader, FetchReader):
            reader.adopt(await reader.taken().bring(groups, tell, demand))
        elif not isinstance(reader, EntryReader):
            raise InternalError(f"a remote source cannot bring the bytes of a {type(reader)}")
        elif demand.ended:
            raise nobody_waits()
        else:
            for group in range(len(groups)):
                tell(group)
            await self._check(reader)
        return UNCHECKED if self._verify == "none" else verification_of(reader.entry.record)

    async def populate(self, key: AdapterKey) -> Hold:
        """Of a file of the cache's own, which nobody cuts: a map. Else it is read ahead."""
        remote = _remote(key)
        hold = await self._workers.run(lambda: held(self._required(remote)), _close)
        try:
            for piece in hold.pieces:
                await self._workers.run(piece)
        except BaseException:
            await self._workers.run(hold.close)
            raise
        return hold

    def _required(self, key: RemoteKey) -> CacheEntry:
        """Blocks. Raises `EvictedError`."""
        entry = self._entry(key)
        if entry is None:
            raise gone()
        return entry

    def _entry(self, key: RemoteKey, *, check: bool = False) -> CacheEntry | None:
        """Blocks."""
        return self._caches(kind_of(key.location)).open(_cache_key(key), check=check)

    async def _begun(self, key: RemoteKey, demand: Demand) -> CacheEntry | CacheDownload:
        """What the cache has, or a download. Waits while another process downloads it."""
        origin = self._known.origin(key)
        if origin is None or origin.located is None:
            here = await self._workers.run(partial(self._entry, key), _close)
            if here is not None:
                return here
        scope = (await self._resolving.located(key)).scope

        def attempt(*, alone: bool) -> CacheEntry | CacheDownload | int:
            cache = self._caches(kind_of(key.location))
            found = cache.try_begin(_cache_key(key), scope, alone=alone)
            if isinstance(found, CacheEntry):
                found.grant(scope)
            return found

        progress, since, alone = -1, monotonic(), False
        while not demand.ended:
            found = await self._workers.run(partial(attempt, alone=alone), _close)
            if not isinstance(found, int):
                return found
            if found != progress:
                progress, since = found, monotonic()
            idle = key in self._idle  # opened here, and nobody brings it: it may be for us to do
            alone = monotonic() - since > (_IDLE_SECONDS if idle else PATIENCE_SECONDS)
            await asyncio.sleep(_POLL_SECONDS)
        raise nobody_waits()

    def _opened(self, key: RemoteKey, entry: CacheEntry) -> AdapterFile:
        """Blocks. On an error the entry is closed."""
        try:
            config = config_of(entry)
            reader = EntryReader(entry, _cache_key(key))
            prefix = read_prefix(reader, self._limits)
        except BaseException:
            entry.close()
            raise
        return AdapterFile(config, prefix, reader, entry.mappable)

    async def _fetching(
        self,
        key: RemoteKey,
        located: Located,
        download: CacheDownload,
        digest: str | None,
        demand: Demand,
    ) -> AdapterFile:
        """Begin to download it."""
        config, weights = located.files
        whole, start = await self._beginning.of(config, weights, demand)
        nbytes = self._beginning.size(weights, start)
        expected = (self._expected(config, None), self._expected(weights, digest))
        check_config(whole.start, expected[0])  # it is used before the download is published
        for role, begins, size, digest in (CONFIG)
        file = await self._in_room(place, demand)
        prefix = start.start[: header_size(start.start[:8], nbytes, self._beginning.header_limits)]
        fetch = Fetch(
            *(self._engine, self._workers, download, file, start),
            resumable=not located.version.startswith(WEAK),
        )
        self._idle[key] += 1
        reader = FetchReader(file.reader(), fetch, partial(self._no_longer_idle, key))
        return AdapterFile(whole.start, prefix, reader, download.mappable)

    async def _in_room(self, place: Callable[[], CacheFile], demand: Demand) -> CacheFile:
        """Wait for room, where others have it who will end."""
        while not demand.ended:
            try:
                return await self._workers.run(place)
            except CrowdedError:
                await asyncio.sleep(_POLL_SECONDS)
        raise nobody_waits()

    def _no_longer_idle(self, key: RemoteKey) -> None:
        self._idle[key] -= 1
        if not self._idle[key]:
            del self._idle[key]

    def _expected(self, file: RemoteFile, digest: str | None) -> Digest | None:
        """What its bytes have to come to, by the source's word or else the caller's."""
        if self._verify == "none":
            return None
        return file.expected or (None if digest is None else Digest("sha256", digest))

    async def _check(self, reader: EntryReader) -> None:
        """Hash what was published before, against what it came to then."""
        if self._verify == "none":
            return
        key = reader.key
        cache = self._caches(kind_of(key.source))
        checked = await self._workers.run(partial(cache.open, key, check=True), _close)
        if checked is None:
            raise IntegrityError("it changed in the disk cache since it was stored; load it again")
        checked.close()


def kind_of(location: str) -> str:
    """Which kind of source has what is called so: its scheme, or "hub"."""
    scheme, separator, _ = location.partition("://")
    return scheme if separator else "hub"


def _remote(key: AdapterKey) -> RemoteKey:
    if not isinstance(key, RemoteKey):
        raise InternalError(f"{key} is not from a remote source")
    return key


def _cache_key(key: RemoteKey) -> CacheKey:
    return CacheKey(key.location, key.version)


def _close(opened: object) -> None:
    if isinstance(opened, CacheEntry | CacheDownload | EntryHold):
        opened.close()


def _end(download: CacheDownload, error: BaseException) -> None:
    """Of what may be wrong nothing is kept."""
    if isinstance(error, IntegrityError):
        download.discard()
    else:
        download.close()


def _nobody(_: int) -> None:
    """Is told of nothing before all is checked."""
