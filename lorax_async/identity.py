"""What a caller asks for, and which bytes that is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorax_async.errors import InvalidAdapterIdError, UsageError
from lorax_async.ids.texts import refuse_secrets

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What a caller asks for: an id with where to look, which revision, on whose authority.

    Attributes
    ----------
    source
        "hub", "s3", "gs", "az", "http", "https" or "local", where the id does not say it; None is
        the hub for `org/name` (docs/sources.md has all forms).
    revision
        A branch, tag or commit of the hub; a versionId or ETag elsewhere. None is the present one.
    token
        What the source is asked with; never shown.
    use_token
        Ask the hub with this machine's own token (`HF_TOKEN`, `hf auth login`). For ids that the
        program itself names, never for an id out of a request.
    digest
        What the weights come to, as sha256 in hexadecimal, for who knows it: all else is refused.
    allow_stale
        Where the source cannot be asked, take the version that it last named.

    Raises
    ------
    InvalidAdapterIdError
        The id is neither text nor path, or a URL with a user name, password, query or fragment.
    UsageError
        An argument has the wrong type, or `token` and `use_token` are both given.
    """

    id: str | Path
    source: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    digest: str | None = None
    allow_stale: bool = False
    use_token: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        given: object = self.id
        if not isinstance(given, str | Path):
            kind = type(given).__name__
            raise InvalidAdapterIdError(f"an adapter id is a str or a pathlib.Path, not {kind}")
        for name in ("source", "revision", "token", "digest"):
            if not isinstance(getattr(self, name), str | None):
                raise UsageError(f"{name} of an adapter is a str or None")
        if isinstance(self.id, str):
            refuse_secrets(self.id, self.source)
        if self.digest is not None and not _SHA256.fullmatch(self.digest):
            raise UsageError(f"digest {self.digest!r} is no sha256 in 64 lower-case hex digits")
        for name in ("allow_stale", "use_token"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.use_token and self.token is not None:
            raise UsageError("token and use_token contradict each other; give one of them")

    @property
    def text(self) -> str:
        return str(self.id)

    @property
    def name(self) -> AdapterRef:
        """What it means, whatever its caller knows of the bytes and whether old ones will do."""
        plain = self.digest is None and not self.allow_stale
        return self if plain else replace(self, digest=None, allow_stale=False)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Tells two versions of a local file apart without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """One version of one adapter's files. Equal keys are the same bytes, and are loaded once.

    A loader has one layout, shard and dtype, so that within it a key also names one slot's content.
    """

    location: str
    files: tuple[FileIdentity, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Kept, for keys are looked up several times per copy; over all, for versions of one
        # location lie in the same dictionaries.
        object.__setattr__(self, "_hash", hash((self.location, self.files)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return self.location


@dataclass(frozen=True, slots=True)
class TensorsKey(AdapterKey):
    """An adapter that was given as tensors: the location tells config, names and bytes by digest.

    So equal content is one adapter, whatever it is called.
    """

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def of(cls, digest: str) -> TensorsKey:
        """Of a SHA-256 in hexadecimal."""
        return cls(f"tensors:sha256:{digest}", ())

    @property
    def digest(self) -> str:
        """That SHA-256."""
        return self.location.rpartition(":")[2]


@dataclass(frozen=True, slots=True)
class RemoteKey(AdapterKey):
    """One version of an adapter that lies elsewhere; the location is its id without a revision.

    `version` is the hub's commit, or what versionIds or strong ETags of its files come to. It is
    `stale` where the source could not be asked, and last named this one.
    """

    version: str = ""
    stale: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.location, self.version)))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return f"{self.location}@{self.version}"


PartId = str | Path | AdapterRef | AdapterKey
"""Whatever names one adapter that somebody saved."""


def as_part(adapter_id: object) -> AdapterRef | AdapterKey:
    """Raises `UsageError` for what is none."""
    if isinstance(adapter_id, AdapterRef | AdapterKey):
        return adapter_id
    return AdapterRef(adapter_id)  # type: ignore[arg-type]  # it checks
