"""What the rules that are broken on purpose have in common."""

from __future__ import annotations

from types import ModuleType

Mutant = tuple[str, type | ModuleType, str, object]
"""The world, and what is replaced by what."""


def never(*_: object, **__: object) -> bool:
    return False


def nothing(*_: object, **__: object) -> None:
    return


def no_commands(*_: object) -> list[object]:
    return []
