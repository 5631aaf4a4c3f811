"""Count calls of the operating system; let one fail, or kill the process at it."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CHANGES: tuple[str, ...] = ("open", "mkdir", "pwritev", "write", "posix_fallocate", "ftruncate")
CHANGES += ("fsync", "rename", "unlink", "rmdir", "utime")
LOOKS: tuple[str, ...] = ("preadv", "read", "stat", "fstat", "listdir", "scandir", "dup")

Act = Callable[[str], None]


class Calls:
    """Calls of `os` and flock by name, in order. `before` and `after` see each; they may raise."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.made: list[str] = []
        self.before: Act = lambda name: None
        self.after: Act = lambda name: None

    def watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.made.append(name)
            self.before(name)
            try:
                return real(*args, **options)
            finally:
                self.after(name)

        return call

    @contextmanager
    def counted(self) -> Iterator[None]:
        places = [(os, name) for name in self.names] + [(fcntl, "flock")]
        real = [getattr(module, name) for module, name in places]
        try:
            for (module, name), one in zip(places, real, strict=True):
                setattr(module, name, self.watched(name, one))
            yield
        finally:
            for (module, name), one in zip(places, real, strict=True):
                setattr(module, name, one)


def failing(names: tuple[str, ...], at: int, code: int) -> Calls:
    """Let the call with this number, counted from 1, fail."""
    calls = Calls(names)

    def fail(name: str) -> None:
        if len(calls.made) == at:
            raise OSError(code, os.strerror(code))

    calls.before = fail
    return calls
