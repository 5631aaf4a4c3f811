"""What the first reader opens, and what is closed after the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Generic, TypeVar

from lorax_async.errors import FetchError
from lorax_async.io.sources.local_hold import Closable

T = TypeVar("T", bound=Closable)


class OpenedOnce(Generic[T]):
    """Held by many threads; closed by `close`, or after the last of them. From any thread.

    Parameters
    ----------
    too_late
        What the error says to who comes after the end.
    opened
        If that is there already; else `opener` gives it to whoever comes first. It may block.
    """

    def __init__(self, too_late: str, opened: T | None, opener: Callable[[], T] | None) -> None:
        self.opened = opened
        self._too_late = too_late
        self._opener = opener
        self._lock = Lock()
        self._opening = Lock()
        self._users = 0
        self._closed = False

    @contextmanager
    def held(self) -> Iterator[T]:
        """Raises `FetchError` once it is closed, and what opening raises."""
        self._enter()
        try:
            yield self._open()
        finally:
            self._leave()

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            unused = not self._closed and not self._users
            self._closed = True
        if unused:
            self._end()

    def _enter(self) -> None:
        with self._lock:
            if self._closed:
                raise FetchError(self._too_late)
            self._users += 1

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._closed and not self._users
        if last:
            self._end()

    def _open(self) -> T:
        with self._opening:
            if self.opened is None:
                assert self._opener is not None
                self.opened = self._opener()
            return self.opened

    def _end(self) -> None:
        if self.opened is not None:
            self.opened.close()
