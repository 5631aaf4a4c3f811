"""Opening an adapter: from the cache, or with a download into it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic

from lorax_async.cache.base import Cache, CacheDownload, CacheEntry, CacheFile, LeftoverError
from lorax_async.cache.directory import CrowdedError
from lorax_async.cache.records import CacheKey
from lorax_async.concurrency import FetchControl, WorkerThreads
from lorax_async.config import Checking, Limits
from lorax_async.errors import AdapterError, AdapterFormatError, IntegrityError, LoraxError
from lorax_async.formats.digests import Digest, FileHash, sent_sha256
from lorax_async.formats.split_weights import FileRole
from lorax_async.http.range_engine import RangeEngine
from lorax_async.remote.base import WEAK, LocatedAdapter
from lorax_async.remote.fetching import AdapterFetch
from lorax_async.remote.metadata import (
    AdapterMetadata,
    MetadataReader,
    WeightsPart,
    bind_to,
    nobody_waits,
)
from lorax_async.remote.readers import FetchReader, open_entry, read_first
from lorax_async.remote.resolution import Caches, ResolutionCache, VersionResolver
from lorax_async.sources.base import AdapterFile
from lorax_async.types import RemoteKey

PATIENCE_SECONDS = 10.0
"""Somebody else's download that got no byte for so long is not waited for any more."""

_MAX_HASHED = 16_384
_IDLE_SECONDS = 0.5
_POLL_SECONDS = 0.02


class AdapterOpener:
    """Opens what is in the caches, and begins to download what is not."""

    def __init__(
        self,
        resolving: VersionResolver,
        known: ResolutionCache,
        caches: Caches,
        engine: RangeEngine,
        workers: WorkerThreads,
        *,
        limits: Limits,
        verify: Checking,
    ) -> None:
        self._resolving = resolving
        self._known = known
        self._caches = caches
        self._engine = engine
        self._workers = workers
        self._limits = limits
        self._verify: Checking = verify
        self._metadata_reader = MetadataReader(engine, workers, limits, resolving.shards)
        self._idle: Counter[RemoteKey] = Counter()
        self._hashed: set[RemoteKey] = set()

    async def open(self, key: RemoteKey, control: FetchControl) -> AdapterFile:
        """Its reader is an `EntryReader` or a `FetchReader`.

        What turns out to be outdated, in the cache or of an interrupted download, is dropped, and
        fetched once more.
        """
        found = await self._found(key, control)
        try:
            return await self._opened(key, found, control)
        except LeftoverError:
            pass  # it was discarded
        except AdapterFormatError:
            if isinstance(found, CacheDownload) or not await self._is_outdated(key, control):
                raise
        return await self._opened(key, await self._found(key, control), control)

    def _is_refuted(self, key: RemoteKey, entry: CacheEntry) -> bool:
        """Close an entry that nobody vouched for, and that the caller's digest says is wrong."""
        origin = self._known.origin(key)
        digest = None if origin is None else origin.ref.digest
        weights = [file for file in entry.record.files if file.role.kind == "weights"]
        refuted = (
            digest is not None
            and len(weights) == 1
            and weights[0].digest.kind == "transport"
            and weights[0].digest.value != digest
        )
        if refuted:
            entry.close()
        return refuted

    async def _opened(
        self, key: RemoteKey, found: CacheEntry | CacheDownload, control: FetchControl
    ) -> AdapterFile:
        if isinstance(found, CacheEntry):
            return await self._opened_entry(key, found, control)
        try:
            return await self._fetching(key, found, control)
        except BaseException as error:
            await self._workers.finish(partial(_end, found, error))
            raise
        finally:
            self._known.used(key)  # of what was refused, too: a stranger says how much it is

    async def _opened_entry(
        self, key: RemoteKey, entry: CacheEntry, control: FetchControl
    ) -> AdapterFile:
        try:
            file = await self._workers.run(
                partial(open_entry, entry, cache_key(key), self._limits), _close_reader
            )
        except BaseException:
            entry.close()  # it may be that no thread has begun
            raise

        async def refuse(error: LoraxError, *, weights: bool) -> bool:  # noqa: ARG001
            if weights:
                return await self._distrust(key)
            file.reader.close()
            return await self._is_outdated(key, control)

        return replace(file, refuse=refuse)

    async def metadata(self, key: RemoteKey, control: FetchControl) -> AdapterMetadata:
        """Its first bytes, by the source's word; the caches have no part in it."""
        return await self._metadata_reader.of(await self._located(key, control), control)

    async def _located(self, key: RemoteKey, control: FetchControl) -> LocatedAdapter:
        async with bind_to(control):
            return await self._resolving.located(key)

    def cache(self, key: RemoteKey | CacheKey) -> Cache:
        """Where it belongs. May block."""
        location = key.location if isinstance(key, RemoteKey) else key.source
        return self._caches(kind_of(location))

    async def _found(self, key: RemoteKey, control: FetchControl) -> CacheEntry | CacheDownload:
        """What the cache has, or a download. Waits while another process downloads it."""
        origin = self._known.origin(key)
        if origin is None or origin.located is None:  # nobody has asked the source this time

            def look() -> CacheEntry | None:
                entry = self.cache(key).open(cache_key(key))
                return None if entry is None or self._is_refuted(key, entry) else entry

            here = await self._workers.run(look, close_opened)
            if here is not None:
                return here
        scope = (await self._located(key, control)).scope
        progress, since, alone = -1, monotonic(), False
        while not control.ended:
            attempt = partial(self._attempt, key, scope, alone=alone)
            found = await self._workers.run(attempt, close_opened)
            if not isinstance(found, int):
                return found
            if found != progress:
                progress, since = found, monotonic()
            idle = key in self._idle  # opened here, and nobody brings it: it may be for us to do
            alone = monotonic() - since > (_IDLE_SECONDS if idle else PATIENCE_SECONDS)
            await asyncio.sleep(_POLL_SECONDS)
        raise nobody_waits()

    def _attempt(
        self, key: RemoteKey, scope: str, *, alone: bool
    ) -> CacheEntry | CacheDownload | int:
        """Blocks."""
        found = self.cache(key).try_begin(cache_key(key), scope, alone=alone)
        if isinstance(found, CacheEntry) and self._is_refuted(key, found):
            self.cache(key).condemn(cache_key(key))
            found = self.cache(key).try_begin(cache_key(key), scope, alone=alone)
        if isinstance(found, CacheEntry):
            try:
                found.grant(scope)
            except BaseException:
                found.close()
                raise
        return found

    async def _fetching(
        self, key: RemoteKey, download: CacheDownload, control: FetchControl
    ) -> AdapterFile:
        located, origin = await self._located(key, control), self._known.origin(key)
        begun = await self._metadata_reader.of(located, control)
        digest = None if origin is None else origin.ref.digest
        files = await self._put(download, begun, digest, control)
        fetch = AdapterFetch(
            *(self._engine, self._workers, download, files, begun),
            resumable=not located.version.startswith(WEAK),
        )
        self._idle[key] += 1
        reader = FetchReader(key, fetch.reader(), fetch, partial(self._no_longer_idle, key))

        async def refuse(error: LoraxError, *, weights: bool) -> bool:
            if weights:
                return await self._distrust(key)
            fetch = reader.taken()
            reader.close()
            await fetch.refuse(error)
            return False

        return AdapterFile(begun.config[1], begun.prefix, reader, download.mappable, refuse)

    async def _is_outdated(self, key: RemoteKey, control: FetchControl) -> bool:
        """Whether an entry that was refused is not (any more) what its source has; it is dropped.

        Bytes that somebody vouched for are hashed, once; of others the source's first bytes are
        compared. If it cannot be asked, the refusal stands.
        """
        entry = await self._workers.run(partial(self._entry, key, check=False), close_opened)
        if entry is None:
            return True
        try:
            if not entry.record.vouched:
                outdated = await self._differs(key, entry, control)
        finally:
            entry.close()
        if entry.record.vouched:
            return await self._is_damaged(key)
        if outdated:
            await self._workers.run(lambda: self.cache(key).condemn(cache_key(key)))
        return outdated

    async def _differs(self, key: RemoteKey, entry: CacheEntry, control: FetchControl) -> bool:
        """Raises `IntegrityError` if the source has another version by now."""
        try:
            begun = await self._metadata_reader.of(await self._located(key, control), control)
        except IntegrityError:
            raise
        except AdapterError:
            return False
        finally:
            self._known.used(key)
        return not await self._workers.run(partial(_begins_as, entry, begun))

    async def _distrust(self, key: RemoteKey) -> bool:
        """Drop an entry of which the weights were refused, unless somebody vouched for them."""

        def distrust() -> bool:
            entry = self._entry(key, check=False)
            if entry is None:
                return True
            entry.close()
            if not entry.record.vouched:
                self.cache(key).condemn(cache_key(key))
            return not entry.record.vouched

        return await self._workers.run(distrust)

    async def _is_damaged(self, key: RemoteKey) -> bool:
        if key in self._hashed:
            return False
        if len(self._hashed) >= _MAX_HASHED:
            self._hashed.clear()
        self._hashed.add(key)
        entry = await self._workers.run(partial(self._entry, key, check=True), close_opened)
        if entry is not None:
            entry.close()
        return entry is None

    def _entry(self, key: RemoteKey, *, check: bool) -> CacheEntry | None:
        """Blocks."""
        return self.cache(key).open(cache_key(key), check=check)

    async def _put(
        self,
        download: CacheDownload,
        begun: AdapterMetadata,
        digest: str | None,
        control: FetchControl,
    ) -> list[CacheFile]:
        """Give what is here a place in the download; returns the files of the weights."""
        for file, content in begun.small:
            expected = None if self._verify == "none" else file.expected
            _check(content, file.role, expected)  # it is used before all is published
            place = partial(_placed, download, file.role, content, len(content), expected)
            await self._in_room(place, control)
        places = [
            partial(
                _placed,
                *(download, part.file.role, part.answer.start, part.nbytes),
                self._expected(part, digest if begun.plan is None else None),
            )
            for part in begun.parts
        ]
        return [await self._in_room(place, control) for place in places]

    async def _in_room(self, place: Callable[[], CacheFile], control: FetchControl) -> CacheFile:
        """Wait for room, where others have it who will end."""
        while not control.ended:
            try:
                return await self._workers.run(place)
            except CrowdedError:
                await asyncio.sleep(_POLL_SECONDS)
        raise nobody_waits()

    def _no_longer_idle(self, key: RemoteKey) -> None:
        self._idle[key] -= 1
        if not self._idle[key]:
            del self._idle[key]

    def _expected(self, part: WeightsPart, digest: str | None) -> Digest | None:
        """What its bytes have to come to, by the source's word or else the caller's."""
        if self._verify == "none":
            return None
        told = part.file.expected or sent_sha256(part.answer.fields)
        return told or (None if digest is None else Digest("sha256", digest))


def _placed(
    download: CacheDownload, role: FileRole, start: bytes, nbytes: int, expected: Digest | None
) -> CacheFile:
    """A file of a download, whose first bytes are here. Blocks.

    Raises `LeftoverError` if an interrupted download left other first bytes. On an error the
    download is the caller's; `CapacityError` leaves it as it was.
    """
    file = download.file(role, nbytes, expected)
    if start:
        file.write([memoryview(start)[:nbytes]], 0)
    return file


def _begins_as(entry: CacheEntry, begun: AdapterMetadata) -> bool:
    """Whether the source's config, index and headers are the entry's. Blocks."""
    told = [(file.role, content, len(content)) for file, content in begun.small]
    told += [(part.file.role, part.prefix, part.nbytes) for part in begun.parts]
    stored = {file.role: file.nbytes for file in entry.record.files}
    return {role: nbytes for role, _, nbytes in told} == stored and all(
        read_first(entry, role, len(first)) == first for role, first, _ in told
    )


def _check(content: bytes, role: FileRole, expected: Digest | None) -> None:
    if expected is None:
        return
    found = FileHash(expected.kind, len(content))
    found.feed(memoryview(content))
    if found.digest() != expected:
        raise IntegrityError(
            f"{role.file_name} has not the {expected.kind} digest that was promised; load it again"
        )


def kind_of(location: str) -> str:
    """Which kind of source has what is called so: its scheme, or "hub"."""
    scheme, separator, _ = location.partition("://")
    return scheme if separator else "hub"


def cache_key(key: RemoteKey) -> CacheKey:
    return CacheKey(key.location, key.version)


def close_opened(found: object) -> None:
    """What came too late for whoever asked for it."""
    if isinstance(found, CacheEntry | CacheDownload):
        found.close()


def _close_reader(file: AdapterFile) -> None:
    file.reader.close()


def _end(download: CacheDownload, error: BaseException) -> None:
    """Of what may be wrong nothing is kept."""
    if isinstance(error, IntegrityError | AdapterFormatError):
        download.discard()
    else:
        download.close()
