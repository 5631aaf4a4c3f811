"""Leases on folders of verified files, for callers that need files and not tensors.

Overlapping calls share one download and one check. Against other processes, and loads of this
loader, the cache ensures one download per key.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, Self

from lorax_async.cache.base import LeftoverError
from lorax_async.concurrency import FetchControl, SharedTasks, result_of
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


class _CheckedFolder(NamedTuple):
    """An adapter's folder; the open reader keeps it in the cache."""

    folder: StoredFolder
    verification: Verification
    reader: Reader


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

    def __init__(
        self, ref: Ref, key: AdapterKey, checked: _CheckedFolder, release: Callable[[], None]
    ) -> None:
        self.id = text_of(ref)
        self.key = key
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

    def __exit__(self, *_: object) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        release = getattr(self, "_release", None)
        if release is not None:
            with suppress(RuntimeError):  # the loop is closed, and the lease with the loader
                self._loop.call_soon_threadsafe(release)
            warnings.warn(f"the folder of {self.id!r} was not released", ResourceWarning, 2)


class FolderLeases:
    """All folder leases of one loader or command, and the tasks behind them. On one event loop."""

    def __init__(self, source: Source) -> None:
        self._source = source
        # A lease stays joined to its task, so that the last one closes the task's reader.
        self._tasks = SharedTasks(self._run, lambda key: f"lorax fetch {key}", unused=_close_folder)
        self._readers: dict[AdapterKey, Reader] = {}
        self._watches: dict[AdapterKey, list[Watch]] = {}
        self._leases: set[ExitStack] = set()
        self._released = asyncio.Event()
        self._closing = False

    async def fetch(self, ref: Ref, key: AdapterKey, watch: Watch | None = None) -> AdapterFolder:
        """Return the checked folder of `key`, downloaded if necessary.

        `watch` is called with the adapter's reader once it is open. Raise what loads raise, without
        an id. No lease stays after an error or a cancellation.
        """
        if isinstance(key, TensorsKey | MergedKey) or not isinstance(self._source, FolderSource):
            raise UsageError("it has no folder: it is a merge, or was loaded from tensors")
        if self._closing:
            raise LoaderClosedError("the loader is closed")
        with ExitStack() as joined:
            task = joined.enter_context(self._tasks.join(key))
            if watch is not None and key in self._readers:
                watch(self._readers[key])
            elif watch is not None:
                watches = self._watches.setdefault(key, [])
                watches.append(watch)
                joined.callback(watches.remove, watch)
            checked = await result_of(task, "fetch")
            lease = joined.pop_all()
        self._leases.add(lease)
        lease.callback(self._end, lease)
        return AdapterFolder(ref, key, checked, lease.close)

    async def _run(self, key: AdapterKey) -> _CheckedFolder:
        source, control = self._source, FetchControl()
        assert isinstance(source, FolderSource)
        file = await source.open(key, control)
        self._readers[key] = file.reader
        try:
            for watch in self._watches.pop(key, ()):
                watch(file.reader)
            # No layer groups: fetch the whole file in the fastest order.
            verification = await source.bring(file, (), lambda _: None, control)
            return _CheckedFolder(source.folder(key, file.reader), verification, file.reader)
        except BaseException:
            file.reader.close()
            raise
        finally:
            if self._readers.get(key) is file.reader:  # not that of a task which came after this
                del self._readers[key]

    def _end(self, lease: ExitStack) -> None:
        self._leases.discard(lease)
        self._released.set()

    async def close(self, timeout: float) -> None:
        """Cancel tasks, wait `timeout` seconds for leases, then end the others."""
        self._closing = True
        await self._tasks.stop()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    while self._leases:
                        self._released.clear()
                        await self._released.wait()
        finally:
            for lease in tuple(self._leases):
                lease.close()


def _close_folder(task: asyncio.Task[_CheckedFolder]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().reader.close()


class FolderFetcher:
    """Fetches folders for refs within deadlines."""

    def __init__(self, resolver: Resolver, leases: FolderLeases, digests: DigestChecks) -> None:
        self._resolver = resolver
        self._leases = leases
        self._digests = digests

    async def fetch(self, ref: Ref, seconds: float) -> AdapterFolder:
        """Return a lease on the folder of `ref`; see `AdapterLoader.fetch`."""
        deadline = asyncio.timeout(seconds)
        key = ref if isinstance(ref, AdapterKey) else None
        try:
            if isinstance(ref, Merge):
                raise UsageError("a merge has no folder; fetch its parts")
            async with deadline:
                key = await self._resolver.resolve(ref)
                for _ in range(MAX_ATTEMPTS - 1):
                    with suppress(LeftoverError):
                        return await self._fetch_checked(ref, key)
                    key = await self._resolver.resolve(ref)
                return await self._fetch_checked(ref, key)
        except BaseException as error:
            problem = error
            if deadline.expired() and type(error) is TimeoutError:
                late = f"its files were not fetched within {seconds:g} s"
                problem = AdapterTimeoutError(late, stage="resolve" if key is None else "fetch")
            if isinstance(problem, LoraxError):
                raise problem.located(id=text_of(ref), key=key) from problem.__cause__
            if isinstance(problem, Exception):
                raise InternalError(f"a fetch failed: {problem!r}", id=text_of(ref)) from problem
            raise

    async def _fetch_checked(self, ref: Ref, key: AdapterKey) -> AdapterFolder:
        """Fetch `key`, and compare it with the digest in `ref`."""
        folder = await self._leases.fetch(ref, key)
        try:
            await self._digests.compare(ref, key, folder.verification)
        except BaseException:
            folder.release()
            raise
        return folder
