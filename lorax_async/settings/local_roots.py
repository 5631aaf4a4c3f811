"""Folders from which a `str` id may name an adapter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lorax_async.errors import ConfigError, shorten
from lorax_async.settings.requirements import require_bool


@dataclass(frozen=True, slots=True)
class LocalRoot:
    """A folder from which a `str` id may name an adapter. `path` is kept as an absolute `Path`.

    `immutable=True` is the operator's word that no file below it is ever changed in place or
    truncated (new versions come by rename), so that such files may be mapped and held in host
    memory. A file that is cut while it is mapped can kill the process.

    Raises `ConfigError` if there is no such folder.
    """

    path: str | os.PathLike[str]
    immutable: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise ConfigError(f"a local root must be the path of a folder, not {self.path!r}")
        require_bool("immutable", self.immutable)
        object.__setattr__(self, "path", _folder(os.fsdecode(self.path)))


Root = str | os.PathLike[str] | LocalRoot
"""What names a local root: a plain path says nothing of how its files change."""


def as_local_roots(roots: object) -> tuple[LocalRoot, ...]:
    """Of a tuple or list of `Root`s; those that are `LocalRoot`s already stay as they are."""
    if not isinstance(roots, tuple | list) or not all(
        isinstance(root, str | os.PathLike | LocalRoot) for root in roots
    ):
        raise ConfigError("local_roots must be a tuple of folders")
    return tuple(root if isinstance(root, LocalRoot) else LocalRoot(root) for root in roots)


def _folder(name: str) -> Path:
    if not name:  # an unset variable, say, must not open the present folder
        raise ConfigError("local root '' is not a folder; '.' is the present one")
    path = Path(name).absolute()
    if not os.path.isdir(path):  # Path.is_dir raises where it may not look
        raise ConfigError(f"local root {shorten(str(path), 500)!r} is not a folder")
    return path
