"""The C library's calls on ranges of memory. Python's own would hold the GIL, or a descriptor.

Addresses and sizes in bytes; an address is a multiple of the page size. Where an errno is returned,
0 means that all went well.
"""

from __future__ import annotations

import ctypes
import mmap
import os

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
