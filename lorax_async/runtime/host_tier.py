"""The host tier: files that stay in memory, because they are mapped.

A map keeps the pages of an adapter's file in memory, so that the next copy reads no disk. It is
never read: of a file that is truncated meanwhile, reading a map kills the process (SIGBUS). Copies
go through the file's checked descriptor, and find its pages in memory.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import mmap
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextlib import closing
from functools import partial

from lorax_async.concurrency import SharedResource, call_in
from lorax_async.errors import CapacityError, FetchError, IntegrityError, LoraxError, as_lorax_error
from lorax_async.files import POPULATE_READ, FileBacked, Reader, madvise, to_adapter_error
from lorax_async.lifecycle.adapter_state import AdapterState, HostState, Urgency, WantedTier
from lorax_async.lifecycle.commands import Command
from lorax_async.lifecycle.lifecycle import Lifecycle
from lorax_async.lifecycle.residency import reload_cost
from lorax_async.sources.base import Source
from lorax_async.types import AdapterKey

_logger = logging.getLogger("lorax_async")

PIECE_BYTES = 8 << 20
"""Bytes populated in one call: milliseconds from a good disk. Other work of the threads waits."""


DEMOTED: Urgency = (True, float("inf"))
"""Adapters that have left the device come after every waiter."""

Decide = Callable[[AdapterKey, Callable[[], list[Command]]], None]
"""Called on the loop with an adapter and an outcome."""


class HostTier:
    """Rule 7: keeps files in memory within `nbytes`; drops the first of the ranking to make room.

    It has the files that the lifecycle has given it, and returns one outcome for each. Only the
    first of those that wait is served, one at a time: populating competes with loads for the disk.
    `tasks` populates and unmaps. One level of priority counts as `level` seconds of waiting.
    """

    def __init__(
        self, nbytes: int, lifecycle: Lifecycle, tasks: MapTasks, decide: Decide, *, level: float
    ) -> None:
        self.nbytes = nbytes
        self.evictions = 0
        self.waiting: dict[AdapterKey, bool] = {}
        """Whether each adapter that waits for its turn was demoted."""
        self.populating: AdapterKey | None = None
        self.sizes: dict[AdapterKey, int] = {}
        """Bytes of the files that are populated, held or unmapped; 0 if only read ahead."""
        self.leaving: set[AdapterKey] = set()
        """Those that are to be unmapped, or are being."""
        self._lifecycle = lifecycle
        self._tasks = tasks
        self._decide = decide
        self._level = level

    @property
    def used(self) -> int:
        return sum(self.sizes.values())

    def populate(self, key: AdapterKey, *, demoted: bool) -> None:
        self.waiting[key] = demoted
        self._advance()

    def release(self, key: AdapterKey) -> None:
        """Release a file's pages now, or once they are populated."""
        if key in self.waiting:
            self._give_up(key)
        elif key == self.populating:
            self.leaving.add(key)
        elif key not in self.leaving:
            self._unmap(key, evicted=False)
            self._tasks.unmap(key)
        else:  # it was picked for eviction
            self._tasks.unmap(key)

    def populated(self, key: AdapterKey, error: LoraxError | None) -> None:
        """End populating: the file is mapped, or read ahead, or else failed with `error`."""
        self.populating = None
        attempt = self._lifecycle.states[key].attempt
        if key in self.leaving and error is None:
            self._tasks.unmap(key)
        elif key in self.leaving:
            self.unmapped(key)
        elif error is not None:
            del self.sizes[key]
            self._decide(key, partial(self._lifecycle.lost, key, attempt, error))
        else:
            nbytes, needs = self.sizes[key], self._lifecycle.states[key].needs
            assert needs is not None
            if nbytes:
                self._lifecycle.budgets.host.admit(key, nbytes, reload_cost(needs))
            else:
                del self.sizes[key]
            self._decide(key, partial(self._lifecycle.populated, key, attempt))
        self._advance()

    def unmapped(self, key: AdapterKey) -> None:
        """End a release."""
        self.leaving.discard(key)
        self.sizes.pop(key, None)
        self._released(key)
        self._advance()

    def _released(self, key: AdapterKey, error: LoraxError | None = None) -> None:
        attempt = self._lifecycle.states[key].attempt
        self._decide(key, partial(self._lifecycle.released, key, attempt, error))

    def _give_up(self, key: AdapterKey, error: LoraxError | None = None) -> None:
        del self.waiting[key]
        self._released(key, error)

    def _unmap(self, key: AdapterKey, *, evicted: bool) -> None:
        self.leaving.add(key)
        self._lifecycle.budgets.host.remove(key, evicted=evicted)
        self.evictions += evicted

    def _advance(self) -> None:
        """Serve those that wait, the most urgent first, until one has to."""
        while self.populating is None and self.waiting:
            states = (self._lifecycle.states[key] for key in self.waiting)
            if not self._serve(min(states, key=self._urgency)):
                return

    def _urgency(self, state: AdapterState) -> Urgency:
        named = state.waiters.has_tier(WantedTier.HOST)
        return state.waiters.urgency(self._level) if named else DEMOTED

    def _serve(self, head: AdapterState) -> bool:
        """Populate, refuse or give up the head, or make room. Return whether another may be."""
        assert head.needs is not None
        demoted = self.waiting[head.key] and head.grant is None
        if not (demoted or head.waiters.has_tier(WantedTier.HOST)):
            self._give_up(head.key)  # it is on the device again, or its waiters have gone
            return True
        nbytes = head.needs.file_nbytes if head.needs.holdable else 0
        kept = sum(self.sizes.get(key, 0) for key in head.waiters.spared)
        if nbytes > self.nbytes - kept:
            beside = f" beside {kept:,} of its prefetch" if kept else ""
            problem = f"it needs {nbytes:,} bytes of a host tier of {self.nbytes:,}{beside}"
            error = CapacityError(f"{problem}; raise host_bytes", retryable=kept > 0)
            self._give_up(head.key, error)
            return True
        if nbytes > self.nbytes - self.used:
            return self._make_room(head, nbytes)
        del self.waiting[head.key]
        self.sizes[head.key] = nbytes
        self.populating = head.key
        self._tasks.populate(head.key, holdable=head.needs.holdable)
        return True

    def _make_room(self, head: AdapterState, nbytes: int) -> bool:
        """Wait for pages in release if they suffice, else release the first of the ranking."""
        leaving = sum(self.sizes[key] for key in self.leaving)
        if self.nbytes - self.used + leaving >= nbytes:
            return False
        for key in self._lifecycle.budgets.host.ranked():
            held = self._lifecycle.states[key].host is HostState.HELD
            if held and key not in head.waiters.spared:
                self._unmap(key, evicted=True)
                self._decide(key, partial(self._lifecycle.release_pages, key))
                return True
        return False


class MapTasks:
    """One task for each file that is populated or unmapped. `threads` do the work."""

    def __init__(self, source: Source, threads: Executor) -> None:
        self.host_tier: HostTier
        self.maps: dict[AdapterKey, MappedFile] = {}
        self._source = source
        self._threads = threads
        self._tasks: set[asyncio.Task[None]] = set()
        self._populating: asyncio.Task[None] | None = None
        self._is_closing = False

    def populate(self, key: AdapterKey, *, holdable: bool) -> None:
        self._spawn("populate", key, self._populate(key, holdable=holdable))

    def unmap(self, key: AdapterKey) -> None:
        self._spawn("release", key, self._release(key))

    def begin_close(self) -> None:
        """Cancel the running populate, which may take long for whole files; begin no other."""
        self._is_closing = True
        if self._populating is not None:
            self._populating.cancel()

    async def stop(self) -> None:
        """Cancel the tasks that are left, and unmap all files."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for key in tuple(self.maps):
            await self._unmap(key)

    def _spawn(self, verb: str, key: AdapterKey, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"lorax {verb} {key}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _populate(self, key: AdapterKey, *, holdable: bool) -> None:
        error: LoraxError | None = None
        # Set here: a task that is cancelled before it has begun would have no outcome.
        self._populating = asyncio.current_task()
        try:
            if self._is_closing:
                raise FetchError("the loader was closed")
            pages = await populate(self._source.reopen(key), self._threads, holdable=holdable)
            if pages is not None:
                self.maps[key] = pages
        except asyncio.CancelledError:
            error = FetchError("the loader was closed")
        except Exception as problem:  # noqa: BLE001 - becomes the task's outcome
            error = as_lorax_error(problem, "bringing the adapter into host memory failed")
        finally:
            self._populating = None
        self.host_tier.populated(key, error)

    async def _release(self, key: AdapterKey) -> None:
        try:
            await self._unmap(key)
        finally:  # the map is released even if closing it fails
            self.host_tier.unmapped(key)

    async def _unmap(self, key: AdapterKey) -> None:
        """Unmap a file in a thread: unmapping many pages takes milliseconds."""
        pages = self.maps.pop(key, None)
        if pages is not None:
            try:
                closing = asyncio.get_running_loop().run_in_executor(self._threads, _close, pages)
            except Exception:  # the process has reached its limit of threads
                _logger.exception("no thread to unmap a file in; unmapping it on the loop")
                _close(pages)
            else:
                await closing


def _close(pages: MappedFile) -> None:
    """Unmap a file; only log an error, so that the release has its outcome."""
    try:
        pages.close()
    except Exception:
        _logger.exception("unmapping an adapter's file failed")


async def populate(reader: Reader, threads: Executor, *, holdable: bool) -> MappedFile | None:
    """Bring the bytes of a reader, which this closes, into memory; return the map that keeps them.

    Of a file that is not `holdable`, the kernel is only asked to read ahead. Return None for it,
    and for bytes that are not in a file. Raise `IntegrityError` if the file has changed.
    """
    with closing(reader):
        pages = await call_in(threads, partial(_open_pages, reader, holdable), _discard)
        try:
            if pages is not None:
                for start in range(0, pages.nbytes, PIECE_BYTES):
                    await call_in(threads, partial(pages.populate, start, start + PIECE_BYTES))
            await call_in(threads, partial(_require_unchanged, reader))
        except BaseException as error:
            if pages is not None:
                # A thread that still populates keeps the map until it has finished.
                unmapping = threads.submit(pages.close)
                if isinstance(error, Exception):
                    await asyncio.wrap_future(unmapping)
            raise
        return pages


def _open_pages(reader: Reader, holdable: bool) -> MappedFile | None:
    file = reader.file() if isinstance(reader, FileBacked) else None
    if file is None:
        return None
    if not holdable:
        file.read_ahead()
        return None
    with file.descriptor as fd:
        return MappedFile(fd, file.nbytes, file.name)


def _require_unchanged(reader: Reader) -> None:
    """Raise as a read does, if the file has changed since it was opened."""
    reader.read_into((), 0)


def _discard(pages: MappedFile | None) -> None:
    if pages is not None:
        pages.close()


# -- the map of one file ---------------------------------------------------------------------------

_MLOCK_ONFAULT = 1
_MAP_FAILED = ctypes.c_void_p(-1).value

_LIBRARY = ctypes.CDLL(None, use_errno=True)
_LIBRARY.mmap.restype = ctypes.c_void_p
_LIBRARY.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_LIBRARY.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _map(fd: int, nbytes: int, name: str) -> int:
    """Map a file's first bytes; return the address. Python's `mmap` would keep a descriptor."""
    address: int | None = _LIBRARY.mmap(None, nbytes, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, 0)
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise to_adapter_error(OSError(code, os.strerror(code)), name)
    return address


def lock_on_fault(address: int, nbytes: int) -> int:
    """Lock the resident pages, and others as they are faulted in; return errno, 0 for success.

    Plain mlock(2) would read all of them at once.
    """
    extent = ctypes.c_void_p(address), ctypes.c_size_t(nbytes)
    # Looked up at the call: other platforms lack it, and must still import this module.
    return ctypes.get_errno() if _LIBRARY.mlock2(*extent, ctypes.c_uint(_MLOCK_ONFAULT)) else 0


class MappedFile:
    """A map of a whole file, which keeps the file's pages in memory.

    `fd` may be closed once the map is made; `nbytes` is the file's size, more than 0. Raises as
    `to_adapter_error` says.
    """

    def __init__(self, fd: int, nbytes: int, name: str) -> None:
        self.nbytes = nbytes
        self._name = name
        address = _map(fd, nbytes, name)
        self._address = SharedResource(
            f"the map of {name}",
            lambda address: _LIBRARY.munmap(address, nbytes),
            opened=address,
            warns=True,
        )
        # Before populating, so that no page is evicted in between.
        self.locked = lock_on_fault(address, nbytes) == 0
        """Whether the kernel may not evict the pages: False over RLIMIT_MEMLOCK, for example."""

    def populate(self, start: int, stop: int) -> None:
        """Read these bytes' pages into memory and map them. Blocks.

        A kernel before 5.14 only reads ahead, and `locked` becomes False. Raises `IntegrityError`
        if the file is shorter or its disk fails, else `FetchError`. `close` waits for the end.
        """
        start -= start % mmap.PAGESIZE
        with self._address as address:
            place, nbytes = address + start, min(stop, self.nbytes) - start
            code = madvise(place, nbytes, POPULATE_READ)
            if code == errno.EINVAL:
                self.locked = False
                code = madvise(place, nbytes, mmap.MADV_WILLNEED)
        if code == errno.EFAULT:
            raise IntegrityError(
                f"{self._name} ends before byte {self.nbytes:,}, or its disk fails; load the"
                " adapter again"
            )
        if code:
            raise to_adapter_error(OSError(code, os.strerror(code)), self._name)

    def close(self) -> None:
        """Unmap, now or when `populate` has ended. Blocks for milliseconds. Idempotent."""
        self._address.close()
