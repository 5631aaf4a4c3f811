"""Map and lock files in host memory, through the C library."""

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
"""MADV_POPULATE_… of Linux 5.14, missing from Python's mmap. EINVAL on older kernels."""

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
    """Map a file's first bytes, private and writable; return the address.

    The descriptor may be closed afterwards. Raises `OSError`.
    """
    access = mmap.PROT_READ | mmap.PROT_WRITE
    address: int | None = _LIBRARY.mmap(None, nbytes, access, mmap.MAP_PRIVATE, fd, 0)
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return address


def unmap(address: int, nbytes: int) -> int:
    """Call munmap(2); return errno, 0 for success. Takes milliseconds for a large map."""
    return ctypes.get_errno() if _LIBRARY.munmap(address, nbytes) else 0


def madvise(address: int, nbytes: int, advice: int) -> int:
    """Call madvise(2); return errno, 0 for success."""
    return ctypes.get_errno() if _LIBRARY.madvise(address, nbytes, advice) else 0


def lock_on_fault(address: int, nbytes: int) -> int:
    """Lock the resident pages, and others as they are faulted in; return errno, 0 for success.

    Plain mlock(2) would write-fault the pages of a writable private map, which copies each of them.
    """
    extent = ctypes.c_void_p(address), ctypes.c_size_t(nbytes)
    # Looked up at the call: other platforms lack it, and must still import this module.
    return ctypes.get_errno() if _LIBRARY.mlock2(*extent, ctypes.c_uint(_MLOCK_ONFAULT)) else 0


_POPULATE_BYTES = 32 << 20
"""Bytes per call, between which other threads may map and fault."""


class MappedFile:
    """A private map of a whole file, which keeps the file's pages in memory.

    Reading a map of a truncated file kills the process (SIGBUS). So the loader copies through the
    file's checked descriptor, and the map only keeps those pages in memory. Use `view` only for
    files that do not change.

    Parameters
    ----------
    fd
        The file, open for reading; may be closed once the map is made.
    nbytes
        Size of the file, more than 0.
    name
        The file's name in errors.

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
        """Whether the kernel may not evict the resident pages."""
        return self._lock_granted and self._populates

    def lock(self) -> bool:
        """Lock the resident pages and later ones, if permitted; return `locked`.

        If False (for example over RLIMIT_MEMLOCK without CAP_IPC_LOCK), the kernel may evict pages.
        Lock before populating, so that no page is evicted in between.
        """
        address = ctypes.addressof(self._open_memory())
        self._lock_granted = lock_on_fault(address, self.nbytes) == 0
        return self.locked

    def populate(self, start: int = 0, stop: int | None = None) -> None:
        """Read these bytes' pages into memory and map them. Blocks. None is the file's end.

        A kernel before 5.14 only reads ahead, and `locked` becomes False. Raises `IntegrityError`
        if the file is shorter or its disk fails, else `OSError`.
        """
        memory = self._open_memory()  # a concurrent `close` must not unmap during this call
        start -= start % mmap.PAGESIZE
        stop = self.nbytes if stop is None else min(stop, self.nbytes)
        address = ctypes.addressof(memory)
        try:
            for offset in range(start, stop, _POPULATE_BYTES):
                self._populate(address + offset, offset, min(stop, offset + _POPULATE_BYTES))
        finally:
            del memory  # else an error's traceback would keep the map

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
        """Return the bytes as uint8 `[stop - start]` without a copy. The view keeps the map alive.

        Writes change this map only, not the file.
        """
        if not 0 <= start <= stop <= self.nbytes:
            raise UsageError(f"bytes {start:,} to {stop:,} are not in a map of {self.nbytes:,}")
        return torch.frombuffer(self._open_memory(), dtype=torch.uint8)[start:stop]

    def close(self) -> None:
        """Drop the map; the last view unmaps it. Blocks for milliseconds. Idempotent."""
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
    """Map a file; unmap it with the last reference, but not at interpreter exit."""
    address = map_privately(fd, nbytes)
    memory = (ctypes.c_char * nbytes).from_address(address)
    # Views may be read until the interpreter exits.
    weakref.finalize(memory, unmap, address, nbytes).atexit = False
    return memory
