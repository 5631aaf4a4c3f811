"""Host copies: snapshots of tensors and merges in host memory, within a budget, or spilled."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import resource
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import inf
from threading import Lock
from weakref import WeakSet

import torch

from lorax_async.cache.base import Cache, CacheDownload, CacheEntry, CacheKey
from lorax_async.concurrency import FetchControl, outcome
from lorax_async.config import Limits
from lorax_async.devices.staging import TORCH_DTYPES, StagingBuffer
from lorax_async.devices.streams import DeviceEvent, new_event, stream_on
from lorax_async.errors import (
    CapacityError,
    FetchError,
    IntegrityError,
    InternalError,
    LoraxError,
    UnsupportedAdapterError,
    UsageError,
    shorten,
)
from lorax_async.files import Reader
from lorax_async.formats.digests import Digest
from lorax_async.formats.safetensors import TensorDescription, write_header
from lorax_async.formats.split_weights import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.planning.transfer_plan import check_size
from lorax_async.types import UNCHECKED, AdapterKey, TensorsKey, Verification

STEP_BYTES = 4 << 20
"""Bytes copied and hashed in one step: some milliseconds."""

STEP_TENSORS = 256

_DTYPE_NAMES = {dtype: word for word, dtype in TORCH_DTYPES.items()}


class TensorSnapshot:
    """Copies tensors in steps of some milliseconds, in any thread, one step at a time.

    Make it while the tensors have the values to copy; it waits for work that is queued by then on
    this thread's current streams. Call `measure`, then `step` until it returns False; then `key`,
    `prefix` and `content` (uint8 `[nbytes]`) are those of the file.

    Raise `UsageError` for values that are no tensors.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], config: bytes, limits: Limits) -> None:
        argument: object = tensors
        if not isinstance(argument, Mapping):
            kind = type(argument).__name__
            raise UsageError(f"tensors must be a dict of torch tensors by name, not {kind}")
        self._tensors = dict(tensors)
        if len(self._tensors) > limits.max_tensors:
            raise UnsupportedAdapterError(
                f"{len(self._tensors):,} tensors are over the limit of {limits.max_tensors:,};"
                " raise Limits.max_tensors to accept them"
            )
        self.config = config
        self.prefix = b""
        self._limits = limits
        self._versions = _versions(self._tensors)
        self._events = _recorded_events(self._tensors)
        self._descriptions: list[TensorDescription] = []
        self._places: list[tuple[int, int]] = []
        self._content: torch.Tensor | None = None
        self._digest = hashlib.sha256()
        self._steps = self._copy()

    @property
    def key(self) -> TensorsKey:
        return TensorsKey.of(self._digest.hexdigest())

    @property
    def content(self) -> torch.Tensor:
        assert self._content is not None
        return self._content

    def measure(self) -> int:
        """Check everything but the bytes; return the file's size. Blocks.

        Raise `UnsupportedAdapterError`, also for a size over the limit.
        """
        descriptions = [_describe(name, tensor) for name, tensor in self._tensors.items()]
        # The order of safetensors: wider dtypes first, so that each tensor is aligned to its dtype.
        self._descriptions = sorted(
            descriptions, key=lambda tensor: (-TORCH_DTYPES[tensor.dtype].itemsize, tensor.name)
        )
        self.prefix, self._places = write_header(self._descriptions)
        nbytes = self._places[-1][1] if self._places else len(self.prefix)
        check_size(nbytes, "in its tensors", self._limits)
        return nbytes

    def step(self) -> bool:
        """Copy some bytes; return whether there are more. Blocks.

        Raises
        ------
        IntegrityError
            A tensor was written to since the snapshot was made.
        FetchError
            A tensor could not be read.
        CapacityError
            The machine has no memory for the copy.
        """
        try:
            return next(self._steps, None) is not None
        except BaseException:
            self._content = None  # a stored error must not keep the bytes alive
            raise

    def _copy(self) -> Iterator[bool]:
        self._content = content = host_memory(
            self._places[-1][1] if self._places else len(self.prefix), self.prefix
        )
        # Hash the length too: config and prefix must not exchange bytes.
        self._digest.update(len(self.config).to_bytes(8, "little") + self.config + self.prefix)
        for event in self._events:
            event.synchronize()
        nbytes = count = 0
        for description, (start, stop) in zip(self._descriptions, self._places, strict=True):
            name = description.name
            source = _source(name, self._tensors[name])
            target = content[start:stop].view(source.dtype).view(source.shape)
            rows_per_step = max(1, STEP_BYTES * len(source) // max(1, source.nbytes))
            cuts = list(range(rows_per_step, len(source), rows_per_step))
            pieces = zip(target.tensor_split(cuts), source.tensor_split(cuts), strict=True)
            for piece, rows in pieces if source.numel() else ():
                _copy_piece(name, piece, rows)
                self._digest.update(StagingBuffer.of(piece.view(torch.uint8)).memory)
                nbytes, count = nbytes + piece.nbytes, count + 1
                if nbytes >= STEP_BYTES or count >= STEP_TENSORS:
                    nbytes = count = 0
                    yield True
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        after = _versions(self._tensors)
        for name, before, now in zip(self._tensors, self._versions, after, strict=True):
            if before != now:
                raise IntegrityError(
                    f"tensor {shorten(name, 200)!r} was written to while it was copied; continue"
                    " training after the call, or pass a clone"
                )


def host_memory(nbytes: int, prefix: bytes) -> torch.Tensor:
    """Return uint8 `[nbytes]` of host memory that begins with `prefix`. Raise `CapacityError`."""
    try:
        content = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    except (RuntimeError, MemoryError) as error:
        problem = f"there is no host memory for a copy of {nbytes:,} bytes"
        raise CapacityError(problem, stage="fetch") from error
    content[: len(prefix)] = torch.frombuffer(bytearray(prefix), dtype=torch.uint8)
    return content


def _versions(tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """Return how often each tensor was written to, as far as torch counts it."""
    try:
        return [tensor._version for tensor in tensors.values()]  # noqa: SLF001 - torch has no other
    except AttributeError:
        name, other = next(
            (name, value) for name, value in tensors.items() if not isinstance(value, torch.Tensor)
        )
        kind = type(other).__name__
        raise UsageError(f"tensor {str(name)!r} is no torch tensor, but {kind}") from None
    except RuntimeError:  # one was made in inference mode, where torch does not count
        return [
            0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - as above
            for tensor in tensors.values()
        ]


def _recorded_events(tensors: Mapping[str, torch.Tensor]) -> list[DeviceEvent]:
    """Return events that complete when work queued so far on the tensors' devices does."""
    if all(tensor.is_cpu for tensor in tensors.values()):
        return []
    events: list[DeviceEvent] = []
    for device in {tensor.device for tensor in tensors.values()}:
        if device.type not in {"cpu", "meta"}:
            event = new_event(device)
            event.record(stream_on(device, None))
            events.append(event)
    return events


def _describe(name: object, tensor: torch.Tensor) -> TensorDescription:
    if not isinstance(name, str):
        raise UsageError(f"tensor names must be str, not {shorten(repr(name), 200)}")
    shown = repr(shorten(name, 200))
    if tensor.layout != torch.strided or tensor.is_meta:
        raise UsageError(f"tensor {shown} has no plain bytes to copy; materialise it first")
    dtype = _DTYPE_NAMES.get(tensor.dtype)
    if dtype is None:
        raise UnsupportedAdapterError(
            f"tensor {shown} is {tensor.dtype}; pass it as {', '.join(map(str, _DTYPE_NAMES))}"
        )
    return TensorDescription(name, dtype, tuple(tensor.shape))


def _source(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as rows. Check its memory first: reading without any ends the process."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    last = (tensor.storage_offset() + reach + 1) * tensor.itemsize
    if tensor.numel() and tensor.untyped_storage().nbytes() < last:
        problem = f"tensor {shorten(name, 200)!r} has no memory behind it; gather it first"
        raise FetchError(problem, retryable=False)
    rows = tensor.detach()
    return rows if rows.dim() else rows.view(1)


def _copy_piece(name: str, piece: torch.Tensor, rows: torch.Tensor) -> None:
    try:
        piece.copy_(rows)
    except Exception as error:  # noqa: BLE001 - whatever a stranger's tensor raises
        problem = f"tensor {shorten(name, 200)!r} could not be copied: {error}"
        # Drop the frames, which keep the bytes alive.
        raise FetchError(problem, retryable=False) from error.with_traceback(None)


PIECE_BYTES = 8 << 20
"""Bytes written or read ahead in one call: a cancelled spill ends after these."""

SOURCE = "tensors"
"""The source in spill files' cache keys; no id of another source is one word."""

_logger = logging.getLogger("lorax_async")


class Reservation:
    """Reserved bytes of a budget, until it is ended."""

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
    """The weights of one adapter, in an entry of the disk cache that only this loader uses."""

    def __init__(self, key: CacheKey, entry: CacheEntry) -> None:
        self.key = key
        self.reader = entry.reader(WEIGHTS_FILE)
        self._entry = entry

    def close(self) -> None:
        """Release the entry without removing it. Quick."""
        self.reader.close()
        self._entry.close()


class HostCopy:
    """A safetensors file with its config, in memory or spilled. Any thread may open readers.

    It owns `room`, the reservation of `content` (uint8 `[nbytes]`). When it is dropped and its last
    reader closed, the bytes are freed or the spill file is passed to `discard`.
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
        self.spilling: FetchControl | None = None
        """The control of the spill in progress."""
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
        """The bytes; None if they are not in memory."""
        return self._content

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
        """Keep the bytes where they are: yield the memory, or the file's reader."""
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
        """Free the memory; later reads use `file`."""
        with self._lock:
            unused = not self._users
            if not unused:
                self._file, self._content = file, None
        if unused:
            self.discard(file)
        self._free()

    def leave(self) -> None:
        """End one use: a reader's, or that of `HostCopies`."""
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
                "its spill file in the disk cache was changed or removed; pass its tensors to"
                " load_tensors again"
            )
            raise IntegrityError(problem, retryable=False) from error


class HostCopies:
    """Host copies by key, least recently used first; those in memory are within `nbytes`.

    `cache` returns the disk cache to spill to, and blocks; None leaves all tensors in memory. Use
    on the loop; reservations may end in any thread.
    """

    def __init__(self, nbytes: int, cache: Callable[[], Cache] | None = None) -> None:
        self.nbytes = nbytes
        self.used = 0
        self.spills = 0
        self._cache = cache
        self._threads = ThreadPoolExecutor(1, "lorax-spill")
        self._copies: dict[AdapterKey, HostCopy] = {}
        self._dropped: WeakSet[HostCopy] = WeakSet()
        self._lock = Lock()
        self._order = asyncio.Lock()
        self._notify: Callable[[], None] = lambda: None
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
        """Keep and return a copy; if one with the same key is kept, close it and return that."""
        known = self.get(copy.key)
        if known is not None:
            copy.leave()
            return known
        copy.discard, copy.changed = self._discard, self._changed
        self._copies[copy.key] = copy
        self._changed()
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

    async def reserve(self, nbytes: int, check_open: Callable[[], None]) -> Reservation:
        """Reserve memory, in the order of the calls; drop merges and spill tensors for it.

        `check_open` raises once the loader is closing. Raise `CapacityError` if the copies that
        must stay leave too little.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            with suppress(RuntimeError):  # the loop is closed: nothing waits any more
                loop.call_soon_threadsafe(changed.set)

        failed = _Failures(self._cache is None)
        if nbytes > self.nbytes:
            raise self._full(nbytes, failed)
        async with self._order:
            self._notify = notify
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
        """Return the copy to drop or spill next; None to wait for memory in use."""
        in_memory = [copy for copy in self._copies.values() if copy.content is not None]
        staying = 0
        for copy in sorted(in_memory, key=lambda copy: isinstance(copy.key, TensorsKey)):
            if not isinstance(copy.key, TensorsKey):
                if not copy.is_read:
                    return copy
            elif copy.nbytes >= failed.from_bytes:
                staying += copy.nbytes
            elif copy.spilling is None:
                return copy
        if staying + nbytes > self.nbytes:
            raise self._full(nbytes, failed)
        # A merge reads its parts until it is computed, and may be what waits for room.
        for copy in tuple(self._dropped):
            spillable = isinstance(copy.key, TensorsKey) and copy.nbytes < failed.from_bytes
            if spillable and copy.content is not None and copy.spilling is None:
                return copy
        return None

    def _full(self, nbytes: int, failed: _Failures) -> CapacityError:
        return CapacityError(
            f"{nbytes:,} bytes of tensors do not fit beside {self.used:,} in memory_bytes"
            f" ({self.nbytes:,}); unload adapters loaded from tensors, or raise it"
            f"{failed.reason}",
            stage="fetch",
            retryable=nbytes <= self.nbytes,
        )

    async def _spill(self, copy: HostCopy, failed: _Failures) -> None:
        """Write one copy to the disk. A cancellation ends the write soon, without waiting."""
        control = copy.spilling = FetchControl()
        nbytes = copy.nbytes
        writing = self._threads.submit(self._write, copy, control)
        del copy  # so that the thread frees the memory, which takes a while
        try:
            error = await outcome(writing)
        except asyncio.CancelledError:
            control.cancel()
            raise
        if error is not None and not control.cancelled:
            failed.add(error, nbytes)

    def _write(self, copy: HostCopy, control: FetchControl) -> LoraxError | None:
        """Spill a copy; return the error if it stays in memory. Runs in the spill thread."""
        try:
            self._require_descriptors()
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
            self._changed()
        return None

    def _discard(self, file: SpillFile) -> None:
        """Close a spill file now, in any thread, and remove it in the spill thread."""
        file.close()
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

    def _require_descriptors(self) -> None:
        """Raise `CapacityError` if open spill files use a quarter of the process's descriptors."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if limit != resource.RLIM_INFINITY and self._files >= limit // 4:
            raise CapacityError(
                f"{self._files:,} spill files are open, of the {limit:,} files that this process"
                " may open; raise its RLIMIT_NOFILE (ulimit -n)"
            )

    def _give_back(self, nbytes: int) -> None:
        if nbytes:
            with self._lock:
                self.used -= nbytes
            self._changed()

    def _changed(self) -> None:
        self._notify()


class _Failures:
    """The failed spills of one call: copies of `from_bytes` or more are not tried again."""

    def __init__(self, never: bool) -> None:
        self.from_bytes = 0.0 if never else inf
        self.reason = ""

    def add(self, error: LoraxError, nbytes: int) -> None:
        """Exclude copies of this size or more if the disk had no room, else all copies."""
        self.reason = f"; others cannot be spilled to the disk: {error.problem}"
        is_full = isinstance(error, CapacityError)
        self.from_bytes = min(self.from_bytes, nbytes) if is_full else 0


def _write_spill_file(cache: Cache, copy: HostCopy, control: FetchControl) -> SpillFile:
    """Publish a copy as a new entry of the cache. Leave nothing on an error.

    No other loader has its key, so there is no download to join or resume. A killed process leaves
    an entry without a lease, which is evicted when the cache needs room.
    """
    key = CacheKey(SOURCE, f"{copy.key}-{secrets.token_hex(8)}")
    with copy.held() as content:  # its room stays taken while it is written, even if it is dropped
        if not isinstance(content, torch.Tensor):
            raise InternalError("the copy is in a spill file already")
        download = cache.begin(key, SOURCE, control)
        if not isinstance(download, CacheDownload):
            raise InternalError("the disk cache already has the new spill file's entry")
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
                    file.write([data[start : start + PIECE_BYTES]], start)
            return SpillFile(key, download.publish())
        except BaseException:
            download.discard()
            raise
