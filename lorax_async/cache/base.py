"""Keys and records of the disk cache's entries, and the interface that every cached adapter has."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from lorax_async.errors import AdapterFormatError, IntegrityError, UsageError, shorten
from lorax_async.files import FileReader
from lorax_async.formats.digests import Digest
from lorax_async.formats.peft_names import CONFIG_FILE, TOKENIZER_FILES, WEIGHTS_FILE
from lorax_async.formats.strict_json import parse_object
from lorax_async.types import FileIdentity

RECORD = "record.json"
STAMP = "verified"
TOKENIZER_RECORD = "tokenizer"
"""A file with the digests of the entry's tokenizer files; written last, when all are there."""

MAP_SUFFIX = ".chunks"
PARTIAL_LOCK = "lock"
SCOPE_PREFIX = "scope."

MAX_RECORD_BYTES = 64 << 10
"""A record has two files, and a key of at most `errors.MAX_TEXT` characters twice."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"[0-9a-f]{64}\.[0-9a-z.-]{1,180}")
_FORMAT = 1
_WHAT = "the cache's record"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CacheKey:
    """The adapter (`source`) and its version (commit, ETag, versionId): equal keys, equal bytes.

    Both are any text, and neither is secret: people see them.
    """

    source: str
    version: str

    @property
    def name(self) -> str:
        """The entry's name: 64 hexadecimal digits."""
        return digest_of(self.source, self.version)


def digest_of(*texts: str) -> str:
    """Return a digest that only the same texts in this order have: 64 hexadecimal digits."""
    texts_hash = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        # Lengths first, so that different lists of texts never concatenate to the same bytes.
        texts_hash.update(len(data).to_bytes(8, "big") + data)
    return texts_hash.hexdigest()


def scope_name(scope: str) -> str:
    """Return the name of the file that records that this scope may have the entry."""
    return SCOPE_PREFIX + digest_of(scope)


def is_entry_name(name: str) -> bool:
    return _DIGEST.fullmatch(name) is not None


def is_partial_name(name: str) -> bool:
    return _PARTIAL.fullmatch(name) is not None


def is_adapter_file(name: str) -> bool:
    """Return whether a name in an entry or a partial is that of an adapter's file.

    Version 0.2 also stored the files of weights in several files.
    """
    is_ours = name.startswith("adapter_") and not name.endswith(MAP_SUFFIX)
    return is_ours or name in TOKENIZER_FILES


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of an entry as it was published."""

    name: str
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
        return sum(file.nbytes for file in self.files)

    @property
    def vouched(self) -> bool:
        """Whether the source or the caller promised the digest of every file."""
        return all(file.digest.kind != "transport" for file in self.files)

    def contradicts(self, files: Iterable[FileRecord]) -> bool:
        """Return whether `files` are other bytes, as far as sizes and comparable digests tell."""
        ours = {file.name: file for file in self.files}
        return any(theirs.name not in ours or ours[theirs.name].differs(theirs) for theirs in files)

    def is_refuted_by(self, sha256: str | None) -> bool:
        """Return whether the weights have another digest, and nothing promised theirs."""
        digest = self.weights.digest
        return sha256 is not None and digest.kind == "transport" and digest.value != sha256

    @property
    def weights(self) -> FileRecord:
        """The record of the weights, which every entry has."""
        return next(file for file in self.files if file.name == WEIGHTS_FILE)

    def encoded(self) -> bytes:
        files = [
            {
                "file": file.name,
                "nbytes": file.nbytes,
                "mtime_ns": file.mtime_ns,
                "kind": file.digest.kind,
                "digest": file.digest.value,
            }
            for file in self.files
        ]
        key = {"entry": self.name, "source": self.source, "version": self.version}
        return json.dumps({"format": _FORMAT, **key, "files": files}, indent=1).encode() + b"\n"


def record_of(key: CacheKey, files: tuple[FileRecord, ...]) -> EntryRecord:
    return EntryRecord(key.name, shorten(key.source), shorten(key.version), files)


def decode_record(content: bytes) -> EntryRecord:
    """Decode a record. Raise `AdapterFormatError` for anything else."""
    fields: dict[str, Any] = parse_object(content, what=_WHAT, max_bytes=MAX_RECORD_BYTES)
    try:
        if fields["format"] != _FORMAT:
            raise ValueError(f"it is not of format {_FORMAT}")
        files = tuple(_file(file) for file in fields["files"])
        names = [file.name for file in files]
        if WEIGHTS_FILE not in names or len(set(names)) != len(names):
            raise ValueError("it names no weights, or a file twice")
        entry, source, version = (_as(str, fields[name]) for name in ("entry", "source", "version"))
        return EntryRecord(entry, source, version, files)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise AdapterFormatError(f"{_WHAT} is damaged: {error}") from error


def _file(fields: Any) -> FileRecord:
    name = _as(str, fields["file"])
    nbytes, mtime_ns = _as(int, fields["nbytes"]), _as(int, fields["mtime_ns"])
    if name not in {CONFIG_FILE, WEIGHTS_FILE} or min(nbytes, mtime_ns) < 0:
        raise ValueError("it names a file that no adapter has, or a negative size or time")
    kind: Any = _as(str, fields["kind"])
    return FileRecord(name, nbytes, mtime_ns, Digest(kind, _as(str, fields["digest"])))


def _as(kind: type[T], value: object) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"a value is not of type {kind.__name__}")
    return value


class LeftoverError(IntegrityError):
    """The bytes that an interrupted download left are not those that the source sends now."""


@runtime_checkable
class CacheEntry(Protocol):
    """A whole adapter in the cache, leased: it stays until this is closed.

    `mappable`: no other program changes its files, so that they may be mapped. `is_verified`: its
    bytes were hashed since this machine was started, and the files were not touched since.
    `identities` are those that its files had when it was opened: readers insist on them.
    """

    mappable: bool
    is_verified: bool
    identities: Mapping[str, FileIdentity]

    @property
    def record(self) -> EntryRecord:
        """Its files, their sizes and digests."""

    @property
    def folder(self) -> str:
        """Absolute path of its folder, which PEFT can load as long as the lease lasts."""

    def reader(self, name: str) -> FileReader:
        """Return a reader of one file. Quick: opened by the first read.

        It may outlive this, but raises `IntegrityError` once the entry is removed. Raise
        `InternalError` for a file that the record does not name.
        """

    def last_access(self, scope: str) -> float | None:
        """Return the seconds since the source last let this scope have it; None if never."""

    def record_access(self, scope: str) -> None:
        """Record that the source has just let this scope have it."""

    def close(self) -> None:
        """Quick and idempotent."""


class ReadOnlyCache(Protocol):
    """A cache that other tools fill, and that is never written to. Blocks."""

    def open(self, key: CacheKey, *, check: bool = False) -> CacheEntry | None:
        """Return the entry; None if there is none, or (by `check`) it has other bytes."""

    def last_version(self, question: str) -> tuple[str, str] | None:
        """Return the source and version that was recorded last for a question; None if none was."""
