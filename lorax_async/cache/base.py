"""What other packages see of the disk cache, and the notes in its folders."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from lorax_async.concurrency import FetchControl
from lorax_async.errors import AdapterFormatError, IntegrityError, UsageError, shorten
from lorax_async.files import Reader
from lorax_async.formats.digests import Digest
from lorax_async.formats.spans import ByteRange
from lorax_async.formats.split_weights import FileRole, role_of
from lorax_async.formats.strict_json import parse_object

RECORD = "record.json"
MAP_SUFFIX = ".chunks"
PARTIAL_LOCK = "lock"
SCOPE_PREFIX = "scope."

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"[0-9a-f]{64}\.[0-9a-z.-]{1,180}")


@dataclass(frozen=True, slots=True)
class CacheKey:
    """The adapter (`source`) and its version (commit, ETag, versionId): equal keys, equal bytes.

    Both are any text, and neither is secret: people see them.
    """

    source: str
    version: str

    @property
    def name(self) -> str:
        """Return the entry's name: 64 hexadecimal digits."""
        return _digest_of(self.source, self.version)


def _digest_of(*texts: str) -> str:
    texts_hash = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        # Lengths first, so that different lists of texts never concatenate to the same bytes.
        texts_hash.update(len(data).to_bytes(8, "big") + data)
    return texts_hash.hexdigest()


def scope_name(scope: str) -> str:
    """Return the name of the file that records that this scope may have the entry."""
    return SCOPE_PREFIX + _digest_of(scope)


def is_entry_name(name: str) -> bool:
    return _DIGEST.fullmatch(name) is not None


def is_partial_name(name: str) -> bool:
    return _PARTIAL.fullmatch(name) is not None


MAX_RECORD_BYTES = 16 << 20
"""About 200 bytes a file, for the largest number of shards."""

_FORMAT = 1
_WHAT = "the cache's record"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of an entry as it was published."""

    role: FileRole
    nbytes: int
    mtime_ns: int
    digest: Digest

    def differs(self, other: FileRecord) -> bool:
        """Return whether the bytes differ. A sha256 and a git digest cannot be compared."""
        git = {self.digest.kind == "git-sha1", other.digest.kind == "git-sha1"}
        comparable = len(git) == 1
        return self.nbytes != other.nbytes or (
            comparable and self.digest.value != other.digest.value
        )


@dataclass(frozen=True, slots=True)
class EntryRecord:
    """An entry: `name` is its folder's; `source` and `version` are its key's, shortened to read."""

    name: str
    source: str
    version: str
    files: tuple[FileRecord, ...]

    @property
    def nbytes(self) -> int:
        """Return the size of all files together."""
        return sum(file.nbytes for file in self.files)

    @property
    def vouched(self) -> bool:
        """Return whether the source or the caller promised the digest of every file."""
        return all(file.digest.kind != "transport" for file in self.files)

    def contradicts(self, files: Iterable[FileRecord]) -> bool:
        """Return whether `files` are other bytes, as far as sizes and comparable digests tell."""
        ours = {file.role: file for file in self.files}
        return any(theirs.role not in ours or ours[theirs.role].differs(theirs) for theirs in files)

    def file(self, role: FileRole) -> FileRecord | None:
        return next((file for file in self.files if file.role == role), None)

    def encoded(self) -> bytes:
        files = [
            {
                "file": file.role.file_name,
                "nbytes": file.nbytes,
                "mtime_ns": file.mtime_ns,
                "kind": file.digest.kind,
                "digest": file.digest.value,
            }
            for file in self.files
        ]
        content = {
            "format": _FORMAT,
            "entry": self.name,
            "source": self.source,
            "version": self.version,
            "files": files,
        }
        return json.dumps(content, indent=1).encode() + b"\n"


def record_of(key: CacheKey, files: tuple[FileRecord, ...]) -> EntryRecord:
    return EntryRecord(key.name, shorten(key.source), shorten(key.version), files)


def decode_record(content: bytes) -> EntryRecord:
    """Decode a record. Raise `AdapterFormatError` for anything else."""
    fields = parse_object(content, what=_WHAT, max_bytes=MAX_RECORD_BYTES)
    try:
        if fields["format"] != _FORMAT:
            raise ValueError(f"it is not of format {_FORMAT}")
        listed: Any = fields["files"]
        files = tuple(_file(file) for file in listed)
        if not files or len({file.role for file in files}) != len(files):
            raise ValueError("it names no file, or one twice")
        entry, source, version = (_text(fields[name]) for name in ("entry", "source", "version"))
        return EntryRecord(entry, source, version, files)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise AdapterFormatError(f"{_WHAT} is damaged: {error}") from error


def _file(fields: Any) -> FileRecord:
    role = role_of(_text(fields["file"]))
    if role is None:
        raise ValueError("it names a file that no adapter has")
    kind: Any = _text(fields["kind"])
    digest = Digest(kind, _text(fields["digest"]))
    return FileRecord(role, _count(fields["nbytes"]), _count(fields["mtime_ns"]), digest)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is missing")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("a number is missing")
    return value


class LeftoverError(IntegrityError):
    """The bytes that an interrupted download left are not those that the source sends now."""


@runtime_checkable
class CacheEntry(Protocol):
    """A whole adapter in the cache, leased: it stays until this is closed.

    `mappable`: no other program changes its files, so that they may be mapped.
    """

    mappable: bool

    @property
    def record(self) -> EntryRecord:
        """Its files, their sizes and digests."""

    @property
    def folder(self) -> str:
        """Absolute path of its folder, which PEFT can load as long as the lease lasts."""

    def reader(self, role: FileRole) -> Reader:
        """Return a reader of one file. Quick: opened by the first read.

        It may outlive this, but raises `IntegrityError` once the entry is removed. Raise
        `InternalError` for a file that the record does not name.
        """

    def granted(self, scope: str) -> float | None:
        """Return the seconds since the source last let this scope have it; None if never."""

    def grant(self, scope: str) -> None:
        """Record that the source has just let this scope have it."""

    def close(self) -> None:
        """Quick and idempotent."""


class CacheFile(Protocol):
    """One file of a download, written by many threads."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    @property
    def resumed(self) -> bool:
        """Whether an interrupted download left bytes of it."""

    @property
    def expected(self) -> Digest | None:
        """The digest that judges it at the end, if one was promised."""

    def missing(self) -> list[ByteRange]:
        """Return the ranges not written yet, ascending. Quick."""

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Write all buffers, one after the other, from `offset` on.

        Compare with the bytes of a partial download: `LeftoverError` if they differ. Raise
        `IntegrityError` beyond the file's end, `CapacityError` if the disk is full (or the file may
        not be so large, or its owner may have no more), `FetchError` if it fails.
        """

    def hash_along(self) -> int:
        """Continue hashing, up to the first missing byte; return how many bytes are hashed.

        For one thread beside those that write; `publish` hashes the rest.
        """

    def reader(self) -> Reader:
        """Return a reader of the bytes written; reading others raises `InternalError`.

        It stays good after publication.
        """


@runtime_checkable
class CacheDownload(Protocol):
    """An adapter on its way into the cache. If locks work, no other process downloads it.

    It is `mappable` if the entry will be.
    """

    mappable: bool

    def file(self, role: FileRole, nbytes: int, expected: Digest | None = None) -> CacheFile:
        """Add a file, with room for all of it, and the bytes of a partial download.

        Without an `expected` digest, record our own. Raise `CapacityError` without room.
        """

    def publish(self) -> CacheEntry:
        """Check the digests of the complete files, and publish them to all processes at once.

        Return the entry of a process that was faster, if it has the same digests. Raise
        `IntegrityError` for a digest that is not the expected one (or not theirs), and leave
        nothing of the download; else raise as `write`.
        """

    def discard(self) -> None:
        """Leave nothing. Idempotent; does nothing after `publish`."""

    def close(self) -> None:
        """End it; the next download resumes it. Idempotent.

        No thread may write any more.
        """


class Cache(Protocol):
    """Whole adapters by key, and partial ones on their way, within a budget of bytes.

    The budget counts adapters' files. Interrupted downloads make room first, then entries that are
    not leased, in the policy's order.
    """

    def open(self, key: CacheKey, *, check: bool = False) -> CacheEntry | None:
        """Lease the entry and count a use; None if there is none.

        Remove an entry whose files have not the recorded sizes, or whose bytes not the recorded
        digests: they are hashed with `check`, or if a file was touched.
        """

    def try_begin(
        self, key: CacheKey, scope: str, *, alone: bool = False
    ) -> CacheEntry | CacheDownload | int:
        """Return the entry, or begin to download it on the authority of `scope`.

        Return the progress of another download if there is one; begin a second if `alone`.
        """

    def begin(self, key: CacheKey, scope: str, control: FetchControl) -> CacheEntry | CacheDownload:
        """Call `try_begin`, waiting for another download while it makes progress.

        Raise `FetchError` when `control` ends.
        """

    def note_version(self, question: str, source: str, version: str) -> None:
        """Record a source's latest answer, whether the cache has that version or not."""

    def last_version(self, question: str) -> tuple[str, str] | None:
        """Return the source and version of the last answer; None if there is none."""

    def condemn(self, key: CacheKey) -> None:
        """Remove an entry whose bytes are wrong, even if it is leased.

        Open files stay readable; opening another raises `IntegrityError`.
        """

    def remove(self, key: CacheKey) -> bool:
        """Remove the entry and partials of it; False if any is in use."""

    def used(self) -> int:
        """Return the bytes of adapters' files in the cache now, partial ones included."""

    def close(self) -> None:
        """Close the cache. Close entries and downloads first; readers may stay open. Idempotent."""
