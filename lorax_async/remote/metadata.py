"""The metadata of an adapter: its config, its index if it has one, and its weights' headers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from lorax_async.concurrency import FetchControl, WorkerThreads, outcome, wait_for_end
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
from lorax_async.http.range_engine import (
    FOREGROUND,
    PREFETCH,
    NeededBytes,
    ProbeRequest,
    RangeEngine,
)
from lorax_async.http.target import ProbeResult, Target, Validators
from lorax_async.remote.base import LocatedAdapter, RemoteFile

LONGEST = 86_400.0
"""Seconds. Callers have their own deadlines, and an unwanted fetch is cancelled."""


@asynccontextmanager
async def track(control: FetchControl, *jobs: Job[Any]) -> AsyncIterator[None]:
    """Give jobs the urgency of `control`, and cancel them when it ends.

    On an error or a cancellation, cancel them and wait until their threads have left.
    """

    def update() -> None:
        for job in jobs:
            if control.cancelled:
                job.cancel(unwanted_error())
            elif control.urgent:
                job.raise_priority(FOREGROUND)

    try:
        with control.watch(update):
            yield
    except BaseException:
        for job in jobs:
            job.cancel(unwanted_error())
        for job in jobs:
            await wait_for_end(job.done)
        raise


@asynccontextmanager
async def bind_to(control: FetchControl) -> AsyncIterator[None]:
    """Cancel the body when `control` ends, and raise `FetchError`."""
    loop = asyncio.get_running_loop()
    limit = asyncio.timeout(None)

    def update() -> None:
        if control.cancelled and not limit.expired():
            limit.reschedule(loop.time())

    try:
        async with limit:
            with control.watch(update):
                yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise unwanted_error() from None


def unwanted_error() -> FetchError:
    return FetchError("no caller waits for the adapter any more")


class CancelScope:
    """Sends probe requests for several files at once; on exit cancels the unfinished ones.

    Exit does not wait: the engine's threads leave their sockets by themselves.
    """

    def __init__(self, engine: RangeEngine) -> None:
        self._engine = engine
        self._requests: list[ProbeRequest] = []

    def probe(self, target: Target, nbytes: int, needed_bytes: NeededBytes) -> ProbeRequest:
        """Request the first bytes of a file; see `RangeEngine.probe`."""
        return self._add(self._engine.probe(target, nbytes, needed_bytes=needed_bytes))

    def fetch_whole(self, target: Target, max_bytes: int) -> ProbeRequest:
        """Request all of a file of at most `max_bytes`."""
        return self._add(self._engine.probe(target, max_bytes, ranged=False))

    def _add(self, request: ProbeRequest) -> ProbeRequest:
        self._requests.append(request)
        return request

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for request in self._requests:
            if not request.done.done():
                request.cancel(FetchError("no caller waits for the answer any more"))


async def wait_for(request: ProbeRequest) -> ProbeResult:
    """Return the result, or raise the engine's error. Cancelling does not cancel the request."""
    return await asyncio.wrap_future(request.done)


FIRST_BYTES = 256 << 10
"""Bytes of the weights in the first request, which uses one connection.

They should contain the header, or another round trip is needed: a header has 60 KB for 448 tensors,
and about 235 KB for DoRA on all seven targets of 80 layers. Bytes beyond the header arrive sooner
over all connections. Measured for 84 MB over 16 connections of 20 MB/s with 10 ms: 390 ms with
64 KiB (too few to estimate the link's rate), 351 with 128, 337 with 256, 350 with 512, 385 with
1 MiB; at 5 MB/s 1.13 s with 128 and with 256 KiB, 1.18 with 512.
"""

_LIMITS = {
    "config": "max_config_bytes",
    "index": "max_header_bytes",
    "weights": "max_adapter_bytes",
}

Shards = Callable[[LocatedAdapter, Sequence[FileRole]], Awaitable[tuple[RemoteFile, ...]]]


@dataclass(frozen=True, slots=True, eq=False)
class WeightsPart:
    """One file of weights: its `prefix` ends with the header."""

    file: RemoteFile
    answer: ProbeResult
    nbytes: int
    prefix: bytes


@dataclass(frozen=True, slots=True, eq=False)
class AdapterMetadata:
    """The part of an adapter that is checked before any layer is fetched.

    Weights in several files have an index, and a plan that joins them into one.
    """

    config: tuple[RemoteFile, bytes]
    index: tuple[RemoteFile, bytes] | None
    parts: tuple[WeightsPart, ...]
    plan: SplitPlan | None

    @property
    def small(self) -> tuple[tuple[RemoteFile, bytes], ...]:
        """The config and the index: files that were fetched whole."""
        return (self.config,) if self.index is None else (self.config, self.index)

    @property
    def prefix(self) -> bytes:
        return self.parts[0].prefix if self.plan is None else self.plan.prefix

    @property
    def nbytes(self) -> int:
        """The size of the weights as one file."""
        return self.parts[0].nbytes if self.plan is None else self.plan.nbytes


class MetadataReader:
    """Fetches metadata, except for files that were probed when they were located."""

    def __init__(
        self, engine: RangeEngine, workers: WorkerThreads, limits: Limits, shards: Shards
    ) -> None:
        self._engine = engine
        self._workers = workers
        self._limits = limits
        self._shards = shards

    async def fetch(self, located: LocatedAdapter, control: FetchControl) -> AdapterMetadata:
        """Return the adapter's metadata, within the limits. End early when `control` ends."""
        for file in located.files:
            self._require_size(file, file.nbytes)
        config, second = located.files
        is_split = second.role == INDEX_FILE
        nbytes = self._limits.max_header_bytes if is_split else FIRST_BYTES
        config_probe, probe = await self._probe(
            [(config, self._limits.max_config_bytes), (second, nbytes)], control
        )
        checked = (config, self._whole(config, config_probe))
        if not is_split:
            parts = await self._parts([second], [probe], control)
            return AdapterMetadata(checked, None, parts, None)
        content = self._whole(second, probe)
        index = await self._workers.run(partial(parse_index, content, self._limits))
        roles = [FileRole("weights", number + 1, index.count) for number in range(index.count)]
        async with bind_to(control):
            files = await self._shards(located, roles)
        for file in files:
            self._require_size(file, file.nbytes)
        probes = await self._probe([(file, FIRST_BYTES) for file in files], control)
        parts = await self._parts(files, probes, control)
        heads = [FileHead(part.prefix, part.nbytes) for part in parts]
        plan = await self._workers.run(partial(plan_split, index, heads, self._limits))
        return AdapterMetadata(checked, (second, content), parts, plan)

    async def _parts(
        self, files: Sequence[RemoteFile], probes: Sequence[ProbeResult], control: FetchControl
    ) -> tuple[WeightsPart, ...]:
        return tuple(
            [
                await self._part(file, probe, control)
                for file, probe in zip(files, probes, strict=True)
            ]
        )

    async def _part(
        self, file: RemoteFile, probe: ProbeResult, control: FetchControl
    ) -> WeightsPart:
        nbytes = self._size(file, probe)
        needed = header_size(probe.start[:8], nbytes, self._limits)
        if needed > len(probe.start):
            (larger,) = await self._probe([(replace(file, answer=None), needed)], control)
            if larger.validators != probe.validators:
                raise IntegrityError(
                    f"{file.target.name} changed while it was requested; load it again"
                )
            probe = larger
        return WeightsPart(file, probe, nbytes, probe.start[:needed])

    def _size(self, file: RemoteFile, answer: ProbeResult) -> int:
        """Return the size of the whole file. Raise if it is unknown or over the limit."""
        name = file.target.name
        size = file.nbytes if answer.validators.size is None else answer.validators.size
        if size is None:
            raise FetchError(f"the source does not say how large {name} is", retryable=False)
        self._require_size(file, size)
        return size

    def _require_size(self, file: RemoteFile, nbytes: int | None) -> None:
        """Raise `AdapterFormatError` for a size over the limit: such a file is not requested."""
        limit = _LIMITS[file.role.kind]
        max_bytes: int = getattr(self._limits, limit)
        if nbytes is not None and nbytes > max_bytes:
            raise AdapterFormatError(
                f"{file.target.name} has {nbytes:,} bytes, over the limit of {max_bytes:,};"
                f" raise Limits.{limit} to accept it"
            )

    def _whole(self, file: RemoteFile, answer: ProbeResult) -> bytes:
        """Return the content of a file that was fetched whole."""
        if file.nbytes not in {None, len(answer.start)}:
            raise IntegrityError(
                f"{file.target.name} has {len(answer.start):,} bytes, and {file.nbytes:,} were"
                " promised; load it again"
            )
        return answer.start

    async def _probe(
        self, files: Sequence[tuple[RemoteFile, int]], control: FetchControl
    ) -> list[ProbeResult]:
        """Return the first bytes of weights, and all bytes of a config or an index."""
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
        for (file, _), answer in zip(files, answers, strict=True):
            file.require_match(answer)
        return answers


def _header(start: memoryview, _: Validators) -> int:
    return header_end(start)
