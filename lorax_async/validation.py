"""What a setting must be; each raises `ConfigError` with the setting's name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorax_async.errors import ConfigError, shorten

MAX_SECONDS = 1e9
"""The longest wait: what locks, event loops and their C clocks can all count to."""


def require_positive(name: str, value: object) -> None:
    require_count(name, value, least=1)


def require_count(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        kind = "a positive integer" if least else "an integer of at least 0"
        raise ConfigError(f"{name} must be {kind}, not {value!r}")


def require_share(name: str, value: object) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    if not 0 < number <= 1:
        raise ConfigError(f"{name} must be above 0 and at most 1, not {value!r}")


def require_seconds(name: str, value: object) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else 0
    if not 0 < number <= MAX_SECONDS:
        raise ConfigError(
            f"{name} must be a positive number of seconds up to {MAX_SECONDS:g}, not {value!r}"
        )


def require_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {value!r}")


def require_one_of(name: str, value: object, words: Sequence[str]) -> None:
    if value not in words:
        raise ConfigError(f"{name} must be one of {', '.join(words)}")


def as_folder_to_be(name: str, value: object) -> Path | None:
    """An absolute path where a folder is or may be made; None stays None. Makes nothing."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"{name} must be the path of a folder or None, not {value!r}")
    path = Path(os.fsdecode(value)).absolute()
    if "\0" in str(path) or (os.path.lexists(path) and not os.path.isdir(path)):
        raise ConfigError(f"{name} {shorten(str(path), 500)!r} is not a folder")
    return path
