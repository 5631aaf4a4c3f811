"""Host copies: safetensors files in host memory, within a budget."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from threading import Lock

import torch

from lorax_async.concurrency import SharedResource, outcome
from lorax_async.errors import CapacityError, IntegrityError, LoraxError
from lorax_async.types import AdapterKey

_NO_BYTES = torch.empty(0, dtype=torch.uint8)


class HostCopy:
    """A safetensors file with its config, in memory. Any thread may open readers.

    It begins as reserved room, which `HostCopies.put` fills. When it is dropped and its last reader
    closed, the room is given back.
    """

    key: AdapterKey | None = None
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

    def leave(self) -> None:
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

    def in_memory(self, key: AdapterKey) -> bool:
        return key in self._copies

    def put(
        self, copy: HostCopy, key: AdapterKey, config: bytes, content: torch.Tensor
    ) -> HostCopy:
        """Fill reserved room and keep it; if a copy with `key` is kept, return that one instead."""
        copy.key, copy.config, copy.content = key, config, content
        known = self.get(key)
        if known is not None:
            copy.leave()
            return known
        self._copies[key] = copy
        self.notify()
        return copy

    def get(self, key: AdapterKey) -> HostCopy | None:
        return self._copies.get(key)

    def drop(self, key: AdapterKey) -> None:
        """Drop a copy. Open readers stay valid."""
        copy = self._copies.pop(key, None)
        if copy is not None:
            copy.leave()

    def clear(self) -> None:
        for key in tuple(self._copies):
            self.drop(key)

    async def reserve(self, nbytes: int, check_open: Callable[[], None]) -> HostCopy:
        """Reserve memory, in the order of the calls.

        Return it as a copy to fill; its `leave` ends the reservation. `check_open` raises once the
        loader is closing. Raise `CapacityError` if the copies that must stay leave too little.
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
                await outcome(changed)  # until what is read now has been

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
