"""Who was let have what is in the standard hub cache. Blocks."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from contextlib import suppress

from lorax_async.core.cache_names import scope_name
from lorax_async.io.cache.entries import grant
from lorax_async.io.cache.failures import translated_errors
from lorax_async.io.cache.folders import Folder

MAX_REMEMBERED = 65_536

_ALL = "all"


class Scopes:
    """By an entry's name: on the disk, in a `folder` of our own, or for as long as this is kept."""

    def __init__(self, folder: Folder | None) -> None:
        self._folder = folder
        self._since: OrderedDict[tuple[str, str], float] = OrderedDict()

    def begin(self, name: str) -> None:
        """The entry is there by our own work: who was let have it, is known to the last."""
        if self._folder is not None:
            with translated_errors("note who may have an entry"), self._entered(name) as entry:
                os.close(entry.file(_ALL, os.O_WRONLY | os.O_CREAT))

    def are_all(self, name: str) -> bool:
        """Is it there by our own work?"""
        if self._folder is None:
            return False
        with translated_errors("look who may have an entry"):
            return self._time_of(name, _ALL) is not None

    def grant(self, name: str, scope: str) -> None:
        if self._folder is not None:
            with translated_errors("note who may have an entry"), self._entered(name) as entry:
                grant(entry, scope)
            return
        self._since[name, scope] = time.time()
        self._since.move_to_end((name, scope))
        if len(self._since) > MAX_REMEMBERED:
            self._since.popitem(last=False)

    def granted(self, name: str, scope: str) -> float | None:
        """Seconds since."""
        if self._folder is None:
            since = self._since.get((name, scope))
        else:
            with translated_errors("look who may have an entry"):
                since = self._time_of(name, scope_name(scope))
        return None if since is None else max(0.0, time.time() - since)

    def _entered(self, name: str) -> Folder:
        assert self._folder is not None
        with suppress(FileExistsError):
            return self._folder.make_subfolder(name)
        return self._folder.subfolder(name)

    def _time_of(self, name: str, file: str) -> float | None:
        assert self._folder is not None
        try:
            with self._folder.subfolder(name) as entry:
                status = entry.status(file)
        except FileNotFoundError:
            return None
        return None if status is None else status.st_mtime
