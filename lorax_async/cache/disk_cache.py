"""The disk cache of one or several processes, and its maintenance."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass

from lorax_async.cache.base import (
    MAP_SUFFIX,
    RECORD,
    CacheEntry,
    CacheKey,
    EntryRecord,
    ReadOnlyCache,
    is_adapter_file,
    is_entry_name,
    is_partial_name,
    record_of,
)
from lorax_async.cache.directory import CacheDirectory, Folder, translate_errors, unique
from lorax_async.cache.entries import (
    DiskBudget,
    DiskEntry,
    Entries,
    measure,
    record_access,
    require_whole,
    stamp,
)
from lorax_async.cache.partials import OpenPartial, PartialFile, Partials
from lorax_async.errors import AdapterFormatError, FetchError, IntegrityError, InternalError
from lorax_async.formats.digests import Digest
from lorax_async.formats.strict_json import parse_object
from lorax_async.lifecycle.policies import EvictionPolicy

_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
_PUBLICATIONS = 3
_MAX_ANSWER_BYTES = 64 << 10
_COPY_BYTES = 4 << 20


class DiskCache:
    """Whole adapters by key, and partial ones on their way, in a folder that processes share.

    The budget counts adapters' files. Interrupted downloads make room first, then entries that are
    not leased, in the policy's order. Between calls only leases and downloads keep files open: if
    the folder is removed, the next call makes it again.

    Methods raise `ConfigError` if the folder belongs to another user, others may write to it, it
    cannot be opened, or its file system has no locks.

    Parameters
    ----------
    path
        The folder, made if it is missing; for nothing else.
    nbytes
        Budget, over entries and partials of all processes.
    policy
        The order of eviction; an instance that nothing else uses.
    read_only
        A cache that is looked at before the folder: the standard hub cache.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        nbytes: int,
        policy: EvictionPolicy,
        read_only: ReadOnlyCache | None = None,
    ) -> None:
        self._read_only = read_only
        self.directory = CacheDirectory(path)
        self.entries, self.partials = Entries(self.directory), Partials(self.directory)
        self.budget = DiskBudget(self.directory, nbytes, policy)

    def open(
        self, key: CacheKey, *, check: bool = False, sha256: str | None = None
    ) -> CacheEntry | None:
        """Lease the entry and count a use; None if there is none, or `sha256` refutes it.

        Remove an entry whose files do not have the recorded sizes or digests. Hash them with
        `check`, or if a file was touched.
        """
        stored: CacheEntry | None = None
        if self._read_only is not None:
            stored = self._read_only.open(key, check=check)
        if stored is None:
            entry = self.entries.open(key.name, check=check)
            stored = None if entry is None else self.use(entry)
        if stored is not None and stored.record.is_refuted_by(sha256):
            stored.close()
            return None
        return stored

    def use(self, entry: DiskEntry) -> DiskEntry:
        """Count a use of an entry and return the entry; close it on an error."""
        try:
            self.budget.note_use(entry)
        except BaseException:
            entry.close()
            raise
        return entry

    def add_tokenizer(self, entry: DiskEntry, contents: Mapping[str, bytes]) -> None:
        """Add the files of an adapter's own tokenizer to its leased entry, with which they leave.

        Files that another process has added stay. Raise `CapacityError` without room.
        """
        nbytes = sum(map(len, contents.values()))
        with self.budget.reserve(nbytes), translate_errors("add a tokenizer"):
            entry.add_tokenizer(contents)
        self.budget.note_use(entry)

    def try_begin(
        self, key: CacheKey, scope: str, *, alone: bool = False, sha256: str | None = None
    ) -> CacheEntry | DiskDownload | int:
        """Return the entry, or begin to download it; record that `scope` may have it.

        Return the progress of another download if there is one; begin a second if `alone`. An entry
        that `sha256` refutes, and that is not in use, is downloaded again; it stays until the new
        bytes are here, and only other ones replace it.
        """
        stored = self.open(key, sha256=sha256)
        if stored is not None:
            return _accessed(stored, scope)
        with translate_errors("begin a download"), self.directory.locked():
            entry = self.entries.open(key.name, check=False)  # published meanwhile?
            refuted = entry is not None and entry.record.is_refuted_by(sha256)
            if entry is not None and refuted:
                entry.close()
                is_busy = self.directory.is_busy(key.name)
                entry = self.entries.open(key.name, check=False) if is_busy else None
            if entry is None:
                claimed = self.partials.claim(key.name, alone=alone)
                if isinstance(claimed, int):
                    return claimed
                return DiskDownload(self, key, scope, claimed, replaces=refuted)
        # Not with the directory locked: the budget's lock comes before it.
        return _accessed(self.use(entry), scope)

    def note_version(self, question: str, source: str, version: str) -> None:
        """Record a source's latest answer, whether the cache has that version or not."""
        if self.last_version(question) == (source, version):
            return  # it is on the disk, where another one might not be after a crash
        content = json.dumps({"source": source, "version": version}).encode()
        new = f"{unique()}.new"
        with translate_errors("note a version"), self.directory.open("answers") as answers:
            try:
                answers.write(new, content)  # half of one, after a crash, is ignored
                os.rename(new, _name_of(question), src_dir_fd=answers.fd, dst_dir_fd=answers.fd)
            except BaseException:
                answers.unlink(new)
                raise

    def last_version(self, question: str) -> tuple[str, str] | None:
        """Return the source and version of the last answer; None if there is none.

        An answer to this cache is preferred to what other tools recorded.
        """
        with translate_errors("look for a version"), self.directory.open("answers") as answers:
            key = read_answer(answers, _name_of(question))
        if key is not None:
            return key.source, key.version
        return None if self._read_only is None else self._read_only.last_version(question)

    def invalidate(self, key: CacheKey) -> None:
        """Remove an entry whose bytes are wrong, even if it is leased.

        Open files stay readable; opening another raises `IntegrityError`.
        """
        with translate_errors("remove an entry"):
            self.directory.discard(key.name)


def _accessed(entry: CacheEntry, scope: str) -> CacheEntry:
    """Record that a scope may have the entry, and return it; close it on an error."""
    try:
        entry.record_access(scope)
    except BaseException:
        entry.close()
        raise
    return entry


class DiskDownload:
    """An adapter on its way into the cache, which no other process downloads meanwhile.

    Its folder becomes an entry by one rename: the first to do so wins. It is `mappable`, as the
    entry will be. With `replaces`, it takes the place of an entry with other bytes.
    """

    mappable = True

    def __init__(
        self,
        cache: DiskCache,
        key: CacheKey,
        scope: str,
        partial: OpenPartial,
        *,
        replaces: bool = False,
    ) -> None:
        self.key = key
        self._cache = cache
        self._directory = cache.directory
        self._scope = scope
        self._partial = partial
        self._replaces = replaces
        self._open = True
        self._files: dict[str, PartialFile] = {}

    def file(self, name: str, nbytes: int, expected: Digest | None = None) -> PartialFile:
        """Add a file, with room for all of it, and the bytes of a partial download.

        Without an `expected` digest, record our own. Raise `CapacityError` without room.
        """
        self._require_open()
        if name in self._files:
            raise InternalError(f"{name} was added to the download twice")
        file = self._files[name] = PartialFile(
            self._partial.folder, name, nbytes, expected, self._cache.budget.reserve
        )
        return file

    def store(self, name: str, content: int) -> None:
        """Add a file with the bytes of an open one. Raise as `file`. Blocks."""
        file = self.file(name, os.fstat(content).st_size)
        for offset in range(0, file.nbytes, _COPY_BYTES):
            file.write(offset, memoryview(os.pread(content, _COPY_BYTES, offset)))

    def remove(self, name: str) -> None:
        """Remove a file, which only others were made from."""
        self._require_open()
        with translate_errors("remove a file"), closing(self._files.pop(name)) as file:
            file.remove()

    def publish(self) -> DiskEntry:
        """Check the digests of the complete files, and publish them to all processes at once.

        Return the entry of a process that was faster, if it has the same digests. Raise
        `IntegrityError` for a digest that is not the expected one (or not theirs), and leave
        nothing of the download; else raise as `PartialFile.write`.
        """
        self._require_open()
        if not self._files:
            raise InternalError("a download without files was to be published")
        try:
            with translate_errors("publish a download"):
                record = self._complete()
                entry, is_ours = self._rename(record)
        except IntegrityError:
            self.discard()
            raise
        if is_ours:
            with self._ending():
                return self._cache.use(entry)
        try:
            self.discard()
            if entry.record.contradicts(record.files):
                raise IntegrityError(
                    "another process has stored other bytes of the same version meanwhile: the"
                    " source changed them without saying so; load it again"
                )
        except BaseException:
            entry.close()
            raise
        return entry

    def _complete(self) -> EntryRecord:
        """Turn the folder into that of an entry, and return its record."""
        folder = self._partial.folder
        files = [file.complete() for _, file in sorted(self._files.items())]
        record = record_of(self.key, tuple(files))
        for name in folder.names():  # what a partial download had, and this one did not add
            of_file = name.removesuffix(MAP_SUFFIX)
            if name == RECORD or (is_adapter_file(of_file) and of_file not in self._files):
                folder.unlink(name)
        # Not synced: an entry that loses its record or a name in a crash is fetched again.
        folder.write(RECORD, record.encoded())
        record_access(folder, self._scope)
        stamp(folder, record, require_whole(folder, record, check=False))
        return record

    def _rename(self, record: EntryRecord) -> tuple[DiskEntry, bool]:
        """Rename the folder; return the entry, and whether it is ours, not a faster process's."""
        for _ in range(_PUBLICATIONS):
            # Under one lock, so that the entry cannot be evicted before it is leased.
            with self._directory.locked():
                is_ours = self._try_rename()
                if not is_ours and self._replaces and self._remove_other(record):
                    is_ours = self._try_rename()
                entry = self._cache.entries.open(self.key.name, check=False)
            if entry is not None:  # else it was damaged, and has been removed
                return entry, is_ours
        raise FetchError("the disk cache's entry was in the way again and again; load it again")

    def _remove_other(self, record: EntryRecord) -> bool:
        """Remove the entry if it has other bytes and is not in use; return whether it is gone."""
        stored = self._cache.entries.record(self.key.name)
        has_same = stored is not None and not stored.contradicts(record.files)
        return not has_same and self._directory.drop(self.key.name)

    def _try_rename(self) -> bool:
        """Rename the folder; False if there is an entry already."""
        open_folder = self._directory.open
        try:
            with open_folder("partials") as partials, open_folder("entries") as entries:
                ours, name = self._partial.name, self.key.name
                os.rename(ours, name, src_dir_fd=partials.fd, dst_dir_fd=entries.fd)
        except FileNotFoundError as error:
            raise FetchError("its folder was removed; load it again") from error
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            return False
        return True

    def discard(self) -> None:
        """Leave nothing. Idempotent; does nothing after `publish`."""
        if self._open:
            with translate_errors("remove a download"), self._ending():
                self._directory.discard(self._partial.name)

    def close(self) -> None:
        """End the download; the next one resumes it. Idempotent. No thread may still write."""
        if not self._open:
            return
        with translate_errors("leave a download"), self._ending():
            try:
                for file in self._files.values():
                    file.keep()
                is_empty = not any(map(is_adapter_file, self._partial.folder.names()))
            except BaseException:
                self._directory.discard(self._partial.name)
                raise
            if is_empty:
                self._directory.discard(self._partial.name)

    def __del__(self) -> None:
        if self._open:
            warnings.warn("unclosed download of a disk cache", ResourceWarning, stacklevel=2)
            self.close()

    def _require_open(self) -> None:
        if not self._open:
            raise InternalError("the download has ended")

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Close all files, and let others have the folder, when the context is left."""
        self._open = False
        with ExitStack() as ending:  # runs all of these, also where one fails
            ending.callback(self._partial.close)
            for file in self._files.values():
                ending.callback(file.close)
            yield


def read_answer(answers: Folder, name: str) -> CacheKey | None:
    """Read one answer of a source; None if there is none. Raise `OSError`."""
    with suppress(FileNotFoundError, AdapterFormatError):
        content = answers.read(name, _MAX_ANSWER_BYTES)
        fields = parse_object(content, what="an answer", max_bytes=_MAX_ANSWER_BYTES)
        source, version = fields.get("source"), fields.get("version")
        if isinstance(source, str) and isinstance(version, str):
            return CacheKey(source, version)
    return None


def _name_of(question: str) -> str:
    return hashlib.sha256(question.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry or a partial download.

    `nbytes` counts the adapter's files; `age` is the seconds since it was used last (a partial:
    begun). `record` is None for a partial, and for a damaged entry, which is never served.
    """

    name: str
    nbytes: int
    age: float
    record: EntryRecord | None
    is_partial: bool
    in_use: bool


@dataclass(frozen=True, slots=True)
class Verified:
    """An entry that was hashed again; with a `problem` it has been removed."""

    name: str
    record: EntryRecord | None
    problem: str | None


def ls(cache: DiskCache) -> list[Listed]:
    """List entries and partials, the most recently used first."""
    directory, now_ns = cache.directory, time.time_ns()
    with (
        translate_errors("look at its folder"),
        directory.locked(),
        directory.open("entries") as entries,
        directory.open("partials") as partials,
    ):
        whole, partial = measure(entries, is_entry_name), measure(partials, is_partial_name)
        items = []
        for name, stored in sorted((whole | partial).items(), key=lambda item: -item[1].used_ns):
            record = cache.entries.record(name) if name in whole else None
            age, in_use = max(0, now_ns - stored.used_ns) / 1e9, directory.is_busy(name)
            items.append(Listed(name, stored.nbytes, age, record, name in partial, in_use))
    return items


def verify(cache: DiskCache) -> Iterator[Verified]:
    """Hash every entry again, one at a time; remove what is damaged."""
    for listed in ls(cache):
        if listed.is_partial:
            continue
        try:
            entry = cache.entries.require(listed.name, check=True)
        except IntegrityError as error:
            yield Verified(listed.name, listed.record, error.problem)
            continue
        if entry is not None:  # else another process has removed it
            entry.close()
            yield Verified(listed.name, entry.record, None)


def rm(cache: DiskCache, name: str) -> bool:
    """Remove the entry or partial of that name, if it is there; False if it is in use."""
    with translate_errors("remove an entry"), cache.directory.locked():
        return cache.directory.drop(name)


def gc(cache: DiskCache) -> list[Listed]:
    """Remove unusable files, then evict down to the budget; return the entries and partials gone.

    Unusable are partial downloads that are not in use, damaged entries, answers about entries that
    are not there, and leftovers of killed processes.
    """
    before = ls(cache)
    for listed in before:
        if listed.is_partial:
            rm(cache, listed.name)
        elif listed.record is None:
            with translate_errors("clean up"):
                cache.directory.discard(listed.name)
    cache.budget.trim()
    left = {listed.name for listed in ls(cache)}
    with translate_errors("clean up"), cache.directory.open("answers") as answers:
        for name in answers.names():
            key = read_answer(answers, name)
            if key is None or key.name not in left:
                answers.unlink(name)
    return [listed for listed in before if listed.name not in left]
