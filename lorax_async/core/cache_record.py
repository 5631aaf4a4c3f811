"""What an entry of the disk cache says of itself: `record.json`, written before it is published."""

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
"""Some 200 bytes a file, of as many shards as there are numbers for."""

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
        """Whether the bytes are others; digests by sha256 and by git say nothing of each other."""
        git = {self.digest.kind == "git-sha1", other.digest.kind == "git-sha1"}
        comparable = len(git) == 1
        return self.nbytes != other.nbytes or (
            comparable and self.digest.value != other.digest.value
        )


@dataclass(frozen=True, slots=True)
class Record:
    """`name` is that of the entry; `source` and `version` are its key's, cut for people to read."""

    name: str
    source: str
    version: str
    files: tuple[FileRecord, ...]

    @property
    def nbytes(self) -> int:
        """Of the adapter's files together."""
        return sum(file.nbytes for file in self.files)

    @property
    def vouched(self) -> bool:
        """Whether the source or the caller promised the digest of every file."""
        return all(file.digest.kind != "transport" for file in self.files)

    def contradicts(self, files: Iterable[FileRecord]) -> bool:
        """Whether `files` are other bytes, as far as sizes and digests of one kind tell."""
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
    """Raises `AdapterFormatError` for what is no record."""
    fields = parse_object(content, what=_WHAT, max_bytes=MAX_RECORD_BYTES)
    files = fields.get("files")
    if fields.get("format") != _FORMAT or not isinstance(files, list) or not files:
        raise AdapterFormatError(f"{_WHAT} is not of format {_FORMAT}, or names no file")
    record = Record(
        _text(fields, "entry"),
        _text(fields, "source"),
        _text(fields, "version"),
        tuple(_file(each) for each in files),
    )
    if len({file.role for file in record.files}) != len(files):
        raise AdapterFormatError(f"{_WHAT} names a file twice")
    return record


def _file(fields: object) -> FileRecord:
    if not isinstance(fields, dict) or (role := role_of(_text(fields, "file"))) is None:
        raise AdapterFormatError(f"{_WHAT} names a file that no adapter has")
    kind: Any = _text(fields, "kind")
    try:
        digest = Digest(kind, _text(fields, "digest"))
    except UsageError as error:
        raise AdapterFormatError(f"{_WHAT}: {error.problem}") from error
    return FileRecord(role, _count(fields, "nbytes"), _count(fields, "mtime_ns"), digest)


def _text(fields: dict[str, Any], name: str) -> str:
    if not isinstance(value := fields.get(name), str):
        raise AdapterFormatError(f"{_WHAT} lacks the text {name!r}")
    return value


def _count(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise AdapterFormatError(f"{_WHAT} lacks the number {name!r}")
    return value
