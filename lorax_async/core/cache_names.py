"""Names inside a disk cache. They are digests and fixed words: none comes from a server."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from lorax_async.errors import UsageError

RECORD = "record.json"
MAP_SUFFIX = ".chunks"
PARTIAL_LOCK = "lock"
SCOPE_PREFIX = "scope."

MAX_SHARDS = 99_999

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(
    r"(?P<config>adapter_config\.json)"
    r"|(?P<index>adapter_model\.safetensors\.index\.json)"
    r"|(?P<weights>adapter_model(?:-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5}))?\.safetensors)"
)
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
    found = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        # Lengths first, so that different lists of texts never concatenate to the same bytes.
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()


def scope_name(scope: str) -> str:
    """Return the name of the file that records that this scope may have the entry."""
    return SCOPE_PREFIX + _digest_of(scope)


def is_entry_name(name: str) -> bool:
    return _DIGEST.fullmatch(name) is not None


@dataclass(frozen=True, slots=True, order=True)
class FileRole:
    """One of an adapter's files. Weights in one file have number 0; `count` shards count from 1.

    Raises `UsageError` for any other number.
    """

    kind: Literal["config", "index", "weights"]
    number: int = 0
    count: int = 0

    def __post_init__(self) -> None:
        most = MAX_SHARDS if self.kind == "weights" else 0
        if not min(self.count, 1) <= self.number <= self.count <= most:
            raise UsageError(f"there is no {self.kind} file {self.number} of {self.count}")

    @property
    def file_name(self) -> str:
        if self.kind == "config":
            return "adapter_config.json"
        if self.kind == "index":
            return "adapter_model.safetensors.index.json"
        shard = f"-{self.number:05d}-of-{self.count:05d}" if self.number else ""
        return f"adapter_model{shard}.safetensors"


CONFIG_FILE = FileRole("config")
INDEX_FILE = FileRole("index")
WEIGHTS_FILE = FileRole("weights")


def role_of(file_name: str) -> FileRole | None:
    """Return the role of a file name; None if no adapter has such a file."""
    found = _FILE.fullmatch(file_name)
    if found is None:
        return None
    if found["weights"] is None:
        return CONFIG_FILE if found["config"] else INDEX_FILE
    number, count = int(found["number"] or 0), int(found["count"] or 0)
    is_shard = 1 <= number <= count
    return FileRole("weights", number, count) if is_shard or found["number"] is None else None


def is_partial_name(name: str) -> bool:
    return _PARTIAL.fullmatch(name) is not None
