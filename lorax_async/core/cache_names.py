"""The names inside a disk cache: digests and our own words. None comes from a server."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from lorax_async.errors import UsageError

RECORD = "record.json"
MAP_SUFFIX = ".chunks"
SCOPE_PREFIX = "scope."
BUDGET_LOCK = "budget"

MAX_SHARDS = 99_999

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(
    r"(?P<config>adapter_config\.json)"
    r"|(?P<index>adapter_model\.safetensors\.index\.json)"
    r"|(?P<weights>adapter_model(?:-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5}))?\.safetensors)"
)
_PARTIAL = re.compile(
    r"(?P<entry>[0-9a-f]{64})"
    r"\.(?:free|(?P<boot>[0-9a-f]{1,64})-(?P<space>[0-9]{1,20})-(?P<pid>[0-9]{1,20})-(?P<start>[0-9]{1,20}))"
    r"\.(?P<serial>[0-9a-f]{1,32})"
)


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Which bytes: `source` names the adapter, `version` its one state (commit, ETag, versionId).

    Equal keys are the same bytes. Both are any text, and neither is a secret: people see them.
    """

    source: str
    version: str

    @property
    def name(self) -> str:
        """Of the entry: 64 hexadecimal digits."""
        return _digest_of(self.source, self.version)


def _digest_of(*texts: str) -> str:
    found = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        # Lengths first: no two lists of texts are one string of bytes.
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()


def scope_name(scope: str) -> str:
    """The file that tells that an entry was granted to this scope of authorization."""
    return SCOPE_PREFIX + _digest_of(scope)


def is_entry_name(name: str) -> bool:
    return _DIGEST.fullmatch(name) is not None


@dataclass(frozen=True, slots=True, order=True)
class FileRole:
    """Which of an adapter's files. Weights in one file have number 0, `count` shards 1 … `count`.

    Raises `UsageError` for another number.
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
    """Whose name that is; None if it is not one of an adapter's files."""
    found = _FILE.fullmatch(file_name)
    if found is None:
        return None
    if found["weights"] is None:
        return CONFIG_FILE if found["config"] else INDEX_FILE
    number, count = int(found["number"] or 0), int(found["count"] or 0)
    is_shard = 1 <= number <= count
    return FileRole("weights", number, count) if is_shard or found["number"] is None else None


@dataclass(frozen=True, slots=True)
class Owner:
    """A process, told apart from every other: of this boot, this namespace of pids, this start."""

    boot: str
    namespace: int
    pid: int
    started: int


@dataclass(frozen=True, slots=True)
class PartialName:
    """The folder of a partial download of `entry`. Without an owner, nobody writes to it any more.

    Whoever takes it over renames it to a name with himself in it: of two, one succeeds.
    """

    entry: str
    owner: Owner | None
    serial: str

    def __str__(self) -> str:
        if (owner := self.owner) is None:
            return f"{self.entry}.free.{self.serial}"
        process = f"{owner.boot}-{owner.namespace}-{owner.pid}-{owner.started}"
        return f"{self.entry}.{process}.{self.serial}"


def partial_name(text: str) -> PartialName | None:
    """What such a name says; None if it is none."""
    found = _PARTIAL.fullmatch(text)
    if found is None:
        return None
    owner = None
    if found["boot"] is not None:
        owner = Owner(found["boot"], int(found["space"]), int(found["pid"]), int(found["start"]))
    return PartialName(found["entry"], owner, found["serial"])


def is_partial_name(name: str) -> bool:
    return _PARTIAL.fullmatch(name) is not None
