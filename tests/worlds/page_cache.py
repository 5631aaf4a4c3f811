"""The kernel's view of this process's pages, by file and by map."""

import ctypes
import mmap
import os
import re
from pathlib import Path

LIBRARY = ctypes.CDLL(None, use_errno=True)
_ENTRY = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE)


def cached_pages(path: Path) -> int:
    """Return how many of a file's pages are in memory, by mincore(2)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as map:
        here = (ctypes.c_ubyte * pages(len(map)))()
        start = ctypes.c_char.from_buffer(map)
        code = LIBRARY.mincore(ctypes.c_void_p(ctypes.addressof(start)), len(map), here)
        del start
    assert code == 0
    return sum(page & 1 for page in here)


def drop_pages(path: Path) -> None:
    """Drop a file's pages from memory; mapped ones stay."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def map_sizes(path: Path) -> list[dict[str, int]]:
    """Return /proc/self/smaps for each map of the file, in bytes: Size, Rss, Locked …"""
    found: list[dict[str, int]] = []
    wanted = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if _ENTRY.match(line):
            wanted = line.endswith(f" {path}")
            found += [{}] if wanted else []
        elif wanted and line.endswith(" kB"):
            name, number = line.removesuffix(" kB").split(":")
            found[-1][name] = int(number) << 10
    return found


def may_lock(nbytes: int) -> bool:
    """Return whether the kernel lets this process lock this much memory of any kind."""
    with mmap.mmap(-1, nbytes) as map:
        start = ctypes.c_char.from_buffer(map)
        code = LIBRARY.mlock(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(nbytes))
        del start
    return bool(code == 0)
