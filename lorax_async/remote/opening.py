"""From an id to its open adapter, in the order of this file.

The version that the id names, then the cache's entry or a new download, then that download's config
and header, which are checked before any layer is fetched; at the end, what becomes of an entry that
was refused.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from lorax_async.cache.base import CacheEntry, CacheKey, LeftoverError
from lorax_async.cache.directory import CrowdedError
from lorax_async.cache.disk_cache import DiskCache, DiskDownload
from lorax_async.cache.entries import DiskEntry
from lorax_async.cache.partials import PartialFile
from lorax_async.concurrency import (
    FetchControl,
    IsWanted,
    SharedResource,
    WorkerThreads,
    in_thread,
    outcome,
)
from lorax_async.config import Checking, Limits
from lorax_async.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    CapacityError,
    FetchError,
    IntegrityError,
    LoraxError,
)
from lorax_async.files import FileReader, open_same, read_prefix, require_same
from lorax_async.formats.digests import Digest, FileHash, sent_sha256
from lorax_async.formats.peft_names import (
    CONFIG_FILE,
    HEADS,
    PICKLE_FILE,
    TOKENIZER_FILES,
    TOKENS,
    WEIGHTS_FILE,
    brings_tokens,
)
from lorax_async.formats.safetensors import header_end, header_size, parse_header
from lorax_async.http.download_scheduler import Job
from lorax_async.http.failures import changed_error
from lorax_async.http.range_downloader import FOREGROUND, PREFETCH, RangeDownloader
from lorax_async.http.target import ProbeResult, Validators
from lorax_async.ids import HubRepository, Location, ParsedRef
from lorax_async.lru import remember
from lorax_async.remote.base import (
    FIRST_BYTES,
    LONGEST,
    WEAK,
    AdapterMetadata,
    AnotherVersionError,
    Backend,
    Confirmation,
    FetchedFile,
    LocatedAdapter,
    RemoteFile,
    bind_to,
    track,
    unwanted_error,
)
from lorax_async.remote.readers import (
    ConvertedReader,
    EntryReader,
    FetchReader,
    entry_gone,
    read_first,
)
from lorax_async.sources.base import AdapterFile
from lorax_async.sources.local import read_checked
from lorax_async.sources.pickled_weights import convert_open
from lorax_async.types import AdapterRef, RemoteKey

T = TypeVar("T")

_ROWS_OF_TOKENS = [name.encode() for name in sorted(HEADS | TOKENS)]
"""What a header has somewhere if `brings_tokens`: nothing that writes safetensors escapes it."""

MAX_REFS = 65_536
MAX_KEYS = 16_384
"""The lifecycle remembers as many idle adapters."""

MAX_ANSWERS = 64
"""Unused first bytes that came with a version; about 320 KiB each."""

ANSWER_SECONDS = 1.0
"""Request older first bytes again: the source may have changed its file under the same validator,
and the first bytes of one version would be joined with the rest of another."""

LOCATED_SECONDS = 600.0
"""A file's location is valid for this long: signed URLs expire."""

PUBLIC = ""
"""The scope of callers without a token."""


@dataclass(slots=True)
class Resolution:
    """The last request for a key, and its source's answer; None if it must be asked again."""

    ref: ParsedRef
    located: LocatedAdapter | None
    since: float


class VersionResolver:
    """Resolves refs by the backends of their locations, and remembers answers.

    With `offline`, send no request to any source. An answer counts for `fresh` seconds of `clock`,
    and a recorded access lets a scope have an entry for as long.
    """

    def __init__(
        self,
        find_backend: Callable[[Location], Awaitable[Backend[Any]]],
        cache: DiskCache,
        workers: WorkerThreads,
        *,
        offline: bool,
        fresh: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache = cache
        self._find_backend = find_backend
        self._workers = workers
        self._offline = offline
        self._fresh = fresh
        self._clock = clock
        self._keys: OrderedDict[ParsedRef, RemoteKey] = OrderedDict()
        self._resolutions: OrderedDict[RemoteKey, Resolution] = OrderedDict()
        self._answered: OrderedDict[RemoteKey, None] = OrderedDict()

    async def resolve(self, ref: ParsedRef) -> RemoteKey:
        """Return the version that `ref` names now: by a recent answer, the cache or the source."""
        key = self._keys.get(ref)
        if key is not None and self._clock() - (key.answered_at or 0.0) < self._fresh:
            self._set_requester(ref, key)
            return key
        since, backend = self._clock(), await self._find_backend(ref.location)
        scope, revision = await backend.scope(ref.location, ref), ref.revision
        pinned = None
        if revision is not None and backend.is_version(revision):
            pinned = RemoteKey(ref.text, (), revision)
            age = await self._access_age(pinned, scope)
            if age is not None and age <= self._fresh:
                return self._remember(ref, pinned, None, since - age)
        try:
            located = await self._query(ref)
        except (FetchError, AnotherVersionError) as error:
            key = await self._stored(ref, pinned, scope, error)
            if key is None:
                raise
            return self._remember(ref, key, None, since)
        key = self._remember(ref, _key_of(located), located, since)
        await self._record(ref, located)
        return key

    async def locate(self, key: RemoteKey, control: FetchControl) -> LocatedAdapter:
        """Return where the key's files are. Ask the source if that is unknown."""
        if (known := self.located(key)) is not None:
            return known
        last = self._resolutions.get(key)
        if last is None:
            raise AdapterNotFoundError("the location of the key is not known any more; load its id")
        since = self._clock()
        async with bind_to(control):
            located = await self._query(last.ref)
        self._remember(last.ref, _key_of(located), located, since)
        if _key_of(located) != key:
            raise IntegrityError("it is another version by now; load it again")
        return located

    async def find_files(
        self, key: RemoteKey, names: Sequence[str], control: FetchControl
    ) -> list[RemoteFile]:
        """Return those of `names` that the source has beside the key's adapter.

        Raise as `locate`, also if the source has another version by now.
        """
        last = self._resolutions.get(key)
        if last is None or self._offline:
            raise FetchError("its source is not asked for more of its files", retryable=False)
        ref = replace(last.ref, revision=key.version)
        async with bind_to(control):
            backend = await self._find_backend(ref.location)
            files = await backend.find_files(ref.location, ref, names)
            located = await self._query(ref)  # afterwards, as the files may be replaced meanwhile
        if _key_of(located) != key:
            raise IntegrityError("it is another version by now; load it again")
        return files

    def located(self, key: RemoteKey) -> LocatedAdapter | None:
        """Return the source's last answer, if it still counts."""
        last = self._resolutions.get(key)
        seconds = ANSWER_SECONDS if key in self._answered else LOCATED_SECONDS
        return last.located if last and self._clock() - last.since < seconds else None

    def digest(self, key: RemoteKey) -> str | None:
        """Return the digest of the weights that the last request expects."""
        last = self._resolutions.get(key)
        return None if last is None else last.ref.digest

    def forget(self, key: RemoteKey) -> None:
        """Ask the source again what the refs are that were answered with `key`."""
        self.discard_probe(key)
        for ref in [ref for ref, answer in self._keys.items() if answer == key]:
            del self._keys[ref]

    def discard_probe(self, key: RemoteKey) -> None:
        """Drop the first bytes that came with `key`: locate it again."""
        if key in self._answered:
            del self._answered[key]
            self._resolutions[key].located = None

    def _remember(
        self, ref: ParsedRef, key: RemoteKey, located: LocatedAdapter | None, since: float
    ) -> RemoteKey:
        """Record that `ref` was `key` at the time `since`; return the key with that time.

        `located` is the source's answer, None if the cache knew the version.
        """
        now = self._clock()
        key = replace(key, answered_at=since)
        remember(self._keys, ref, key, MAX_REFS)
        if located is None and self._set_requester(ref, key):
            return key
        gone = remember(self._resolutions, key, Resolution(ref, located, now), MAX_KEYS)
        if gone is not None:
            self._answered.pop(gone, None)
        if located is not None and any(file.answer for file in located.files):
            self._answered[key] = None
            self._answered.move_to_end(key)
            if len(self._answered) > MAX_ANSWERS:
                self.discard_probe(next(iter(self._answered)))
        return key

    def _set_requester(self, ref: ParsedRef, key: RemoteKey) -> bool:
        """Let the key be fetched in the name of its last request; False if the key is unknown.

        Another request's token might be refused, and its digest is not this one's.
        """
        last = self._resolutions.get(key)
        if last is None:
            return False
        last.ref = ref
        return True

    async def _query(self, ref: ParsedRef) -> LocatedAdapter:
        if not self._offline:
            backend = await self._find_backend(ref.location)
            return await backend.locate(ref.location, ref)
        # The same text whether the adapter exists or not.
        for_whom = ""
        if isinstance(ref.location, HubRepository) and ref.token is None and not ref.use_token:
            for_whom = (
                " for callers without a token (on a machine that has one, adapters that other"
                " tools stored there are for ids with use_token=True)"
            )
        raise FetchError(
            f"it is not in the cache{for_whom}, and offline=True forbids to ask its source; fetch"
            " it before, or set offline=False",
            retryable=False,
        )

    async def _access_age(self, key: RemoteKey, scope: str) -> float | None:
        """Return how many seconds ago the source last let `scope` have the cache's entry.

        0 if the entry is public; None if there is no entry, or no access was recorded.
        """

        def look() -> float | None:
            entry = self.cache.open(cache_key(key))
            if entry is None:
                return None
            with closing(entry):
                return 0.0 if entry.last_access(PUBLIC) is not None else entry.last_access(scope)

        return await self._workers.run(look)

    async def _stored(
        self, ref: ParsedRef, pinned: RemoteKey | None, scope: str, error: Exception
    ) -> RemoteKey | None:
        """Return a version that the cache has for a caller whose source failed with `error`.

        It is the pinned one, or else the source's last answer, if the caller accepts a stale one.
        A caller with a token of its own gets the last answer for a public adapter only.
        """
        unreachable = isinstance(error, FetchError)
        if isinstance(error, FetchError) and not error.retryable and not self._offline:
            return None
        if pinned is not None and await self._access_age(pinned, scope) is not None:
            return pinned
        if not unreachable or not (ref.allow_stale or self._offline):
            return None
        last = await self._workers.run(partial(self.cache.last_version, question_of(ref)))
        if last is None:
            return None
        key = RemoteKey(last[0], (), last[1], stale=True)
        own = scope if ref.token is None else PUBLIC
        return None if await self._access_age(key, own) is None else key

    async def _record(self, ref: ParsedRef, located: LocatedAdapter) -> None:
        """Record the answer for times when the source is unreachable. Ignore failures."""
        if ref.token is None:
            answer = question_of(ref), located.source, located.version
            # A cached adapter needs no room, and a download reports the failure itself.
            with suppress(CapacityError, FetchError):
                await self._workers.run(partial(self.cache.note_version, *answer))


def question_of(ref: AdapterRef) -> str:
    """Return the text by which caches record the source's answer to a request.

    It ends with the scope, as in version 0.2, whose recorded answers stay valid.
    """
    return "\n".join((ref.source or "", ref.text, ref.revision or "", PUBLIC))


def _key_of(located: LocatedAdapter) -> RemoteKey:
    return RemoteKey(located.source, (), located.version)


PATIENCE_SECONDS = 10.0
"""Start a second download if that of another process has received nothing for this long."""

_POLL_SECONDS = 0.02
"""Other processes hold entries and downloads by flock, and the kernel reports no release of it."""


class AdapterOpener:
    """Opens adapters: from their key to the cache's entry, or to a download that has begun."""

    def __init__(
        self,
        resolver: VersionResolver,
        downloader: RangeDownloader,
        workers: WorkerThreads,
        *,
        limits: Limits,
        verify: Checking,
    ) -> None:
        self._resolver = resolver
        self._cache = resolver.cache
        self._downloader = downloader
        self._workers = workers
        self._limits = limits
        self._verify: Checking = verify
        self._converting = asyncio.Semaphore(1)

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
            is_entry = isinstance(stored, CacheEntry)
            if not (is_entry and await self._remove_outdated(key, control)):
                raise
        return await self._open(key, await self._find(key, control), control)

    # -- an entry, or a download ------------------------------------------------------------------

    async def _find(self, key: RemoteKey, control: FetchControl) -> CacheEntry | DiskDownload:
        """Return the entry, or a new download. Wait while another process downloads it."""
        if self._resolver.located(key) is None:  # the source was not asked this time
            entry = await self._stored(key, sha256=self._resolver.digest(key))
            if entry is not None:
                return entry
        try:
            # A key with files is a local folder, which is looked up anew for each request.
            scope = PUBLIC if key.files else (await self._resolver.locate(key, control)).scope
        except AdapterError:
            # Only the caller whose digest refutes an entry may fail with its source.
            entry = await self._stored(key)
            if entry is None:
                raise
            return entry
        progress, since, alone = -1, time.monotonic(), False
        while not control.cancelled:
            begin = partial(self._cache.try_begin, cache_key(key), scope, alone=alone)
            expecting = partial(begin, sha256=self._resolver.digest(key))
            result = await self._workers.run(expecting, close_unused)
            if not isinstance(result, int):
                return result
            if result != progress:
                progress, since = result, time.monotonic()
            alone = time.monotonic() - since > PATIENCE_SECONDS
            await asyncio.sleep(_POLL_SECONDS)
        raise unwanted_error()

    async def _stored(
        self, key: RemoteKey, *, check: bool = False, sha256: str | None = None
    ) -> CacheEntry | None:
        """Call `DiskCache.open`."""
        look = partial(self._cache.open, cache_key(key), check=check, sha256=sha256)
        return await self._workers.run(look, close_unused)

    async def _open(
        self, key: RemoteKey, stored: CacheEntry | DiskDownload, control: FetchControl
    ) -> AdapterFile:
        if isinstance(stored, CacheEntry):
            return await self._open_entry(key, stored, control)
        try:
            return await self._begin_fetch(key, stored, control)
        except BaseException as error:
            # Discard it if its bytes may be wrong.
            wrong = isinstance(error, IntegrityError | AdapterFormatError)
            await self._workers.finish(stored.discard if wrong else stored.close)
            raise
        finally:
            # Free the probed bytes of refused adapters too: their size is a stranger's choice.
            self._resolver.discard_probe(key)

    async def _open_entry(
        self,
        key: RemoteKey,
        entry: CacheEntry,
        control: FetchControl,
        kind: type[EntryReader] = EntryReader,
    ) -> AdapterFile:
        reader = kind(entry, cache_key(key))

        def read() -> AdapterFile:
            config, prefix = read_first(entry, CONFIG_FILE), read_prefix(reader, self._limits)
            cached = reader.file().is_cached()
            return AdapterFile(config, prefix, reader, entry.mappable, refuse, cached=cached)

        async def refuse(error: LoraxError, *, weights: bool) -> bool:  # noqa: ARG001
            if weights:
                return await self._remove_unvouched(key)
            reader.close()
            return await self._remove_outdated(key, control)

        try:
            return await self._workers.run(read)
        except BaseException:
            reader.close()
            raise

    # -- a download that begins -------------------------------------------------------------------

    async def _begin_fetch(
        self, key: RemoteKey, download: DiskDownload, control: FetchControl
    ) -> AdapterFile:
        if key.files:
            await self._convert_folder(key, download, control)
            return await self._open_converted(key, EntryReader, control)
        located = await self._resolver.locate(key, control)
        confirmation = self._confirmation(key, located)
        try:
            with confirmation.translate_changes():
                metadata = await self._fetch_located(located, control)
                weights = await self._add_files(download, metadata, control)
        except BaseException:
            confirmation.close()
            raise
        is_pickle = weights.name == PICKLE_FILE
        reader = FetchReader(
            *(key, self._downloader, self._workers, download, weights, metadata.weights),
            layers_first=self._verify in {"none", "stream"},
            resumable=not located.version.startswith(WEAK),
            confirmation=confirmation,
            prepare=partial(self._convert_download, download, weights) if is_pickle else None,
        )
        if is_pickle:
            with closing(reader):
                await reader.fetch_groups((), lambda _: None, control)
                return await self._open_converted(key, ConvertedReader, control)

        async def refuse(error: LoraxError, *, weights: bool) -> bool:
            if weights:
                return await self._remove_unvouched(key)
            await reader.refuse(error)
            async with bind_to(control):
                await confirmation.wait()  # else config and weights need not fit each other
            return False

        config, header = metadata.config.prefix, metadata.weights.prefix
        return AdapterFile(config, header, reader, download.mappable, refuse)

    async def fetch_metadata(self, key: RemoteKey, control: FetchControl) -> AdapterMetadata:
        """Fetch config and header of one version from its source, without the cache."""
        located = await self._resolver.locate(key, control)
        with closing(self._confirmation(key, located)) as confirmation:
            metadata = await self._fetch_located(located, control)
            await confirmation.wait()
        return metadata

    def _confirmation(self, key: RemoteKey, located: LocatedAdapter) -> Confirmation:
        return Confirmation(located.recheck, partial(self._resolver.forget, key))

    async def _fetch_located(
        self, located: LocatedAdapter, control: FetchControl
    ) -> AdapterMetadata:
        """Return the adapter's metadata, within the limits. End early when `control` ends.

        Files that were probed when they were located are not requested again.
        """
        for file in located.files:
            self._require_size(file, file.nbytes)
        config, weights = located.files
        wanted = [(config, self._limits.max_config_bytes), (weights, FIRST_BYTES)]
        whole, start = await self._probe(wanted, control)
        if config.nbytes not in {None, len(whole.start)}:
            raise IntegrityError(
                f"{config.target.name} has {len(whole.start):,} bytes, and {config.nbytes:,} were"
                " promised; load it again"
            )
        return AdapterMetadata(
            FetchedFile(config, whole, len(whole.start), whole.start),
            await self._to_header(weights, start, control),
        )

    async def _probe(
        self, files: Sequence[tuple[RemoteFile, int]], control: FetchControl
    ) -> list[ProbeResult]:
        """Return the first bytes of weights, and all bytes of a config."""
        jobs: list[Job[ProbeResult] | ProbeResult] = [
            file.answer
            or self._downloader.probe(
                file.target,
                nbytes,
                ranged=file.name != CONFIG_FILE,
                needed_bytes=_header if file.name == WEIGHTS_FILE else None,
                urgency=FOREGROUND if control.urgent else PREFETCH,
                timeout=LONGEST,
            )
            for file, nbytes in files
        ]
        async with track(control, *(job for job in jobs if isinstance(job, Job))):
            answers = [
                job if isinstance(job, ProbeResult) else await outcome(job.done) for job in jobs
            ]
        for (file, _), answer in zip(files, answers, strict=True):
            file.require_match(answer)
        return answers

    async def _to_header(
        self, file: RemoteFile, probe: ProbeResult, control: FetchControl
    ) -> FetchedFile:
        """Return the weights by their first bytes, and more of them if their header is long."""
        size = file.nbytes if probe.validators.size is None else probe.validators.size
        if size is None:
            problem = f"the source does not say how large {file.target.name} is"
            raise FetchError(problem, retryable=False)
        self._require_size(file, size)
        if file.name == PICKLE_FILE:
            return FetchedFile(file, probe, size, b"")
        needed = header_size(probe.start[:8], size, self._limits)
        if needed > len(probe.start):
            (larger,) = await self._probe([(replace(file, answer=None), needed)], control)
            if larger.validators != probe.validators:
                raise changed_error(file.target.name)
            probe = larger
        return FetchedFile(file, probe, size, probe.start[:needed])

    def _require_size(self, file: RemoteFile, nbytes: int | None) -> None:
        """Raise `AdapterFormatError` for a size over the limit: such a file is not requested."""
        limit = "max_config_bytes" if file.name == CONFIG_FILE else "max_adapter_bytes"
        max_bytes: int = getattr(self._limits, limit)
        if nbytes is not None and nbytes > max_bytes:
            raise AdapterFormatError(
                f"{file.target.name} has {nbytes:,} bytes, over the limit of {max_bytes:,};"
                f" raise Limits.{limit} to accept it"
            )

    async def _add_files(
        self, download: DiskDownload, metadata: AdapterMetadata, control: FetchControl
    ) -> PartialFile:
        """Add both files to the download, with the bytes received so far; return the weights'.

        The source's digests judge them. Callers' digests do not: they may share the download.
        """
        weights, answer = metadata.weights.file, metadata.weights.answer
        promised = metadata.config.file.expected, weights.expected or sent_sha256(answer.fields)
        if self._verify == "none":
            promised = None, None
        _check(metadata.config, promised[0])  # it is used before publication
        files = [
            await self._wait_for_room(partial(_add_file, download, fetched, expected), control)
            for fetched, expected in zip((metadata.config, metadata.weights), promised, strict=True)
        ]
        if files[1].resumed:  # another file's bytes are to be noticed before any caller's
            rest = await outcome(answer.rest)
            await self._workers.run(partial(files[1].write, len(answer.start), rest))
        return files[1]

    async def _wait_for_room(self, add: Callable[[], T], control: FetchControl) -> T:
        """Retry `add` while the cache is full of entries and downloads in use."""
        while not control.cancelled:
            try:
                return await self._workers.run(add)
            except CrowdedError:
                await asyncio.sleep(_POLL_SECONDS)
        raise unwanted_error()

    # -- a tokenizer ------------------------------------------------------------------------------

    async def add_tokenizer(self, key: RemoteKey, file: AdapterFile, control: FetchControl) -> int:
        """Add the adapter's own tokenizer to its entry, if the source has one; return its bytes.

        An adapter that brings no tokens costs no request. Neither does one whose tokenizer is here,
        or was found to be missing. An entry that was here before stays usable without its source.
        """
        reader = file.reader
        assert isinstance(reader, EntryReader | FetchReader)
        entry = reader.entry
        if not isinstance(entry, DiskEntry) or key.files:
            return 0  # the standard hub cache's and a local folder's are other programs'
        if not any(word in file.prefix for word in _ROWS_OF_TOKENS):
            return 0  # no need to parse it

        def look() -> int | None:
            with suppress(AdapterFormatError):  # whoever loads the weights hears of it
                header = parse_header(file.prefix, reader.nbytes, self._limits)
                if brings_tokens(tensor.name for tensor in header.tensors):
                    return entry.tokenizer_bytes()
            return 0

        known = await self._workers.run(look)
        if known is not None:
            return known
        try:
            files = await self._resolver.find_files(key, TOKENIZER_FILES, control)
            contents = await self._fetch_small(files, control)
        except (FetchError, AdapterNotFoundError, IntegrityError):
            if isinstance(reader, EntryReader):
                return 0  # its source is away, or has another version by now
            raise
        await self._wait_for_room(partial(self._cache.add_tokenizer, entry, contents), control)
        return sum(map(len, contents.values()))

    async def _fetch_small(
        self, files: Sequence[RemoteFile], control: FetchControl
    ) -> dict[str, bytes]:
        """Return the bytes of whole files. Raise `AdapterFormatError` if they are too many."""
        left = self._limits.max_tokenizer_bytes
        contents: dict[str, bytes] = {}
        for file in files:
            nbytes = left if file.nbytes is None else file.nbytes
            if nbytes > left:
                raise AdapterFormatError(
                    f"{file.target.name} and the other files of its tokenizer have more than the"
                    f" {self._limits.max_tokenizer_bytes:,} bytes that they may have; raise"
                    " Limits.max_tokenizer_bytes to accept them"
                )
            if nbytes == 0:
                contents[file.name] = b""
                continue
            urgency = FOREGROUND if control.urgent else PREFETCH
            job = self._downloader.probe(
                file.target, nbytes, ranged=False, urgency=urgency, timeout=LONGEST
            )
            async with track(control, job), bind_to(control):
                answer = await outcome(job.done)
            file.require_match(answer)
            content = answer.start
            if file.nbytes not in {None, len(content)}:
                raise IntegrityError(f"{file.target.name} ended early; load it again")
            _check(FetchedFile(file, answer, len(content), content), file.expected)
            contents[file.name] = content
            left -= len(content)
        return contents

    # -- weights that are a pickle ----------------------------------------------------------------

    async def _convert_download(
        self, download: DiskDownload, pickle: PartialFile, control: FetchControl
    ) -> None:
        """Put the weights in the place of a downloaded pickle, whose promised digest is checked.

        If the pickle is refused, nothing of the download is left.
        """
        await self._workers.run(pickle.complete)
        try:
            content = await self._convert(pickle.descriptor, control)
        except FetchError:
            raise
        except AdapterError:
            await self._workers.finish(download.discard)
            raise

        def exchange() -> None:
            download.remove(pickle.name)
            download.store(WEIGHTS_FILE, content)

        try:
            await self._workers.run(exchange)
        finally:
            os.close(content)

    async def _convert_folder(
        self, key: RemoteKey, download: DiskDownload, control: FetchControl
    ) -> None:
        """Make the entry of a local folder whose weights are a pickle."""
        config, pickle = key.files
        path = os.path.join(key.location, PICKLE_FILE)
        reader = FileReader(partial(open_same, path, pickle), pickle, PICKLE_FILE)
        with closing(reader):
            content = await self._convert(reader.descriptor, control)

        def publish() -> None:
            require_same(path, pickle)  # it was not written to meanwhile
            text = read_checked(key.location, CONFIG_FILE, config)
            download.file(CONFIG_FILE, len(text)).write(0, memoryview(text))
            download.store(WEIGHTS_FILE, content)
            download.publish().close()

        try:
            await self._workers.run(publish)
        finally:
            os.close(content)

    async def _convert(self, pickle: SharedResource[int], control: FetchControl) -> int:
        """Return a descriptor of the weights, in memory. One conversion at a time, in a thread."""

        def work(is_wanted: IsWanted) -> int:
            with pickle as fd:
                return convert_open(fd, self._limits, lambda: not is_wanted())

        async with bind_to(control), self._converting:
            return await in_thread(work, os.close)

    async def _open_converted(
        self, key: RemoteKey, kind: type[EntryReader], control: FetchControl
    ) -> AdapterFile:
        entry = await self._stored(key)
        if entry is None:
            raise entry_gone()
        return await self._open_entry(key, entry, control, kind)

    # -- what was refused -------------------------------------------------------------------------

    async def _remove_unvouched(self, key: RemoteKey) -> bool:
        """Remove an unvouched entry whose weights were refused; return whether it is gone."""
        entry = await self._stored(key)
        if entry is not None:
            entry.close()
            if entry.record.vouched:
                return False
            await self._invalidate(key)
        return True

    async def _remove_outdated(self, key: RemoteKey, control: FetchControl) -> bool:
        """Remove a refused entry that is not what its source has now; return whether it is gone.

        Hash a vouched entry that was not hashed before; compare another with the source's first
        bytes. If the source cannot be reached, the refusal stands.
        """
        entry = await self._stored(key)
        if entry is None:
            return True
        with closing(entry):
            vouched = entry.record.vouched
            outdated = not vouched and await self._differs(key, entry, control)
        if outdated:
            await self._invalidate(key)
        if not vouched or entry.is_verified:
            return outdated
        entry = await self._stored(key, check=True)  # the cache removes a damaged one
        if entry is not None:
            entry.close()
        return entry is None

    async def _invalidate(self, key: RemoteKey) -> None:
        await self._workers.run(partial(self._cache.invalidate, cache_key(key)))

    async def _differs(self, key: RemoteKey, entry: CacheEntry, control: FetchControl) -> bool:
        """Compare an entry with its source; False if that cannot be reached.

        Raise `IntegrityError` if the source has another version now.
        """
        try:
            metadata = await self.fetch_metadata(key, control)
        except IntegrityError:
            raise
        except LoraxError:
            return False
        finally:
            self._resolver.discard_probe(key)
        if metadata.weights.file.name == PICKLE_FILE:
            return False  # the entry was made of it
        sizes = {file.name: file.nbytes for file in entry.record.files}
        fetched = {file.file.name: file for file in (metadata.config, metadata.weights)}

        def differs() -> bool:
            return sizes != {name: file.nbytes for name, file in fetched.items()} or any(
                read_first(entry, name, len(file.prefix)) != file.prefix
                for name, file in fetched.items()
            )

        return await self._workers.run(differs)


def _header(start: memoryview, _: Validators) -> int:
    return header_end(start)


def _add_file(download: DiskDownload, fetched: FetchedFile, expected: Digest | None) -> PartialFile:
    """Add a file to the download, and write its first bytes. Blocks.

    Raise `LeftoverError` if a partial download has other first bytes. On an error the caller still
    owns the download; `CapacityError` leaves it unchanged.
    """
    file = download.file(fetched.file.name, fetched.nbytes, expected)
    if start := fetched.answer.start:
        file.write(0, memoryview(start)[: fetched.nbytes])
    return file


def _check(fetched: FetchedFile, expected: Digest | None) -> None:
    """Raise `IntegrityError` if a whole file does not have the expected digest."""
    if expected is None:
        return
    content_hash = FileHash(expected.kind, fetched.nbytes)
    content_hash.feed(memoryview(fetched.prefix))
    if content_hash.digest() != expected:
        raise IntegrityError(
            f"{fetched.file.name} does not have the promised {expected.kind} digest; load it again"
        )


def cache_key(key: RemoteKey) -> CacheKey:
    return CacheKey(key.location, key.version)


def close_unused(result: object) -> None:
    """Close an entry or a download whose caller was cancelled."""
    if isinstance(result, CacheEntry | DiskDownload):
        result.close()
