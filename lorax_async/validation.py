"""Checks of settings; each raises `ConfigError` with the setting's name."""

from __future__ import annotations

from collections.abc import Sequence

from lorax_async.errors import ConfigError

MAX_SECONDS = 1e9
"""The longest wait that locks, event loops and C clocks all support."""


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
