"""The first bytes of an adapter: its config, and its weights as far as their headers go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from lorax_async.concurrency import FetchControl, WorkerThreads, ended, outcome
from lorax_async.config import Limits
from lorax_async.errors import AdapterFormatError, FetchError, IntegrityError
from lorax_async.formats.safetensors import header_end, header_size
from lorax_async.formats.split_weights import (
    INDEX_FILE,
    FileHead,
    FileRole,
    SplitPlan,
    parse_index,
    plan_split,
)
from lorax_async.http.download_scheduler import Job
from lorax_async.http.downloads import NeededBytes, ProbeRequest
from lorax_async.http.range_engine import FOREGROUND, PREFETCH, RangeEngine
from lorax_async.http.target import ProbeResult, Target, Validators
from lorax_async.remote.base import LocatedAdapter, RemoteFile

LONGEST = 86_400.0
"""Seconds. Callers have deadlines of their own, and what no caller waits for is cancelled."""


@asynccontextmanager
async def track(control: FetchControl, *jobs: Job[Any]) -> AsyncIterator[None]:
    """Give jobs the demand's urgency, and cancel them when it ends.

    On an error or a cancellation, cancel them and wait until their threads have left.
    """

    def follow() -> None:
        for job in jobs:
            if control.ended:
                job.cancel(nobody_waits())
            elif control.urgent:
                job.raise_priority(FOREGROUND)

    try:
        with control.watched(follow):
            yield
    except BaseException:
        for job in jobs:
            job.cancel(nobody_waits())
        for job in jobs:
            await ended(job.done)
        raise


@asynccontextmanager
async def bind_to(control: FetchControl) -> AsyncIterator[None]:
    """Cancel what is awaited in here when the demand ends, and raise `FetchError`."""
    loop = asyncio.get_running_loop()
    limit = asyncio.timeout(None)

    def follow() -> None:
        if control.ended and not limit.expired():
            limit.reschedule(loop.time())

    try:
        async with limit:
            with control.watched(follow):
                yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise nobody_waits() from None


def nobody_waits() -> FetchError:
    return FetchError("nobody waits for the adapter any more")


class CancelScope:
    """Probe requests for several files at once. Leaving it cancels those without an answer.

    It waits for nothing: the engine's threads leave their sockets by themselves.
    """

    def __init__(self, engine: RangeEngine) -> None:
        self._engine = engine
        self._asked: list[ProbeRequest] = []

    def metadata(self, target: Target, nbytes: int, enough: NeededBytes) -> ProbeRequest:
        """Ask for the first bytes of a file; see `RangeEngine.probe`."""
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
    """Return the answer, or raise the engine's error. Cancelling leaves the job to its scope."""
    return await asyncio.wrap_future(job.done)


FIRST_BYTES = 256 << 10
"""How much of the weights is asked for first, over one connection.

The header should be in it, or another round trip is needed: it has 60 KB for 448 tensors, and about
235 KB for DoRA on all seven targets of 80 layers. What is beyond it would come sooner over all
connections, and is left to these where it comes slowly. Measured before that was so,
84 MB over 16 connections of 20 MB/s with 10 ms: 390 ms with 64 KiB (which tell little of the link's
rate), 351 with 128, 337 with 256, 350 with 512, 385 with 1 MiB; at 5 MB/s 1.13 s with 128 and with
256 KiB, 1.18 with 512.
"""

_LIMITS = {
    "config": "max_config_bytes",
    "index": "max_header_bytes",
    "weights": "max_adapter_bytes",
}

Shards = Callable[[LocatedAdapter, Sequence[FileRole]], Awaitable[tuple[RemoteFile, ...]]]


@dataclass(frozen=True, slots=True, eq=False)
class WeightsPart:
    """One file of weights, of which the `prefix` with the whole header is here."""

    file: RemoteFile
    answer: ProbeResult
    nbytes: int
    prefix: bytes


@dataclass(frozen=True, slots=True, eq=False)
class AdapterMetadata:
    """What is checked before a layer is fetched.

    Of weights in several files there are an index, and the plan of the one that they stand for.
    """

    config: tuple[RemoteFile, bytes]
    index: tuple[RemoteFile, bytes] | None
    parts: tuple[WeightsPart, ...]
    plan: SplitPlan | None

    @property
    def small(self) -> tuple[tuple[RemoteFile, bytes], ...]:
        """The files that are here as a whole."""
        return (self.config,) if self.index is None else (self.config, self.index)

    @property
    def prefix(self) -> bytes:
        return self.parts[0].prefix if self.plan is None else self.plan.prefix

    @property
    def nbytes(self) -> int:
        """Of the one file that the weights are, or stand for."""
        return self.parts[0].nbytes if self.plan is None else self.plan.nbytes


class MetadataReader:
    """Asks for the first bytes of files, as far as nobody has before."""

    def __init__(
        self, engine: RangeEngine, workers: WorkerThreads, limits: Limits, shards: Shards
    ) -> None:
        self._engine = engine
        self._workers = workers
        self._limits = limits
        self._shards = shards

    async def of(self, located: LocatedAdapter, control: FetchControl) -> AdapterMetadata:
        for file in located.files:
            self._require_size(file, file.nbytes)
        config, second = located.files
        is_split = second.role == INDEX_FILE
        most = self._limits.max_header_bytes if is_split else FIRST_BYTES
        whole, start = await self._asked(
            [(config, self._limits.max_config_bytes), (second, most)], control
        )
        said = (config, self._whole(config, whole))
        if not is_split:
            return AdapterMetadata(said, None, await self._parts([second], [start], control), None)
        content = self._whole(second, start)
        index = await self._workers.run(partial(parse_index, content, self._limits))
        roles = [FileRole("weights", number + 1, index.count) for number in range(index.count)]
        async with bind_to(control):
            files = await self._shards(located, roles)
        for file in files:
            self._require_size(file, file.nbytes)
        starts = await self._asked([(file, FIRST_BYTES) for file in files], control)
        parts = await self._parts(files, starts, control)
        heads = [FileHead(part.prefix, part.nbytes) for part in parts]
        plan = await self._workers.run(partial(plan_split, index, heads, self._limits))
        return AdapterMetadata(said, (second, content), parts, plan)

    async def _parts(
        self, files: Sequence[RemoteFile], starts: Sequence[ProbeResult], control: FetchControl
    ) -> tuple[WeightsPart, ...]:
        return tuple(
            [
                await self._part(file, start, control)
                for file, start in zip(files, starts, strict=True)
            ]
        )

    async def _part(
        self, file: RemoteFile, start: ProbeResult, control: FetchControl
    ) -> WeightsPart:
        nbytes = self._size(file, start)
        needed = header_size(start.start[:8], nbytes, self._limits)
        if needed > len(start.start):
            (again,) = await self._asked([(_unanswered(file), needed)], control)
            if again.validators != start.validators:
                raise IntegrityError(
                    f"{file.target.name} changed while it was asked for; load it again"
                )
            start = again
        return WeightsPart(file, start, nbytes, start.start[:needed])

    def _size(self, file: RemoteFile, answer: ProbeResult) -> int:
        """Of the whole file. Raises what is wrong with it."""
        name = file.target.name
        size = file.nbytes if answer.validators.size is None else answer.validators.size
        if size is None:
            raise FetchError(f"the source does not say how large {name} is", retryable=False)
        self._require_size(file, size)
        return size

    def _require_size(self, file: RemoteFile, nbytes: int | None) -> None:
        """What is known to be too large is not asked for."""
        limit = _LIMITS[file.role.kind]
        most: int = getattr(self._limits, limit)
        if nbytes is not None and nbytes > most:
            raise AdapterFormatError(
                f"{file.target.name} has {nbytes:,} bytes, over the limit of {most:,};"
                f" raise Limits.{limit} to accept it"
            )

    def _whole(self, file: RemoteFile, answer: ProbeResult) -> bytes:
        if file.nbytes not in {None, len(answer.start)}:
            raise IntegrityError(
                f"{file.target.name} has {len(answer.start):,} bytes, and {file.nbytes:,} were"
                " promised; load it again"
            )
        return answer.start

    async def _asked(
        self, files: Sequence[tuple[RemoteFile, int]], control: FetchControl
    ) -> list[ProbeResult]:
        """Of each file the first bytes; of one that is small by its nature, all of it."""
        jobs: list[Job[ProbeResult] | ProbeResult] = [
            file.answer
            or self._engine.probe(
                file.target,
                nbytes,
                ranged=file.role.kind == "weights",
                needed_bytes=_header if file.role.kind == "weights" else None,
                urgency=FOREGROUND if control.urgent else PREFETCH,
                timeout=LONGEST,
            )
            for file, nbytes in files
        ]
        async with track(control, *(job for job in jobs if isinstance(job, Job))):
            answers = [
                job if isinstance(job, ProbeResult) else await outcome(job.done) for job in jobs
            ]
        return [file.checked(answer) for (file, _), answer in zip(files, answers, strict=True)]


def _header(start: memoryview, _: Validators) -> int:
    return header_end(start)


def _unanswered(file: RemoteFile) -> RemoteFile:
    return replace(file, answer=None)
