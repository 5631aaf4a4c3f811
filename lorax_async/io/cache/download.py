"""An adapter on its way into the cache: its files, and how they become an entry. Blocks."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from lorax_async.core.cache_names import MAP_SUFFIX, RECORD, CacheKey, FileRole, role_of
from lorax_async.core.cache_record import Record, record_of
from lorax_async.core.file_digest import Digest
from lorax_async.errors import FetchError, InternalError
from lorax_async.io.cache.entries import DiskEntry, Entries, Identities, grant, require_whole
from lorax_async.io.cache.failures import translated_errors
from lorax_async.io.cache.locks import NamedLock, granted_shared
from lorax_async.io.cache.partial_download import PartialDownload
from lorax_async.io.cache.partial_file import PartialFile
from lorax_async.io.cache.partials import Partials, Taken
from lorax_async.io.cache.place import Place
from lorax_async.io.cache.ports import contradiction
from lorax_async.io.cache.room import Room

_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Shelves:
    """All that a cache consists of."""

    place: Place
    entries: Entries
    partials: Partials
    room: Room


class DiskDownload(PartialDownload):
    """The `CacheDownload` whose folder becomes an entry by one rename.

    The first to rename his to the entry's name has published it.
    """

    mappable = True

    def __init__(
        self, shelves: Shelves, key: CacheKey, scope: str, taken: Taken, lock: NamedLock | None
    ) -> None:
        super().__init__(shelves.partials, shelves.room.claimed, taken, lock)
        self.key = key
        self._shelves = shelves
        self._scope = scope

    def file(
        self, role: FileRole, nbytes: int | None, expected: Digest | None = None
    ) -> PartialFile:
        return self._add(role, nbytes, expected)

    def publish(self) -> DiskEntry:
        taken = self._open_folder()
        if not self._files:
            raise InternalError("a download without files was to be published")
        with self._discarded_if_wrong():
            digests = [file.checked_digest() for file in self._files.values()]
        with translated_errors("publish a download"):
            settled = zip(self._files.values(), digests, strict=True)
            files = (file.settled(digest) for file, digest in settled)
            record = record_of(self.key, tuple(sorted(files, key=lambda file: file.role)))
            self._write_record(taken, record)
            identities = require_whole(taken.folder, record, check=False)
            return self._renamed(taken, record, identities)

    def _write_record(self, taken: Taken, record: Record) -> None:
        for name in taken.folder.names():
            role = role_of(name.removesuffix(MAP_SUFFIX))
            if name == RECORD or (role is not None and role not in self._files):
                taken.folder.unlink(name)  # of one that was interrupted
        taken.folder.write(RECORD, record.encoded())
        grant(taken.folder, self._scope)
        taken.folder.sync()

    def _renamed(self, taken: Taken, record: Record, files: Identities) -> DiskEntry:
        place, entries = self._shelves.place, self._shelves.entries
        granted_shared(taken.folder.fd)  # it must not be evicted as soon as it is there
        for _ in range(_ATTEMPTS):
            try:
                with self._unless_taken_away(), place.undisturbed():
                    os.rename(
                        taken.name,
                        self.key.name,
                        src_dir_fd=place.partials.fd,
                        dst_dir_fd=place.entries.fd,
                    )
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                # Opening removes what is damaged; then there is room for ours.
                theirs = entries.open(self.key.name, check=False)
                if theirs is not None:
                    self.discard()
                    if theirs.record.contradicts(record.files):
                        theirs.close()
                        raise contradiction() from None
                    return theirs
            else:
                return self._published(taken, record, files)
        raise FetchError("the disk cache's entry was in the way again and again; load it again")

    def _published(self, taken: Taken, record: Record, files: Identities) -> DiskEntry:
        entry = self._shelves.entries.adopt(taken.folder, record, files)
        try:
            with self._ending():
                self._shelves.partials.forget(taken.name)
                self._shelves.place.entries.sync()
                for file in self._files.values():
                    file.remove_map()
            self._shelves.room.note_use(record.name, entry.used_now())
        except BaseException:
            entry.close()
            raise
        return entry
