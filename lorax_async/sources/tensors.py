"""The source of adapters in host memory: tensors passed by the program."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from lorax_async.concurrency import FetchControl, SharedResource, outcome
from lorax_async.config import Limits
from lorax_async.devices.staging import TORCH_DTYPES, StagingBuffer
from lorax_async.devices.streams import DeviceEvent, new_event, stream_on
from lorax_async.errors import (
    AdapterNotFoundError,
    CapacityError,
    FetchError,
    IntegrityError,
    InvalidAdapterIdError,
    LoraxError,
    UnsupportedAdapterError,
    UsageError,
    shorten,
)
from lorax_async.files import Reader, read_prefix, sha256_of
from lorax_async.formats.safetensors import TensorDescription, write_header
from lorax_async.formats.spans import ByteSpan
from lorax_async.planning.transfer_plan import check_size
from lorax_async.sources.base import AdapterFile
from lorax_async.types import UNCHECKED, AdapterKey, AdapterRef, TensorsKey, Verification

STEP_BYTES = 4 << 20
"""Bytes copied and hashed in one step: some milliseconds."""

STEP_TENSORS = 256

_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_GONE = "its tensors were dropped; pass them again to load_tensors"


class TensorSnapshot:
    """Copies tensors into a safetensors file in memory, in any thread.

    Make it while the tensors have the values to copy; it waits for work that is queued by then on
    this thread's current streams. Call `measure`, then run `copy` to its end; then `key`, `prefix`
    and `content` (uint8 `[nbytes]`) are those of the file.

    Raise `UsageError` for values that are not tensors.
    """

    key: TensorsKey
    content: torch.Tensor
    prefix: bytes

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
        self._config = config
        self._limits = limits
        self._versions = [_version(name, tensor) for name, tensor in self._tensors.items()]
        self._events: list[DeviceEvent] = []
        for device in {tensor.device for tensor in self._tensors.values()}:
            if device.type not in {"cpu", "meta"}:
                event = new_event(device)
                event.record(stream_on(device, None))
                self._events.append(event)

    def measure(self) -> int:
        """Check everything but the bytes; return the file's size. Blocks.

        Raise `UnsupportedAdapterError`, also for a size over the limit.
        """
        # The order of safetensors: wider dtypes first, so that each tensor is aligned to its dtype.
        self._descriptions = sorted(
            (_describe(name, tensor) for name, tensor in self._tensors.items()),
            key=lambda tensor: (-TORCH_DTYPES[tensor.dtype].itemsize, tensor.name),
        )
        self.prefix, self._places = write_header(self._descriptions)
        self._nbytes = self._places[-1][1] if self._places else len(self.prefix)
        check_size(self._nbytes, "in its tensors", self._limits)
        return self._nbytes

    def copy(self) -> Iterator[None]:
        """Copy the tensors, in steps of some milliseconds. Blocks.

        Raise `IntegrityError` if a tensor was written to since the snapshot was made, `FetchError`
        if one could not be read, `CapacityError` if the machine has no memory for the copy.
        """
        content = host_memory(self._nbytes, self.prefix)
        # Hash the length too: config and prefix must not exchange bytes.
        digest = hashlib.sha256(len(self._config).to_bytes(8, "little"))
        digest.update(self._config + self.prefix)
        for event in self._events:
            event.synchronize()
        nbytes = count = 0
        for description, (start, stop) in zip(self._descriptions, self._places, strict=True):
            name = description.name
            for piece in _copy_in_pieces(name, self._tensors[name], content[start:stop]):
                digest.update(StagingBuffer.of(piece).memory)
                nbytes, count = nbytes + piece.nbytes, count + 1
                if nbytes >= STEP_BYTES or count >= STEP_TENSORS:
                    nbytes = count = 0
                    yield
        self._require_unchanged()
        self.key, self.content = TensorsKey.of(digest.hexdigest()), content

    def _require_unchanged(self) -> None:
        for (name, tensor), before in zip(self._tensors.items(), self._versions, strict=True):
            if _version(name, tensor) != before:
                raise IntegrityError(
                    f"tensor {shorten(name, 200)!r} was written to while it was copied; continue"
                    " training after the call, or pass a clone"
                )


def _version(name: object, tensor: object) -> int:
    """Return how often a tensor was written to; 0 in inference mode, where torch does not count."""
    if not isinstance(tensor, torch.Tensor):
        raise UsageError(f"tensor {str(name)!r} is not a torch tensor, but {type(tensor).__name__}")
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch has no other


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


def _copy_in_pieces(
    name: str, tensor: torch.Tensor, target: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Copy a tensor into `target`, uint8 `[nbytes]`; yield each piece of it, of whole rows."""
    reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    last = (tensor.storage_offset() + reach + 1) * tensor.itemsize
    # Reading a tensor without memory would end the process.
    if tensor.numel() and tensor.untyped_storage().nbytes() < last:
        problem = f"tensor {shorten(name, 200)!r} has no memory behind it; gather it first"
        raise FetchError(problem, retryable=False)
    source = tensor.detach() if tensor.dim() else tensor.detach().view(1)
    row_bytes = target.nbytes // max(1, len(source))
    count = max(1, STEP_BYTES // max(1, row_bytes))
    for first in range(0, len(source) if row_bytes else 0, count):
        rows = source[first : first + count]
        piece = target[first * row_bytes :][: rows.nbytes]
        try:
            piece.view(rows.dtype).view(rows.shape).copy_(rows)
        except Exception as error:  # noqa: BLE001 - whatever a stranger's tensor raises
            problem = f"tensor {shorten(name, 200)!r} could not be copied: {error}"
            # Drop the frames, which keep the bytes alive.
            raise FetchError(problem, retryable=False) from error.with_traceback(None)
        yield piece


@dataclass(eq=False)
class MemorySource:
    """The `Source` of `TensorsKey`s, which no text names.

    Tensors stay from `take` until they are dropped. `threads` copy them, some milliseconds at a
    time.
    """

    copies: HostCopies
    limits: Limits
    threads: Executor

    async def take(
        self, tensors: Mapping[str, torch.Tensor], config: bytes, check_open: Callable[[], None]
    ) -> AdapterKey:
        """Copy tensors as they are now and keep the copy, unless there is one with equal content.

        `check_open` raises once the loader is closing. Raise as `TensorSnapshot` does, and
        `CapacityError` if the budget has no room. Nothing is left on an error or a cancellation.
        """
        snapshot = TensorSnapshot(tensors, config, self.limits)
        running: Future[Any] = self.threads.submit(snapshot.measure)
        copy = await self.copies.reserve(await asyncio.wrap_future(running), check_open)
        try:
            steps, ended = snapshot.copy(), None
            while not ended:
                check_open()
                running = self.threads.submit(next, steps, True)
                ended = await asyncio.wrap_future(running)
        except BaseException:
            # A thread that still copies uses the memory.
            running.add_done_callback(lambda _: copy.release())
            raise
        self.copies.put(copy, snapshot.key, config, snapshot.content)
        return snapshot.key

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        raise InvalidAdapterIdError(f"no adapter in memory has the id {ref.text!r}")

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:  # noqa: ARG002 - the port's
        copy = self.copies.get(key)
        if copy is None:
            raise AdapterNotFoundError(_GONE, stage="fetch")
        loop, reader = asyncio.get_running_loop(), copy.open()
        try:
            prefix = await loop.run_in_executor(self.threads, read_prefix, reader, self.limits)
        except BaseException:
            reader.close()
            raise
        return AdapterFile(copy.config, prefix, reader)

    def reopen(self, key: AdapterKey) -> Reader:
        copy = self.copies.get(key)
        return CopyReader(None, _gone_error()) if copy is None else copy.open()

    async def fetch_groups(
        self,
        file: AdapterFile,  # noqa: ARG002 - the port's
        groups: Sequence[Sequence[ByteSpan]],  # noqa: ARG002 - the port's
        arrived: Callable[[int], None],  # noqa: ARG002 - the port's
        control: FetchControl,
    ) -> Verification:
        """Return at once."""
        if control.cancelled:
            raise FetchError("no caller waits for the adapter any more")
        return UNCHECKED

    async def digest(self, key: AdapterKey) -> str:
        """Return the sha256 of the file made of tensors."""
        with closing(self._reader(key)) as reader:
            return await sha256_of(reader, self.threads)

    def _reader(self, key: AdapterKey) -> CopyReader:
        copy = self.copies.get(key)
        if copy is None:
            raise _gone_error()
        return copy.open()


def _gone_error() -> FetchError:
    return FetchError(_GONE, retryable=False)


# -- host copies -----------------------------------------------------------------------------------

_NO_BYTES = torch.empty(0, dtype=torch.uint8)


class HostCopy:
    """A safetensors file with its config, in memory. Any thread may open readers.

    It begins as reserved memory, which `HostCopies.put` fills, and gives it back once it is dropped
    and its last reader is closed.
    """

    config: bytes

    def __init__(self, nbytes: int, copies: HostCopies) -> None:
        self.nbytes = nbytes
        self.content = _NO_BYTES
        """The bytes, uint8 `[nbytes]`."""
        self._copies = copies
        self._users = 1
        self._lock = Lock()

    def open(self) -> CopyReader:
        """Return a reader, which stays valid when the copy is dropped."""
        with self._lock:
            self._users += 1
        return CopyReader(self)

    def release(self) -> None:
        """End one use: a reader's, or that of `HostCopies`."""
        with self._lock:
            self._users -= 1
            unused = not self._users
        if unused:
            self.content = _NO_BYTES
            self._copies.give_back(self)
        self._copies.notify()


class CopyReader:
    """The `Reader` of a host copy. Without one, its first use raises `problem`."""

    def __init__(self, copy: HostCopy | None, problem: LoraxError | None = None) -> None:
        def missing() -> HostCopy:
            assert problem is not None
            raise problem

        self._copy = SharedResource("the reader", HostCopy.release, opened=copy, open=missing)

    @property
    def nbytes(self) -> int:
        with self._copy as copy:
            return copy.nbytes

    def read_into(
        self, buffers: Sequence[memoryview], offset: int, rows: int = 1, pitch: int = 0
    ) -> None:
        size = sum(buffer.nbytes for buffer in buffers) // rows
        stop = offset + (rows - 1) * pitch + size
        with self._copy as copy:
            if stop > copy.nbytes:
                raise IntegrityError(f"the adapter ends before byte {stop:,}")
            if rows > 1:
                apart = copy.content[offset:stop].as_strided((rows, size), (pitch, 1))
                target = torch.frombuffer(buffers[0].cast("B"), dtype=torch.uint8)
                target.view(rows, size).copy_(apart)
                return
            for buffer in buffers:
                if buffer.nbytes:
                    target = torch.frombuffer(buffer.cast("B"), dtype=torch.uint8)
                    # As a memoryview it would hold the GIL.
                    target.copy_(copy.content[offset : offset + buffer.nbytes])
                    offset += buffer.nbytes

    def close(self) -> None:
        self._copy.close()


class HostCopies:
    """Host copies by key, within `nbytes`.

    Use on the loop; reservations may end in any thread.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._copies: dict[AdapterKey, HostCopy] = {}
        self._taking: set[HostCopy] = set()
        """All copies that take room: those in `_copies`, reserved ones, and dropped ones in use."""
        self._order = asyncio.Lock()
        self._lock = Lock()
        self._changed: Future[None] = Future()

    @property
    def used(self) -> int:
        """Bytes of memory that are taken or reserved."""
        return sum(copy.nbytes for copy in tuple(self._taking))

    @property
    def sizes(self) -> Mapping[AdapterKey, int]:
        """Bytes of each copy."""
        return {key: copy.nbytes for key, copy in self._copies.items()}

    def put(self, copy: HostCopy, key: AdapterKey, config: bytes, content: torch.Tensor) -> None:
        """Fill a reserved copy and keep it; release it if there is a copy with `key` already."""
        copy.config, copy.content = config, content
        if key in self._copies:
            copy.release()
        else:
            self._copies[key] = copy
            self.notify()

    def get(self, key: AdapterKey) -> HostCopy | None:
        return self._copies.get(key)

    def drop(self, key: AdapterKey) -> None:
        """Drop a copy. Open readers stay valid."""
        copy = self._copies.pop(key, None)
        if copy is not None:
            copy.release()

    def clear(self) -> None:
        for key in tuple(self._copies):
            self.drop(key)

    async def reserve(self, nbytes: int, check_open: Callable[[], None]) -> HostCopy:
        """Reserve memory, in the order of the calls.

        Return it as a copy to fill; its `release` ends the reservation. `check_open` raises once
        the loader is closing. Raise `CapacityError` if the copies that must stay leave too little.
        """
        async with self._order:
            while True:
                check_open()
                changed = self._changed
                if nbytes <= self.nbytes - self.used:
                    copy = HostCopy(nbytes, self)
                    self._taking.add(copy)
                    return copy
                staying = sum(copy.nbytes for copy in self._copies.values())
                if staying + nbytes > self.nbytes:
                    raise CapacityError(
                        f"{nbytes:,} bytes of tensors do not fit beside {staying:,} in"
                        f" memory_bytes ({self.nbytes:,}); unload adapters loaded from tensors, or"
                        " raise it",
                        stage="fetch",
                        retryable=nbytes <= self.nbytes,
                    )
                await outcome(changed)  # until a reader of a dropped copy closes

    def give_back(self, copy: HostCopy) -> None:
        """End the copy's use of memory. Any thread."""
        self._taking.discard(copy)

    def notify(self) -> None:
        """Wake the call that waits for room. Any thread."""
        with self._lock:
            changed, self._changed = self._changed, Future()
        changed.set_result(None)


def host_memory(nbytes: int, prefix: bytes) -> torch.Tensor:
    """Return uint8 `[nbytes]` of host memory that begins with `prefix`. Raise `CapacityError`."""
    try:
        content = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    except (RuntimeError, MemoryError) as error:
        problem = f"there is no host memory for a copy of {nbytes:,} bytes"
        raise CapacityError(problem, stage="fetch") from error
    content[: len(prefix)] = torch.frombuffer(bytearray(prefix), dtype=torch.uint8)
    return content
