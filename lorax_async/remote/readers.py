"""Readers of adapters in the cache, and of those that are being downloaded into it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from functools import partial
from threading import Lock

from lorax_async.cache.base import CacheEntry, CacheKey
from lorax_async.cache.disk_cache import DiskDownload
from lorax_async.cache.partials import PartialFile
from lorax_async.concurrency import FetchControl, Inbox, SharedResource, WorkerThreads, outcome
from lorax_async.errors import AdapterFormatError, EvictedError, IntegrityError, LoraxError
from lorax_async.files import FileReader, Reader
from lorax_async.formats.peft_names import WEIGHTS_FILE
from lorax_async.formats.spans import ByteRange, ByteSpan, SpanSet
from lorax_async.http.download_scheduler import Job
from lorax_async.http.range_downloader import FOREGROUND, PREFETCH, RangeDownloader
from lorax_async.http.ranges import size_of
from lorax_async.remote.base import (
    LONGEST,
    Confirmation,
    FetchedFile,
    bind_to,
    track,
    unwanted_error,
)
from lorax_async.types import RemoteKey

Groups = Sequence[Sequence[ByteSpan]]

_IDLE_SECONDS = 0.03

COMPARED_BYTES = 4 << 10
"""Bytes at the end of each span of a partial download that are fetched again and compared."""


class CountedReader:
    """Passes reads to another `Reader`, and notifies one waiter of how much was read."""

    def __init__(self, reader: Reader) -> None:
        self.nbytes = reader.nbytes
        self._reader = reader
        self._counting = Lock()
        self._read_bytes = 0
        self._waiter: tuple[int, Callable[[], object]] | None = None
        """The number of bytes to wait for, and what to call then, in any thread."""

    def read_into(
        self, buffers: Sequence[memoryview], offset: int, rows: int = 1, pitch: int = 0
    ) -> None:
        self._reader.read_into(buffers, offset, rows, pitch)
        with self._counting:
            self._read_bytes += sum([buffer.nbytes for buffer in buffers])
            if self._waiter is not None and self._read_bytes >= self._waiter[0]:
                notify, self._waiter = self._waiter[1], None
                notify()

    async def wait_until_read(self, groups: Groups) -> None:
        """Wait until the groups were read, or nothing was for a while."""
        loop, all_read = asyncio.get_running_loop(), asyncio.Event()
        wanted, seen = sum(span.nbytes for group in groups for span in group), -1
        with self._counting:
            if self._read_bytes >= wanted:
                return
            self._waiter = wanted, partial(loop.call_soon_threadsafe, all_read.set)
        try:
            while not all_read.is_set() and self._read_bytes != seen:
                seen = self._read_bytes
                with suppress(TimeoutError):
                    async with asyncio.timeout(_IDLE_SECONDS):
                        await all_read.wait()
        finally:
            with self._counting:  # no notification follows: the loop may be closed
                self._waiter = None


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

    Its owner calls `fetch_groups` or `refuse` once, or only `close`, which ends the download too.
    `file` is that of the weights, which began as `fetched`. A
    `resumable` download may be resumed after it failed: the version names the bytes. With
    `layers_first` hashing takes no core from receiving and copying them. It closes `confirmation`.
    `prepare` runs once all files are here, before publication.
    """

    def __init__(
        self,
        key: RemoteKey,
        downloader: RangeDownloader,
        workers: WorkerThreads,
        download: DiskDownload,
        file: PartialFile,
        fetched: FetchedFile,
        *,
        resumable: bool,
        layers_first: bool,
        confirmation: Confirmation,
        prepare: Callable[[FetchControl], Awaitable[object]] | None = None,
    ) -> None:
        self.key = key
        self.entry: CacheEntry | None = None
        self._downloader = downloader
        self._workers = workers
        self._download = download
        self._file = file
        self._fetched = fetched
        self._resumable = resumable
        self._layers_first = layers_first
        self._confirmation = confirmation
        self._prepare = prepare
        self._lock = Lock()
        self._job: Job[None] | None = None
        self._hashing: Future[int] | None = None
        self._taken = self._closed = False
        super().__init__(file.reader())

    def landed(self) -> tuple[int, int]:
        """Return how many bytes of the weights have arrived, and how many there are.

        Quick; from any thread.
        """
        return self.nbytes - size_of(self._file.missing()), self.nbytes

    async def fetch_groups(
        self, groups: Groups, arrived: Callable[[int], None], control: FetchControl
    ) -> CacheEntry:
        """Download all files, the groups' bytes first; check digests, publish, return the entry.

        Call `arrived` on the loop, once all files are known to be of one version. The download
        has ended when this returns or raises.
        """
        self._taken = True
        try:
            if control.cancelled:
                raise unwanted_error()
            gate = _Gate(arrived)
            inbox = Inbox(asyncio.get_running_loop(), gate.put)
            layers_first = self._layers_first and control.urgent and bool(groups)
            answer = self._fetched.answer
            with self._confirmation.translate_changes():
                async with bind_to(control):
                    rest = await outcome(answer.rest)
                    await self._workers.run(partial(self._file.write, len(answer.start), rest))
                is_whole = not self._file.missing()
                begin = partial(
                    self._begin, groups, inbox.put, control, hash_along=not layers_first
                )
                job = await self._workers.run(begin)
                async with track(control, job):
                    async with bind_to(control):
                        await self._confirmation.wait()
                        if is_whole:  # else the answers with the rest show a replacement
                            await self._confirmation.wait()
                    gate.open()
                    await outcome(job.done)
            if layers_first:
                await self.wait_until_read(groups)
            if self._prepare is not None:
                await self._prepare(control)
            entry = await self._workers.run(self._download.publish, lambda entry: entry.close())
        except BaseException as error:
            self._confirmation.close()
            await self._workers.finish(partial(self._leave, control.refused or error))
            raise
        self._adopt(entry)
        return entry

    async def refuse(self, error: LoraxError) -> None:
        """End it and close it, after a check of its content failed with `error`."""
        self._taken = True
        self.close()
        await self._workers.finish(partial(self._leave, error))

    def close(self) -> None:
        """Close it. Without `fetch_groups` what arrived stays for the next download. Quick."""
        if self._closed:
            return
        self._closed = True
        self._reader.close()
        self._confirmation.close()
        if not self._taken:
            self._taken = True
            self._workers.submit(partial(self._leave, None))
        if self.entry is not None:
            self.entry.close()

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
    ) -> Job[None]:
        def on_progress(n: int) -> None:
            if hash_along:
                self._continue_hashing()
            if n < len(groups):  # not the rest of the file
                arrived(n)

        self._job = self._downloader.download(
            self._fetched.answer,
            _missing_ranges(groups, self._file),
            self._file.write,
            on_progress,
            urgency=FOREGROUND if control.urgent else PREFETCH,
            timeout=LONGEST,
        )
        return self._job

    def _continue_hashing(self) -> None:
        """Hash what has arrived, in one thread."""
        with self._lock:
            if self._hashing is None or self._hashing.done():
                self._hashing = self._workers.submit(self._file.hash_along)

    def _leave(self, error: BaseException | None) -> None:
        """Close the download; discard it if its bytes may be wrong. Blocks."""
        if self._job is not None:
            self._job.cancel(unwanted_error())
            self._job.done.exception()
        if self._hashing is not None and not self._hashing.cancel():
            self._hashing.exception()
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
    """The `Reader` of an entry's weights. Leases the entry until it is closed. `key` is its key."""

    def __init__(self, entry: CacheEntry, key: CacheKey) -> None:
        self.entry = entry
        self.key = key
        self._file = entry.reader(WEIGHTS_FILE)
        super().__init__(self._file)

    def file(self) -> FileReader:
        return self._file

    def close(self) -> None:
        self._file.close()
        self.entry.close()


class ConvertedReader(EntryReader):
    """The `EntryReader` of a pickle just downloaded: statistics count it as a download."""


def read_first(entry: CacheEntry, name: str, nbytes: int | None = None) -> bytes:
    """Return the first bytes of a file; all of them by default. Blocks."""
    with closing(entry.reader(name)) as reader:
        content = bytearray(reader.nbytes if nbytes is None else nbytes)
        reader.read_into([memoryview(content)], 0)
    return bytes(content)


class ReopenedReader:
    """The `Reader` of a key whose entry is opened by the first read.

    If it is gone then, every later read fails too, even if the cache has it again.
    """

    def __init__(self, open: Callable[[], EntryReader]) -> None:
        self._open = open
        self._gone = False
        self._opened = SharedResource(
            "the adapter's weights", lambda reader: reader.close(), open=self._open_once
        )

    @property
    def nbytes(self) -> int:
        with self._opened as reader:
            return reader.nbytes

    def read_into(
        self, buffers: Sequence[memoryview], offset: int, rows: int = 1, pitch: int = 0
    ) -> None:
        with self._opened as reader:
            reader.read_into(buffers, offset, rows, pitch)

    def file(self) -> FileReader:
        with self._opened as reader:
            return reader.file()

    def close(self) -> None:
        self._opened.close()

    def _open_once(self) -> EntryReader:
        if self._gone:
            raise entry_gone()
        try:
            return self._open()
        except EvictedError:
            self._gone = True
            raise


def entry_gone() -> EvictedError:
    return EvictedError("it has left the disk cache; load it again")
