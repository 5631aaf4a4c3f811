"""Leases on folders of verified files, for callers that need files and not tensors.

Overlapping calls share one download and one check. With other processes, and with loads of the same
loader, they share a download by the disk cache, which has one per key.
"""

from __future__ import annotations

import asyncio
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, Self

from lorax_async.cache.base import LeftoverError
from lorax_async.concurrency import FetchControl, SharedTasks, result_of
from lorax_async.errors import AdapterTimeoutError, LoraxError, Stage, UsageError, as_lorax_error
from lorax_async.files import Reader
from lorax_async.lru import remember
from lorax_async.remote.readers import ConvertedReader, FetchReader
from lorax_async.runtime.leases import DigestChecks
from lorax_async.runtime.resolver import Resolver
from lorax_async.sources.base import FolderSource, Source, StoredFolder
from lorax_async.types import (
    AdapterKey,
    Ref,
    RemoteKey,
    TensorsKey,
    Verification,
    is_stale,
    text_of,
)

MAX_ATTEMPTS = 3
"""Attempts of one call if partial downloads have other bytes than the source."""

MAX_IDS = 16_384
"""Ids whose last calls are remembered; the oldest is dropped first."""


class _CheckedFolder(NamedTuple):
    """An adapter's folder; the open reader keeps it in the cache."""

    folder: StoredFolder
    verification: Verification
    reader: Reader


class AdapterFolder:
    """A lease on the folder with one adapter's files, as PEFT writes them.

    Use it as a context manager, or call `release`: the disk cache keeps the files until then. Local
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
        Whether this fetch downloaded them from their source; False if they were on disk already.
    """

    def __init__(
        self,
        ref: Ref,
        key: AdapterKey,
        checked: _CheckedFolder,
        lease: ExitStack,
        leases: Collection[ExitStack],
    ) -> None:
        self._lease = lease
        self._leases = leases
        self.id = text_of(ref)
        self.key = key
        self.path = Path(checked.folder.path)
        self.nbytes = checked.folder.nbytes
        self.verification = checked.verification
        self.downloaded = isinstance(checked.reader, FetchReader | ConvertedReader)
        self._loop = asyncio.get_running_loop()

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
        return self._lease not in self._leases

    def release(self) -> None:
        """End the lease, so that the cache may remove the files. Idempotent, quick."""
        self._lease.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        if not self.released:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._lease.close)
            warnings.warn(f"the folder of {self.id!r} was not released", ResourceWarning, 2)


StoreState = Literal["resolving", "fetching", "checking", "present", "failed"]


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """What became of the last call for one id that was not cancelled."""

    state: StoreState
    """"present": the files are on disk and were checked; without `leases`, the cache may have
    removed them since. It stays until another call ends, or finds another version."""
    key: AdapterKey | None
    """The exact version; None before it is resolved."""
    nbytes: int
    """Bytes of weights on disk so far; once present, of all files."""
    total: int | None
    """Bytes when it is complete; None if that is unknown."""
    leases: int
    """Folders that are not released."""
    error: LoraxError | None

    @property
    def version(self) -> str | None:
        """As `AdapterFolder.version`; None before it is resolved."""
        return self.key.version if isinstance(self.key, RemoteKey) else None


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """Totals since a store was opened."""

    downloads: int = 0
    """Adapters that came from their source, each once, however many calls waited."""
    downloaded_bytes: int = 0
    """The bytes of their files."""


@dataclass(slots=True, eq=False)
class _FolderRequest:
    """One call: the version that its id was resolved to, and its end; None if cancelled."""

    key: AdapterKey | None
    end: StoredAdapter | None = None


@dataclass(slots=True, eq=False)
class _RequestsOfId:
    """The calls for one id: those that run, and how the last one ended."""

    running: list[_FolderRequest] = field(default_factory=list)
    end: StoredAdapter | None = None


@dataclass(slots=True, eq=False)
class _Fetch:
    """A task that fetches and checks an adapter; its reader closes with the last lease.

    It is a prefetch until an urgent call joins it.
    """

    control: FetchControl = field(default_factory=lambda: FetchControl(urgent=False))
    reader: Reader | None = None


@dataclass(eq=False)
class FolderLeases:
    """Fetches folders within deadlines, and has all leases on them. On one event loop."""

    source: Source
    resolver: Resolver
    digests: DigestChecks
    check_open: Callable[[], None]

    def __post_init__(self) -> None:
        # A lease stays joined to its task, so that the last one closes the task's reader.
        self._tasks = SharedTasks(self._run, lambda key: f"lorax fetch {key}", unused=self._close)
        self._fetches: dict[asyncio.Task[_CheckedFolder], _Fetch] = {}
        self._running: dict[AdapterKey, _Fetch] = {}
        self._calls: OrderedDict[str, _RequestsOfId] = OrderedDict()
        self._leased: Counter[AdapterKey | None] = Counter()
        self._leases: set[ExitStack] = set()
        self._released = asyncio.Event()
        self.statistics = StoreStatistics()

    async def fetch(self, ref: Ref, seconds: float, *, urgent: bool = True) -> AdapterFolder:
        """Return a lease on the folder of `ref`, downloaded if necessary, and checked.

        See `AdapterStore.checkout`. No lease stays after an error or a cancellation. Calls that are
        not `urgent` leave the connections to others.
        """
        deadline = asyncio.timeout(seconds)
        with self._call(ref) as call:
            try:
                async with deadline:
                    folder = await self._attempt(ref, call, urgent)
            except BaseException as error:
                problem = error
                if deadline.expired() and type(error) is TimeoutError:
                    late = f"its files were not fetched within {seconds:g} s"
                    stage: Stage = "resolve" if call.key is None else "fetch"
                    problem = AdapterTimeoutError(late, stage=stage)
                elif isinstance(error, Exception) and not isinstance(error, LoraxError):
                    problem = as_lorax_error(error, "a fetch failed")
                if not isinstance(problem, LoraxError):
                    raise
                noted = problem.located(id=text_of(ref), key=call.key)
                noted.__cause__ = None  # its frames would stay in memory
                call.end = StoredAdapter("failed", call.key, 0, None, 0, noted)
                raise problem.located(id=text_of(ref), key=call.key) from problem.__cause__
            nbytes = folder.nbytes
            call.end = StoredAdapter("present", folder.key, nbytes, nbytes, 0, None)
            return folder

    async def _attempt(self, ref: Ref, call: _FolderRequest, urgent: bool) -> AdapterFolder:
        attempt = 0
        while True:
            attempt += 1
            call.key = await self.resolver.resolve(ref)
            try:
                return await self._fetch_checked(ref, call.key, urgent)
            except LeftoverError:
                if attempt == MAX_ATTEMPTS:
                    raise

    def placement(self) -> dict[str, StoredAdapter]:
        """Return what became of the last call for each id."""
        # Of thousands of ids, few are in use: the others cost a look, and no object.
        return {
            text: calls.end
            if calls.end is not None and not calls.running and calls.end.key not in self._leased
            else self._state(calls)
            for text, calls in self._calls.items()
        }

    def _state(self, calls: _RequestsOfId) -> StoredAdapter:
        """Return how far the newest call is, or how the last one ended if none runs."""
        end = calls.end
        if not calls.running and end is not None:
            return replace(end, leases=self._leased[end.key])
        key = calls.running[-1].key
        fetch = None if key is None else self._running.get(key)
        if fetch is not None and isinstance(fetch.reader, FetchReader):
            return StoredAdapter("fetching", key, *fetch.reader.landed(), self._leased[key], None)
        if end is not None and end.state == "present" and key in {None, end.key}:
            return replace(end, leases=self._leased[end.key])  # until this finds another version
        if key is None:
            return StoredAdapter("resolving", None, 0, None, 0, None)
        state: StoreState = "fetching" if fetch is None or fetch.reader is None else "checking"
        return StoredAdapter(state, key, 0, None, self._leased[key], None)

    @contextmanager
    def _call(self, ref: Ref) -> Iterator[_FolderRequest]:
        """Record a call for an id, unless it is cancelled."""
        text, call = text_of(ref), _FolderRequest(ref if isinstance(ref, AdapterKey) else None)
        calls = self._calls.get(text) or _RequestsOfId()
        remember(self._calls, text, calls, MAX_IDS)
        calls.running.append(call)
        try:
            yield call
        finally:
            calls.running.remove(call)
            calls.end = call.end or calls.end
            if not calls.running and calls.end is None and self._calls.get(text) is calls:
                del self._calls[text]

    async def _fetch_checked(self, ref: Ref, key: AdapterKey, urgent: bool) -> AdapterFolder:
        """Fetch `key`, and compare it with the digest in `ref`."""
        if isinstance(key, TensorsKey):
            raise UsageError("it has no folder: it was loaded from tensors")
        if not isinstance(self.source, FolderSource):
            raise UsageError("its source has no folders; give one that is a FolderSource")
        self.check_open()
        with ExitStack() as joined:
            task = joined.enter_context(self._tasks.join(key))
            fetch = self._fetches.setdefault(task, _Fetch())
            if urgent:
                fetch.control.raise_priority()
            checked = await result_of(task, "fetch", self.check_open)
            self.check_open()
            lease = joined.pop_all()
        self._leases.add(lease)
        self._leased[key] += 1
        lease.callback(self._end, lease, key)
        folder = AdapterFolder(ref, key, checked, lease, self._leases)
        try:
            by_caller = await self.digests.compare(ref, key, folder.verification)
            folder.verification = by_caller or folder.verification
        except BaseException:
            folder.release()
            raise
        return folder

    async def _run(self, key: AdapterKey) -> _CheckedFolder:
        source, task = self.source, asyncio.current_task()
        assert isinstance(source, FolderSource)
        assert task is not None
        fetch = self._running[key] = self._fetches.setdefault(task, _Fetch())
        try:
            file = await source.open(key, fetch.control)
            fetch.reader = file.reader
            # No layer groups: fetch the whole file in the fastest order.
            verification = await source.fetch_groups(file, (), lambda _: None, fetch.control)
            folder = await source.folder(key, file, fetch.control)
            if isinstance(file.reader, FetchReader | ConvertedReader):
                before = self.statistics
                self.statistics = StoreStatistics(
                    before.downloads + 1, before.downloaded_bytes + folder.nbytes
                )
            return _CheckedFolder(folder, verification, file.reader)
        except BaseException:
            if fetch.reader is not None:
                fetch.reader.close()
            raise
        finally:
            if self._running.get(key) is fetch:  # not that of a task which came after this
                del self._running[key]

    def _close(self, task: asyncio.Task[_CheckedFolder]) -> None:
        """Close the reader of a task that no lease is joined to any more. It may be closed."""
        fetch = self._fetches.pop(task, None)
        if fetch is not None and fetch.reader is not None:
            fetch.reader.close()

    def _end(self, lease: ExitStack, key: AdapterKey) -> None:
        self._leases.discard(lease)
        self._leased[key] -= 1
        if not self._leased[key]:
            del self._leased[key]
        self._released.set()

    async def close(self, timeout: float) -> None:
        """Cancel tasks, wait `timeout` seconds for leases, then end the others.

        Call it once `check_open` raises.
        """
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
