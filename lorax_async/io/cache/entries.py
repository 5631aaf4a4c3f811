"""Whole adapters in the cache: opening, checking and dropping them. Blocks."""

from __future__ import annotations

import errno
import os
import stat
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from threading import Lock

from lorax_async.adapter import FileIdentity
from lorax_async.core.cache_names import MAP_SUFFIX, RECORD, SCOPE_PREFIX, FileRole, scope_name
from lorax_async.core.cache_record import MAX_RECORD_BYTES, FileRecord, Record, decoded_record
from lorax_async.core.disk_budget import Stored
from lorax_async.core.file_digest import FileHash
from lorax_async.errors import AdapterFormatError, IntegrityError, InternalError
from lorax_async.io.cache.failures import translated_errors
from lorax_async.io.cache.folders import Folder, remove_tree
from lorax_async.io.cache.hashing import hash_on
from lorax_async.io.cache.locks import granted_alone, granted_shared
from lorax_async.io.cache.place import Place
from lorax_async.io.sources.checked_open import FileReader, changed, identity_of, translated

_NO_FOLDER = {errno.ENOTDIR, errno.ELOOP}
_ABSENT = {errno.ENOENT, errno.EISDIR} | _NO_FOLDER

MAX_SCOPES = 1_024
"""Scopes that an entry remembers; any other has to ask the source."""

Identities = Mapping[FileRole, FileIdentity]


class DiskEntry:
    """The `CacheEntry` of a folder, which is open and locked against removal."""

    mappable = True

    def __init__(self, shelf: Entries, folder: Folder, record: Record, files: Identities) -> None:
        self.record = record
        self._shelf = shelf
        self._folder = folder
        self._files = files
        self._open = True

    @property
    def folder(self) -> str:
        return os.readlink(f"/proc/self/fd/{self._folder.fd}")

    def used_now(self) -> Stored:
        """Every process can see that it was used now; as it is stored then. Raises `OSError`."""
        with _unless_read_only():
            os.utime(self._folder.fd)
        return Stored(self.record.nbytes, os.fstat(self._folder.fd).st_mtime_ns)

    def reader(self, role: FileRole) -> FileReader:
        identity = self._files.get(role)
        if identity is None:
            raise InternalError(f"the cache's entry has no {role.file_name}")
        opener = partial(_open_same, self._shelf.folder, self.record.name, role, identity)
        return FileReader(opener, identity, role.file_name)

    def granted(self, scope: str) -> float | None:
        with translated_errors("look at an entry"):
            status = self._folder.status(scope_name(scope))
        return None if status is None else max(0.0, time.time() - status.st_mtime)

    def grant(self, scope: str) -> None:
        with translated_errors("write to an entry"), _unless_read_only():
            grant(self._folder, scope)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._shelf.leave(self.record.name, self._folder)

    def __del__(self) -> None:
        if self._open:
            warnings.warn("unclosed entry of a disk cache", ResourceWarning, stacklevel=2)
            self.close()


class Entries:
    """All entries, and which of them this process holds."""

    def __init__(self, place: Place) -> None:
        self.folder = place.entries
        self._place = place
        self._lock = Lock()
        self._held: Counter[str] = Counter()

    def held(self) -> set[str]:
        with self._lock:
            return set(self._held)

    def open(self, name: str, *, check: bool) -> DiskEntry | None:
        """The entry; None if there is none, or it was damaged and has been removed."""
        try:
            return self.require(name, check=check)
        except IntegrityError:
            return None

    def require(self, name: str, *, check: bool) -> DiskEntry | None:
        """As `open`, but `IntegrityError` if it was damaged."""
        with translated_errors("open an entry"):
            folder = self._enter(name)
            if folder is None:
                return None
            try:
                return self._opened(name, folder, check=check)
            except BaseException as error:
                self.leave(name, folder)
                if isinstance(error, IntegrityError):
                    self.condemn(name)
                raise

    def record(self, name: str) -> Record | None:
        """What an entry says of itself; None if it cannot be read. Raises `OSError`."""
        try:
            with self.folder.subfolder(name) as folder:
                return read_record(folder, name)
        except IntegrityError:
            return None
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            return None

    def adopt(self, folder: Folder, record: Record, files: Identities) -> DiskEntry:
        """The entry that a folder of ours, which is open, has just become."""
        with self._lock:
            self._held[record.name] += 1
        return DiskEntry(self, folder, record, files)

    def drop(self, name: str) -> bool:
        """Remove an entry; False if somebody holds it, or it is not there. Raises `OSError`."""
        with self._lock:
            removed = None if name in self._held else self._claimed(name)
        if removed is not None:
            remove_tree(removed, self._place.trash)
        return removed is not None

    def condemn(self, name: str) -> None:
        """Remove what nobody may have any more; whoever holds it keeps what he has open."""
        with suppress(FileNotFoundError):
            self._place.throw_away(self.folder, name)

    def leave(self, name: str, folder: Folder) -> None:
        """One holder less."""
        with self._lock:
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]
        folder.close()

    def in_use(self, name: str) -> bool:
        """Does somebody hold it, in any process? Raises `OSError`."""
        try:
            with self.folder.subfolder(name) as folder:
                return not granted_alone(folder.fd)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            return False

    def _enter(self, name: str) -> Folder | None:
        """Its folder, held; None if there is none, or it is being removed."""
        with self._lock:
            try:
                folder = self.folder.subfolder(name)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno not in _NO_FOLDER:
                    raise
                self.condemn(name)
                return None
            held = False
            try:
                held = self._is_still(name, folder)
            finally:
                if not held:
                    folder.close()
            if held:
                self._held[name] += 1
            return folder if held else None

    def _is_still(self, name: str, folder: Folder) -> bool:
        """Is it locked for us before anybody removed it?"""
        if not granted_shared(folder.fd):
            return False
        status = self.folder.status(name)
        return status is not None and os.path.samestat(status, os.fstat(folder.fd))

    def _opened(self, name: str, folder: Folder, *, check: bool) -> DiskEntry:
        record = read_record(folder, name)
        files = require_whole(folder, record, check=check)
        _tidy(folder)
        return DiskEntry(self, folder, record, files)

    def _claimed(self, name: str) -> str | None:
        """Its name in the trash; None if another process holds it, or was faster."""
        with suppress(FileNotFoundError):
            try:
                with self.folder.subfolder(name) as folder:
                    free = granted_alone(folder.fd)
                    return self._place.move_out(self.folder, name) if free else None
            except OSError as error:
                if error.errno not in _NO_FOLDER:
                    raise
                return self._place.move_out(self.folder, name)
        return None


@contextmanager
def _unless_read_only() -> Iterator[None]:
    """On a read-only file system an entry is as good as elsewhere, and nothing is noted of it."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EROFS:
            raise


def read_record(folder: Folder, name: str) -> Record:
    """Raises `IntegrityError` if there is none, or another entry's; else `OSError`."""
    try:
        record = decoded_record(folder.read(RECORD, MAX_RECORD_BYTES))
    except AdapterFormatError as error:
        raise IntegrityError(error.problem) from error
    except OSError as error:
        if error.errno not in _ABSENT and error.errno is not None:
            raise
        raise IntegrityError("the cache's record is missing") from error
    if record.name != name:
        raise IntegrityError("the cache's record is that of another entry")
    return record


def require_whole(folder: Folder, record: Record, *, check: bool) -> Identities:
    """Which files these are; `IntegrityError` if one is not as it was published, else `OSError`."""
    return {file.role: _identity(folder, file, check=check) for file in record.files}


def _identity(folder: Folder, file: FileRecord, *, check: bool) -> FileIdentity:
    name = file.role.file_name
    status = folder.status(name)
    if status is None or not stat.S_ISREG(status.st_mode) or status.st_size != file.nbytes:
        raise IntegrityError(f"{name} in the cache has not the size that was published")
    if check or status.st_mtime_ns != file.mtime_ns:
        fd = folder.file(name, os.O_RDONLY)
        try:
            found = FileHash(file.digest.kind, file.nbytes)
            hash_on(fd, found, file.nbytes, name)
        finally:
            os.close(fd)
        if found.digest() != file.digest:
            raise IntegrityError(f"{name} in the cache has not the digest that was published")
    return identity_of(status)


def _tidy(folder: Folder) -> None:
    """Whoever published it may have been killed before he had removed his maps."""
    for name in folder.names():
        if name.endswith(MAP_SUFFIX):
            folder.unlink(name)


def grant(folder: Folder, scope: str) -> None:
    """Let the folder's entry remember a scope, from now on. Raises `OSError`."""
    name = scope_name(scope)
    if folder.status(name) is None:
        if sum(each.startswith(SCOPE_PREFIX) for each in folder.names()) >= MAX_SCOPES:
            return
        os.close(folder.file(name, os.O_WRONLY | os.O_CREAT))
    os.utime(name, dir_fd=folder.fd, follow_symlinks=False)


def _open_same(folder: Folder, entry: str, role: FileRole, identity: FileIdentity) -> int:
    name = role.file_name
    try:
        fd = folder.file(f"{entry}/{name}", os.O_RDONLY)
        try:
            if identity_of(os.fstat(fd)) != identity:
                raise changed(name)
        except BaseException:
            os.close(fd)
            raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise changed(name) from error
    except OSError as error:
        raise translated(error, name) from error
    return fd
