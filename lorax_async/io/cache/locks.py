"""Locks between processes. They save bandwidth and room; nothing that is served depends on them.

Where a file system has no locks, every lock is granted.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event
from time import monotonic

from lorax_async.io.cache.folders import Folder

# EBADF: NFS makes of flock a lock of bytes, which must be open for writing; a folder is not.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}

_POLL_SECONDS = 0.002
PATIENCE_SECONDS = 5.0
"""After which a short lock is done without: whoever has it was stopped."""


def granted_alone(fd: int) -> bool:
    """Is the lock on this open file ours, and nobody else's?"""
    return _granted(fd, fcntl.LOCK_EX)


def granted_shared(fd: int) -> bool:
    """Is the lock on this open file ours, with others who share it?"""
    return _granted(fd, fcntl.LOCK_SH)


def _granted(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


class NamedLock:
    """A lock that is ours, on a file that is gone when it is released."""

    def __init__(self, fd: int, folder: Folder, name: str) -> None:
        self._fd: int | None = fd
        self._folder = folder
        self._name = name

    def release(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            try:
                # A file that stays is free, and goes when somebody next has the lock.
                with suppress(OSError):
                    self._folder.unlink(self._name)
            finally:
                os.close(fd)


def attempt(folder: Folder, name: str) -> NamedLock | None:
    """The lock of that name, or None if somebody else has it."""
    while True:
        fd = folder.file(name, os.O_RDWR | os.O_CREAT)
        taken = False
        try:
            if not granted_alone(fd):
                return None
            # Whoever had it before may have removed the file between our two calls.
            status = folder.status(name)
            taken = status is not None and os.path.samestat(status, os.fstat(fd))
            if taken:
                return NamedLock(fd, folder, name)
        finally:
            if not taken:
                os.close(fd)


@contextmanager
def short_lock(folder: Folder, name: str) -> Iterator[None]:
    """Held by everybody for moments only; whoever waited too long goes on without it."""
    until = monotonic() + PATIENCE_SECONDS
    pause = Event()
    while (lock := attempt(folder, name)) is None and monotonic() < until:
        pause.wait(_POLL_SECONDS)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
