"""What came of calls for adapters: where they were found, or why there is none."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Literal, Protocol, get_args

from lorax_async.adapter import AdapterKey, Ref, TensorsKey
from lorax_async.core.life import Life
from lorax_async.core.transitions import FileState, SlotState
from lorax_async.errors import LoraxError, Stage

_logger = logging.getLogger("lorax_async")

Found = Literal["device", "host", "disk", "source"]
"""The nearest tier that has all of an adapter when somebody asks for it: resident, in host memory,
opened before and still there, or none, so that its source is to be asked for its files."""

FOUND: tuple[Found, ...] = get_args(Found)


class Watcher(Protocol):
    """Who hears of single calls, on the loop."""

    def call(self, name: str, ref: Ref) -> AbstractContextManager[None]:
        """Entered in the caller's task, around all of the call."""

    def wished(self, key: AdapterKey, found: Found, stage: Stage) -> None:
        """In the task of whoever wants it: which adapter that is, where it was, where it is now.

        Whoever joins while it fills its slot is at "copy", also while bytes have yet to come.
        """

    def checked(self, key: AdapterKey) -> None:
        """It was opened, and its header is understood."""


def kind_of(error: LoraxError) -> tuple[str, str]:
    """The stage, or "none", and the class of an error."""
    return error.stage or "none", type(error).__name__


class Calls:
    """Counts; and tells one watcher, if there is one.

    `lives` are the lifecycle's, to be looked at only. `in_memory` says of an adapter that was given
    as tensors whether its copy is in host memory.
    """

    def __init__(self, lives: Mapping[AdapterKey, Life]) -> None:
        self.hits: Counter[str] = Counter(dict.fromkeys(FOUND, 0))
        self.errors: Counter[tuple[str, str]] = Counter()
        self.in_memory: Callable[[AdapterKey], bool] = lambda key: False  # noqa: ARG005
        self.watcher: Watcher | None = None
        self._lives = lives

    @contextmanager
    def one(self, name: str, ref: Ref) -> Iterator[None]:
        """One call, by a caller who waits for its end."""
        watched = self._watched(name, ref)
        try:
            yield
        except BaseException as error:
            if isinstance(error, LoraxError):
                self.errors[kind_of(error)] += 1
            _tell(partial(watched.__exit__, type(error), error, error.__traceback__))
            raise
        _tell(partial(watched.__exit__, None, None, None))

    def found(self, key: AdapterKey) -> Found:
        """Count where an adapter is that somebody wants now."""
        found = self._where(key)
        self.hits[found] += 1
        return found

    def wished(self, key: AdapterKey, found: Found, stage: Stage) -> None:
        """The wish for it was begun; it is in that stage since."""
        if self.watcher is not None:
            life = self._lives.get(key)
            filling = life is not None and life.slot is SlotState.FILLING
            _tell(partial(self.watcher.wished, key, found, "copy" if filling else stage))

    def checked(self, key: AdapterKey) -> None:
        if self.watcher is not None:
            _tell(partial(self.watcher.checked, key))

    def _watched(self, name: str, ref: Ref) -> ExitStack:
        """What the watcher has around the call, entered."""
        watcher, entered = self.watcher, ExitStack()
        if watcher is not None:
            _tell(lambda: entered.enter_context(watcher.call(name, ref)))
        return entered

    def _where(self, key: AdapterKey) -> Found:
        life = self._lives.get(key)
        if life is not None and life.slot is SlotState.RESIDENT and not life.departing:
            return "device"
        if self.in_memory(key) or (life is not None and life.in_host):
            return "host"
        opened = life is not None and life.file is FileState.PRESENT
        return "disk" if opened or isinstance(key, TensorsKey) else "source"


def _tell(say: Callable[[], object]) -> None:
    """A watcher's faults are its own: what it is told of goes on."""
    try:
        say()
    except Exception:
        _logger.exception("who watches a loader's calls failed")
