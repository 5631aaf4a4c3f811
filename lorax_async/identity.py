"""What a caller asks for, and which bytes that is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lorax_async.errors import InvalidAdapterIdError, UsageError


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What a caller asks for: an id with where to look, which revision, on whose authority."""

    id: str | Path
    source: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        given: object = self.id
        if not isinstance(given, str | Path):
            kind = type(given).__name__
            raise InvalidAdapterIdError(f"an adapter id is a str or a pathlib.Path, not {kind}")
        for name in ("source", "revision", "token"):
            if not isinstance(getattr(self, name), str | None):
                raise UsageError(f"{name} of an adapter is a str or None")

    @property
    def text(self) -> str:
        return str(self.id)


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


PartId = str | Path | AdapterRef | AdapterKey
"""Whatever names one adapter that somebody saved."""


def as_part(adapter_id: object) -> AdapterRef | AdapterKey:
    """Raises `UsageError` for what is none."""
    if isinstance(adapter_id, AdapterRef | AdapterKey):
        return adapter_id
    return AdapterRef(adapter_id)  # type: ignore[arg-type]  # it checks
