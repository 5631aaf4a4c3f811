"""The range engine: probe files, download them by ranges."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Self

from lorax_async.formats.spans import ByteRange
from lorax_async.http.client import HttpClient, LinkStatistics
from lorax_async.http.download_scheduler import DownloadScheduler, WorkerPool
from lorax_async.http.downloads import Download, NeededBytes, ProbeRequest, Sink
from lorax_async.http.pool import ConnectionPool, Network, RealNetwork
from lorax_async.http.ranges import GroupArrivals, LinkEstimate, plan_waves, subtract
from lorax_async.http.settings import HttpSettings
from lorax_async.http.target import ProbeResult, Target
from lorax_async.tracing.recorder import Tracer

FOREGROUND, PREFETCH = 0, 1
"""Urgencies: smaller ones come first."""


class RangeEngine:
    """Fetches files by ranges, on blocking connections in threads of its own.

    Threads start with work and end after `Timeouts.idle` seconds without. Every method may be
    called from any thread; jobs report by a future. Its owner closes it.

    Parameters
    ----------
    settings
        How it fetches.
    network, clock, wall_clock, draw
        For tests: the network's calls, monotonic seconds, seconds since the epoch, and a draw from
        [0, 1).
    tracer
        Records what each connection does.
    """

    def __init__(
        self,
        settings: HttpSettings | None = None,
        *,
        network: Network | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        draw: Callable[[], float] = random.random,
        tracer: Tracer | None = None,
    ) -> None:
        self._settings = settings or HttpSettings()
        self._clock = clock
        self._wall_clock = wall_clock
        self._links = LinkStatistics()
        tracer = tracer or Tracer()
        self._pool = ConnectionPool(self._settings, network or RealNetwork(), clock, tracer)
        self._client = HttpClient(self._settings, self._pool, self._links, clock, tracer)
        timeouts = self._settings.timeouts
        self._scheduler = DownloadScheduler(
            self._settings.connections, self._settings.retries, clock, draw, timeouts.stuck
        )
        self._workers = WorkerPool(self._scheduler, self._pool, timeouts.idle)

    def probe(
        self,
        target: Target,
        nbytes: int,
        *,
        ranged: bool = True,
        urgency: int = FOREGROUND,
        timeout: float = 60.0,
        needed_bytes: NeededBytes | None = None,
    ) -> ProbeRequest:
        """Request the first `nbytes` of a file, or without `ranged` a file of at most that many.

        `needed_bytes` says how many of them are needed: the others are left out if they come
        slowly. `done` of the job returns a `ProbeResult`, or raises `FetchError` (or a subclass)
        or `AdapterNotFoundError`.
        """
        job = ProbeRequest(
            *(self._scheduler, self._client, target, nbytes),
            ranged=ranged,
            urgency=urgency,
            deadline=self._clock() + timeout,
            wall_clock=self._wall_clock,
            needed_bytes=needed_bytes,
        )
        self._workers.submit(job)
        return job

    def download(
        self,
        probe: ProbeResult,
        groups: Sequence[Sequence[ByteRange]],
        sink: Sink,
        arrived: Callable[[int], None],
        *,
        first: int = 0,
        have: Sequence[ByteRange] = (),
        urgency: int = FOREGROUND,
        timeout: float = 300.0,
    ) -> Download:
        """Write the groups' bytes to the sink, earlier groups first.

        Parameters
        ----------
        probe
            The result of `probe` for the same file.
        groups
            Spans of the file per group, in the order in which they are wanted.
        sink, arrived
            `arrived(n)` is called in order when group n and all before it are in the sink: from
            threads of the engine, except for what is there already and for groups without bytes at
            the beginning. Both must be quick, or they delay the download.
        first
            Groups that a caller waits for before all others.
        have
            Spans that the sink has already.
        urgency
            `FOREGROUND` or `PREFETCH`: the latter gets the connections that the former leaves.
        timeout
            Seconds for all of it.

        `done` of the job returns None when all is in the sink, or raises one `FetchError` (or a
        subclass) or `AdapterNotFoundError`, after its last thread has stopped.
        """
        missing = [subtract(group, have) for group in groups]
        arrivals = GroupArrivals(groups)
        for group, left in zip(groups, missing, strict=True):
            for span in subtract(group, left):
                arrivals.landed(span)
        for n in arrivals.take():
            arrived(n)
        origin = probe.location.url.origin
        waves = plan_waves(
            missing,
            first=first,
            connections=self._scheduler.connections_for(origin, urgency),
            link=self._links.link(origin),
            sizes=self._settings.sizes,
        )
        job = Download(
            *(self._scheduler, self._client, probe, waves, arrivals, sink, arrived),
            least=self._settings.sizes.least,
            urgency=urgency,
            deadline=self._clock() + timeout,
            wall_clock=self._wall_clock,
        )
        self._workers.submit(job)
        return job

    def link(self, target: Target) -> LinkEstimate:
        """Return the link statistics of the target's own origin."""
        return self._links.link(target.url.origin)

    def close(self) -> None:
        """Cancel everything, and wait until it has ended. Idempotent."""
        self._workers.close()
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        workers = getattr(self, "_workers", None)
        if workers is not None and not workers.closed:
            warnings.warn("unclosed RangeEngine", ResourceWarning, stacklevel=2)
