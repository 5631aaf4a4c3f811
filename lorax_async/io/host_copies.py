"""Adapters that are kept in host memory, for they came from nowhere else; within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock

import torch

from lorax_async.adapter import AdapterKey
from lorax_async.errors import CapacityError, FetchError, IntegrityError
from lorax_async.io.snapshot import TensorsFile


class Claim:
    """Bytes of a budget, until they are given back."""

    def __init__(self, nbytes: int, give_back: Callable[[int], None]) -> None:
        self._give_back = give_back
        self._nbytes = nbytes
        self._lock = Lock()

    def end(self) -> None:
        """Idempotent, from any thread."""
        with self._lock:
            nbytes, self._nbytes = self._nbytes, 0
        self._give_back(nbytes)


class HostCopy:
    """One adapter's file. Its bytes are claimed until it is dropped and nobody reads it."""

    def __init__(self, file: TensorsFile, claim: Claim) -> None:
        self.file = file
        self._claim = claim
        self._users = 1
        self._lock = Lock()

    def open(self) -> HostReader:
        with self._lock:
            self._users += 1
        return HostReader(self.file.content, self.leave)

    def leave(self) -> None:
        """One who needed it does so no longer."""
        with self._lock:
            self._users -= 1
            unused = not self._users
        if unused:
            self._claim.end()


class HostReader:
    """The `Reader` of a `HostCopy`."""

    def __init__(self, content: torch.Tensor, closed: Callable[[], None]) -> None:
        self.nbytes = content.nbytes
        self._content: torch.Tensor | None = content
        self._closed = closed
        self._lock = Lock()

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        content = self._up_to(offset + sum(buffer.nbytes for buffer in buffers))
        for buffer in buffers:
            if buffer.nbytes:
                target = torch.frombuffer(buffer.cast("B"), dtype=torch.uint8)
                # As a memoryview it would hold the GIL.
                target.copy_(content[offset : offset + buffer.nbytes])
                offset += buffer.nbytes

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        size = buffer.nbytes // rows
        stop = offset + (rows - 1) * pitch + size
        apart = self._up_to(stop)[offset:stop].as_strided((rows, size), (pitch, 1))
        torch.frombuffer(buffer.cast("B"), dtype=torch.uint8).view(rows, size).copy_(apart)

    def _up_to(self, stop: int) -> torch.Tensor:
        """The content, which has so many bytes."""
        content = self._content
        if content is None:
            raise FetchError("the reader was closed before it was read")
        if stop > content.nbytes:
            raise IntegrityError(f"the adapter ends before byte {stop:,}")
        return content

    def close(self) -> None:
        with self._lock:
            was_open, self._content = self._content is not None, None
        if was_open:
            self._closed()


class HostCopies:
    """The copies, by key, within `nbytes`. On the loop, but for what readers give back."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.used = 0
        self._copies: dict[AdapterKey, HostCopy] = {}
        self._lock = Lock()

    @property
    def sizes(self) -> Mapping[AdapterKey, int]:
        """Bytes of each."""
        return {key: copy.file.content.nbytes for key, copy in self._copies.items()}

    def claim(self, nbytes: int) -> Claim:
        """Room for one more. Raises `CapacityError` if there is none."""
        with self._lock:
            if nbytes > self.nbytes - self.used:
                raise CapacityError(
                    f"{nbytes:,} bytes of tensors do not fit beside {self.used:,} in memory_bytes"
                    f" ({self.nbytes:,}); unload adapters that were given as tensors, or raise it",
                    retryable=nbytes <= self.nbytes,
                )
            self.used += nbytes
        return Claim(nbytes, self._give_back)

    def put(self, file: TensorsFile, claim: Claim) -> AdapterKey:
        """Keep a file, or the one that is here with the same content."""
        known = self._copies.get(file.key)
        if known is not None:
            claim.end()
            return known.file.key
        self._copies[file.key] = HostCopy(file, claim)
        return file.key

    def get(self, key: AdapterKey) -> HostCopy | None:
        return self._copies.get(key)

    def drop(self, key: AdapterKey) -> None:
        """Keep it no longer; who reads it reads on."""
        copy = self._copies.pop(key, None)
        if copy is not None:
            copy.leave()

    def clear(self) -> None:
        for key in tuple(self._copies):
            self.drop(key)

    def _give_back(self, nbytes: int) -> None:
        with self._lock:
            self.used -= nbytes
