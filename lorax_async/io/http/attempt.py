"""One thread's try at one piece, which anybody may end."""

from __future__ import annotations

from threading import Lock

from lorax_async.io.http.failures import AbortedError
from lorax_async.io.http.wire import Wire


class Attempt:
    """Knows which wire is in use, so that `end` reaches the thread wherever it waits."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._wire: Wire | None = None
        self._ended = False

    def use(self, wire: Wire) -> None:
        """Raises `AbortedError` after an `end`."""
        with self._lock:
            self._wire = wire
            ended = self._ended
        if ended:
            raise AbortedError

    def look(self) -> None:
        """Raises `AbortedError` after an `end`."""
        if self._ended:
            raise AbortedError

    def end(self) -> None:
        """From any thread. Quick, idempotent."""
        with self._lock:
            self._ended = True
            if self._wire is not None:
                self._wire.abort()

    def leave(self) -> None:
        """The wire is somebody else's from here on."""
        with self._lock:
            self._wire = None
