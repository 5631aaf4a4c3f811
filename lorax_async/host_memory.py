"""Map and lock files in host memory, by the C library's calls."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import warnings
import weakref

import torch

from lorax_async.errors import IntegrityError, UsageError

POPULATE_READ = 22
POPULATE_WRITE = 23
"""MADV_POPULATE_… of Linux 5.14, which Python's mmap does not name. EINVAL on an older kernel."""

WILLNEED = mmap.MADV_WILLNEED

_MLOCK_ONFAULT = 1
_MAP_FAILED = ctypes.c_void_p(-1).value

_LIBRARY = ctypes.CDLL(None, use_errno=True)
_LIBRARY.mmap.restype = ctypes.c_void_p
_LIBRARY.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_LIBRARY.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBRARY.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_privately(fd: int, nbytes: int) -> int:
    """The address of a private, writable map of a file's first bytes. Raises `OSError`.

    The descriptor may be closed afterwards.
    """
    access = mmap.PROT_READ | mmap.PROT_WRITE
    address: int | None = _LIBRARY.mmap(None, nbytes, access, mmap.MAP_PRIVATE, fd, 0)
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return address


def unmap(address: int, nbytes: int) -> int:
    """As munmap(2), returning errno. Milliseconds for a large map."""
    return ctypes.get_errno() if _LIBRARY.munmap(address, nbytes) else 0


def madvise(address: int, nbytes: int, advice: int) -> int:
    """As madvise(2), returning errno."""
    return ctypes.get_errno() if _LIBRARY.madvise(address, nbytes, advice) else 0


def lock_on_fault(address: int, nbytes: int) -> int:
    """Lock the pages that are here, and every other one as it comes; returns errno.

    Plain mlock(2) would fault the pages of a writable private map as if to write them: each would
    become a copy of its own.
    """
    place = ctypes.c_void_p(address), ctypes.c_size_t(nbytes)
    # Named here and not above: other platforms have no such call, and import this all the same.
    return ctypes.get_errno() if _LIBRARY.mlock2(*place, ctypes.c_uint(_MLOCK_ONFAULT)) else 0


_AT_ONCE = 32 << 20
"""Others may map and fault in between two such pieces."""


class MappedFile:
    """A private map of a whole file, which keeps the file's pages in memory.

    Whoever touches a map of a file that was cut is killed (SIGBUS). So the loader touches none: it
    copies through the file's checked descriptor, and the map only keeps the pages that are read
    there. `view` is for callers who know that the file does not change.

    Parameters
    ----------
    fd
        Of the file, open for reading; not needed any more once the map is made.
    nbytes
        Size of the file, more than 0.
    name
        What errors call the file.

    Raises
    ------
    OSError
        The file cannot be mapped.
    """

    def __init__(self, fd: int, nbytes: int, name: str) -> None:
        self.nbytes = nbytes
        self._name = name
        self._lock_granted = False
        self._populates = True
        self._memory: ctypes.Array[ctypes.c_char] | None = None
        self._memory = _mapped(fd, nbytes)

    @property
    def locked(self) -> bool:
        """The kernel may not take back the pages that are here."""
        return self._lock_granted and self._populates

    def lock(self) -> bool:
        """Lock the pages that are here and those to come, if this process may; returns `locked`.

        False (over RLIMIT_MEMLOCK without CAP_IPC_LOCK, say) leaves it to the kernel how long they
        stay. Lock first and populate then, so that no page can come and go in between.
        """
        address = ctypes.addressof(self._open_memory())
        self._lock_granted = lock_on_fault(address, self.nbytes) == 0
        return self.locked

    def populate(self, start: int = 0, stop: int | None = None) -> None:
        """Bring these bytes' pages into memory, and map them. None is the file's end. Blocks.

        A kernel before 5.14 is only asked to read ahead, and then nothing counts as locked. Raises
        `IntegrityError` where the file has no bytes or its disk fails, else `OSError`.
        """
        memory = self._open_memory()  # whoever closes meanwhile does not unmap under this call
        start -= start % mmap.PAGESIZE
        stop = self.nbytes if stop is None else min(stop, self.nbytes)
        address = ctypes.addressof(memory)
        try:
            for piece in range(start, stop, _AT_ONCE):
                self._populate(address + piece, piece, min(stop, piece + _AT_ONCE))
        finally:
            del memory  # an error keeps its frames, and with them the map, until they are collected

    def _populate(self, address: int, start: int, stop: int) -> None:
        code = madvise(address, stop - start, POPULATE_READ)
        if code == errno.EINVAL:
            self._populates = False
            code = madvise(address, stop - start, WILLNEED)
        if code == errno.EFAULT:
            raise IntegrityError(
                f"{self._name} ends before byte {stop:,}, or its disk fails; load the adapter again"
            )
        if code:
            raise OSError(code, os.strerror(code))

    def view(self, start: int, stop: int) -> torch.Tensor:
        """The bytes as uint8 `[stop - start]`, without a copy. It keeps the map alive.

        What is written to it is seen in this map alone, not in the file.
        """
        if not 0 <= start <= stop <= self.nbytes:
            raise UsageError(f"bytes {start:,} to {stop:,} are not in a map of {self.nbytes:,}")
        return torch.frombuffer(self._open_memory(), dtype=torch.uint8)[start:stop]

    def close(self) -> None:
        """Let the map go; it ends with the last view of it. Blocks for milliseconds. Idempotent."""
        self._memory = None

    def _open_memory(self) -> ctypes.Array[ctypes.c_char]:
        memory = self._memory
        if memory is None:
            raise UsageError(f"the map of {self._name} was closed before it was used")
        return memory

    def __del__(self) -> None:
        if self._memory is not None:
            warnings.warn(f"unclosed map of {self._name}", ResourceWarning, stacklevel=2)


def _mapped(fd: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """A map that is unmapped when nobody refers to it any more, and at the process's end."""
    address = map_privately(fd, nbytes)
    memory = (ctypes.c_char * nbytes).from_address(address)
    # Views may be read until the very end of the interpreter.
    weakref.finalize(memory, unmap, address, nbytes).atexit = False
    return memory
