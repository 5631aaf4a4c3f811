"""A hint that adapters will be needed soon, and what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Mapping, Sequence
from types import MappingProxyType

from lorax_async.errors import LoraxError

AT_ONCE = 8
"""Begun in one turn of the loop: thousands of hints must not hold it."""

Hint = tuple[str, Callable[[], asyncio.Task[None]]]
"""An id, and what begins to bring it."""


class Prefetch:
    """What `AdapterLoader.prefetch` started. It goes on whether or not anybody waits for it.

    Awaiting it waits until every adapter has arrived at its tier, failed or was cancelled, and then
    raises the first error, in the order of the ids. Cancelling who waits does not cancel it.
    """

    def __init__(self, hints: Sequence[Hint]) -> None:
        self._hints = tuple(hints)
        self._begun: list[asyncio.Task[None]] = []
        self._cancelled = False
        self.task = asyncio.get_running_loop().create_task(self._run(), name="lorax prefetch")
        """Done when all is."""

    @property
    def done(self) -> bool:
        """Whether nothing of it is under way."""
        begun = self._cancelled or len(self._begun) == len(self._hints)
        return begun and all(task.done() for task in self._begun)

    @property
    def errors(self) -> Mapping[str, LoraxError]:
        """Why adapters did not arrive, by id, so far."""
        found: dict[str, LoraxError] = {}
        for (id, _), task in zip(self._hints, self._begun, strict=False):
            error = task.exception() if task.done() and not task.cancelled() else None
            if isinstance(error, LoraxError):
                found[id] = error
        return MappingProxyType(found)

    def cancel(self) -> None:
        """Want the adapters that have not arrived no longer; other wishes for them stay."""
        self._cancelled = True
        for task in self._begun:
            task.cancel()

    async def _run(self) -> None:
        for number, (_, begin) in enumerate(self._hints):
            if self._cancelled:
                break
            self._begun.append(begin())
            if number % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
        if self._begun:
            await asyncio.wait(self._begun)

    def __await__(self) -> Generator[object, None, None]:
        yield from self._wait().__await__()

    async def _wait(self) -> None:
        await asyncio.wait([self.task])
        for error in self.errors.values():
            raise error

    def __repr__(self) -> str:
        arrived = sum(task.done() for task in self._begun)
        return f"<Prefetch of {len(self._hints)} adapters, {arrived} of them done>"
