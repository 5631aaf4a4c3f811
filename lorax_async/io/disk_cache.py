"""Whole adapters on this machine's disk, and partial ones on their way. Blocks; knows no loop.

In the folder, which is its owner's alone (0700, files 0600), all names are ours:

    entries/DIGEST/     adapter_config.json, weights, record.json, scope.DIGEST…
    partials/DIGEST.WHO.SERIAL/     the same files, and a chunk map beside each
    locks/, trash/, answers/    what is being done; being removed; was answered last

DIGEST is that of the key. An entry appears by one rename, after its digests were checked and its
files were brought to the disk (fsync); when it was used last is the time of its folder.

A partial is written by one process, whose name it bears. Its chunk maps are written right after the
bytes and brought to the disk with them when it is left; so they are true after a kill, for the
kernel has the pages, and after a proper end. After a crash of the machine they may not be: a
partial that was being written to in another boot is dropped. Nothing in the way of a byte waits for
the disk, and the digest at the end judges in any case.
"""

from __future__ import annotations

import os
import warnings
from time import monotonic

from lorax_async.core.cache_names import CacheKey
from lorax_async.core.policies import Policy
from lorax_async.errors import FetchError
from lorax_async.io.cache.answers import note, recall
from lorax_async.io.cache.download import DiskDownload, Shelves
from lorax_async.io.cache.entries import DiskEntry, Entries
from lorax_async.io.cache.failures import translated_errors
from lorax_async.io.cache.locks import NamedLock
from lorax_async.io.cache.partial_download import one_at_a_time
from lorax_async.io.cache.partials import Partials, Taken
from lorax_async.io.cache.place import Place
from lorax_async.io.cache.room import Room
from lorax_async.io.ports import Demand

POLL_SECONDS = 0.02
PATIENCE_SECONDS = 10.0
"""Somebody else's download that got no byte for so long is not waited for any more."""


class Turn:
    """Waits while somebody else downloads, and tells when to go on alone: `alone`.

    Raises `FetchError` if the demand has ended, when it is made and by `wait`.
    """

    def __init__(self, demand: Demand) -> None:
        self.alone = False
        self._demand = demand
        self._progress, self._since = -1, monotonic()
        self._require()

    def wait(self, progress: int) -> None:
        """A moment; the other one is that far. Blocks."""
        if progress != self._progress:
            self._progress, self._since = progress, monotonic()
        self.alone = monotonic() - self._since > PATIENCE_SECONDS
        self._demand.wait(POLL_SECONDS)
        self._require()

    def _require(self) -> None:
        if self._demand.ended:
            raise FetchError("the fetch was cancelled before it began")


class DiskCache:
    """The `Cache` in a folder, which several processes may use at once.

    Parameters
    ----------
    path
        The folder, made if it is not there; for nothing else.
    nbytes
        Budget, over entries and partials of all processes.
    policy
        In which order entries have to go; a new one.

    Raises
    ------
    ConfigError
        The folder belongs to another user, others may write to it, or it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], nbytes: int, policy: Policy) -> None:
        place = Place(path)
        try:
            with translated_errors("clean up"):
                place.tidy()
        except BaseException:
            place.close()
            raise
        entries, partials = Entries(place), Partials(place)
        room = Room(place, entries, partials, nbytes, policy)
        self.shelves = Shelves(place, entries, partials, room)
        """For `io/cache/upkeep.py`."""
        self._open = True

    def open(self, key: CacheKey, *, check: bool = False) -> DiskEntry | None:
        self.shelves.place.restore()
        entry = self.shelves.entries.open(key.name, check=check)
        if entry is not None:
            try:
                with translated_errors("note a use"):
                    self.shelves.room.note_use(key.name, entry.used_now())
            except BaseException:
                entry.close()
                raise
        return entry

    def try_begin(
        self, key: CacheKey, scope: str, *, alone: bool = False
    ) -> DiskEntry | DiskDownload | int:
        shelves = self.shelves
        shelves.place.restore()

        def download(taken: Taken, lock: NamedLock | None) -> DiskDownload:
            return DiskDownload(shelves, key, scope, taken, lock)

        return one_at_a_time(
            *(shelves.place, shelves.partials, key, self.open, download), alone=alone
        )

    def begin(self, key: CacheKey, scope: str, demand: Demand) -> DiskEntry | DiskDownload:
        turn = Turn(demand)
        while isinstance(begun := self.try_begin(key, scope, alone=turn.alone), int):
            turn.wait(begun)
        return begun

    def note_version(self, question: str, source: str, version: str) -> None:
        self.shelves.place.restore()
        note(self.shelves.place.answers, question, source, version)

    def last_version(self, question: str) -> tuple[str, str] | None:
        self.shelves.place.restore()
        return recall(self.shelves.place.answers, question)

    def condemn(self, key: CacheKey) -> None:
        with translated_errors("remove an entry"):
            self.shelves.entries.condemn(key.name)

    def remove(self, key: CacheKey) -> bool:
        shelves = self.shelves
        shelves.place.restore()
        with translated_errors("remove an entry"):
            left = [
                name for name in shelves.partials.of(key.name) if not shelves.partials.drop(name)
            ]
            shelves.entries.drop(key.name)
            return not left and shelves.place.entries.status(key.name) is None

    def used(self) -> int:
        self.shelves.place.restore()
        return self.shelves.room.used()

    @property
    def last_used(self) -> int | None:
        """As `used` was when room was made last; None before that. Looks at nothing."""
        return self.shelves.room.last_used

    def close(self) -> None:
        if self._open:
            self._open = False
            self.shelves.place.close()

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            warnings.warn("unclosed disk cache", ResourceWarning, stacklevel=2)
            self.close()
