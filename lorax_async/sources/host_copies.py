"""Host copies: safetensors files in host memory, within a budget, or spilled to the disk cache."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import resource
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from math import inf
from threading import Event, Lock

import torch

from lorax_async.cache.base import CacheKey
from lorax_async.cache.disk_cache import DiskCache, DiskDownload
from lorax_async.concurrency import SharedResource, outcome
from lorax_async.devices.staging import StagingBuffer
from lorax_async.errors import CapacityError, FetchError, IntegrityError, LoraxError
from lorax_async.files import FileReader, Reader
from lorax_async.formats.digests import Digest
from lorax_async.formats.split_weights import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.types import UNCHECKED, AdapterKey, MergedKey, TensorsKey, Verification

PIECE_BYTES = 8 << 20
"""Bytes written in one call: a cancelled spill ends after these."""

SOURCE = "tensors"
"""The source in spill files' cache keys; no id of another source is one word."""

_NO_BYTES = torch.empty(0, dtype=torch.uint8)
_logger = logging.getLogger("lorax_async")


class HostCopy:
    """A safetensors file with its config, in memory or spilled. Any thread may open readers.

    It begins as reserved room, which `HostCopies.put` fills. When it is dropped and its last reader
    closed, the room is given back, or the spill file removed.
    """

    key: AdapterKey | None = None
    config: bytes
    verification: Verification = UNCHECKED

    def __init__(self, nbytes: int, copies: HostCopies) -> None:
        self.nbytes = nbytes
        self.place: SharedResource[torch.Tensor | Reader] = SharedResource(
            "the adapter", opened=_NO_BYTES, freed=lambda: copies.give_back(self)
        )
        """The bytes, uint8 `[nbytes]`, or the spill file."""
        self.needless = Event()
        """Set to end the spill in progress."""
        self._copies = copies
        self._users = 1
        self._lock = Lock()

    @property
    def in_memory(self) -> bool:
        return isinstance(self.place.opened, torch.Tensor) and not self.place.closed

    @property
    def is_read(self) -> bool:
        return self._users > 1

    def open(self) -> CopyReader:
        """Return a reader that stays valid when the bytes are spilled."""
        with self._lock:
            self._users += 1
        return CopyReader(self)

    @contextmanager
    def held(self) -> Iterator[torch.Tensor | Reader]:
        """Keep the bytes where they are, and their room taken."""
        with ExitStack() as used:
            places = []
            with self._lock:  # `move` must not close the place in between
                places.append(used.enter_context(self.place))
            yield places.pop()  # refer to it no longer: its end gives the room back

    def move(self, file: SharedResource[torch.Tensor | Reader]) -> None:
        """Free the memory; later reads use `file`."""
        with self._lock:
            memory, self.place = self.place, file
            unused = not self._users
        memory.close()
        if unused:
            file.close()

    def leave(self) -> None:
        """End one use: a reader's, or that of `HostCopies`."""
        with self._lock:
            self._users -= 1
            unused = not self._users
        if unused:
            self.place.close()
            self.needless.set()
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
        with self._copy as copy:
            return copy.nbytes

    def read_into(
        self, buffers: Sequence[memoryview], offset: int, rows: int = 1, pitch: int = 0
    ) -> None:
        size = sum(buffer.nbytes for buffer in buffers) // rows
        stop = offset + (rows - 1) * pitch + size
        with self._held(stop) as place:
            if not isinstance(place, torch.Tensor):
                place.read_into(buffers, offset, rows, pitch)
            elif rows > 1:
                apart = place[offset:stop].as_strided((rows, size), (pitch, 1))
                target = torch.frombuffer(buffers[0].cast("B"), dtype=torch.uint8)
                target.view(rows, size).copy_(apart)
            else:
                for buffer in buffers:
                    if buffer.nbytes:
                        target = torch.frombuffer(buffer.cast("B"), dtype=torch.uint8)
                        # As a memoryview it would hold the GIL.
                        target.copy_(place[offset : offset + buffer.nbytes])
                        offset += buffer.nbytes

    def read_ahead(self) -> None:
        """Start reading a spilled file into the page cache."""
        with self._held(0) as place:
            if isinstance(place, FileReader):
                place.read_ahead()

    def close(self) -> None:
        self._copy.close()

    @contextmanager
    def _held(self, stop: int) -> Iterator[torch.Tensor | Reader]:
        with self._copy as copy:
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
        self.spills = 0
        self._cache = cache
        self._threads = ThreadPoolExecutor(1, "lorax-spill")
        self._copies: dict[AdapterKey, HostCopy] = {}
        self._taking: set[HostCopy] = set()
        """All copies that take room: those in `_copies`, reserved ones, and dropped ones in use."""
        self._files: set[CacheKey] = set()
        self._order = asyncio.Lock()
        self._lock = Lock()
        self._changed: Future[None] = Future()

    @property
    def used(self) -> int:
        """Bytes of memory that are taken or reserved."""
        return sum(copy.nbytes for copy in tuple(self._taking))

    @property
    def sizes(self) -> Mapping[AdapterKey, int]:
        """Bytes of each copy that is in memory."""
        return {key: copy.nbytes for key, copy in self._copies.items() if copy.in_memory}

    def in_memory(self, key: AdapterKey) -> bool:
        copy = self._copies.get(key)
        return copy is not None and copy.in_memory

    def put(
        self, copy: HostCopy, key: AdapterKey, config: bytes, content: torch.Tensor
    ) -> HostCopy:
        """Fill reserved room and keep it; if a copy with `key` is kept, return that one instead."""
        copy.key, copy.config, copy.place.opened = key, config, content
        known = self.get(key)
        if known is not None:
            copy.leave()
            return known
        self._copies[key] = copy
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
            copy.leave()

    def clear(self) -> None:
        for key in tuple(self._copies):
            self.drop(key)

    def close(self) -> None:
        """Remove all spill files. Drop all copies before. Blocks."""
        self._threads.shutdown()
        for key in tuple(self._files):
            self._remove(key)

    async def reserve(self, nbytes: int, check_open: Callable[[], None]) -> HostCopy:
        """Reserve memory, in the order of the calls; drop merges and spill tensors for it.

        Return it as a copy to fill; its `leave` ends the reservation. `check_open` raises once the
        loader is closing. Raise `CapacityError` if the copies that must stay leave too little.
        """
        # Copies below this size can be spilled, as far as failed spills have shown.
        spillable, reason = 0.0 if self._cache is None else inf, ""
        if nbytes > self.nbytes:
            raise self._full_error(nbytes, reason)
        async with self._order:
            while True:
                check_open()
                changed = self._changed
                if nbytes <= self.nbytes - self.used:
                    copy = HostCopy(nbytes, self)
                    self._taking.add(copy)
                    return copy
                victim = self._victim(nbytes, spillable, reason)
                if victim is None:
                    await outcome(changed)
                elif isinstance(victim.key, MergedKey):
                    self.drop(victim.key)
                elif (error := await self._spill(victim)) is not None:
                    reason = f"; others cannot be spilled to the disk: {error.problem}"
                    full = isinstance(error, CapacityError)
                    spillable = min(spillable, victim.nbytes) if full else 0

    def give_back(self, copy: HostCopy) -> None:
        """End the copy's use of memory. Any thread."""
        self._taking.discard(copy)
        self.notify()

    def notify(self) -> None:
        """Wake the call that waits for room. Any thread."""
        with self._lock:
            changed, self._changed = self._changed, Future()
        changed.set_result(None)

    def _victim(self, nbytes: int, spillable: float, reason: str) -> HostCopy | None:
        """Return the copy to drop or spill next; None to wait for memory in use."""
        tensors: list[HostCopy] = []
        for copy in self._copies.values():
            if isinstance(copy.key, TensorsKey):
                tensors.append(copy)
            elif not copy.is_read:
                return copy
        staying = sum(
            copy.nbytes for copy in tensors if copy.in_memory and copy.nbytes >= spillable
        )
        if staying + nbytes > self.nbytes:
            raise self._full_error(nbytes, reason)
        # The dropped ones last: their readers may end soon. But a merge reads its parts until it is
        # computed, and may be what waits for room.
        tensors += [copy for copy in tuple(self._taking) if isinstance(copy.key, TensorsKey)]
        return next((copy for copy in tensors if copy.in_memory and copy.nbytes < spillable), None)

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
        copy.needless.clear()
        try:
            return await outcome(self._threads.submit(self._write, copy))
        except asyncio.CancelledError:
            copy.needless.set()
            raise

    def _write(self, copy: HostCopy) -> LoraxError | None:
        """Spill in the spill thread. At most a quarter of the process's descriptors is used."""
        if not copy.in_memory:  # dropped, or spilled for a call that was cancelled
            return None
        try:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            if limit != resource.RLIM_INFINITY and len(self._files) >= limit // 4:
                raise CapacityError(
                    f"{len(self._files):,} spill files are open, of the {limit:,} files that this"
                    " process may open; raise its RLIMIT_NOFILE (ulimit -n)"
                )
            file = self._publish(copy)
        except LoraxError as error:
            bare = error.located()
            bare.__cause__ = None  # its frames keep the bytes alive
            return bare if copy.in_memory else None
        self.spills += 1
        copy.move(file)
        return None

    def _publish(self, copy: HostCopy) -> SharedResource[torch.Tensor | Reader]:
        """Write a copy to a new entry of the disk cache. Leave nothing on an error.

        No other loader has its key, so there is no download to join or resume. A killed process
        leaves an entry without a lease, which is evicted when the cache needs room.
        """
        assert self._cache is not None
        key = CacheKey(SOURCE, f"{copy.key}-{secrets.token_hex(8)}")
        with copy.held() as content:  # its room stays taken even if it is dropped
            assert isinstance(content, torch.Tensor)
            download = self._cache().try_begin(key, SOURCE)
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
                        if copy.needless.is_set():
                            raise FetchError("the spill is not needed any more")
                        file.write(start, data[start : start + PIECE_BYTES])
                entry = download.publish()
            except BaseException:
                download.discard()
                raise
        reader = entry.reader(WEIGHTS_FILE)

        def discard(_: object) -> None:
            """Close the file now, in any thread, and remove it in the spill thread."""
            reader.close()
            entry.close()
            with suppress(RuntimeError):  # `close` has begun, and removes it
                self._threads.submit(self._remove, key)

        self._files.add(key)
        return SharedResource("the adapter", discard, opened=reader)

    def _remove(self, key: CacheKey) -> None:
        self._files.discard(key)
        try:
            assert self._cache is not None
            self._cache().remove(key)
        except Exception:
            _logger.exception("a spill file could not be removed from the disk cache")


def host_memory(nbytes: int, prefix: bytes) -> torch.Tensor:
    """Return uint8 `[nbytes]` of host memory that begins with `prefix`. Raise `CapacityError`."""
    try:
        content = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    except (RuntimeError, MemoryError) as error:
        problem = f"there is no host memory for a copy of {nbytes:,} bytes"
        raise CapacityError(problem, stage="fetch") from error
    content[: len(prefix)] = torch.frombuffer(bytearray(prefix), dtype=torch.uint8)
    return content
