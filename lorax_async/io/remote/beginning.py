"""The first bytes of an adapter: its config, and its weights as far as the header goes."""

from __future__ import annotations

from lorax_async.config import Limits
from lorax_async.core.cache_names import CONFIG_FILE
from lorax_async.core.header import HeaderLimits, header_size
from lorax_async.errors import AdapterFormatError, FetchError, IntegrityError
from lorax_async.io.http.desk import Job
from lorax_async.io.http.engine import FOREGROUND, PREFETCH, RangeEngine
from lorax_async.io.http.target import Answer
from lorax_async.io.ports import Demand
from lorax_async.io.remote.jobs import LONGEST, followed
from lorax_async.io.remote.ports import RemoteFile
from lorax_async.io.remote.workers import outcome

FIRST_BYTES = 256 << 10
"""Of weights: the header of nearly every adapter, and not much of what follows out of turn."""


class Beginning:
    """Asks for the first bytes of files, as far as nobody has before."""

    def __init__(self, engine: RangeEngine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        self.header_limits = HeaderLimits(max_header_bytes=limits.max_header_bytes)

    async def of(
        self, config: RemoteFile, weights: RemoteFile, demand: Demand
    ) -> tuple[Answer, Answer]:
        """All of the config; the header of the weights, and whatever came with it."""
        whole, start = await self._asked(
            [(config, self._limits.max_config_bytes), (weights, FIRST_BYTES)], demand
        )
        needed = header_size(start.start[:8], self.size(weights, start), self.header_limits)
        if needed > len(start.start):
            (again,) = await self._asked([(_unanswered(weights), needed)], demand)
            if again.known != start.known:
                raise IntegrityError(f"{weights.target.name} changed while it was asked for")
            start = again
        return whole, start

    def size(self, file: RemoteFile, answer: Answer) -> int:
        """Of the whole file. Raises what is wrong with it."""
        name, size = file.target.name, answer.known.size
        if size is None:
            raise FetchError(f"the source does not say how large {name} is", retryable=False)
        if file.nbytes not in {None, size}:
            raise IntegrityError(
                f"{name} has {size:,} bytes, and {file.nbytes:,} were promised; load it again"
            )
        if size > self._limits.max_adapter_bytes:
            raise AdapterFormatError(
                f"{name} has {size:,} bytes, over the limit of {self._limits.max_adapter_bytes:,};"
                " raise Limits.max_adapter_bytes to accept it"
            )
        return size

    async def _asked(self, files: list[tuple[RemoteFile, int]], demand: Demand) -> list[Answer]:
        jobs: list[Job[Answer] | Answer] = [
            file.answer
            or self._engine.ask(
                file.target,
                nbytes,
                ranged=file.role != CONFIG_FILE,
                urgency=FOREGROUND if demand.urgent else PREFETCH,
                timeout=LONGEST,
            )
            for file, nbytes in files
        ]
        async with followed(demand, *(job for job in jobs if isinstance(job, Job))):
            return [job if isinstance(job, Answer) else await outcome(job.done) for job in jobs]


def _unanswered(file: RemoteFile) -> RemoteFile:
    return RemoteFile(file.role, file.target, file.nbytes, file.expected)
