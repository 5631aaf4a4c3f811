"""The budget of a disk cache's folder, kept by all processes that use it. Blocks."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple

from lorax_async.cache.directory import CacheDirectory, CrowdedError, Folder, translated_errors
from lorax_async.cache.entries import Entries
from lorax_async.cache.partials import Partials
from lorax_async.cache.records import is_entry_name, is_partial_name
from lorax_async.errors import CapacityError
from lorax_async.formats.split_weights import role_of
from lorax_async.lifecycle.policies import EvictionPolicy
from lorax_async.types import AdapterKey

FETCH_FIXED_COST = 32 << 20
"""What a fetch costs besides its bytes, in bytes: three round trips of 30 ms at 16 x 20 MB/s."""


class Stored(NamedTuple):
    """The size of a folder of the cache, and when it was used (a partial: begun) last."""

    nbytes: int
    used_ns: int


class DiskBudget:
    """The bytes of a cache's folder, reserved before they are written, in any process.

    Totals are not kept: each reservation measures the folder and allocates its bytes with the
    directory locked. Without locks two processes may see the same room; then the folder holds too
    much until the next reservation. What others do with an entry shows in its last use; how often
    it is used, each process counts for itself.
    """

    def __init__(
        self,
        directory: CacheDirectory,
        entries: Entries,
        partials: Partials,
        nbytes: int,
        policy: EvictionPolicy,
    ) -> None:
        self._directory = directory
        self._partials = partials
        self._entries = entries
        self._nbytes = nbytes
        self._policy = policy
        self._lock = Lock()
        self._sizes = Sizes(directory.entries, is_entry_name)
        self._whole: dict[str, Stored] = {}
        self._partial: dict[str, Stored] = {}
        self._is_measured = False

    @contextmanager
    def reserve(self, nbytes: int) -> Iterator[None]:
        """Make room for this many more bytes, to be allocated before the context is left.

        Raise `CapacityError` if they do not fit beside the files in use.
        """
        with self._measured():
            # Evict nothing in vain. Use by other processes shows only when an entry is dropped.
            held, stored = self._directory.held(), self._whole | self._partial
            in_use = sum(stored[name].nbytes for name in held if name in stored)
            if in_use + nbytes <= self._nbytes:
                self._evict(nbytes)
            if self._used() + nbytes > self._nbytes:
                is_possible = nbytes <= self._nbytes
                raise (CrowdedError if is_possible else CapacityError)(
                    f"{nbytes:,} bytes do not fit into the disk cache's {self._nbytes:,}"
                    " beside what is in use; raise its budget",
                    stage="fetch",
                    retryable=is_possible,
                )
            yield

    def trim(self) -> None:
        """Evict unused entries and partials down to the budget."""
        with self._measured():
            self._evict(0)

    def used(self) -> int:
        """Return the bytes of adapters' files in the folder."""
        with self._measured():
            return self._used()

    @property
    def last_used(self) -> int | None:
        """The bytes last measured, with this process's changes since; None before. Quick."""
        return self._used() if self._is_measured else None

    def note_use(self, name: str, nbytes: int, now_ns: int) -> None:
        with self._lock:
            self._see(name, Stored(nbytes, now_ns))

    @contextmanager
    def _measured(self) -> Iterator[None]:
        with self._lock, translated_errors("make room"), self._directory.locked():
            # The trash is not counted, and is empty except after a kill or a failure.
            self._directory.empty_trash()
            entries = self._sizes.look()
            for name in self._whole.keys() - entries.keys():
                self._forget(name, evicted=False)
            for name, seen in sorted(entries.items(), key=lambda item: item[1].used_ns):
                self._see(name, seen)
            # Partials change, so measure them anew each time; there are few.
            self._partial = Sizes(self._directory.partials, is_partial_name).look()
            self._is_measured = True
            yield

    def _used(self) -> int:
        return sum(item.nbytes for item in (*self._whole.values(), *self._partial.values()))

    def _see(self, name: str, seen: Stored) -> None:
        known = self._whole.get(name)
        if known is not None and known.nbytes != seen.nbytes:
            self._forget(name, evicted=False)  # another one in its place
            known = None
        if known is None:
            cost = float(FETCH_FIXED_COST + seen.nbytes)
            self._policy.admit(_key(name), max(1, seen.nbytes), cost)
        elif seen.used_ns > known.used_ns:
            self._policy.use(_key(name))
        self._whole[name] = seen

    def _forget(self, name: str, *, evicted: bool) -> None:
        self._partial.pop(name, None)
        if self._whole.pop(name, None) is not None:
            self._policy.remove(_key(name), evicted=evicted)

    def _evict(self, nbytes: int) -> None:
        """Drop until this much is free, or nothing more can go: partials first, by their age."""
        if self._used() + nbytes <= self._nbytes:
            return
        partials = sorted(self._partial, key=lambda name: self._partial[name].used_ns)
        for name in (*partials, *(key.location for key in self._policy.ranked())):
            if (self._entries if is_entry_name(name) else self._partials).drop(name):
                self._forget(name, evicted=True)
                if self._used() + nbytes <= self._nbytes:
                    return


def _key(name: str) -> AdapterKey:
    return AdapterKey(name, ())


class Sizes:
    """Sizes of the folders in `folder` with `wanted` names, counting adapters' files.

    An entry does not change: it is looked into once, and then costs one call.
    """

    def __init__(self, folder: Folder, wanted: Callable[[str], bool]) -> None:
        self._folder = folder
        self._wanted = wanted
        self._known: dict[str, tuple[int, int]] = {}

    def look(self) -> dict[str, Stored]:
        """Return what is there now, and when it was used. Raise `OSError`."""
        stored: dict[str, Stored] = {}
        known: dict[str, tuple[int, int]] = {}
        for name, status in _listed(self._folder):
            if self._wanted(name):
                inode, nbytes = self._known.get(name, (-1, 0))
                if inode != status.st_ino:
                    nbytes = self._size_of(name)
                known[name] = (status.st_ino, nbytes)
                stored[name] = Stored(nbytes, status.st_mtime_ns)
        self._known = known
        return stored

    def _size_of(self, name: str) -> int:
        try:
            with self._folder.subfolder(name) as inside:
                return sum(
                    status.st_size
                    for file, status in _listed(inside)
                    if role_of(file) is not None and stat.S_ISREG(status.st_mode)
                )
        except (FileNotFoundError, NotADirectoryError):
            return 0


def _listed(folder: Folder) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder.fd) as there:
        for entry in there:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # another process has removed it
            yield entry.name, status
