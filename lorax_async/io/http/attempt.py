"""One thread's try at one piece, which anybody may end."""

from __future__ import annotations

from collections.abc import Hashable
from threading import Lock

from lorax_async.io.http.failures import AbortedError
from lorax_async.io.http.wire import Wire


class Attempt:
    """Knows which wire is in use, so that `end` reaches the thread wherever it waits.

    Attributes
    ----------
    origin
        Which origin the attempt waits for now: redirects may lead to another one.
    """

    def __init__(self, origin: Hashable = None) -> None:
        self.origin = origin
        self._lock = Lock()
        self._wire: Wire | None = None
        self._received = 0
        self._ended = False

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def received(self) -> int:
        """Bytes that came for it so far, on all its wires."""
        with self._lock:
            return self._received + (0 if self._wire is None else self._wire.received)

    def use(self, wire: Wire) -> None:
        """Raises `AbortedError` after an `end`."""
        with self._lock:
            if self._wire is not None:
                self._received += self._wire.received
            self._wire = wire
            self._received -= wire.received  # those came for earlier requests
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
            if self._wire is not None:
                self._received += self._wire.received
            self._wire = None
