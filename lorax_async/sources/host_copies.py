"""Host copies: safetensors files in host memory, within a budget, or spilled to the disk cache."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import resource
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from math import inf
from threading import Lock
from typing import NamedTuple
from weakref import WeakSet

import torch

from lorax_async.cache.base import CacheEntry, CacheKey
from lorax_async.cache.disk_cache import DiskCache, DiskDownload
from lorax_async.concurrency import FetchControl, SharedResource, outcome
from lorax_async.devices.staging import StagingBuffer
from lorax_async.errors import CapacityError, FetchError, IntegrityError, LoraxError
from lorax_async.files import FileReader, Reader
from lorax_async.formats.digests import Digest
from lorax_async.formats.split_weights import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.types import UNCHECKED, AdapterKey, TensorsKey, Verification

PIECE_BYTES = 8 << 20
"""Bytes written in one call: a cancelled spill ends after these."""

SOURCE = "tensors"
"""The source in spill files' cache keys; no id of another source is one word."""

_NO_BYTES = torch.empty(0, dtype=torch.uint8)
_logger = logging.getLogger("lorax_async")


class SpillFile(NamedTuple):
    """The weights of one adapter, in an entry of the disk cache that only this loader uses."""

    key: CacheKey
    entry: CacheEntry
    reader: Reader


class HostCopy:
    """A safetensors file with its config, in memory or spilled. Any thread may open readers.

    It begins as reserved room, which `fill` fills. When it is dropped and its last reader closed,
    the room is given back, or the spill file discarded.
    """

    key: AdapterKey
    config: bytes
    prefix_bytes: int
    verification: Verification

    def __init__(self, nbytes: int, copies: HostCopies) -> None:
        self.nbytes = nbytes
        self.spilling: FetchControl | None = None
        """The control of the spill in progress."""
        self._copies = copies
        self._place: SharedResource[torch.Tensor | SpillFile] = SharedResource(
            "the adapter", opened=_NO_BYTES, freed=lambda: copies.give_back(nbytes)
        )
        self._users = 1
        self._lock = Lock()

    def fill(
        self,
        key: AdapterKey,
        config: bytes,
        prefix_bytes: int,
        content: torch.Tensor,
        verification: Verification = UNCHECKED,
    ) -> HostCopy:
        """Set the bytes, uint8 `[nbytes]`; the first `prefix_bytes` end with the header."""
        self.key, self.config, self.prefix_bytes = key, config, prefix_bytes
        self.verification = verification
        self._place.opened = content
        return self

    @property
    def in_memory(self) -> bool:
        return isinstance(self._place.opened, torch.Tensor)

    @property
    def is_read(self) -> bool:
        return self._users > 1

    def open(self) -> CopyReader:
        """Return a reader that stays valid when the bytes are spilled."""
        with self._lock:
            self._users += 1
        return CopyReader(self)

    @contextmanager
    def held(self) -> Iterator[torch.Tensor | SpillFile]:
        """Keep the bytes where they are, and their room taken."""
        with ExitStack() as used:
            places = []
            with self._lock:  # `move` must not close the place in between
                places.append(used.enter_context(self._place.use()))
            yield places.pop()  # refer to it no longer: its end gives the room back

    def move(self, file: SpillFile) -> None:
        """Free the memory; later reads use `file`."""
        with self._lock:
            memory, unused = self._place, not self._users
            if not unused:
                self._place = SharedResource(
                    "the adapter", lambda _: self._copies.discard(file), opened=file
                )
        if unused:
            self._copies.discard(file)
        else:
            memory.close()

    def leave(self) -> None:
        """End one use: a reader's, or that of `HostCopies`."""
        with self._lock:
            self._users -= 1
            unused = not self._users
        if unused:
            self._place.close()
        self._copies.notify()


class CopyReader:
    """The `Reader` of a host copy. Without one, its first use raises `problem`."""

    def __init__(self, copy: HostCopy | None, problem: LoraxError | None = None) -> None:
        def missing() -> HostCopy:
            assert problem is not None
            raise problem

        self.copy = copy
        self._copy = SharedResource("the reader", HostCopy.leave, opened=copy, open=missing)

    @property
    def nbytes(self) -> int:
        with self._copy.use() as copy:
            return copy.nbytes

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        with self._held(offset + sum(buffer.nbytes for buffer in buffers)) as place:
            if isinstance(place, SpillFile):
                place.reader.read_into(buffers, offset)
                return
            for buffer in buffers:
                if buffer.nbytes:
                    target = torch.frombuffer(buffer.cast("B"), dtype=torch.uint8)
                    # As a memoryview it would hold the GIL.
                    target.copy_(place[offset : offset + buffer.nbytes])
                    offset += buffer.nbytes

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        size = buffer.nbytes // rows
        stop = offset + (rows - 1) * pitch + size
        with self._held(stop) as place:
            if isinstance(place, SpillFile):
                place.reader.read_rows(buffer, offset, rows, pitch)
                return
            apart = place[offset:stop].as_strided((rows, size), (pitch, 1))
            torch.frombuffer(buffer.cast("B"), dtype=torch.uint8).view(rows, size).copy_(apart)

    def read_ahead(self) -> None:
        """Start reading a spilled file into the page cache."""
        with self._held(0) as place:
            if isinstance(place, SpillFile) and isinstance(place.reader, FileReader):
                place.reader.read_ahead()

    def close(self) -> None:
        self._copy.close()

    @contextmanager
    def _held(self, stop: int) -> Iterator[torch.Tensor | SpillFile]:
        with self._copy.use() as copy:
            if stop > copy.nbytes:
                raise IntegrityError(f"the adapter ends before byte {stop:,}")
            try:
                with copy.held() as place:
                    yield place
            except IntegrityError as error:
                problem = (
                    "its spill file in the disk cache was changed or removed; pass its tensors to"
                    " load_tensors again"
                )
                raise IntegrityError(problem, retryable=False) from error


class HostCopies:
    """Host copies by key, least recently used first; those in memory are within `nbytes`.

    `cache` returns the disk cache to spill to, and blocks; None leaves all tensors in memory. Use
    on the loop; reservations may end in any thread.
    """

    def __init__(self, nbytes: int, cache: Callable[[], DiskCache] | None = None) -> None:
        self.nbytes = nbytes
        self.used = 0
        self.spills = 0
        self.notify: Callable[[], None] = lambda: None
        """Wakes the call that waits for room, from any thread."""
        self._cache = cache
        self._threads = ThreadPoolExecutor(1, "lorax-spill")
        self._copies: dict[AdapterKey, HostCopy] = {}
        self._dropped: WeakSet[HostCopy] = WeakSet()
        self._lock = Lock()
        self._order = asyncio.Lock()
        self._files = 0
        self._discarded: deque[CacheKey] = deque()

    @property
    def sizes(self) -> Mapping[AdapterKey, int]:
        """Bytes of each copy that is in memory."""
        return {key: copy.nbytes for key, copy in self._copies.items() if copy.in_memory}

    def in_memory(self, key: AdapterKey) -> bool:
        copy = self._copies.get(key)
        return copy is not None and copy.in_memory

    def put(self, copy: HostCopy) -> HostCopy:
        """Keep and return a copy; if one with the same key is kept, close it and return that."""
        known = self.get(copy.key)
        if known is not None:
            copy.leave()
            return known
        self._copies[copy.key] = copy
        self.notify()
        return copy

    def get(self, key: AdapterKey) -> HostCopy | None:
        """Return a copy and mark it as used; None if there is none."""
        copy = self._copies.pop(key, None)
        if copy is not None:
            self._copies[key] = copy
        return copy

    def drop(self, key: AdapterKey) -> None:
        """Drop a copy. Open readers stay valid."""
        copy = self._copies.pop(key, None)
        if copy is not None:
            if copy.spilling is not None:
                copy.spilling.cancel()
            copy.leave()
            self._dropped.add(copy)

    def clear(self) -> None:
        for key in tuple(self._copies):
            self.drop(key)

    def close(self) -> None:
        """Remove all spill files. Drop all copies before. Blocks."""
        self._threads.shutdown()
        self._remove_discarded()

    async def reserve(self, nbytes: int, check_open: Callable[[], None]) -> HostCopy:
        """Reserve memory, in the order of the calls; drop merges and spill tensors for it.

        Return it as a copy to fill; its `leave` ends the reservation. `check_open` raises once the
        loader is closing. Raise `CapacityError` if the copies that must stay leave too little.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with suppress(RuntimeError):  # the loop is closed: nothing waits any more
                loop.call_soon_threadsafe(changed.set)

        # Copies below this size can be spilled, as far as failed spills have shown.
        spillable, reason = 0.0 if self._cache is None else inf, ""
        if nbytes > self.nbytes:
            raise self._full_error(nbytes, reason)
        async with self._order:
            self.notify = notify
            while True:
                check_open()
                changed.clear()
                with self._lock:
                    if nbytes <= self.nbytes - self.used:
                        self.used += nbytes
                        return HostCopy(nbytes, self)
                victim = self._victim(nbytes, spillable, reason)
                if victim is None:
                    await changed.wait()
                elif not isinstance(victim.key, TensorsKey):
                    self.drop(victim.key)
                elif (error := await self._spill(victim)) is not None:
                    reason = f"; others cannot be spilled to the disk: {error.problem}"
                    full = isinstance(error, CapacityError)
                    spillable = min(spillable, victim.nbytes) if full else 0

    def give_back(self, nbytes: int) -> None:
        with self._lock:
            self.used -= nbytes
        self.notify()

    def _victim(self, nbytes: int, spillable: float, reason: str) -> HostCopy | None:
        """Return the copy to drop or spill next; None to wait for memory in use."""
        copies = [copy for copy in self._copies.values() if copy.in_memory]
        tensors = [copy for copy in copies if isinstance(copy.key, TensorsKey)]
        for copy in copies:
            if not isinstance(copy.key, TensorsKey) and not copy.is_read:
                return copy
        for copy in tensors:
            if copy.nbytes < spillable and copy.spilling is None:
                return copy
        staying = sum(copy.nbytes for copy in tensors if copy.nbytes >= spillable)
        if staying + nbytes > self.nbytes:
            raise self._full_error(nbytes, reason)
        # A merge reads its parts until it is computed, and may be what waits for room.
        for copy in tuple(self._dropped):
            spilled = isinstance(copy.key, TensorsKey) and copy.nbytes < spillable
            if spilled and copy.in_memory and copy.spilling is None:
                return copy
        return None

    def _full_error(self, nbytes: int, reason: str) -> CapacityError:
        return CapacityError(
            f"{nbytes:,} bytes of tensors do not fit beside {self.used:,} in memory_bytes"
            f" ({self.nbytes:,}); unload adapters loaded from tensors, or raise it{reason}",
            stage="fetch",
            retryable=nbytes <= self.nbytes,
        )

    async def _spill(self, copy: HostCopy) -> LoraxError | None:
        """Move a copy to the disk; return the error if it stays in memory.

        A cancellation ends the write soon, without waiting.
        """
        control = copy.spilling = FetchControl()
        writing = self._threads.submit(self._write, copy, control)
        try:
            error = await outcome(writing)
        except asyncio.CancelledError:
            control.cancel()
            raise
        return None if control.cancelled else error

    def _write(self, copy: HostCopy, control: FetchControl) -> LoraxError | None:
        """Spill in the spill thread. At most a quarter of the process's descriptors is used."""
        try:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            if limit != resource.RLIM_INFINITY and self._files >= limit // 4:
                raise CapacityError(
                    f"{self._files:,} spill files are open, of the {limit:,} files that this"
                    " process may open; raise its RLIMIT_NOFILE (ulimit -n)"
                )
            assert self._cache is not None
            file = _write_spill_file(self._cache(), copy, control)
            self._files += 1
            self.spills += 1
            copy.move(file)
        except LoraxError as error:
            bare = error.located()
            bare.__cause__ = None  # its frames keep the bytes alive
            return bare
        finally:
            copy.spilling = None
            self.notify()
        return None

    def discard(self, file: SpillFile) -> None:
        """Close a spill file now, in any thread, and remove it in the spill thread."""
        file.reader.close()
        file.entry.close()
        self._discarded.append(file.key)
        with suppress(RuntimeError):  # `close` has begun, and removes the rest
            self._threads.submit(self._remove_discarded)

    def _remove_discarded(self) -> None:
        while self._discarded:
            self._files -= 1
            try:
                assert self._cache is not None
                self._cache().remove(self._discarded.popleft())
            except Exception:
                _logger.exception("a spill file could not be removed from the disk cache")


def _write_spill_file(cache: DiskCache, copy: HostCopy, control: FetchControl) -> SpillFile:
    """Publish a copy as a new entry of the cache. Leave nothing on an error.

    No other loader has its key, so there is no download to join or resume. A killed process leaves
    an entry without a lease, which is evicted when the cache needs room.
    """
    key = CacheKey(SOURCE, f"{copy.key}-{secrets.token_hex(8)}")
    with copy.held() as content:  # its room stays taken while it is written, even if it is dropped
        assert isinstance(content, torch.Tensor)
        download = cache.try_begin(key, SOURCE)
        assert isinstance(download, DiskDownload)
        try:
            for role, data in (
                (CONFIG_FILE, memoryview(copy.config)),
                (WEIGHTS_FILE, StagingBuffer.of(content).memory),
            ):
                # Publication compares what it reads back with the memory that is given up.
                expected = Digest("sha256", hashlib.sha256(data).hexdigest())
                file = download.file(role, data.nbytes, expected)
                for start in range(0, data.nbytes, PIECE_BYTES):
                    if control.cancelled:
                        raise FetchError("the spill is not needed any more")
                    file.write(start, data[start : start + PIECE_BYTES])
            entry = download.publish()
        except BaseException:
            download.discard()
            raise
    return SpillFile(key, entry, entry.reader(WEIGHTS_FILE))


def host_memory(nbytes: int, prefix: bytes) -> torch.Tensor:
    """Return uint8 `[nbytes]` of host memory that begins with `prefix`. Raise `CapacityError`."""
    try:
        content = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    except (RuntimeError, MemoryError) as error:
        problem = f"there is no host memory for a copy of {nbytes:,} bytes"
        raise CapacityError(problem, stage="fetch") from error
    content[: len(prefix)] = torch.frombuffer(bytearray(prefix), dtype=torch.uint8)
    return content
