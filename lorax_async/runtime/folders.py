"""Leases on folders of verified files, for callers that need files and not tensors.

Overlapping calls share one flight: one download, one check. Against other processes, and loads of
this loader, the cache ensures one download per key.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from lorax_async.cache.base import LeftoverError
from lorax_async.concurrency import FetchControl, result_of
from lorax_async.errors import (
    AdapterTimeoutError,
    InternalError,
    LoaderClosedError,
    LoraxError,
    UsageError,
)
from lorax_async.files import Reader
from lorax_async.remote.readers import FetchReader
from lorax_async.runtime.digest_checks import DigestChecks
from lorax_async.runtime.resolver import Resolver
from lorax_async.sources.base import FolderSource, Source, StoredFolder
from lorax_async.types import (
    AdapterKey,
    AdapterRef,
    Merge,
    MergedKey,
    Ref,
    RemoteKey,
    TensorsKey,
    Verification,
    is_stale,
    text_of,
)

MAX_ATTEMPTS = 3
"""Attempts of one call if partial downloads have other bytes than the source."""

Watch = Callable[[Reader], None]


def _ignore(_: object) -> None:
    """Do nothing."""


class _CheckedFolder(NamedTuple):
    """An adapter's folder; the open reader keeps it in the cache."""

    folder: StoredFolder
    verification: Verification
    reader: Reader


class _Flight:
    """One open, download and check for all `users`; the last one to `leave` closes the reader."""

    def __init__(self, source: FolderSource, key: AdapterKey) -> None:
        self.key = key
        self.users = 0
        self.reader: Reader | None = None
        self._source = source
        self._control = FetchControl()
        self._watches: list[Watch] = []
        self.task = asyncio.get_running_loop().create_task(self._run(), name=f"lorax fetch {key}")
        self.task.add_done_callback(self._ended)

    async def _run(self) -> _CheckedFolder:
        source, key = self._source, self.key
        file = await source.open(key, self._control)
        self.reader = file.reader
        try:
            for watch in self._watches:
                watch(file.reader)
            # No layer groups: fetch the whole file in the fastest order.
            verification = await source.bring(file, (), _ignore, self._control)
            return _CheckedFolder(source.folder(key, file.reader), verification, file.reader)
        except BaseException:
            file.reader.close()
            raise

    def watch(self, watch: Watch) -> None:
        """Call `watch` with the reader once the adapter is open."""
        if self.reader is None:
            self._watches.append(watch)
        else:
            watch(self.reader)

    def leave(self) -> None:
        self.users -= 1
        if self.users:
            return
        if self.task.done():
            self._ended(self.task)
        else:
            self._control.cancel()

    def _ended(self, task: asyncio.Task[_CheckedFolder]) -> None:
        """Close the reader if no user is left."""
        if not task.cancelled() and task.exception() is None and not self.users:
            task.result().reader.close()


class AdapterFolder:
    """A lease on the folder with one adapter's files, as PEFT writes them.

    Use it as a context manager, or call `release`: the cache keeps the files until then. Local
    folders and those of the standard hub cache are not protected from removal by their owner.

    Attributes
    ----------
    id, key
        The caller's id, and the exact version of the adapter.
    path
        The folder.
    nbytes
        The size of all its files.
    verification
        How the weights were checked, and their digest.
    downloaded
        Whether this fetch downloaded them; False if they were on disk already.
    """

    def __init__(self, ref: Ref, flight: _Flight, release: Callable[[], None]) -> None:
        checked = flight.task.result()
        self.id = text_of(ref)
        self.key = flight.key
        self.path = Path(checked.folder.path)
        self.nbytes = checked.folder.nbytes
        self.verification = checked.verification
        self.downloaded = isinstance(checked.reader, FetchReader)
        self._loop = asyncio.get_running_loop()
        self._release: Callable[[], None] | None = release

    @property
    def version(self) -> str | None:
        """The commit, versionId or ETags of the files; None for a local folder."""
        return self.key.version if isinstance(self.key, RemoteKey) else None

    @property
    def stale(self) -> bool:
        """Whether the source was unreachable, and this is the version that it named last."""
        return is_stale(self.key)

    @property
    def released(self) -> bool:
        return self._release is None

    def release(self) -> None:
        """End the lease, so that the cache may remove the files. Idempotent, quick."""
        release, self._release = self._release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        release = getattr(self, "_release", None)
        if release is not None:
            with suppress(RuntimeError):  # the loop is closed, and the lease with the loader
                self._loop.call_soon_threadsafe(release)
            warnings.warn(f"the folder of {self.id!r} was not released", ResourceWarning, 2)


class Fetches:
    """All flights and folder leases of one loader or command. On one event loop."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._flights: dict[AdapterKey, _Flight] = {}
        self._tasks: set[asyncio.Task[_CheckedFolder]] = set()
        self._leases: set[_Flight] = set()
        self._released = asyncio.Event()
        self._closing = False

    async def fetch(self, ref: Ref, key: AdapterKey, watch: Watch = _ignore) -> AdapterFolder:
        """Return the checked folder of `key`, downloaded if necessary.

        `watch` is called with the adapter's reader once it is open. Raise what loads raise, without
        an id. No lease stays after an error or a cancellation.
        """
        if isinstance(key, TensorsKey | MergedKey) or not isinstance(self._source, FolderSource):
            raise UsageError("it has no folder: it is a merge, or was loaded from tensors")
        flight = self._flights.get(key) or self._begin(self._source, key)
        flight.users += 1
        try:
            flight.watch(watch)
            await self._wait_for(flight)
            folder = AdapterFolder(ref, flight, lambda: self._leave(flight))
            self._leases.add(flight)
        except BaseException:
            self._leave(flight)
            raise
        return folder

    def _begin(self, source: FolderSource, key: AdapterKey) -> _Flight:
        if self._closing:
            raise LoaderClosedError("the loader is closed")
        flight = self._flights[key] = _Flight(source, key)
        self._tasks.add(flight.task)
        flight.task.add_done_callback(lambda _: self._forget(flight))
        return flight

    def _forget(self, flight: _Flight) -> None:
        """Let later calls start another flight, which checks again."""
        self._tasks.discard(flight.task)
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    async def _wait_for(self, flight: _Flight) -> None:
        try:
            await result_of(flight.task, "fetch")
        except LoraxError as error:
            raise error.located() from error.__cause__

    def _leave(self, flight: _Flight) -> None:
        flight.leave()
        if flight.users:
            return
        self._leases.discard(flight)
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]  # the next call begins another one
        self._released.set()

    async def close(self, timeout: float) -> None:
        """Cancel flights, wait `timeout` seconds for leases, then end the others."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(timeout):
                while self._leases:
                    self._released.clear()
                    await self._released.wait()
        except TimeoutError:
            pass
        finally:
            for flight in tuple(self._leases):
                flight.task.result().reader.close()
            self._leases.clear()


class Fetching:
    """Fetches folders for refs within deadlines."""

    def __init__(self, resolver: Resolver, fetches: Fetches, digests: DigestChecks) -> None:
        self._resolver = resolver
        self._fetches = fetches
        self._digests = digests

    async def fetch(self, ref: Ref, seconds: float) -> AdapterFolder:
        """Return a lease on the folder of `ref`; see `AdapterLoader.fetch`."""
        deadline = asyncio.timeout(seconds)
        key = ref if isinstance(ref, AdapterKey) else None
        try:
            if isinstance(ref, Merge):
                raise UsageError("a merge has no folder; fetch its parts")
            async with deadline:
                key = await self._resolve(ref)
                return await self._fetch(ref, key)
        except BaseException as error:
            late = deadline.expired() and type(error) is TimeoutError
            problem = _timeout_error(seconds, key) if late else error
            if isinstance(problem, LoraxError):
                raise problem.located(id=text_of(ref), key=key) from problem.__cause__
            if isinstance(problem, Exception):
                raise InternalError(f"a fetch failed: {problem!r}", id=text_of(ref)) from problem
            raise

    async def _resolve(self, ref: AdapterRef | AdapterKey) -> AdapterKey:
        return ref if isinstance(ref, AdapterKey) else await self._resolver.resolve(ref)

    async def _fetch(self, ref: AdapterRef | AdapterKey, key: AdapterKey) -> AdapterFolder:
        """Fetch `key`, and compare it with the digest in `ref`."""
        for _ in range(MAX_ATTEMPTS - 1):
            try:
                folder = await self._fetches.fetch(ref, key)
                break
            except LeftoverError:
                key = await self._resolve(ref)
        else:
            folder = await self._fetches.fetch(ref, key)
        try:
            await self._digests.compare(ref, key, folder.verification)
        except BaseException:
            folder.release()
            raise
        return folder


def _timeout_error(seconds: float, key: AdapterKey | None) -> AdapterTimeoutError:
    return AdapterTimeoutError(
        f"its files were not fetched within {seconds:g} s",
        stage="resolve" if key is None else "fetch",
    )
