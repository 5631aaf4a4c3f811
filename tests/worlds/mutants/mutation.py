"""Mutations by attribute: each replaces attributes of modules and classes, never text."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import iscoroutinefunction
from typing import Any

Patch = tuple[Any, str, object]  # The module or class, the attribute, and what replaces it


@dataclass(frozen=True, slots=True)
class Mutant:
    """Patches, and the test node below `tests` that must fail with them."""

    test: str
    patches: tuple[Patch, ...]

    def apply(self) -> None:
        for owner, name, replacement in self.patches:
            setattr(owner, name, replacement)


Mutants = dict[str, Mutant]  # by the statement that each one makes false


def mutant(test: str, *patches: Patch) -> Mutant:
    return Mutant(test, patches)


def nothing(*_: object, **__: object) -> None: ...


async def nothing_awaited(*_: object, **__: object) -> None: ...


def same(value: Any) -> Any:
    return value


def skipped(owner: Any, name: str, result: object = None) -> Patch:
    """Replace a function by one that does nothing and returns `result`."""

    async def skip_awaited(*_: object, **__: object) -> object:
        return result

    def skip(*_: object, **__: object) -> object:
        return result

    is_awaited = iscoroutinefunction(getattr(owner, name))
    return owner, name, skip_awaited if is_awaited else skip


def without_context(owner: Any, name: str) -> Patch:
    """Replace a function that returns a context manager by one whose context does nothing."""
    return owner, name, lambda *_, **__: NoLock()


def seen_by(module: Any, name: str, **changes: object) -> Patch:
    """Change what one module sees of another: its global `name` gets other attributes."""
    return module, name, _Seen(getattr(module, name), changes)


def initialized(owner: Any, **factories: Callable[[], object]) -> Patch:
    """Replace attributes of each new instance."""
    original = owner.__init__

    def initialize(self: Any, *given: Any, **named: Any) -> None:
        original(self, *given, **named)
        for name, factory in factories.items():
            setattr(self, name, factory())

    return owner, "__init__", initialize


class NoLock(nullcontext[Any]):
    """A lock, for threading or asyncio, that never excludes."""

    def acquire(self, *_: object, **__: object) -> bool:
        return True

    def release(self) -> None: ...


class _Seen:
    def __init__(self, original: Any, changes: dict[str, object]) -> None:
        self.__dict__.update(changes, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)
