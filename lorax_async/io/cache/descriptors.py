"""A descriptor that several threads use and one closes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from lorax_async.errors import FetchError
from lorax_async.io.sources.checked_open import IOV_MAX


class Descriptor:
    """Closed when it was asked to and nobody uses it any more: its number must not be reused."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._lock = Lock()
        self._users = 0
        self._closed = False

    @contextmanager
    def held(self) -> Iterator[int]:
        """Raises `FetchError` once it is closed."""
        self._enter()
        try:
            yield self._fd
        finally:
            self._leave()

    def close(self) -> None:
        """Quick and idempotent."""
        with self._lock:
            unused = not self._closed and not self._users
            self._closed = True
        if unused:
            os.close(self._fd)

    def _enter(self) -> None:
        with self._lock:
            if self._closed:
                raise FetchError(f"{self._name} was closed before it was used")
            self._users += 1

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._closed and not self._users
        if last:
            os.close(self._fd)

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"unclosed {self._name} of a disk cache", ResourceWarning, stacklevel=2)
            self.close()


def write_all(fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write every buffer, one after the other, from `offset` on. Raises `OSError`."""
    left = [buffer.cast("B") for buffer in buffers if buffer.nbytes]
    first = 0
    while first < len(left):
        count = os.pwritev(fd, left[first : first + IOV_MAX], offset)
        offset += count
        while first < len(left) and count >= left[first].nbytes:
            count -= left[first].nbytes
            first += 1
        if count:
            left[first] = left[first][count:]
