"""Questions to a source that somebody on a loop waits for."""

from __future__ import annotations

import asyncio
from typing import Self

from lorax_async.errors import FetchError
from lorax_async.io.http.asking import Ask, Enough
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.target import Answer, Target


class Inquiry:
    """Asks several files at once; whatever was not answered when it is left is given up.

    Leaving it waits for nothing: the engine's threads leave their sockets by themselves.
    """

    def __init__(self, engine: RangeEngine) -> None:
        self._engine = engine
        self._asked: list[Ask] = []

    def beginning(self, target: Target, nbytes: int, enough: Enough) -> Ask:
        """Ask for the first bytes of a file; see `RangeEngine.ask`."""
        return self._followed(self._engine.ask(target, nbytes, enough=enough))

    def whole(self, target: Target, most: int) -> Ask:
        """Ask for all of a file, which may have `most` bytes."""
        return self._followed(self._engine.ask(target, most, ranged=False))

    def _followed(self, job: Ask) -> Ask:
        self._asked.append(job)
        return job

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._asked:
            if not job.done.done():
                job.cancel(FetchError("nobody waits for the answer any more"))


async def answered(job: Ask) -> Answer:
    """What came, or the engine's error. A cancellation leaves the job to its inquiry."""
    return await asyncio.wrap_future(job.done)
