"""The names in a disk cache, and the record of each entry."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorax_async.errors import AdapterFormatError, UsageError, shorten
from lorax_async.formats.digests import Digest
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


def decoded_record(content: bytes) -> EntryRecord:
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
