"""The range engine: its threads, its clock, and what others ask of it."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Sequence
from threading import Event, Lock, Thread, current_thread
from typing import Any, Self

from lorax_async.core.arrivals import Arrivals
from lorax_async.core.ranges import Link, Span, plan_waves, without
from lorax_async.errors import FetchError, InternalError, LoraxError
from lorax_async.io.http.asking import Ask
from lorax_async.io.http.attempt import Attempt
from lorax_async.io.http.desk import Desk, Job, Piece
from lorax_async.io.http.download import Download, Sink
from lorax_async.io.http.exchange import Exchange
from lorax_async.io.http.failures import AbortedError, SetbackError
from lorax_async.io.http.links import Links
from lorax_async.io.http.network import Network, RealNetwork
from lorax_async.io.http.pool import Pool
from lorax_async.io.http.settings import HttpSettings
from lorax_async.io.http.target import Answer, Target

BUFFER_BYTES = 256 << 10
"""Of each thread: what is read at once, and written on."""

FOREGROUND, PREFETCH = 0, 1

_TICK = 0.05


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
    """

    def __init__(
        self,
        settings: HttpSettings | None = None,
        *,
        network: Network | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings or HttpSettings()
        self._clock = clock
        self._wall = wall
        self._links = Links()
        self._pool = Pool(self._settings, network or RealNetwork(), clock)
        self._exchange = Exchange(self._settings, self._pool, self._links, clock)
        self._desk = Desk(self._settings.connections, self._settings.retries, clock, draw)
        self._threads: set[Thread] = set()
        self._watch: Thread | None = None
        self._hiring = Lock()
        self._woken = Event()
        self._closed = False

    def ask(
        self,
        target: Target,
        nbytes: int,
        *,
        ranged: bool = True,
        urgency: int = FOREGROUND,
        timeout: float = 60.0,
    ) -> Ask:
        """Ask for the first `nbytes` of a file, or without `ranged` for a file of at most so many.

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
        )
        self._begin(job)
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
        arrivals = Arrivals(groups)
        for group in groups:
            for span in without(group, without(group, have)):
                arrivals.landed(span)
        for n in arrivals.take():
            arrived(n)
        missing = [without(group, have) for group in groups]
        waves = plan_waves(
            missing,
            first=first,
            connections=self._settings.connections,
            link=self._links.of(answer.place.url.origin),
            sizes=self._settings.sizes,
        )
        job = Download(
            self._desk,
            self._exchange,
            self._links,
            answer,
            waves,
            arrivals,
            sink,
            arrived,
            least=self._settings.sizes.least,
            urgency=urgency,
            deadline=self._clock() + timeout,
            wall=self._wall,
        )
        self._begin(job)
        return job

    def link(self, target: Target) -> Link:
        """What is known of connections to the target's own origin."""
        return self._links.of(target.url.origin)

    def close(self) -> None:
        """End everything, and wait until it has ended. Idempotent."""
        with self._desk.changed:
            self._closed = True
            jobs = list(self._desk.jobs)
            self._desk.changed.notify_all()
        self._woken.set()
        for job in jobs:
            job.cancel(FetchError("the engine was closed"))
        while (thread := self._some_thread()) is not None:
            thread.join()
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn("unclosed RangeEngine", ResourceWarning, stacklevel=2)

    # -- threads ----------------------------------------------------------------------------------

    def _some_thread(self) -> Thread | None:
        with self._hiring, self._desk.changed:
            threads = self._threads | ({self._watch} if self._watch else set())
        return next((thread for thread in threads if thread is not current_thread()), None)

    def _begin(self, job: Job[Any]) -> None:
        with self._desk.changed:
            if self._closed:
                raise FetchError("the engine is closed", retryable=False)
            self._desk.jobs.append(job)
            self._desk.changed.notify_all()
        self._start_clock()
        self._woken.set()
        self._desk.finish(job)

    def _start_clock(self) -> None:
        with self._hiring:
            with self._desk.changed:
                if self._watch is not None or self._closed:
                    return
                self._watch = Thread(target=self._keep_time, name="lorax-http-clock", daemon=True)
            self._watch.start()

    def _hire(self) -> None:
        """Threads for all that may be begun now, or soon. By the clock: starting takes time."""
        while True:
            with self._hiring:
                with self._desk.changed:
                    if self._closed or len(self._threads) >= self._desk.wanted():
                        return
                    thread = Thread(target=self._work, name="lorax-http", daemon=True)
                    self._threads.add(thread)
                thread.start()

    def _work(self) -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        while (task := self._next()) is not None:
            self._run(*task, buffer)
            del task  # an idle thread keeps no job alive

    def _next(self) -> tuple[Job[Any], Piece, Attempt] | None:
        """The next task; None when there was none for long, or the engine is closed."""
        with self._desk.changed:
            late = self._clock() + self._settings.timeouts.idle
            while not self._closed:
                task = self._desk.next()
                if task is not None:
                    return task
                if self._clock() >= late:
                    break
                self._desk.changed.wait(self._settings.timeouts.idle)
            self._threads.discard(current_thread())
            return None

    def _run(self, job: Job[Any], piece: Piece, attempt: Attempt, buffer: memoryview) -> None:
        failure: Exception | None = None
        try:
            job.work(piece, attempt, buffer)
        except AbortedError:
            pass  # what is left of the piece goes back, if the job goes on
        except (SetbackError, LoraxError) as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - it ends this job, and no other
            failure = InternalError(f"a fetch failed: {type(error).__name__}")
            failure.__cause__ = error
        with self._desk.changed:
            job.left(attempt, failure)
            if job.pending:  # somebody else may go on with it; this thread looks itself
                self._desk.changed.notify()
        self._desk.finish(job)

    def _keep_time(self) -> None:
        while (pause := self._tick()) is not None:
            self._woken.wait(pause)
            self._woken.clear()

    def _tick(self) -> float | None:
        """End what is late, close what is idle, wake who waits; None when there is nothing left."""
        self._hire()
        with self._desk.changed:
            late = self._desk.expire()
        for job in late:
            self._desk.finish(job)
        kept = self._pool.expire()
        with self._desk.changed:
            if self._desk.jobs and not self._closed:
                self._desk.changed.notify_all()
                return _TICK
            if self._closed or not kept:
                self._watch = None
                return None
            return _TICK * 4
