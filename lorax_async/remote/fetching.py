"""One adapter on its way: from its source, by ranges, into the cache, and read meanwhile."""

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
from lorax_async.remote.metadata import LONGEST, AdapterMetadata, nobody_waits, track
from lorax_async.sources.local_weights import SplitFiles, SplitReader

Groups = Sequence[Sequence[runs.ByteSpan]]


COMPARED_BYTES = 4 << 10
"""How much of each span that an interrupted download left comes again, to be compared."""


class CacheSink:
    """Where the engine's threads write a file of a download."""

    def __init__(self, file: CacheFile) -> None:
        self._file = file

    def write(self, offset: int, data: memoryview) -> None:
        self._file.write([data], offset)


class AdapterFetch:
    """A download whose config and headers are here. Its owner ends it: by `bring`, or `leave`.

    Parameters
    ----------
    download, files
        Where it goes; the files of its weights.
    begun
        What came of asking for the beginning.
    resumable
        Whether what was left of it may be gone on with: its version names the bytes.
    """

    def __init__(
        self,
        engine: RangeEngine,
        workers: WorkerThreads,
        download: CacheDownload,
        files: Sequence[CacheFile],
        begun: AdapterMetadata,
        *,
        resumable: bool,
    ) -> None:
        self._engine = engine
        self._workers = workers
        self._download = download
        self._files = files
        self._begun = begun
        self._resumable = resumable
        self._lock = Lock()
        self._hashing: dict[int, Future[int]] = {}

    def reader(self) -> Reader:
        """Of what is here of the weights."""
        readers = [file.reader() for file in self._files]
        plan = self._begun.plan
        return readers[0] if plan is None else SplitReader(SplitFiles(plan, tuple(readers)))

    def landed(self) -> tuple[int, int]:
        """Bytes of the weights' files that are here, and of all of them. Quick, from any thread."""
        wanted = sum(part.nbytes for part in self._begun.parts)
        missing = sum(size_of(file.missing()) for file in self._files)
        return wanted - missing, wanted

    async def bring(
        self, groups: Groups, arrived: Callable[[int], None], control: FetchControl
    ) -> CacheEntry:
        """All of the files, the groups' bytes first; then digests are checked, and it is published.

        `arrived` is called on the loop. Whatever happens, the download has ended after it.
        """
        try:
            if control.ended:
                raise nobody_waits()
            jobs = self._begin(groups, _on_loop(arrived), control)
            async with track(control, *jobs):
                for job in jobs:
                    await outcome(job.done)
            return await self._workers.run(self._download.publish, lambda entry: entry.close())
        except BaseException as error:
            await self._workers.finish(partial(self._leave, control.refused or error))
            raise

    def leave(self) -> None:
        """Nobody will bring it. What is here stays for the next one. Quick."""
        self._workers.submit(partial(self._leave, None))

    async def refuse(self, error: LoraxError) -> None:
        """End it, after a check of its content failed with `error`."""
        await self._workers.finish(partial(self._leave, error))

    def _begin(
        self, groups: Groups, arrived: Callable[[int], None], control: FetchControl
    ) -> list[Job[None]]:
        shares = self._shares(groups)
        arrivals = SplitGroupArrivals(len(groups), shares)
        for group in arrivals.take():
            arrived(group)

        def told(number: int, n: int) -> None:
            self._hash_on(number)
            if n < len(shares[number].groups):
                with self._lock:
                    for group in arrivals.landed(number + 1, n):
                        arrived(group)

        return [
            self._job(number, share, partial(told, number), control)
            for number, share in enumerate(shares)
        ]

    def _shares(self, groups: Groups) -> tuple[FileGroups, ...]:
        """What each file has of the groups."""
        if self._begun.plan is not None:
            return self._begun.plan.by_file(groups)
        numbers = tuple(n for n, group in enumerate(groups) if group)
        return (FileGroups(numbers, tuple(tuple(groups[n]) for n in numbers)),)

    def _job(
        self, number: int, share: FileGroups, told: Callable[[int], None], control: FetchControl
    ) -> Job[None]:
        file, part = self._files[number], self._begun.parts[number]
        wanted = in_turn(share.spans, part.nbytes)
        return self._engine.download(
            part.answer,
            wanted,
            CacheSink(file),
            told,
            first=1 + next((n for n, spans in enumerate(wanted) if spans), 0),
            have=_trusted(file, part.nbytes),
            urgency=FOREGROUND if control.urgent else PREFETCH,
            timeout=LONGEST,
        )

    def _hash_on(self, number: int) -> None:
        """Beside the download, in one thread at a time for each file. So is this called."""
        before = self._hashing.get(number)
        if before is None or before.done():
            self._hashing[number] = self._workers.submit(self._files[number].hash_along)

    def _leave(self, error: BaseException | None) -> None:
        """In a thread. Of what may be wrong nothing is kept."""
        for hashing in self._hashing.values():
            if not hashing.cancel():
                hashing.exception()
        if isinstance(error, IntegrityError | AdapterFormatError) or not self._resumable:
            self._download.discard()
        else:
            self._download.close()


def _trusted(file: CacheFile, nbytes: int) -> list[ByteRange]:
    """Which bytes need not come again.

    Where no digest judges what an interrupted download left, the end of each of its spans does come
    again: writing it compares it, so that a source is noticed that changed its file since.
    """
    here = SpanSet(file.missing()).missing(0, nbytes)
    if file.expected is not None or not file.resumed:
        return here
    return [(start, stop - COMPARED_BYTES) for start, stop in here if stop - start > COMPARED_BYTES]


def _on_loop(arrived: Callable[[int], None]) -> Callable[[int], None]:
    """From any thread."""
    loop = asyncio.get_running_loop()

    def tell(group: int) -> None:
        loop.call_soon_threadsafe(arrived, group)

    return tell


def in_turn(groups: Groups, nbytes: int) -> list[list[ByteRange]]:
    """What to fetch in which turn: the groups' bytes, none twice, and then the rest of the file.

    Of a strided span all between its rows comes with them: a request for each would cost more.
    """
    claimed = SpanSet()
    turns: list[list[ByteRange]] = []
    for group in [*groups, [runs.ByteSpan(0, nbytes)]]:
        new = SpanSet()
        for span in group:
            for start, stop in claimed.missing(span.start, span.end):
                new.add(start, stop)
        turns.append(list(new))
        for start, stop in new:
            claimed.add(start, stop)
    return turns
