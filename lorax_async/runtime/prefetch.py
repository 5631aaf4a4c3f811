"""A hint that adapters will be needed soon, and what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Mapping, Sequence
from types import MappingProxyType

from lorax_async.errors import LoraxError


class Prefetch:
    """What `AdapterLoader.prefetch` started. It goes on whether or not anybody waits for it.

    Awaiting it waits until every adapter has arrived at its tier, failed or was cancelled, and then
    raises the first error, in the order of the ids. Cancelling who waits does not cancel it.
    """

    def __init__(self, tasks: Sequence[tuple[str, asyncio.Task[None]]]) -> None:
        self._tasks = tuple(tasks)

    @property
    def done(self) -> bool:
        """Whether nothing of it is under way."""
        return all(task.done() for _, task in self._tasks)

    @property
    def errors(self) -> Mapping[str, LoraxError]:
        """Why adapters did not arrive, by id, so far."""
        found: dict[str, LoraxError] = {}
        for id, task in self._tasks:
            error = task.exception() if task.done() and not task.cancelled() else None
            if isinstance(error, LoraxError):
                found[id] = error
        return MappingProxyType(found)

    def cancel(self) -> None:
        """Want the adapters that have not arrived no longer; other wishes for them stay."""
        for _, task in self._tasks:
            task.cancel()

    def __await__(self) -> Generator[object, None, None]:
        yield from self._wait().__await__()

    async def _wait(self) -> None:
        if self._tasks:
            await asyncio.wait([task for _, task in self._tasks])
        for error in self.errors.values():
            raise error

    def __repr__(self) -> str:
        left = sum(not task.done() for _, task in self._tasks)
        return f"<Prefetch of {len(self._tasks)} adapters, {left} on their way>"
