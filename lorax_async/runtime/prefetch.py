"""Prefetches: the background loads of one call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from types import MappingProxyType

from lorax_async.errors import LoraxError
from lorax_async.types import Ref, text_of

STARTS_PER_TURN = 8
"""Loads started in one turn of the loop: thousands of ids must not block it."""


class Prefetch:
    """The loads started by `AdapterLoader.prefetch`. They need not be awaited.

    Awaiting a prefetch waits until every adapter is at its tier, has failed, was cancelled or left
    out, and then raises the first error in the order of the ids. Cancelling the awaiting task does
    not cancel the prefetch.
    """

    def __init__(
        self, refs: Sequence[Ref], load: Callable[[Ref], Coroutine[None, None, bool]]
    ) -> None:
        """Start `load` for each ref; it returns False if the adapter does not fit."""
        self._refs = refs
        self._load = load
        self._tasks: list[asyncio.Task[bool]] = []
        self._cancelled = False
        self.task = asyncio.get_running_loop().create_task(self._run(), name="lorax prefetch")
        """Done when all loads are."""

    @property
    def done(self) -> bool:
        """Whether all loads have ended."""
        started = self._cancelled or len(self._tasks) == len(self._refs)
        return started and all(task.done() for task in self._tasks)

    @property
    def errors(self) -> Mapping[str, LoraxError]:
        """The errors so far, by id."""
        errors: dict[str, LoraxError] = {}
        for ref, task in zip(self._refs, self._tasks, strict=False):
            error = task.exception() if task.done() and not task.cancelled() else None
            if isinstance(error, LoraxError):
                errors[text_of(ref)] = error
        return MappingProxyType(errors)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The ids so far that do not fit beside those before them, in order."""
        pairs = zip(self._refs, self._tasks, strict=False)
        return tuple(text_of(ref) for ref, task in pairs if _is_left_out(task))

    def cancel(self) -> None:
        """Cancel the loads that have not ended; other calls for the same adapters go on."""
        self._cancelled = True
        for task in self._tasks:
            task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        for number, ref in enumerate(self._refs, 1):
            if self._cancelled:
                break
            task = loop.create_task(self._load(ref), name=f"lorax prefetch {text_of(ref)}")
            task.add_done_callback(_retrieve_error)
            self._tasks.append(task)
            if number % STARTS_PER_TURN == 0:
                await asyncio.sleep(0)
        if self._tasks:
            await asyncio.wait(self._tasks)

    def __await__(self) -> Generator[object, None, None]:
        yield from asyncio.wait([self.task]).__await__()
        for error in self.errors.values():
            raise error

    def __repr__(self) -> str:
        left_out = len(self.left_out)
        done = sum(task.done() for task in self._tasks) - left_out
        more = f", {left_out} left out" if left_out else ""
        return f"<Prefetch of {len(self._refs)} adapters, {done} of them done{more}>"


def _is_left_out(task: asyncio.Task[bool]) -> bool:
    return task.done() and not task.cancelled() and not task.exception() and not task.result()


def _retrieve_error(task: asyncio.Task[bool]) -> None:
    """Retrieve a task's error, which asyncio would log: a prefetch need not be awaited."""
    if not task.cancelled():
        task.exception()
