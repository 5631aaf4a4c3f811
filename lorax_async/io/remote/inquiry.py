"""Questions to a source that somebody on a loop waits for."""

from __future__ import annotations

import asyncio
from typing import Self

from lorax_async.errors import FetchError
from lorax_async.io.http.downloads import NeededBytes, ProbeRequest
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.target import ProbeResult, Target


class Inquiry:
    """Asks several files at once; whatever was not answered when it is left is given up.

    Leaving it waits for nothing: the engine's threads leave their sockets by themselves.
    """

    def __init__(self, engine: RangeEngine) -> None:
        self._engine = engine
        self._asked: list[ProbeRequest] = []

    def beginning(self, target: Target, nbytes: int, enough: NeededBytes) -> ProbeRequest:
        """Request the first bytes of a file; see `RangeEngine.probe`."""
        return self._followed(self._engine.probe(target, nbytes, needed_bytes=enough))

    def whole(self, target: Target, most: int) -> ProbeRequest:
        """Request all of a file, which may have `most` bytes."""
        return self._followed(self._engine.probe(target, most, ranged=False))

    def _followed(self, job: ProbeRequest) -> ProbeRequest:
        self._asked.append(job)
        return job

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._asked:
            if not job.done.done():
                job.cancel(FetchError("nobody waits for the answer any more"))


async def answered(job: ProbeRequest) -> ProbeResult:
    """What came, or the engine's error. A cancellation leaves the job to its inquiry."""
    return await asyncio.wrap_future(job.done)
