"""The range engine: what others ask of it."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Self

from lorax_async.core.arrivals import Arrivals
from lorax_async.core.ranges import Link, plan_waves, without
from lorax_async.core.spans import Span
from lorax_async.io.http.asking import Ask, Enough
from lorax_async.io.http.crew import Crew
from lorax_async.io.http.desk import Desk
from lorax_async.io.http.download import Download, Sink
from lorax_async.io.http.exchange import Exchange
from lorax_async.io.http.links import Links
from lorax_async.io.http.network import Network, RealNetwork
from lorax_async.io.http.pool import Pool
from lorax_async.io.http.settings import HttpSettings
from lorax_async.io.http.target import Answer, Target
from lorax_async.tracing.recorder import Tracer

FOREGROUND, PREFETCH = 0, 1


class RangeEngine:
    """Fetches files by ranges, on blocking connections in threads of its own.

    Threads begin with work and end when there was none for as long as connections are kept. Every
    method may be called from any thread; what it begins reports by a future. Whoever made it closes
    it.

    Parameters
    ----------
    settings
        How it fetches.
    network, clock, wall, draw
        For tests: the network's calls, seconds that only rise, seconds since the epoch, and a draw
        from [0, 1).
    tracer
        Told of what each connection does, while somebody records.
    """

    def __init__(
        self,
        settings: HttpSettings | None = None,
        *,
        network: Network | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        draw: Callable[[], float] = random.random,
        tracer: Tracer | None = None,
    ) -> None:
        self._settings = settings or HttpSettings()
        self._clock = clock
        self._wall = wall
        self._links = Links()
        tracer = tracer or Tracer()
        self._pool = Pool(self._settings, network or RealNetwork(), clock, tracer)
        self._exchange = Exchange(self._settings, self._pool, self._links, clock, tracer)
        timeouts = self._settings.timeouts
        self._desk = Desk(
            self._settings.connections, self._settings.retries, clock, draw, timeouts.stuck
        )
        self._crew = Crew(self._desk, self._pool, timeouts.idle)

    def ask(
        self,
        target: Target,
        nbytes: int,
        *,
        ranged: bool = True,
        urgency: int = FOREGROUND,
        timeout: float = 60.0,
        enough: Enough | None = None,
    ) -> Ask:
        """Ask for the first `nbytes` of a file, or without `ranged` for a file of at most so many.

        `enough` says how many of them are needed: where the others come slowly, they are left out.

        Its `done` brings an `Answer`, or `FetchError` (and those below it) or
        `AdapterNotFoundError`.
        """
        deadline = self._clock() + timeout
        job = Ask(
            self._desk,
            self._exchange,
            target,
            nbytes,
            ranged=ranged,
            urgency=urgency,
            deadline=deadline,
            wall=self._wall,
            enough=enough,
        )
        self._crew.begin(job)
        return job

    def download(
        self,
        answer: Answer,
        groups: Sequence[Sequence[Span]],
        sink: Sink,
        arrived: Callable[[int], None],
        *,
        first: int = 0,
        have: Sequence[Span] = (),
        urgency: int = FOREGROUND,
        timeout: float = 300.0,
    ) -> Download:
        """Bring the groups' bytes into the sink, earlier groups first.

        Parameters
        ----------
        answer
            Of `ask`, about the same file.
        groups
            Spans of the file per group, in the order in which they are wanted.
        sink, arrived
            `arrived(n)` is called in order when group n and all before it are in the sink; from
            threads of the engine, except for what is there already, and for `groups` without bytes
            at the beginning. Both must be quick, or delay the download.
        first
            How many groups somebody waits for before all others.
        have
            What the sink has already.
        urgency
            `FOREGROUND` or `PREFETCH`: the latter gets the connections that the former leaves.
        timeout
            Seconds for all of it.

        Its `done` brings None when all is in the sink; else one `FetchError` (and those below it)
        or `AdapterNotFoundError`, after its last thread has stopped.
        """
        missing = [without(group, have) for group in groups]
        arrivals = Arrivals(groups)
        for group, left in zip(groups, missing, strict=True):
            for span in without(group, left):
                arrivals.landed(span)
        for n in arrivals.take():
            arrived(n)
        waves = plan_waves(
            missing,
            first=first,
            connections=self._desk.balance(answer.place.url.origin, urgency),
            link=self._links.of(answer.place.url.origin),
            sizes=self._settings.sizes,
        )
        job = Download(
            *(self._desk, self._exchange, self._links, answer, waves, arrivals, sink, arrived),
            least=self._settings.sizes.least,
            urgency=urgency,
            deadline=self._clock() + timeout,
            wall=self._wall,
        )
        self._crew.begin(job)
        return job

    def link(self, target: Target) -> Link:
        """What is known of connections to the target's own origin."""
        return self._links.of(target.url.origin)

    def close(self) -> None:
        """End everything, and wait until it has ended. Idempotent."""
        self._crew.close()
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        crew = getattr(self, "_crew", None)
        if crew is not None and not crew.closed:
            warnings.warn("unclosed RangeEngine", ResourceWarning, stacklevel=2)
