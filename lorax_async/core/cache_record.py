"""`record.json`: the files and digests of a cache entry, written before it is published."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lorax_async.core.cache_names import CacheKey, FileRole, role_of
from lorax_async.core.file_digest import Digest
from lorax_async.core.strict_json import parse_object
from lorax_async.errors import AdapterFormatError, UsageError, shorten

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
class Record:
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


def record_of(key: CacheKey, files: tuple[FileRecord, ...]) -> Record:
    return Record(key.name, shorten(key.source), shorten(key.version), files)


def decoded_record(content: bytes) -> Record:
    """Decode a record. Raise `AdapterFormatError` for anything else."""
    fields = parse_object(content, what=_WHAT, max_bytes=MAX_RECORD_BYTES)
    try:
        if fields["format"] != _FORMAT:
            raise ValueError(f"it is not of format {_FORMAT}")
        listed: Any = fields["files"]
        files = tuple(_file(each) for each in listed)
        if not files or len({file.role for file in files}) != len(files):
            raise ValueError("it names no file, or one twice")
        entry, source, version = (_text(fields[name]) for name in ("entry", "source", "version"))
        return Record(entry, source, version, files)
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
