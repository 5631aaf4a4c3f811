"""Entries that are published, and which of them leave for room."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from hashlib import sha256
from threading import Lock
from typing import NamedTuple

from lorax_async.cache.base import (
    MAP_SUFFIX,
    MAX_RECORD_BYTES,
    PARTIAL_LOCK,
    RECORD,
    SCOPE_PREFIX,
    STAMP,
    TOKENIZER_RECORD,
    EntryRecord,
    decode_record,
    is_adapter_file,
    is_entry_name,
    is_partial_name,
    scope_name,
)
from lorax_async.cache.directory import (
    DAMAGED,
    CacheDirectory,
    CrowdedError,
    Folder,
    read_all,
    suppress_read_only,
    translate_errors,
    try_lock,
)
from lorax_async.cache.partials import this_boot
from lorax_async.errors import AdapterFormatError, CapacityError, IntegrityError, InternalError
from lorax_async.files import FileReader, hash_on, identity_of, is_settled, open_same
from lorax_async.formats.digests import FileHash
from lorax_async.formats.peft_names import TOKENIZER_FILES
from lorax_async.formats.strict_json import parse_object
from lorax_async.lifecycle.policies import EvictionPolicy
from lorax_async.types import AdapterKey, FileIdentity

MAX_SCOPES = 1_024
"""Scopes that an entry remembers; any other has to ask the source."""

Identities = Mapping[str, FileIdentity]
"""By the names of files."""


class DiskEntry:
    """The `CacheEntry` of a leased folder, which no process evicts."""

    mappable = True

    def __init__(
        self,
        directory: CacheDirectory,
        lease: int,
        record: EntryRecord,
        files: Identities,
        *,
        is_stamped: bool,
        tokenizer_bytes: int = 0,
    ) -> None:
        self.record = record
        self.identities = files
        self.nbytes = record.nbytes + tokenizer_bytes
        """Bytes of its files, with those of its tokenizer."""
        self.is_verified = is_stamped
        self._directory = directory
        self._lease = lease
        self._open = True
        directory.leased[lease] = record.name

    @property
    def folder(self) -> str:
        return os.path.join(self._directory.path, "entries", self.record.name)

    def reader(self, name: str) -> FileReader:
        identity = self.identities.get(name)
        if identity is None:
            raise InternalError(f"the cache's entry has no {name}")
        return FileReader(partial(open_same, f"{self.folder}/{name}", identity), identity, name)

    @contextmanager
    def _own_folder(self) -> Iterator[Folder]:
        """Open the leased folder. Raise `FileNotFoundError` if it was removed or replaced."""
        with (
            self._directory.open("entries") as parent,
            parent.subfolder(self.record.name) as folder,
        ):
            status = folder.status(RECORD)
            if status is None or not os.path.samestat(status, os.fstat(self._lease)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), RECORD)
            yield folder

    def tokenizer_bytes(self) -> int | None:
        """Hash the files of the adapter's own tokenizer; return their bytes, which may be 0.

        None if they were not added yet, or were damaged. Blocks.
        """
        with translate_errors("look for a tokenizer"), self._own_folder() as folder:
            return _hash_tokenizer(folder)

    def add_tokenizer(self, contents: Mapping[str, bytes]) -> None:
        """Write the tokenizer's files, and last the record that they are all there. Blocks.

        Call it with the directory locked, and room reserved.
        """
        with self._own_folder() as folder:
            if _hash_tokenizer(folder) is not None:
                return  # another process was faster
            for name in (TOKENIZER_RECORD, *TOKENIZER_FILES):
                folder.unlink(name)
            for name, content in contents.items():
                folder.write(name, content)
            digests = {name: sha256(content).hexdigest() for name, content in contents.items()}
            folder.write(TOKENIZER_RECORD, json.dumps(digests).encode())
            self.nbytes = self.record.nbytes + sum(map(len, contents.values()))

    def last_access(self, scope: str) -> float | None:
        with (
            translate_errors("look at an entry"),
            suppress(FileNotFoundError),
            self._directory.open("entries") as parent,
            parent.subfolder(self.record.name) as folder,
        ):
            status = folder.status(scope_name(scope))
            return None if status is None else max(0.0, time.time() - status.st_mtime)
        return None

    def record_access(self, scope: str) -> None:
        with (
            translate_errors("write to an entry"),
            suppress_read_only(),
            self._directory.open("entries") as parent,
            parent.subfolder(self.record.name) as folder,
        ):
            record_access(folder, scope)

    def close(self) -> None:
        if self._open:
            self._open = False
            del self._directory.leased[self._lease]
            os.close(self._lease)

    def __del__(self) -> None:
        if self._open:
            warnings.warn("unclosed entry of a disk cache", ResourceWarning, stacklevel=2)
            self.close()


class Entries:
    """All entries."""

    def __init__(self, directory: CacheDirectory) -> None:
        self._directory = directory

    def open(self, name: str, *, check: bool) -> DiskEntry | None:
        """Lease an entry; None if there is none, or it was damaged and has been removed."""
        try:
            return self.require(name, check=check)
        except IntegrityError:
            return None

    def require(self, name: str, *, check: bool) -> DiskEntry | None:
        """Lease an entry, as `open` does, but raise `IntegrityError` if it was damaged."""
        with translate_errors("open an entry"), self._directory.open("entries") as parent:
            try:
                folder = parent.subfolder(name)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno not in DAMAGED:
                    raise
                self._directory.discard(name)
                raise IntegrityError("the cache's entry is not a folder") from error
            with folder:
                try:
                    return self._lease(name, folder, parent, check=check)
                except IntegrityError:
                    self._directory.discard(name, only=folder)
                    raise

    def _lease(self, name: str, folder: Folder, parent: Folder, *, check: bool) -> DiskEntry | None:
        """Take the shared lock of the record, and return the entry; None if it is being removed."""
        try:
            lease = folder.file(RECORD, os.O_RDONLY)
        except OSError as error:
            if error.errno not in DAMAGED:
                raise
            if not folder.is_named(name, parent):
                return None
            raise IntegrityError("the cache's record is missing") from error
        with ExitStack() as refused:
            refused.callback(os.close, lease)
            if not try_lock(lease, shared=True):  # a removal may hold it for a moment
                with self._directory.locked():
                    if not try_lock(lease, shared=True):
                        return None
            if not folder.is_named(name, parent):
                return None
            record = _read_record(lease, name)
            files = require_whole(folder, record, check=check)
            names = remove_leftovers(folder)
            stamped = is_stamped(folder, record, files)
            own = _size_of_files(folder, TOKENIZER_FILES) if TOKENIZER_RECORD in names else 0
            refused.pop_all()
            return DiskEntry(
                *(self._directory, lease, record, files), is_stamped=stamped, tokenizer_bytes=own
            )

    def record(self, name: str) -> EntryRecord | None:
        """Return the record of an entry; None if it cannot be read. Raise `OSError`."""
        try:
            with (
                self._directory.open("entries") as parent,
                parent.subfolder(name) as folder,
                folder.open_file(RECORD, os.O_RDONLY) as fd,
            ):
                return _read_record(fd, name)
        except IntegrityError:
            return None
        except OSError as error:
            if error.errno not in DAMAGED:
                raise
            return None


def _read_record(fd: int, name: str) -> EntryRecord:
    try:
        record = decode_record(read_all(fd, MAX_RECORD_BYTES))
    except IsADirectoryError as error:
        raise IntegrityError("the cache's record is not a file") from error
    except AdapterFormatError as error:
        raise IntegrityError(error.problem) from error
    if record.name != name:
        raise IntegrityError("the cache's record is that of another entry")
    return record


def require_whole(folder: Folder, record: EntryRecord, *, check: bool) -> Identities:
    """Identify the files; raise `IntegrityError` if one is not as published, or `OSError`.

    Hash all with `check`, else those whose date changed, unless they were hashed since.
    """
    since_ns = time.time_ns()
    identities: dict[str, FileIdentity] = {}
    for file in record.files:
        name = file.name
        status = folder.status(name)
        if status is None or not stat.S_ISREG(status.st_mode) or status.st_size != file.nbytes:
            raise IntegrityError(f"{name} in the cache does not have its published size")
        identities[name] = identity_of(status)
    touched = [file for file in record.files if identities[file.name].mtime_ns != file.mtime_ns]
    if not check and (not touched or is_stamped(folder, record, identities)):
        return identities
    for file in record.files if check else touched:
        name, file_hash = file.name, FileHash(file.digest.kind, file.nbytes)
        with folder.open_file(name, os.O_RDONLY) as fd:
            identities[name] = identity_of(os.fstat(fd))
            hash_on(fd, file_hash, file.nbytes, name)
        if file_hash.digest() != file.digest:
            raise IntegrityError(f"{name} in the cache does not have its published digest")
    if check and all(is_settled(identity, since_ns) for identity in identities.values()):
        stamp(folder, record, identities)
    return identities


def stamp(folder: Folder, record: EntryRecord, files: Identities) -> None:
    """Record that the files' bytes have the record's digests.

    It holds for this boot, these inodes and these times: it outlives neither a crash, after which
    the disk may have other bytes, nor a write.
    """
    flags, content = os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _stamp_of(record, files)
    with suppress(OSError), folder.open_file(STAMP, flags) as fd:  # else they are hashed again
        os.write(fd, content)


def is_stamped(folder: Folder, record: EntryRecord, files: Identities) -> bool:
    """Return whether these very files were hashed since this machine was started."""
    expected = _stamp_of(record, files)
    with suppress(OSError):
        return folder.read(STAMP, len(expected)) == expected
    return False


def _stamp_of(record: EntryRecord, files: Identities) -> bytes:
    known = this_boot(), [(file, files[file.name]) for file in record.files]
    return sha256(repr(known).encode()).hexdigest().encode()


def remove_leftovers(folder: Folder) -> list[str]:
    """Remove what only the download needed; a process may be killed after the publication.

    Return the names that were there.
    """
    names = folder.names()
    for name in names:
        if name == PARTIAL_LOCK or name.endswith(MAP_SUFFIX):
            folder.unlink(name)
    return names


def _hash_tokenizer(folder: Folder) -> int | None:
    """Return the bytes of the tokenizer's files; None if they are not as their record says."""
    with suppress(FileNotFoundError, AdapterFormatError, IsADirectoryError):
        content = folder.read(TOKENIZER_RECORD, MAX_RECORD_BYTES)
        digests = parse_object(content, what="a record", max_bytes=MAX_RECORD_BYTES)
        nbytes = 0
        for name, digest in digests.items():
            with folder.open_file(name, os.O_RDONLY) as fd:
                size = os.fstat(fd).st_size
                file_hash = FileHash("sha256", size)
                hash_on(fd, file_hash, size, name)
            if name not in TOKENIZER_FILES or file_hash.digest().value != digest:
                return None
            nbytes += size
        return nbytes
    return None


def _size_of_files(folder: Folder, names: Iterable[str]) -> int:
    statuses = map(folder.status, names)
    return sum(status.st_size for status in statuses if status is not None)


def record_access(folder: Folder, scope: str) -> None:
    """Record that a scope may have the entry, as of now. Raise `OSError`."""
    name = scope_name(scope)
    if folder.status(name) is None:
        if sum(other.startswith(SCOPE_PREFIX) for other in folder.names()) >= MAX_SCOPES:
            return
        os.close(folder.file(name, os.O_WRONLY | os.O_CREAT))
    os.utime(name, dir_fd=folder.fd, follow_symlinks=False)


FETCH_FIXED_COST = 32 << 20
"""What a fetch costs besides its bytes, in bytes: three round trips of 30 ms at 16 x 20 MB/s."""


class MeasuredFolder(NamedTuple):
    """A folder of the cache: bytes of adapters' files, and when it was used (a partial: begun)."""

    nbytes: int
    used_ns: int
    inode: int


class DiskBudget:
    """The bytes of a cache's folder, reserved before they are written, in any process.

    Totals are not kept: each reservation measures the folder and allocates its bytes with the
    directory locked. What others do with an entry shows in its last use; how often it is used, each
    process counts for itself.
    """

    def __init__(self, directory: CacheDirectory, nbytes: int, policy: EvictionPolicy) -> None:
        self._directory = directory
        self._nbytes = nbytes
        self._policy = policy
        self._lock = Lock()
        self._whole: dict[str, MeasuredFolder] = {}
        self._partial: dict[str, MeasuredFolder] = {}
        self._is_measured = False

    @contextmanager
    def reserve(self, nbytes: int) -> Iterator[None]:
        """Make room for this many more bytes, to be allocated before the context is left.

        Raise `CapacityError`, and evict nothing, if they do not fit beside the files in use.
        """
        while True:
            with self._measure():
                if self._evict(nbytes):
                    continue  # leave the lock, so that what was evicted is deleted first
                if self._used() + nbytes > self._nbytes:
                    is_possible = nbytes <= self._nbytes
                    raise (CrowdedError if is_possible else CapacityError)(
                        f"{nbytes:,} bytes do not fit into the disk cache's {self._nbytes:,}"
                        " beside what is in use; raise its budget",
                        stage="fetch",
                        retryable=is_possible,
                    )
                yield
                return

    def trim(self) -> None:
        """Evict unused entries and partials down to the budget, or as far as possible."""
        with self._measure():
            self._evict(0, in_part=True)

    def used(self) -> int:
        """Return the bytes of adapters' files in the folder now, partial ones included."""
        with self._measure():
            return self._used()

    @property
    def last_used(self) -> int | None:
        """The bytes last measured, with this process's changes since; None before. Quick."""
        return self._used() if self._is_measured else None

    def note_use(self, entry: DiskEntry) -> None:
        """Count a use of an entry, which this or another process has published."""
        name, now_ns = entry.record.name, time.time_ns()
        with (
            translate_errors("note a use"),
            suppress_read_only(),
            suppress(FileNotFoundError),
            self._directory.open("entries") as parent,
        ):
            os.utime(name, ns=(now_ns, now_ns), dir_fd=parent.fd, follow_symlinks=False)
        with self._lock:
            known = self._whole.get(name)
            self._see(name, MeasuredFolder(entry.nbytes, now_ns, known.inode if known else 0))

    @contextmanager
    def _measure(self) -> Iterator[None]:
        with translate_errors("make room"):
            self._directory.empty_trash()
        with self._lock, translate_errors("make room"), self._directory.locked():
            # The trash is not counted: delete what others removed since, which is seldom anything.
            self._directory.empty_trash()
            with self._directory.open("entries") as parent:
                entries = measure(parent, is_entry_name, self._whole)
            for name in self._whole.keys() - entries.keys():
                self._forget(name, evicted=False)
            for name, seen in sorted(entries.items(), key=lambda item: item[1].used_ns):
                self._see(name, seen)
            # Partials change, so measure them anew each time; there are few.
            with self._directory.open("partials") as parent:
                self._partial = measure(parent, is_partial_name)
            self._is_measured = True
            yield

    def _used(self) -> int:
        return sum(item.nbytes for item in (*self._whole.values(), *self._partial.values()))

    def _see(self, name: str, seen: MeasuredFolder) -> None:
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

    def _evict(self, nbytes: int, *, in_part: bool = False) -> bool:
        """Drop what is not in use until this much is free: partials first, by their age.

        If all of it is not enough, drop nothing, unless `in_part`. Return whether any was dropped.
        """
        over = self._used() + nbytes - self._nbytes
        if over <= 0:
            return False
        stored = self._whole | self._partial
        # Quick, unlike a look at each lock: callers that wait for room retry often.
        ours = set(self._directory.leased.values()) & stored.keys()
        if not in_part and sum(stored[name].nbytes for name in ours) + nbytes > self._nbytes:
            return False
        partials = sorted(self._partial, key=lambda name: stored[name].used_ns)
        unused = list[str]()
        for name in (*partials, *(key.location for key in self._policy.ranked())):
            if over <= 0:
                break
            if not self._directory.is_busy(name):
                unused.append(name)
                over -= stored[name].nbytes
        if over > 0 and not in_part:
            return False
        dropped = [name for name in unused if self._directory.drop(name)]
        for name in dropped:
            self._forget(name, evicted=True)
        return bool(dropped)


def _key(name: str) -> AdapterKey:
    return AdapterKey(name, ())


def measure(
    parent: Folder, wanted: Callable[[str], bool], known: Mapping[str, MeasuredFolder] | None = None
) -> dict[str, MeasuredFolder]:
    """Return the folders in `parent` with `wanted` names. Raise `OSError`.

    Those of `known` that nothing used since cost one call each: a tokenizer may be added to others.
    """
    stored: dict[str, MeasuredFolder] = {}
    for name, status in _list_names(parent):
        if wanted(name):
            before = known.get(name) if known else None
            same = status.st_ino, status.st_mtime_ns
            if before is None or (before.inode, before.used_ns) != same:
                nbytes = _size_of(parent, name)
            else:
                nbytes = before.nbytes
            stored[name] = MeasuredFolder(nbytes, status.st_mtime_ns, status.st_ino)
    return stored


def _size_of(parent: Folder, name: str) -> int:
    try:
        with parent.subfolder(name) as inside:
            return sum(
                status.st_size
                for file, status in _list_names(inside)
                if is_adapter_file(file) and stat.S_ISREG(status.st_mode)
            )
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _list_names(folder: Folder) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder.fd) as there:
        for entry in there:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # another process has removed it
            yield entry.name, status
