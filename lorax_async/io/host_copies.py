"""Adapters that no source can give again, or not as quickly: in host memory, within a budget.

Given tensors that were used longest ago go on in a file of the disk cache where others need the
room; merges are dropped, for they can be computed again.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import inf
from threading import Lock

import torch

from lorax_async.adapter import AdapterKey, TensorsKey
from lorax_async.core.cache_names import CONFIG_FILE, WEIGHTS_FILE, CacheKey
from lorax_async.errors import CapacityError, FetchError, IntegrityError, InternalError, LoraxError
from lorax_async.io.cache.ports import Cache, CacheDownload, CacheEntry
from lorax_async.io.ports import Demand, Reader
from lorax_async.io.remote.workers import outcome
from lorax_async.io.staging import Buffer
from lorax_async.verification import UNCHECKED, Verification

PIECE_BYTES = 8 << 20
"""Written or read ahead in one go: a cancelled spill ends after this many bytes."""

SOURCE = "tensors"
"""Of the cache entries' keys; no id of a source is one word."""

_logger = logging.getLogger("lorax_async")


class Reservation:
    """Bytes of a budget, until it is ended."""

    def __init__(self, nbytes: int, give_back: Callable[[int], None]) -> None:
        self._give_back = give_back
        self._nbytes = nbytes
        self._lock = Lock()

    def end(self) -> None:
        """Give the bytes back. Idempotent, from any thread."""
        with self._lock:
            nbytes, self._nbytes = self._nbytes, 0
        self._give_back(nbytes)


class SpillFile:
    """The weights of one adapter in an entry of the disk cache that is this loader's alone."""

    def __init__(self, key: CacheKey, entry: CacheEntry) -> None:
        self.key = key
        self.reader = entry.reader(WEIGHTS_FILE)
        self._entry = entry

    def close(self) -> None:
        """Quick. The entry is left to be removed."""
        self.reader.close()
        self._entry.close()


class HostCopy:
    """A safetensors file with its config, in memory or spilled. Readers may open it in any thread.

    It owns `room`, the reservation of `content` (uint8 `[nbytes]`). The bytes are freed, or the
    spill file is passed to `discard`, when it was dropped and its last reader closed.
    """

    def __init__(
        self,
        key: AdapterKey,
        config: bytes,
        prefix_bytes: int,
        content: torch.Tensor,
        room: Reservation,
        verification: Verification = UNCHECKED,
    ) -> None:
        self.key = key
        self.config = config
        self.prefix_bytes = prefix_bytes
        self.nbytes = content.nbytes
        self.verification = verification
        self.spilling: Demand | None = None
        """Of the spill that is under way."""
        self.discard: Callable[[SpillFile], None] = SpillFile.close
        self.changed: Callable[[], None] = lambda: None
        self._content: torch.Tensor | None = content
        self._room = room
        self._file: SpillFile | None = None
        self._users = 1
        self._reads = 0
        self._lock = Lock()

    @property
    def content(self) -> torch.Tensor | None:
        """None if it is not in memory."""
        return self._content

    @property
    def is_read(self) -> bool:
        return self._users > 1

    def open(self) -> CopyReader:
        """Return a reader that goes on wherever the bytes are moved."""
        with self._lock:
            self._users += 1
        return CopyReader(self)

    @contextmanager
    def held(self) -> Iterator[torch.Tensor | Reader]:
        """Keep the bytes where they are: in memory, or in a file."""
        with self._lock:
            self._reads += 1
            content, file = self._content, self._file
        try:
            if content is not None:
                yield content
            elif file is not None:
                yield file.reader
            else:
                raise FetchError("the adapter was closed before it was read")
        finally:
            content = None
            with self._lock:
                self._reads -= 1
            self._free()

    def move(self, file: SpillFile) -> None:
        """Read from `file` from here on."""
        with self._lock:
            unused = not self._users
            if not unused:
                self._file, self._content = file, None
        if unused:
            self.discard(file)
        self._free()

    def leave(self) -> None:
        """End one use: a reader's, or that of its keeper, who drops it."""
        with self._lock:
            self._users -= 1
            unused, file = not self._users, self._file
            if unused:
                self._content = self._file = None
        if unused and file is not None:
            self.discard(file)
        self._free()
        self.changed()

    def _free(self) -> None:
        if self._content is None and not self._reads:
            self._room.end()


class CopyReader:
    """The `Reader` of a host copy."""

    def __init__(self, copy: HostCopy) -> None:
        self.copy = copy
        self.nbytes = copy.nbytes
        self._open = True
        self._lock = Lock()

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        with self._held(offset + sum(buffer.nbytes for buffer in buffers)) as found:
            if not isinstance(found, torch.Tensor):
                found.read_into(buffers, offset)
                return
            for buffer in buffers:
                if buffer.nbytes:
                    target = torch.frombuffer(buffer.cast("B"), dtype=torch.uint8)
                    # As a memoryview it would hold the GIL.
                    target.copy_(found[offset : offset + buffer.nbytes])
                    offset += buffer.nbytes

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        size = buffer.nbytes // rows
        stop = offset + (rows - 1) * pitch + size
        with self._held(stop) as found:
            if not isinstance(found, torch.Tensor):
                found.read_rows(buffer, offset, rows, pitch)
                return
            apart = found[offset:stop].as_strided((rows, size), (pitch, 1))
            torch.frombuffer(buffer.cast("B"), dtype=torch.uint8).view(rows, size).copy_(apart)

    def prefix(self) -> bytes:
        """Return the file's length and header. Blocks."""
        content = bytearray(self.copy.prefix_bytes)
        self.read_into([memoryview(content)], 0)
        return bytes(content)

    def read_ahead(self) -> None:
        """Bring a spilled file into the page cache. Blocks."""
        if self.copy.content is None:
            buffer = memoryview(bytearray(min(PIECE_BYTES, self.nbytes)))
            for start in range(0, self.nbytes, PIECE_BYTES):
                self.read_into([buffer[: self.nbytes - start]], start)

    def close(self) -> None:
        with self._lock:
            was_open, self._open = self._open, False
        if was_open:
            self.copy.leave()

    @contextmanager
    def _held(self, stop: int) -> Iterator[torch.Tensor | Reader]:
        if not self._open:
            raise FetchError("the reader was closed before it was read")
        if stop > self.nbytes:
            raise IntegrityError(f"the adapter ends before byte {stop:,}")
        try:
            with self.copy.held() as found:
                yield found
        except IntegrityError as error:
            problem = (
                "its copy in the disk cache, which took it where memory had no room, was changed or"
                " removed by somebody; give its tensors again"
            )
            raise IntegrityError(problem, retryable=False) from error


class HostCopies:
    """Copies by key, the one used last at the end; those in memory are within `nbytes`.

    `cache` returns the disk cache (it blocks) to spill to; None leaves all tensors in memory. To be
    used on the loop, but for what readers give back.
    """

    def __init__(self, nbytes: int, cache: Callable[[], Cache] | None = None) -> None:
        self.nbytes = nbytes
        self.used = 0
        self.spills = 0
        self._cache = cache
        self._threads = ThreadPoolExecutor(1, "lorax-spill")
        self._copies: dict[AdapterKey, HostCopy] = {}
        self._lock = Lock()
        self._order = asyncio.Lock()
        self._tell: Callable[[], None] = lambda: None
        self._files = 0
        self._discarded: deque[CacheKey] = deque()

    @property
    def sizes(self) -> Mapping[AdapterKey, int]:
        """Bytes of each copy that is in memory."""
        return {key: copy.nbytes for key, copy in self._copies.items() if copy.content is not None}

    def in_memory(self, key: AdapterKey) -> bool:
        copy = self._copies.get(key)
        return copy is not None and copy.content is not None

    def put(self, copy: HostCopy) -> HostCopy:
        """Keep a copy, or the one with the same content that is kept already."""
        known = self.get(copy.key)
        if known is not None:
            copy.leave()
            return known
        copy.discard, copy.changed = self._discard, self._changed
        self._copies[copy.key] = copy
        self._changed()
        return copy

    def get(self, key: AdapterKey) -> HostCopy | None:
        """Return a copy that is to be used now."""
        copy = self._copies.pop(key, None)
        if copy is not None:
            self._copies[key] = copy
        return copy

    def drop(self, key: AdapterKey) -> None:
        """Keep a copy no longer; open readers stay valid."""
        copy = self._copies.pop(key, None)
        if copy is not None:
            if copy.spilling is not None:
                copy.spilling.end()
            copy.leave()

    def clear(self) -> None:
        for key in tuple(self._copies):
            self.drop(key)

    def close(self) -> None:
        """Leave nothing in the disk cache. All copies are to be dropped before. Blocks."""
        self._threads.shutdown()
        self._remove_discarded()

    async def reserve(self, nbytes: int, check_open: Callable[[], None]) -> Reservation:
        """Wait for room, in the order of the calls; merges are dropped and tensors spilled for it.

        `check_open` raises once nothing may begin. Raises `CapacityError` if the copies that have
        to stay leave too little.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile: nothing waits any more
                loop.call_soon_threadsafe(changed.set)

        failed = _Failures(self._cache is None)
        if nbytes > self.nbytes:
            raise self._full(nbytes, failed)
        async with self._order:
            self._tell = tell
            while True:
                check_open()
                changed.clear()
                with self._lock:
                    if nbytes <= self.nbytes - self.used:
                        self.used += nbytes
                        return Reservation(nbytes, self._give_back)
                victim = self._victim(nbytes, failed)
                if victim is None:
                    await changed.wait()
                elif isinstance(victim.key, TensorsKey):
                    await self._spill(victim, failed)
                else:
                    self.drop(victim.key)

    def _victim(self, nbytes: int, failed: _Failures) -> HostCopy | None:
        """Return what makes room next; None if room in use now is to be waited for."""
        here = [copy for copy in self._copies.values() if copy.content is not None]
        staying = 0
        for copy in sorted(here, key=lambda each: isinstance(each.key, TensorsKey)):
            if not isinstance(copy.key, TensorsKey):
                if not copy.is_read:
                    return copy
            elif copy.nbytes >= failed.from_bytes:
                staying += copy.nbytes
            elif copy.spilling is None:
                return copy
        if staying + nbytes > self.nbytes:
            raise self._full(nbytes, failed)
        return None

    def _full(self, nbytes: int, failed: _Failures) -> CapacityError:
        return CapacityError(
            f"{nbytes:,} bytes of tensors do not fit beside {self.used:,} in memory_bytes"
            f" ({self.nbytes:,}); unload adapters that were given as tensors, or raise it"
            f"{failed.reason}",
            stage="fetch",
            retryable=nbytes <= self.nbytes,
        )

    async def _spill(self, copy: HostCopy, failed: _Failures) -> None:
        """Write one copy to the disk. A cancellation ends that soon, and does not wait for it."""
        demand = copy.spilling = Demand()
        nbytes = copy.nbytes
        writing = self._threads.submit(self._write, copy, demand)
        del copy  # the thread shall be the last to have it: to free so much takes a while
        try:
            error = await outcome(writing)
        except asyncio.CancelledError:
            demand.end()
            raise
        if error is not None and not demand.ended:
            failed.add(error, nbytes)

    def _write(self, copy: HostCopy, demand: Demand) -> LoraxError | None:
        """In the thread. Return why it stays in memory, if it does."""
        try:
            self._require_descriptors()
            assert self._cache is not None
            file = _written(self._cache(), copy, demand)
            self._files += 1
            self.spills += 1
            copy.move(file)
        except LoraxError as error:
            bare = error.located()
            bare.__cause__ = None  # its frames hold the bytes
            return bare
        finally:
            copy.spilling = None
            self._changed()
        return None

    def _discard(self, file: SpillFile) -> None:
        """Close a spill file now, in any thread, and remove it in the spill thread."""
        file.close()
        self._discarded.append(file.key)
        with suppress(RuntimeError):  # `close` is under way, and removes what is left
            self._threads.submit(self._remove_discarded)

    def _remove_discarded(self) -> None:
        while self._discarded:
            self._files -= 1
            try:
                assert self._cache is not None
                self._cache().remove(self._discarded.popleft())
            except Exception:
                _logger.exception("what was spilled to the disk cache is left there")

    def _require_descriptors(self) -> None:
        """A spill file is held open; a quarter of the process's descriptors may be."""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if most != resource.RLIM_INFINITY and self._files >= most // 4:
            raise CapacityError(
                f"{self._files:,} of them are there, each of which takes one of the {most:,} files"
                " that this process may open; raise its RLIMIT_NOFILE (ulimit -n)"
            )

    def _give_back(self, nbytes: int) -> None:
        if nbytes:
            with self._lock:
                self.used -= nbytes
            self._changed()

    def _changed(self) -> None:
        self._tell()


class _Failures:
    """The spills that one call has tried in vain: copies of `from_bytes` or more are not tried."""

    def __init__(self, never: bool) -> None:
        self.from_bytes = 0.0 if never else inf
        self.reason = ""

    def add(self, error: LoraxError, nbytes: int) -> None:
        """Exclude larger ones if there was no room, else all: those would fail as well."""
        self.reason = f"; nor can others make room on the disk: {error.problem}"
        full = isinstance(error, CapacityError)
        self.from_bytes = min(self.from_bytes, nbytes) if full else 0


def _written(cache: Cache, copy: HostCopy, demand: Demand) -> SpillFile:
    """Write a copy to an entry of its own and bring it to the disk. Leave nothing on an error.

    A key that no other loader has: there is nothing to join, resume or contradict. What a killed
    process leaves is an entry that nothing holds, and makes room when the cache needs some.
    """
    content = copy.content
    if content is None:
        raise FetchError("it was dropped meanwhile")
    key = CacheKey(SOURCE, f"{copy.key}-{secrets.token_hex(8)}")
    download = cache.begin(key, SOURCE, demand)
    if not isinstance(download, CacheDownload):
        raise InternalError("the disk cache has an entry that was to be made")
    try:
        for role, data in (
            (CONFIG_FILE, memoryview(copy.config)),
            (WEIGHTS_FILE, Buffer.of(content).memory),
        ):
            file = download.file(role, data.nbytes)
            for start in range(0, data.nbytes, PIECE_BYTES):
                if demand.ended:
                    raise FetchError("nothing needs it on disk any more")
                file.write([data[start : start + PIECE_BYTES]], start)
        return SpillFile(key, download.publish())
    except BaseException:
        download.discard()
        raise
