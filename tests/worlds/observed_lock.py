"""A lock that reports waits, so that tests do not guess how slow a thread is."""

from threading import Event, Lock


class ObservedLock:
    """A lock that sets `waited` when a thread has to wait for it."""

    def __init__(self, waited: Event) -> None:
        self._waited = waited
        self._lock = Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._waited.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
