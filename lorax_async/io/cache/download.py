"""An adapter on its way into the cache: its files, and how they become an entry. Blocks."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lorax_async.core.cache_names import MAP_SUFFIX, RECORD, CacheKey, FileRole, role_of
from lorax_async.core.cache_record import Record, record_of
from lorax_async.core.file_digest import Digest
from lorax_async.errors import FetchError, IntegrityError, InternalError
from lorax_async.io.cache.entries import DiskEntry, Entries, Identities, grant, require_whole
from lorax_async.io.cache.failures import translated_errors
from lorax_async.io.cache.locks import NamedLock, granted_shared
from lorax_async.io.cache.partial_file import PartialFile
from lorax_async.io.cache.partials import Partials, Taken
from lorax_async.io.cache.place import Place
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


class DiskDownload:
    """The `CacheDownload` that writes to a folder of its own, under the entry's lock if it has it.

    Nothing here relies on that lock: another process that downloads the same writes to another
    folder, and the first to rename his to the entry's name has published it.
    """

    mappable = True

    def __init__(
        self, shelves: Shelves, key: CacheKey, scope: str, taken: Taken, lock: NamedLock | None
    ) -> None:
        self.key = key
        self._shelves = shelves
        self._scope = scope
        self._taken: Taken | None = taken
        self._lock = lock
        self._files: dict[FileRole, PartialFile] = {}

    def file(
        self, role: FileRole, nbytes: int | None, expected: Digest | None = None
    ) -> PartialFile:
        if role in self._files:
            raise InternalError(f"{role.file_name} was added to the download twice")
        file = PartialFile(self._open_folder().folder, role, expected, self._shelves.room.claimed)
        try:
            file.resume(nbytes)
        except BaseException:
            file.close()
            with translated_errors("give room back"):
                file.remove()
            raise
        self._files[role] = file
        return file

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

    def discard(self) -> None:
        if (taken := self._taken) is not None:
            with self._ending(), translated_errors("remove a download"):
                self._shelves.partials.remove(taken)

    def close(self) -> None:
        if (taken := self._taken) is None:
            return
        if not any(file.is_worth_keeping() for file in self._files.values()):
            self.discard()
            return
        with self._ending(), translated_errors("leave a download"):
            try:
                self._bring_to_disk(taken)
            except OSError:
                self._shelves.partials.remove(taken)
                raise
            self._shelves.partials.leave(taken)

    def __del__(self) -> None:
        if self._taken is not None:
            warnings.warn("unclosed download of a disk cache", ResourceWarning, stacklevel=2)
            self.close()

    def _open_folder(self) -> Taken:
        if self._taken is None:
            raise InternalError("the download has ended")
        return self._taken

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
                with self._unless_taken_away():
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

    @contextmanager
    def _discarded_if_wrong(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            self.discard()
            raise

    @contextmanager
    def _unless_taken_away(self) -> Iterator[None]:
        """Where locks do nothing, a process that took this one for dead may have the folder now."""
        try:
            yield
        except FileNotFoundError as error:
            raise FetchError(
                "another process took over the download, for locks do not work in the disk cache's"
                " folder; load it again"
            ) from error

    def _bring_to_disk(self, taken: Taken) -> None:
        for file in self._files.values():
            if file.is_worth_keeping():
                file.sync()
            else:
                file.remove()
        taken.folder.sync()

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Whatever happens, nothing stays open or locked."""
        try:
            yield
        finally:
            self._taken = None
            for file in self._files.values():
                file.close()
            if self._lock is not None:
                self._lock.release()
