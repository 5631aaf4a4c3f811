"""The download of one adapter, by ranges, into the cache; readable while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Lock

from lorax_async.cache.base import CacheDownload, CacheEntry, CacheFile
from lorax_async.concurrency import FetchControl, WorkerThreads, outcome
from lorax_async.errors import AdapterFormatError, IntegrityError, LoraxError
from lorax_async.files import Reader
from lorax_async.formats import spans as runs
from lorax_async.formats.spans import ByteRange, SpanSet
from lorax_async.formats.split_weights import FileGroups, SplitGroupArrivals
from lorax_async.http.download_scheduler import Job
from lorax_async.http.range_engine import FOREGROUND, PREFETCH, RangeEngine
from lorax_async.http.ranges import size_of
from lorax_async.remote.metadata import LONGEST, AdapterMetadata, track, unwanted_error
from lorax_async.sources.local_weights import SplitFiles, SplitReader

Groups = Sequence[Sequence[runs.ByteSpan]]


COMPARED_BYTES = 4 << 10
"""Bytes at the end of each span of a partial download that are fetched again and compared."""


class CacheSink:
    """Writes a file of a download. Called by the engine's threads."""

    def __init__(self, file: CacheFile) -> None:
        self._file = file

    def write(self, offset: int, data: memoryview) -> None:
        self._file.write([data], offset)


class AdapterFetch:
    """A download whose config and headers are here.

    Its owner ends it, by `bring`, `refuse` or `leave`.

    Parameters
    ----------
    download, files
        The cache's download, and its files of weights.
    metadata
        Config and headers.
    resumable
        Whether a partial download may be resumed later: the version names the bytes.
    """

    def __init__(
        self,
        engine: RangeEngine,
        workers: WorkerThreads,
        download: CacheDownload,
        files: Sequence[CacheFile],
        metadata: AdapterMetadata,
        *,
        resumable: bool,
    ) -> None:
        self._engine = engine
        self._workers = workers
        self._download = download
        self._files = files
        self._metadata = metadata
        self._resumable = resumable
        self._lock = Lock()
        self._hashing: dict[int, Future[int]] = {}

    def reader(self) -> Reader:
        """Return a reader of the weights, as far as they have arrived."""
        readers = [file.reader() for file in self._files]
        plan = self._metadata.plan
        return readers[0] if plan is None else SplitReader(SplitFiles(plan, tuple(readers)))

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

        Call `arrived` on the loop. The download has ended when this returns or raises.
        """
        try:
            if control.ended:
                raise unwanted_error()
            jobs = self._begin(groups, _on_loop(arrived), control)
            async with track(control, *jobs):
                for job in jobs:
                    await outcome(job.done)
            return await self._workers.run(self._download.publish, lambda entry: entry.close())
        except BaseException as error:
            await self._workers.finish(partial(self._leave, control.refused or error))
            raise

    def leave(self) -> None:
        """End it without `bring`; what arrived stays for the next download. Quick."""
        self._workers.submit(partial(self._leave, None))

    async def refuse(self, error: LoraxError) -> None:
        """End it after a check of its content failed with `error`."""
        await self._workers.finish(partial(self._leave, error))

    def _begin(
        self, groups: Groups, arrived: Callable[[int], None], control: FetchControl
    ) -> list[Job[None]]:
        shares = self._shares(groups)
        arrivals = SplitGroupArrivals(len(groups), shares)
        for group in arrivals.take():
            arrived(group)

        def on_progress(number: int, n: int) -> None:
            self._continue_hashing(number)
            if n < len(shares[number].groups):
                with self._lock:
                    for group in arrivals.landed(number + 1, n):
                        arrived(group)

        return [
            self._job(number, share, partial(on_progress, number), control)
            for number, share in enumerate(shares)
        ]

    def _shares(self, groups: Groups) -> tuple[FileGroups, ...]:
        """Return the spans of each group by file."""
        if self._metadata.plan is not None:
            return self._metadata.plan.by_file(groups)
        numbers = tuple(n for n, group in enumerate(groups) if group)
        return (FileGroups(numbers, tuple(tuple(groups[n]) for n in numbers)),)

    def _job(
        self,
        number: int,
        share: FileGroups,
        on_progress: Callable[[int], None],
        control: FetchControl,
    ) -> Job[None]:
        file, part = self._files[number], self._metadata.parts[number]
        ranges = order_ranges(share.spans, part.nbytes)
        return self._engine.download(
            part.answer,
            ranges,
            CacheSink(file),
            on_progress,
            first=1 + next((n for n, spans in enumerate(ranges) if spans), 0),
            have=_trusted_ranges(file, part.nbytes),
            urgency=FOREGROUND if control.urgent else PREFETCH,
            timeout=LONGEST,
        )

    def _continue_hashing(self, number: int) -> None:
        """Hash what has arrived, in one thread per file. Calls for one file are serial."""
        running = self._hashing.get(number)
        if running is None or running.done():
            self._hashing[number] = self._workers.submit(self._files[number].hash_along)

    def _leave(self, error: BaseException | None) -> None:
        """Close the download; discard it if its bytes may be wrong. Blocks."""
        for hashing in self._hashing.values():
            if not hashing.cancel():
                hashing.exception()
        if isinstance(error, IntegrityError | AdapterFormatError) or not self._resumable:
            self._download.discard()
        else:
            self._download.close()


def _trusted_ranges(file: CacheFile, nbytes: int) -> list[ByteRange]:
    """Return the ranges that need not be fetched again.

    Without a digest to check a partial download, fetch the end of each of its spans again: the
    write compares it, which detects a source that changed its file since.
    """
    here = SpanSet(file.missing()).missing(0, nbytes)
    if file.expected is not None or not file.resumed:
        return here
    return [(start, stop - COMPARED_BYTES) for start, stop in here if stop - start > COMPARED_BYTES]


def _on_loop(arrived: Callable[[int], None]) -> Callable[[int], None]:
    """Return a function that any thread may call, to call `arrived` on the loop."""
    loop = asyncio.get_running_loop()

    def report(group: int) -> None:
        loop.call_soon_threadsafe(arrived, group)

    return report


def order_ranges(groups: Groups, nbytes: int) -> list[list[ByteRange]]:
    """Return the ranges of each group, then those of the rest of the file; no byte twice.

    The gaps of a strided span are fetched with it: a request for each row would cost more.
    """
    claimed = SpanSet()
    ordered: list[list[ByteRange]] = []
    for group in [*groups, [runs.ByteSpan(0, nbytes)]]:
        new = SpanSet()
        for span in group:
            for start, stop in claimed.missing(span.start, span.end):
                new.add(start, stop)
        ordered.append(list(new))
        for start, stop in new:
            claimed.add(start, stop)
    return ordered
