"""Open an adapter from the cache, or begin to download it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic

from lorax_async.cache.base import (
    Cache,
    CacheDownload,
    CacheEntry,
    CacheFile,
    CacheKey,
    LeftoverError,
)
from lorax_async.cache.directory import CrowdedError
from lorax_async.concurrency import FetchControl, WorkerThreads
from lorax_async.config import Checking, Limits
from lorax_async.errors import AdapterError, AdapterFormatError, IntegrityError, LoraxError
from lorax_async.formats.digests import Digest, FileHash, sent_sha256
from lorax_async.formats.split_weights import FileRole
from lorax_async.http.range_engine import RangeEngine
from lorax_async.remote.base import WEAK, LocatedAdapter
from lorax_async.remote.metadata import (
    AdapterMetadata,
    MetadataReader,
    WeightsPart,
    bind_to,
    unwanted_error,
)
from lorax_async.remote.readers import AdapterFetch, FetchReader, open_entry, read_first
from lorax_async.remote.resolution import Caches, ResolutionCache, VersionResolver
from lorax_async.sources.base import AdapterFile
from lorax_async.types import RemoteKey

PATIENCE_SECONDS = 10.0
"""Start a second download if another process's has received nothing for this long."""

_MAX_HASHED = 16_384
_IDLE_SECONDS = 0.5
_POLL_SECONDS = 0.02


class AdapterOpener:
    """Opens cached adapters, and begins the downloads of others."""

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
        """Return the adapter's file with an `EntryReader` or a `FetchReader`.

        Drop an outdated entry or partial download, and fetch the adapter once more.
        """
        stored = await self._find(key, control)
        try:
            return await self._open(key, stored, control)
        except LeftoverError:
            pass  # it was discarded
        except AdapterFormatError:
            if isinstance(stored, CacheDownload) or not await self._is_outdated(key, control):
                raise
        return await self._open(key, await self._find(key, control), control)

    def _is_refuted(self, key: RemoteKey, entry: CacheEntry) -> bool:
        """Close an unvouched entry whose digest is not the caller's; return whether it was."""
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

    async def _open(
        self, key: RemoteKey, stored: CacheEntry | CacheDownload, control: FetchControl
    ) -> AdapterFile:
        if isinstance(stored, CacheEntry):
            return await self._open_entry(key, stored, control)
        try:
            return await self._begin_fetch(key, stored, control)
        except BaseException as error:
            await self._workers.finish(partial(_end_download, stored, error))
            raise
        finally:
            # Free the probed bytes of refused adapters too: their size is a stranger's choice.
            self._known.used(key)

    async def _open_entry(
        self, key: RemoteKey, entry: CacheEntry, control: FetchControl
    ) -> AdapterFile:
        try:
            file = await self._workers.run(
                partial(open_entry, entry, cache_key(key), self._limits), _close_reader
            )
        except BaseException:
            entry.close()  # the thread may not have begun
            raise

        async def refuse(error: LoraxError, *, weights: bool) -> bool:  # noqa: ARG001
            if weights:
                return await self._distrust(key)
            file.reader.close()
            return await self._is_outdated(key, control)

        return replace(file, refuse=refuse)

    async def metadata(self, key: RemoteKey, control: FetchControl) -> AdapterMetadata:
        """Fetch config and headers from the source, without the cache."""
        return await self._metadata_reader.fetch(await self._locate(key, control), control)

    async def _locate(self, key: RemoteKey, control: FetchControl) -> LocatedAdapter:
        async with bind_to(control):
            return await self._resolving.locate(key)

    def cache(self, key: RemoteKey | CacheKey) -> Cache:
        """Return the cache for a key's kind of source. May block."""
        location = key.location if isinstance(key, RemoteKey) else key.source
        return self._caches(kind_of(location))

    async def _find(self, key: RemoteKey, control: FetchControl) -> CacheEntry | CacheDownload:
        """Return the entry, or a new download. Wait while another process downloads it."""
        origin = self._known.origin(key)
        if origin is None or origin.located is None:  # the source was not asked this time

            def look() -> CacheEntry | None:
                entry = self.cache(key).open(cache_key(key))
                return None if entry is None or self._is_refuted(key, entry) else entry

            entry = await self._workers.run(look, close_unused)
            if entry is not None:
                return entry
        scope = (await self._locate(key, control)).scope
        progress, since, alone = -1, monotonic(), False
        while not control.cancelled:
            attempt = partial(self._attempt, key, scope, alone=alone)
            result = await self._workers.run(attempt, close_unused)
            if not isinstance(result, int):
                return result
            if result != progress:
                progress, since = result, monotonic()
            idle = key in self._idle  # this process opened it, and may never bring it
            alone = monotonic() - since > (_IDLE_SECONDS if idle else PATIENCE_SECONDS)
            await asyncio.sleep(_POLL_SECONDS)
        raise unwanted_error()

    def _attempt(
        self, key: RemoteKey, scope: str, *, alone: bool
    ) -> CacheEntry | CacheDownload | int:
        """Call `Cache.try_begin`, and grant an entry to `scope`. Blocks."""
        cache = self.cache(key)
        result = cache.try_begin(cache_key(key), scope, alone=alone)
        if isinstance(result, CacheEntry) and self._is_refuted(key, result):
            cache.condemn(cache_key(key))
            result = cache.try_begin(cache_key(key), scope, alone=alone)
        if isinstance(result, CacheEntry):
            try:
                result.grant(scope)
            except BaseException:
                result.close()
                raise
        return result

    async def _begin_fetch(
        self, key: RemoteKey, download: CacheDownload, control: FetchControl
    ) -> AdapterFile:
        located, origin = await self._locate(key, control), self._known.origin(key)
        metadata = await self._metadata_reader.fetch(located, control)
        digest = None if origin is None else origin.ref.digest
        files = await self._add_files(download, metadata, digest, control)
        fetch = AdapterFetch(
            *(self._engine, self._workers, download, files, metadata),
            resumable=not located.version.startswith(WEAK),
        )
        self._idle[key] += 1
        reader = FetchReader(key, fetch.reader(), fetch, partial(self._no_longer_idle, key))

        async def refuse(error: LoraxError, *, weights: bool) -> bool:
            if weights:
                return await self._distrust(key)
            fetch = reader.take_fetch()
            reader.close()
            await fetch.refuse(error)
            return False

        return AdapterFile(metadata.config[1], metadata.prefix, reader, download.mappable, refuse)

    async def _is_outdated(self, key: RemoteKey, control: FetchControl) -> bool:
        """Drop a refused entry that is not what its source has now; return whether it was dropped.

        Hash a vouched entry, once; compare another with the source's first bytes. If the source
        cannot be reached, the refusal stands.
        """
        entry = await self._workers.run(partial(self._entry, key, check=False), close_unused)
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
        """Compare an entry with its source; False if that cannot be reached.

        Raise `IntegrityError` if the source has another version now.
        """
        try:
            metadata = await self.metadata(key, control)
        except IntegrityError:
            raise
        except AdapterError:
            return False
        finally:
            self._known.used(key)
        return not await self._workers.run(partial(_has_metadata, entry, metadata))

    async def _distrust(self, key: RemoteKey) -> bool:
        """Drop an unvouched entry whose weights were refused; return whether it is gone."""

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
        """Hash an entry that was not hashed before; return whether the cache removed it."""
        if key in self._hashed:
            return False
        if len(self._hashed) >= _MAX_HASHED:
            self._hashed.clear()
        self._hashed.add(key)
        entry = await self._workers.run(partial(self._entry, key, check=True), close_unused)
        if entry is not None:
            entry.close()
        return entry is None

    def _entry(self, key: RemoteKey, *, check: bool) -> CacheEntry | None:
        """Blocks."""
        return self.cache(key).open(cache_key(key), check=check)

    async def _add_files(
        self,
        download: CacheDownload,
        metadata: AdapterMetadata,
        digest: str | None,
        control: FetchControl,
    ) -> list[CacheFile]:
        """Add all files to the download, with the bytes received so far; return the weights'."""
        for file, content in metadata.small:
            expected = None if self._verify == "none" else file.expected
            _check(content, file.role, expected)  # it is used before publication
            add = partial(_add_file, download, file.role, content, len(content), expected)
            await self._wait_for_room(add, control)
        additions = [
            partial(
                _add_file,
                *(download, part.file.role, part.answer.start, part.nbytes),
                self._expected(part, digest if metadata.plan is None else None),
            )
            for part in metadata.parts
        ]
        return [await self._wait_for_room(add, control) for add in additions]

    async def _wait_for_room(
        self, add: Callable[[], CacheFile], control: FetchControl
    ) -> CacheFile:
        """Retry `add` while the cache is full of entries and downloads in use."""
        while not control.cancelled:
            try:
                return await self._workers.run(add)
            except CrowdedError:
                await asyncio.sleep(_POLL_SECONDS)
        raise unwanted_error()

    def _no_longer_idle(self, key: RemoteKey) -> None:
        self._idle[key] -= 1
        if not self._idle[key]:
            del self._idle[key]

    def _expected(self, part: WeightsPart, digest: str | None) -> Digest | None:
        """Return the digest that the source promised, or else the caller's."""
        if self._verify == "none":
            return None
        promised = part.file.expected or sent_sha256(part.answer.fields)
        return promised or (None if digest is None else Digest("sha256", digest))


def _add_file(
    download: CacheDownload, role: FileRole, start: bytes, nbytes: int, expected: Digest | None
) -> CacheFile:
    """Add a file to the download, and write its first bytes. Blocks.

    Raise `LeftoverError` if a partial download has other first bytes. On an error the caller still
    owns the download; `CapacityError` leaves it unchanged.
    """
    file = download.file(role, nbytes, expected)
    if start:
        file.write([memoryview(start)[:nbytes]], 0)
    return file


def _has_metadata(entry: CacheEntry, metadata: AdapterMetadata) -> bool:
    """Return whether the source's config, index and headers are the entry's. Blocks."""
    files = [(file.role, content, len(content)) for file, content in metadata.small]
    files += [(part.file.role, part.prefix, part.nbytes) for part in metadata.parts]
    stored = {file.role: file.nbytes for file in entry.record.files}
    return {role: nbytes for role, _, nbytes in files} == stored and all(
        read_first(entry, role, len(prefix)) == prefix for role, prefix, _ in files
    )


def _check(content: bytes, role: FileRole, expected: Digest | None) -> None:
    """Raise `IntegrityError` if the content has not the expected digest."""
    if expected is None:
        return
    content_hash = FileHash(expected.kind, len(content))
    content_hash.feed(memoryview(content))
    if content_hash.digest() != expected:
        raise IntegrityError(
            f"{role.file_name} has not the {expected.kind} digest that was promised; load it again"
        )


def kind_of(location: str) -> str:
    """Return the kind of source of a key's location: its scheme, or "hub"."""
    scheme, separator, _ = location.partition("://")
    return scheme if separator else "hub"


def cache_key(key: RemoteKey) -> CacheKey:
    return CacheKey(key.location, key.version)


def close_unused(result: object) -> None:
    """Close an entry or a download whose caller was cancelled."""
    if isinstance(result, CacheEntry | CacheDownload):
        result.close()


def _close_reader(file: AdapterFile) -> None:
    file.reader.close()


def _end_download(download: CacheDownload, error: BaseException) -> None:
    """Close the download; discard it if its bytes may be wrong."""
    if isinstance(error, IntegrityError | AdapterFormatError):
        download.discard()
    else:
        download.close()
