"""Readers of adapters in the cache, and of those that are being downloaded into it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial
from threading import Lock

from lorax_async.cache.base import CacheEntry, CacheKey, EntryRecord, FileRecord
from lorax_async.cache.disk_cache import DiskDownload
from lorax_async.cache.partials import PartialFile
from lorax_async.concurrency import FetchControl, Inbox, WorkerThreads, close_all, outcome
from lorax_async.config import Limits
from lorax_async.errors import AdapterFormatError, IntegrityError, LoraxError
from lorax_async.files import FileReader, Reader, SplitReader, read_prefix
from lorax_async.formats.spans import ByteRange, ByteSpan, SpanSet
from lorax_async.formats.split_weights import (
    CONFIG_FILE,
    INDEX_FILE,
    FileGroups,
    FileHead,
    FileRole,
    parse_index,
    plan_split,
)
from lorax_async.http.download_scheduler import Job
from lorax_async.http.range_engine import FOREGROUND, PREFETCH, RangeEngine
from lorax_async.http.ranges import size_of
from lorax_async.remote.base import LONGEST, AdapterMetadata, bind_to, track, unwanted_error
from lorax_async.sources.base import AdapterFile
from lorax_async.types import RemoteKey

Groups = Sequence[Sequence[ByteSpan]]

_TICK_SECONDS = 0.002
_IDLE_TICKS = 15

COMPARED_BYTES = 4 << 10
"""Bytes at the end of each span of a partial download that are fetched again and compared."""


class CountedReader:
    """Passes reads to another `Reader`, and knows when they are done."""

    def __init__(self, reader: Reader) -> None:
        self.nbytes = reader.nbytes
        self._reader = reader
        self._read_bytes = 0

    def read_into(
        self, buffers: Sequence[memoryview], offset: int, rows: int = 1, pitch: int = 0
    ) -> None:
        self._reader.read_into(buffers, offset, rows, pitch)
        self._read_bytes += sum(buffer.nbytes for buffer in buffers)  # about, of several threads

    async def until_read(self, groups: Groups) -> None:
        """Wait until the groups were read, or nothing was for a while."""
        wanted = sum(span.nbytes for group in groups for span in group)
        seen, idle = -1, 0
        while self._read_bytes < wanted and idle < _IDLE_TICKS:
            idle = idle + 1 if self._read_bytes == seen else 0
            seen = self._read_bytes
            await asyncio.sleep(_TICK_SECONDS)


class _Gate:
    """Holds items back until it is opened. On the loop."""

    def __init__(self, handle: Callable[[int], None]) -> None:
        self._handle = handle
        self._held: list[int] | None = []

    def put(self, item: int) -> None:
        if self._held is None:
            self._handle(item)
        else:
            self._held.append(item)

    def open(self) -> None:
        held, self._held = self._held or [], None
        for item in held:
            self._handle(item)


class FetchReader(CountedReader):
    """The `Reader` of a download whose config and headers are here; publication gives it an entry.

    Its owner calls `bring` or `refuse` once, or only `close`, which ends the download too; the
    first of them calls `on_take`. `files` are those of the weights. A `resumable` download may be
    resumed after it failed: the version names the bytes. With `layers_first` hashing takes no core
    from receiving and copying them. `confirm` raises unless all files are of one version still.
    """

    def __init__(
        self,
        key: RemoteKey,
        engine: RangeEngine,
        workers: WorkerThreads,
        download: DiskDownload,
        files: Sequence[PartialFile],
        metadata: AdapterMetadata,
        *,
        resumable: bool,
        layers_first: bool,
        on_take: Callable[[], object],
        confirm: Callable[[], Awaitable[None]],
    ) -> None:
        self.key = key
        self.entry: CacheEntry | None = None
        self._engine = engine
        self._workers = workers
        self._download = download
        self._files = files
        self._metadata = metadata
        self._resumable = resumable
        self._layers_first = layers_first
        self._on_take = on_take
        self._confirm = confirm
        self._lock = Lock()
        self._jobs: list[Job[None]] = []
        self._hashing: dict[int, Future[int]] = {}
        self._taken = self._closed = False
        readers = tuple(file.reader() for file in files)
        split = metadata.plan and SplitReader(metadata.plan, readers)
        super().__init__(split or readers[0])

    def landed(self) -> tuple[int, int]:
        """Return how many bytes of the weights have arrived, and how many there are.

        Quick; from any thread.
        """
        nbytes = sum(part.nbytes for part in self._metadata.parts)
        missing = sum(size_of(file.missing()) for file in self._files)
        return nbytes - missing, nbytes

    async def bring(
        self, groups: Groups, arrived: Callable[[int], None], control: FetchControl
    ) -> CacheEntry:
        """Download all files, the groups' bytes first; check digests, publish, return the entry.

        Call `arrived` on the loop, once all files are known to be of one version. The download
        has ended when this returns or raises.
        """
        self._take()
        try:
            if control.cancelled:
                raise unwanted_error()
            gate = _Gate(arrived)
            inbox = Inbox(asyncio.get_running_loop(), gate.put)
            layers_first = self._layers_first and control.urgent and bool(groups)
            async with bind_to(control):
                for file, part in zip(self._files, self._metadata.parts, strict=True):
                    rest = await outcome(part.answer.rest)
                    await self._workers.run(partial(file.write, len(part.answer.start), rest))
            is_whole = not any(file.missing() for file in self._files)
            begin = partial(self._begin, groups, inbox.put, control, hash_along=not layers_first)
            await self._workers.run(begin)
            async with track(control, *self._jobs):
                async with bind_to(control):
                    await self._confirm()
                    if is_whole:  # else the answers with the rest show a replacement
                        await self._confirm()
                gate.open()
                for job in self._jobs:
                    await outcome(job.done)
            if layers_first:
                await self.until_read(groups)
            entry = await self._workers.run(self._download.publish, lambda entry: entry.close())
        except BaseException as error:
            await self._workers.finish(partial(self._leave, control.refused or error))
            raise
        self._adopt(entry)
        return entry

    async def refuse(self, error: LoraxError) -> None:
        """End it and close it, after a check of its content failed with `error`."""
        self._take()
        self.close()
        await self._workers.finish(partial(self._leave, error))

    def close(self) -> None:
        """Close it. Without `bring` what arrived stays for the next download. Quick."""
        if self._closed:
            return
        self._closed = True
        self._reader.close()
        if not self._taken:
            self._take()
            self._workers.submit(partial(self._leave, None))
        if self.entry is not None:
            self.entry.close()

    def _take(self) -> None:
        self._taken = True
        self._on_take()

    def _adopt(self, entry: CacheEntry) -> None:
        """Own the published entry; close it if the reader is closed."""
        self.entry = entry
        if self._closed:
            entry.close()

    def _begin(
        self,
        groups: Groups,
        arrived: Callable[[int], None],
        control: FetchControl,
        *,
        hash_along: bool,
    ) -> None:
        plan = self._metadata.plan
        if plan is None:
            numbers = tuple(n for n, group in enumerate(groups) if group)
            shares: Sequence[FileGroups] = (
                FileGroups(numbers, tuple(tuple(groups[n]) for n in numbers)),
            )
        else:
            shares = plan.by_file(groups)
        missing = Counter(group for share in shares for group in share.groups)
        for group in range(len(groups)):
            if not missing[group]:
                arrived(group)

        def on_progress(number: int, n: int) -> None:
            with self._lock:
                if hash_along:
                    self._continue_hashing(number)
                if n == len(shares[number].groups):  # the rest of the file
                    return
                group = shares[number].groups[n]
                missing[group] -= 1
                whole = not missing[group]
            if whole:
                arrived(group)

        parts = zip(shares, self._files, self._metadata.parts, strict=True)
        for number, (share, file, part) in enumerate(parts):
            job = self._engine.download(
                part.answer,
                _missing_ranges(share.spans, file),
                file.write,
                partial(on_progress, number),
                urgency=FOREGROUND if control.urgent else PREFETCH,
                timeout=LONGEST,
            )
            self._jobs.append(job)

    def _continue_hashing(self, number: int) -> None:
        """Hash what has arrived, in one thread per file. With the lock."""
        running = self._hashing.get(number)
        if running is None or running.done():
            self._hashing[number] = self._workers.submit(self._files[number].hash_along)

    def _leave(self, error: BaseException | None) -> None:
        """Close the download; discard it if its bytes may be wrong. Blocks."""
        for job in self._jobs:
            job.cancel(unwanted_error())
            job.done.exception()
        for hashing in self._hashing.values():
            if not hashing.cancel():
                hashing.exception()
        if isinstance(error, IntegrityError | AdapterFormatError) or not self._resumable:
            self._download.discard()
        else:
            self._download.close()


def _trusted_ranges(file: PartialFile) -> list[ByteRange]:
    """Return the ranges that need not be fetched again.

    Without a digest to check a partial download, fetch the end of each of its spans again: the
    write compares it, which detects a source that changed its file since.
    """
    here = SpanSet(file.missing()).missing(0, file.nbytes)
    if file.expected is not None or not file.resumed:
        return here
    return [(start, stop - COMPARED_BYTES) for start, stop in here if stop - start > COMPARED_BYTES]


def _missing_ranges(groups: Groups, file: PartialFile) -> list[list[ByteRange]]:
    """Return what to fetch of each group, then of the rest of the file; no byte twice.

    The gaps of a strided span are fetched with it: a request for each row would cost more.
    """
    claimed = SpanSet(_trusted_ranges(file))
    ordered: list[list[ByteRange]] = []
    for group in [*groups, [ByteSpan(0, file.nbytes)]]:
        missing = SpanSet()
        for span in group:
            for start, stop in claimed.missing(span.start, span.end):
                missing.add(start, stop)
                claimed.add(start, stop)
        ordered.append(list(missing))
    return ordered


class EntryReader(CountedReader):
    """The `Reader` of an entry's weights. Leases the entry until it is closed.

    `key` is the entry's. Making it blocks; on an error the entry is closed.
    """

    def __init__(self, entry: CacheEntry, key: CacheKey, limits: Limits) -> None:
        self.entry = entry
        self.key = key
        readers: list[Reader] = []
        try:
            readers += (entry.reader(file.role) for file in weight_files(entry.record))
            if entry.record.file(INDEX_FILE) is None:
                super().__init__(readers[0])
            else:
                index = parse_index(read_first(entry, INDEX_FILE), limits)
                heads = (FileHead(read_prefix(reader, limits), reader.nbytes) for reader in readers)
                super().__init__(SplitReader(plan_split(index, heads, limits), tuple(readers)))
        except BaseException:
            close_all([*readers, entry])
            raise

    def is_cached(self) -> bool:
        """Return whether the page cache seems to have the weights, if they are one file."""
        return isinstance(self._reader, FileReader) and self._reader.is_cached()

    def close(self) -> None:
        self._reader.close()
        self.entry.close()


def open_entry(entry: CacheEntry, key: CacheKey, limits: Limits) -> AdapterFile:
    """Return config, header and reader of an entry. Blocks. On an error the entry is closed."""
    reader = EntryReader(entry, key, limits)
    try:
        config = read_first(entry, CONFIG_FILE)
        prefix = read_prefix(reader, limits)
        return AdapterFile(config, prefix, reader, entry.mappable, cached=reader.is_cached())
    except BaseException:
        reader.close()
        raise


def weight_files(record: EntryRecord) -> list[FileRecord]:
    return sorted(
        (file for file in record.files if file.role.kind == "weights"), key=lambda file: file.role
    )


def read_first(entry: CacheEntry, role: FileRole, nbytes: int | None = None) -> bytes:
    """Return the first bytes of a file; all of them by default. Blocks."""
    with closing(entry.reader(role)) as reader:
        content = bytearray(reader.nbytes if nbytes is None else nbytes)
        reader.read_into([memoryview(content)], 0)
    return bytes(content)
