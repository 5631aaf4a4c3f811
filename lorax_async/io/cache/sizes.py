"""How much the folders of a cache hold; counted are the files of adapters."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator

from lorax_async.core.cache_names import role_of
from lorax_async.core.disk_budget import Stored
from lorax_async.io.cache.folders import Folder


class Sizes:
    """Sizes of the folders in `folder` whose names are `wanted`.

    An entry does not change any more: it is looked into once, and afterwards costs one call.
    """

    def __init__(self, folder: Folder, wanted: Callable[[str], bool]) -> None:
        self._folder = folder
        self._wanted = wanted
        self._known: dict[str, tuple[int, int]] = {}

    def look(self) -> dict[str, Stored]:
        """What is there now, and when it was used. Raises `OSError`."""
        found: dict[str, Stored] = {}
        known: dict[str, tuple[int, int]] = {}
        for name, status in _listed(self._folder):
            if not self._wanted(name):
                continue
            inode, nbytes = self._known.get(name, (-1, 0))
            if inode != status.st_ino:
                nbytes = size_of(self._folder, name)
            known[name] = (status.st_ino, nbytes)
            found[name] = Stored(nbytes, status.st_mtime_ns)
        self._known = known
        return found


def size_of(folder: Folder, name: str) -> int:
    """Bytes of the adapter's files in there; 0 if it is gone, or no folder."""
    return sum(status.st_size for status in files_in(folder, name))


def files_in(folder: Folder, name: str) -> list[os.stat_result]:
    try:
        with folder.subfolder(name) as inside:
            return [
                status
                for file, status in _listed(inside)
                if role_of(file) is not None and stat.S_ISREG(status.st_mode)
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _listed(folder: Folder) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder.fd) as there:
        for entry in there:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # another process has removed it
            yield entry.name, status
