"""One adapter on its way: from its source, by ranges, into the cache, and read meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Lock

from lorax_async.core import runs
from lorax_async.core.cache_names import CONFIG_FILE, FileRole
from lorax_async.core.file_digest import Digest, FileHash
from lorax_async.core.spans import Span, SpanSet
from lorax_async.errors import IntegrityError
from lorax_async.io.cache.ports import CacheDownload, CacheEntry, CacheFile
from lorax_async.io.http.engine import FOREGROUND, PREFETCH, RangeEngine
from lorax_async.io.http.target import Answer
from lorax_async.io.ports import Demand
from lorax_async.io.remote.jobs import LONGEST, followed, nobody_waits
from lorax_async.io.remote.workers import Workers, outcome


class CacheSink:
    """Where the engine's threads write a file of a download."""

    def __init__(self, file: CacheFile) -> None:
        self._file = file

    def write(self, offset: int, data: memoryview) -> None:
        self._file.write([data], offset)


class Fetch:
    """A download whose config and header are here. Its owner ends it: by `bring`, or `leave`.

    Parameters
    ----------
    download, weights
        Where it goes.
    answer
        What came of asking for the beginning of the weights.
    resumable
        Whether what was left of it may be gone on with: its version names the bytes.
    """

    def __init__(
        self,
        engine: RangeEngine,
        workers: Workers,
        download: CacheDownload,
        weights: CacheFile,
        answer: Answer,
        *,
        resumable: bool,
    ) -> None:
        self.weights = weights
        self._engine = engine
        self._workers = workers
        self._download = download
        self._answer = answer
        self._resumable = resumable
        self._lock = Lock()
        self._hashing: Future[int] | None = None

    async def bring(
        self, groups: Sequence[Sequence[runs.Span]], arrived: Callable[[int], None], demand: Demand
    ) -> CacheEntry:
        """All of the file, the groups' bytes first; then its digest is checked, and it published.

        `arrived` is called on the loop. Whatever happens, the download has ended after it.
        """
        try:
            if demand.ended:
                raise nobody_waits()
            await self._bring(groups, arrived, demand)
            return await self._workers.run(self._download.publish, lambda entry: entry.close())
        except BaseException as error:
            await self._workers.run(partial(self._leave, error))
            raise

    def leave(self) -> None:
        """Nobody will bring it. What is here stays for the next one. Quick."""
        self._workers.submit(partial(self._leave, None))

    async def _bring(
        self, groups: Sequence[Sequence[runs.Span]], arrived: Callable[[int], None], demand: Demand
    ) -> None:
        loop = asyncio.get_running_loop()
        nbytes = self.weights.nbytes
        assert nbytes is not None
        wanted = in_turn(groups, nbytes)

        def told(group: int) -> None:
            self._hash_on()
            if group < len(groups):
                loop.call_soon_threadsafe(arrived, group)

        job = self._engine.download(
            self._answer,
            wanted,
            CacheSink(self.weights),
            told,
            first=1 + next((n for n, spans in enumerate(wanted) if spans), 0),
            have=SpanSet(self.weights.missing()).missing(0, nbytes),
            urgency=FOREGROUND if demand.urgent else PREFETCH,
            timeout=LONGEST,
        )
        async with followed(demand, job):
            await outcome(job.done)

    def _hash_on(self) -> None:
        """Beside the download, in one thread at a time."""
        with self._lock:
            if self._hashing is None or self._hashing.done():
                self._hashing = self._workers.submit(self.weights.hash_along)

    def _leave(self, error: BaseException | None) -> None:
        """In a thread. Of what may be wrong nothing is kept."""
        if self._hashing is not None and not self._hashing.cancel():
            self._hashing.exception()
        if isinstance(error, IntegrityError) or not self._resumable:
            self._download.discard()
        else:
            self._download.close()


def put(
    download: CacheDownload, role: FileRole, start: bytes, nbytes: int, expected: Digest | None
) -> CacheFile:
    """Begin a file of a download, whose first bytes are here. Blocks.

    On an error the download is the caller's; `CapacityError` leaves it as it was.
    """
    file = download.file(role, nbytes, expected)
    content = memoryview(start)[:nbytes]
    for first, last in file.missing(0, len(content)):
        file.write([content[first:last]], first)
    return file


def check_config(config: bytes, expected: Digest | None) -> None:
    if expected is None:
        return
    found = FileHash(expected.kind, len(config))
    found.feed(memoryview(config))
    if found.digest() != expected:
        raise IntegrityError(
            f"{CONFIG_FILE.file_name} has not the {expected.kind} digest that was promised; load it"
            " again"
        )


def in_turn(groups: Sequence[Sequence[runs.Span]], nbytes: int) -> list[list[Span]]:
    """What to fetch in which turn: the groups' bytes, none twice, and then the rest of the file.

    Of a strided span all between its rows comes with them: a request for each would cost more.
    """
    claimed = SpanSet()
    turns: list[list[Span]] = []
    for group in [*groups, [runs.Span(0, nbytes)]]:
        new = SpanSet()
        for span in group:
            for start, stop in claimed.missing(span.start, span.end):
                new.add(start, stop)
        turns.append(list(new))
        for start, stop in new:
            claimed.add(start, stop)
    return turns
