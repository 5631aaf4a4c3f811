"""Schedule downloads: jobs cut into pieces, their shares of the connections, the threads.

`DownloadScheduler` decides, under its lock, by the rules of docs/http.md; `WorkerPool` has the
threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from threading import Condition, Event, Lock, RLock, Thread, current_thread
from typing import Any, Generic, NamedTuple, TypeVar

from lorax_async.errors import FetchError, FetchTimeoutError, InternalError, LoraxError
from lorax_async.http.client import ConnectionPool
from lorax_async.http.connection import Attempt
from lorax_async.http.failures import AbortedError, RetryableError, RetryPolicy


class ConnectionDemand(NamedTuple):
    """How many connections a download can use at one origin; smaller urgencies come first.

    A `stalled` origin has sent nothing for a while, and a `silent` download has received nothing of
    its own. It is `retried` if all pieces that the download would use them for were tried before.
    `useful` is how many connections add throughput there, all downloads together, if that is known.
    """

    urgency: int
    wanted: int
    origin: Hashable = None
    stalled: bool = False
    retried: bool = False
    silent: bool = False
    useful: int | None = None


def shares(claims: Sequence[ConnectionDemand], connections: int, *, soon: int = 0) -> list[int]:
    """Return how many connections each of the claims gets, in their order.

    Connections are divided by urgency, then evenly among origins, then evenly among an origin's
    claims; none gets more than it wants. A remainder goes to claims that were not tried before,
    then to earlier ones. A later urgency gets the connections that earlier ones left, and of an
    origin whose connections share a rate only as many as are useful there. A stalled origin gets
    one connection per urgency, and more only if no other can use them, now or `soon`; of an origin,
    so do the silent claims together.
    """
    granted = [0] * len(claims)
    for rest in (False, True):  # at last the connections withheld from stalled origins
        connections = max(0, connections - soon) if rest else connections
        if not connections:
            break
        for urgency in sorted({claim.urgency for claim in claims}):
            origins = _by_origin(claims, urgency)
            left = [[_more(claims, granted, n) for n in members] for members in origins]
            wanted = []
            for members, more in zip(origins, left, strict=True):
                silent = sum(more[i] for i, n in enumerate(members) if claims[n].silent)
                most = sum(more) if rest else sum(more) - silent + min(silent, 1)
                wanted.append(min(most, 1) if claims[members[0]].stalled and not rest else most)
            parts = _even(wanted, connections)
            connections -= sum(parts)
            for members, more, part in zip(origins, left, parts, strict=True):
                for n, gained in _divide(claims, granted, members, more, part):
                    granted[n] += gained
    return granted


def _divide(
    claims: Sequence[ConnectionDemand],
    granted: Sequence[int],
    members: Sequence[int],
    more: Sequence[int],
    part: int,
) -> list[tuple[int, int]]:
    """Divide an origin's part among its claims: one for the silent, the rest for the others first.

    Return each claim and what it gains.
    """
    is_silent = [claims[n].silent for n in members]
    active = [0 if silent else want for want, silent in zip(more, is_silent, strict=True)]
    silent_ones = [want if silent else 0 for want, silent in zip(more, is_silent, strict=True)]
    has_one = any(claims[n].silent and granted[n] for n in members)
    kept = int(sum(silent_ones) > 0 and part > 1 and not has_one)
    gains = _even(active, part - kept)
    last = _even(silent_ones, part - sum(gains))
    return [(n, a + b) for n, a, b in zip(members, gains, last, strict=True)]


def _more(claims: Sequence[ConnectionDemand], granted: Sequence[int], n: int) -> int:
    """Return how many more connections a claim can use."""
    claim = claims[n]
    more = claim.wanted - granted[n]
    if claim.useful is None:
        return more
    before = sum(
        part
        for other, part in zip(claims, granted, strict=True)
        if other.origin == claim.origin and other.urgency < claim.urgency
    )
    return max(0, min(more, claim.useful - before - granted[n])) if before else more


def _by_origin(claims: Sequence[ConnectionDemand], urgency: int) -> list[list[int]]:
    """Return the claims of each origin; origins and claims are in the order of their precedence."""
    by_origin: dict[Hashable, list[int]] = {}
    for n, claim in enumerate(claims):
        if claim.urgency == urgency:
            by_origin.setdefault(claim.origin, []).append(n)
    origins = [
        sorted(members, key=lambda n: claims[n].retried and not claims[n].silent)
        for members in by_origin.values()
    ]
    return sorted(origins, key=lambda each: (claims[each[0]].stalled, claims[each[0]].retried))


def _in_turn(claims: Mapping[_Stream, ConnectionDemand], now: float) -> list[_Stream]:
    """Return the claims; the silent ones take turns at being first, as one may never answer."""
    silent = [stream for stream, claim in claims.items() if claim.silent]
    first = int(now / _SILENT_TURN_SECONDS) % max(1, len(silent))
    others = [stream for stream, claim in claims.items() if not claim.silent]
    return [*others, *silent[first:], *silent[:first]]


def _even(wanted: Sequence[int], connections: int) -> list[int]:
    """Divide connections evenly; those that want fewer leave theirs to the others."""
    parts = list(wanted)
    ascending = sorted(range(len(wanted)), key=lambda n: wanted[n])
    for count, n in enumerate(ascending):
        level, remainder = divmod(connections, len(ascending) - count)
        if wanted[n] > level:
            for rank, limited in enumerate(sorted(ascending[count:])):
                parts[limited] = level + (rank < remainder)
            break
        connections -= wanted[n]
    return parts


T = TypeVar("T")

BUFFER_BYTES = 1 << 20
"""The buffer of each thread: the maximum of one read and one write."""

_SHARES_SECONDS = 0.01
_SILENT_TURN_SECONDS = 1.0
"""How long each of an origin's silent downloads has the one connection that they share."""
_PROGRESS_BYTES = 1 << 20
"""After this many bytes a piece counts its failures anew."""

_QUIET_SECONDS = 0.25
_MAX_QUIET_SECONDS = 4.0
"""An origin that sends nothing for this long is stalled, and a download that receives nothing is
silent, unless the origin paused for longer before.
"""

_SUSPECT_SECONDS = 2.0
_PAUSE_DECAY = 0.9
"""Per answer."""

_ANSWER_BYTES = 64 << 10
_GRACE_SECONDS = 0.05
"""An attempt that has brought nothing for this long is ended to free its connection.

At a stalled origin, any attempt in excess of its share is.
"""

_MAX_ORIGINS = 1024
"""More than there are connections: no origin is dropped while an attempt waits for it."""

_TICK_SECONDS = 0.05


# -- jobs ------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class DownloadPiece:
    """Bytes [at, stop) that are still to come, of which those before `claimed` are being read."""

    order: int
    at: int
    stop: int
    claimed: int = 0
    failures: int = 0
    received: int = 0
    progress_mark: int = 0
    rate: float | None = None
    begun: float = 0.0
    """When it was requested last."""

    not_before: float = 0.0
    tried: bool = False
    """Whether a request for it failed, or was ended for another job."""


class Job(ABC, Generic[T]):
    """Work for threads. All but `done`, `work` and `cancel` needs the scheduler's lock.

    `done` is its outcome, or one typed error, set by `work` or when its last thread has left it.
    Meanwhile threads start for the `announced` connections, which will be wanted then. If it
    `hands_over`, a thread gives up the piece that it reads when another job needs one.
    """

    def __init__(self, scheduler: DownloadScheduler, urgency: int, timeout: float) -> None:
        self.scheduler = scheduler
        self.urgency = urgency
        self.origin: Hashable = None
        """The origin of its next request."""

        self.deadline = scheduler.clock() + timeout
        self.done: Future[T] = Future()
        self.done.set_running_or_notify_cancel()
        self.running: dict[Attempt, DownloadPiece] = {}
        self.pending: list[DownloadPiece] = []
        self.limit = float(scheduler.connections)
        self.announced = 0
        self.hands_over = False
        self.is_silent = False
        """Whether its attempts brought nothing for a while, until bytes flow again."""

        self.not_before = 0.0
        self.received = 0
        self.over = False
        self.error: LoraxError | None = None
        self.result: T | None = None

    @abstractmethod
    def work(self, piece: DownloadPiece, attempt: Attempt, buffer: memoryview) -> None:
        """Fetch the piece, through the thread's own buffer. Raises what `leave` is to record."""

    def cancel(self, error: LoraxError) -> None:
        """End it with this error; `done`, if not set, follows when its threads have left. Quick."""
        with self.scheduler.lock:
            self.fail(error)
        self.scheduler.finish(self)

    def raise_priority(self, urgency: int) -> None:
        with self.scheduler.lock:
            self.urgency = urgency

    def wanted(self, now: float) -> int:
        """Return how many connections it can use now."""
        used = len(self.running)
        if now < self.not_before or not self.pending:
            return used
        more = sum(piece.not_before <= now for piece in self.pending)
        return max(used, min(int(self.limit), used + more))

    def useful(self) -> int | None:
        """Return how many connections add throughput at its origin; None if all may."""
        return None

    def take(self, now: float) -> DownloadPiece | None:
        """Take the first piece that may start, if it can use another connection now."""
        if now < self.not_before or len(self.running) >= int(self.limit):
            return None
        for n, piece in enumerate(self.pending):
            if piece.not_before <= now:
                return self.pending.pop(n)
        return None

    def is_retry(self, now: float) -> bool:
        """Whether the piece that `take` would return was tried before."""
        return next((piece.tried for piece in self.pending if piece.not_before <= now), False)

    def split(self, now: float) -> DownloadPiece | None:  # noqa: ARG002 - some jobs can
        """Cut a part off a piece that another thread is too slow with."""
        return None

    def put_back(self, piece: DownloadPiece) -> None:
        insort(self.pending, piece, key=lambda each: each.order)

    def leave(self, attempt: Attempt, failure: Exception | None) -> None:
        """Record that a thread has finished with its piece, or failed."""
        self.scheduler.activity.ended(attempt, failure, answered=self.done.done())
        piece = self.running.pop(attempt)
        if self.over:
            return
        if isinstance(failure, RetryableError) and not attempt.ended:
            self._retry(piece, failure)
        elif isinstance(failure, LoraxError):
            self.fail(failure)
        else:
            piece.tried = piece.tried or attempt.ended
            self.return_piece(piece)

    @abstractmethod
    def return_piece(self, piece: DownloadPiece) -> None:
        """Put back what is left of the piece, and decide whether the job is over."""

    def fail(self, error: LoraxError) -> None:
        """End all attempts; the first error counts."""
        if not self.over:
            self.over, self.error = True, error
            for attempt in self.running:
                attempt.end()

    def _retry(self, piece: DownloadPiece, failure: RetryableError) -> None:
        scheduler, throttled = self.scheduler, failure.throttled
        # Throttling is not this piece's failure: count the progress of the whole job.
        received, enough = (self.received, 1) if throttled else (piece.received, _PROGRESS_BYTES)
        piece.failures = 1 if received - piece.progress_mark >= enough else piece.failures + 1
        piece.progress_mark = received
        now = scheduler.clock()
        wait = scheduler.retries.wait(piece.failures, scheduler.draw(), failure.retry_after)
        if wait is None or now + wait >= self.deadline:
            self.fail(failure.error)
            return
        piece.tried = True
        piece.not_before = now + wait
        if throttled:
            self.not_before = max(self.not_before, piece.not_before)
            self.limit = max(1.0, min(self.limit, len(self.running)))
        self.put_back(piece)


# -- which origins are stalled ---------------------------------------------------------------------


@dataclass(slots=True)
class _Observation:
    """The last look at an attempt: its origin, bytes received, and since when.

    `looks` counts those that saw new bytes.
    """

    origin: Hashable
    received: int
    since: float
    looks: int = 0


@dataclass(slots=True)
class _OriginState:
    """How long an origin has been silent.

    `since` is when it began to owe an answer (None: it owes none); `pause` is its longest recent
    pause. `received` counts bytes towards the next answer: the end of a request is one, and so are
    64 KiB. Until `suspect_until` it counts as stalled, whatever it sends.
    """

    since: float | None = None
    pause: float = 0.0
    received: int = 0
    suspect_until: float = 0.0

    @property
    def patience(self) -> float:
        return max(_QUIET_SECONDS, min(2 * self.pause, _MAX_QUIET_SECONDS))


class OriginActivity:
    """Observe which origins send and which are stalled. Use with the scheduler's lock.

    An origin is stalled when half of its attempts have brought nothing for `_QUIET_SECONDS`, or
    twice its longest recent pause; and for `_SUSPECT_SECONDS` after that, for it may answer small
    requests at once and stall with the others. It is, too, when no request to it has ended and
    fewer than `_ANSWER_BYTES` have come for that long, whichever attempts it had meanwhile; that
    ends with the next answer.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._attempts: dict[Attempt, _Observation] = {}
        self._origins: OrderedDict[Hashable, _OriginState] = OrderedDict()

    def begun(self, attempt: Attempt) -> None:
        now = self._clock()
        self._attempts[attempt] = _Observation(attempt.origin, attempt.received, now)
        self._requested(attempt.origin, now)

    def observe(self, attempt: Attempt) -> float:
        """Record the bytes that an attempt received; return since when it has received none."""
        last, now, received = self._attempts[attempt], self._clock(), attempt.received
        if attempt.origin != last.origin:  # a redirect is an answer
            self._record_bytes(last, now, _ANSWER_BYTES)
            self._requested(attempt.origin, now)
            self._attempts[attempt] = _Observation(attempt.origin, received, now)
        elif received != last.received:
            self._record_bytes(last, now, received - last.received)
            last.received, last.since = received, now
            last.looks += 1
        return self._attempts[attempt].since

    def ended(self, attempt: Attempt, failure: Exception | None, *, answered: bool) -> None:
        self.observe(attempt)
        last = self._attempts.pop(attempt)
        reason = failure.error if isinstance(failure, RetryableError) else failure
        answered |= not attempt.ended and not isinstance(reason, FetchTimeoutError)
        state = self._origins.get(last.origin)
        if answered and state is not None:
            self._record_bytes(last, self._clock(), _ANSWER_BYTES)
            if all(other.origin != last.origin for other in self._attempts.values()):
                state.since = None

    def update_stalled(self) -> None:
        """Mark stalled origins. Call after `observe` of all attempts."""
        now = self._clock()
        running, silent = Counter[Hashable](), Counter[Hashable]()
        for attempt, last in self._attempts.items():
            if not attempt.ended:
                running[last.origin] += 1
                silent[last.origin] += now - last.since >= self._origins[last.origin].patience
        for origin, count in silent.items():
            if count and 2 * count >= running[origin]:
                self._origins[origin].suspect_until = now + _SUSPECT_SECONDS

    def patience(self, attempt: Attempt) -> float:
        """Return after how many seconds without a byte an observed attempt counts as silent."""
        return self._origins[self._attempts[attempt].origin].patience

    def is_flowing(self, attempt: Attempt) -> bool:
        """Whether bytes came at different times: the first ones may be all that come."""
        return self._attempts[attempt].looks > 1

    def is_stalled(self, origin: Hashable) -> bool:
        """Whether the origin owes an answer for too long, or did a moment ago."""
        state, now = self._origins.get(origin), self._clock()
        if state is None:
            return False
        owes = state.since is not None and now - state.since >= state.patience
        return owes or now < state.suspect_until

    def _requested(self, origin: Hashable, now: float) -> None:
        state = self._origins.setdefault(origin, _OriginState())
        self._origins.move_to_end(origin)
        if state.since is None:
            state.since = now
        if len(self._origins) > _MAX_ORIGINS:
            in_use = {last.origin for last in self._attempts.values()}
            del self._origins[next(each for each in self._origins if each not in in_use)]

    def _record_bytes(self, last: _Observation, now: float, nbytes: int) -> None:
        state = self._origins.get(last.origin)
        if state is None:
            return
        state.pause = max(now - last.since, state.pause)
        state.received += nbytes
        if state.received >= _ANSWER_BYTES:
            state.pause = max(now - last.since, _PAUSE_DECAY * state.pause)
            state.received, state.since = 0, now


# -- the scheduler ---------------------------------------------------------------------------------

Task = tuple[Job[Any], DownloadPiece, Attempt]

_Stream = tuple[Job[Any], Hashable]
"""A job and one of its attempts' origins."""


class DownloadScheduler:
    """The jobs of one downloader. `changed` shares its `lock`, and is notified of more to do."""

    def __init__(
        self,
        connections: int,
        retries: RetryPolicy,
        clock: Callable[[], float],
        draw: Callable[[], float],
        stuck: float,
    ) -> None:
        self.lock = RLock()
        self.changed = Condition(self.lock)
        self.connections = connections
        self.retries = retries
        self.clock = clock
        self.draw = draw
        self.jobs: list[Job[Any]] = []
        self.activity = OriginActivity(clock)
        self._counted_at = 0.0
        self._parts: dict[Job[Any], int] = {}
        self._stuck = stuck

    def next(self) -> Task | None:
        """Choose a task for a free thread. With the lock."""
        now = self.clock()
        jobs = [job for job in self.jobs if not job.over]
        if len(jobs) == 1:  # nothing to share
            job = jobs[0]
            free = len(job.running) < self.connections
            piece = (job.take(now) if free else None) or self._split(job, now)
            return None if piece is None else self._begin(job, piece)
        parts, running = self._shares(now), _running(jobs)
        owed = Counter[Hashable]()  # connections that each origin lacks
        for (job, origin), part in parts.items():
            owed[origin] += part - running[job, origin]

        def lacks(job: Job[Any]) -> int:
            return parts.get((job, job.origin), 0) - running[job, job.origin]

        def need(job: Job[Any]) -> tuple[object, ...]:
            return job.urgency, job.is_retry(now), -owed[job.origin], -lacks(job)

        for job in sorted(filter(lambda job: lacks(job) > 0, jobs), key=need):
            if (piece := job.take(now)) is not None:
                return self._begin(job, piece)
        for job in sorted(jobs, key=need):
            if (piece := self._split(job, now)) is not None:
                return self._begin(job, piece)
        return None

    def _split(self, job: Job[Any], now: float) -> DownloadPiece | None:
        piece = job.split(now)
        if piece is not None:
            self.changed.notify()  # another thread looks for the next straggler
        return piece

    def _begin(self, job: Job[Any], piece: DownloadPiece) -> Task:
        attempt = Attempt(job.origin)
        piece.begun = self.clock()
        job.running[attempt] = piece
        self.activity.begun(attempt)
        return job, piece, attempt

    def connections_for(self, origin: Hashable, urgency: int) -> int:
        """Return how many connections to cut a new download for. Call without the lock.

        A wave of 16 pieces on 15 connections would take two rounds; one of 8 is as good as any.
        """
        with self.lock:
            claims = self._claims(self.clock()).values()
        others = [claim for claim in claims if claim.origin != origin]
        if not others:
            return self.connections
        all_of_it = ConnectionDemand(urgency, self.connections, origin)
        part = shares([*others, all_of_it], self.connections)[-1]
        return part if 2 * part > self.connections else self.connections

    def _shares(self, now: float) -> dict[_Stream, int]:
        """Return how many connections each job may have at each origin."""
        claims = self._claims(now)
        is_stalled = self.activity.is_stalled
        announcing = [job for job in self.jobs if job.announced and not job.over]
        soon = max((job.announced for job in announcing if not is_stalled(job.origin)), default=0)
        ordered = _in_turn(claims, now)
        parts = shares([claims[stream] for stream in ordered], self.connections, soon=soon)
        return dict(zip(ordered, parts, strict=True))

    def _claims(self, now: float) -> dict[_Stream, ConnectionDemand]:
        claims: dict[_Stream, ConnectionDemand] = {}
        is_stalled = cache(self.activity.is_stalled)
        for job in self.jobs:
            if job.over:
                continue
            pieces: dict[Hashable, list[DownloadPiece]] = {}
            for attempt, piece in job.running.items():
                pieces.setdefault(attempt.origin, []).append(piece)
            more = job.wanted(now) - len(job.running)
            if more or not pieces:
                pieces.setdefault(job.origin, [])
            for origin, read in pieces.items():
                starts = more if origin == job.origin else 0
                retried = all(piece.tried for piece in read) and (not starts or job.is_retry(now))
                wanted = len(read) + starts
                claims[job, origin] = ConnectionDemand(
                    *(job.urgency, wanted, origin, is_stalled(origin), retried, job.is_silent),
                    useful=job.useful(),
                )
        return claims

    def wanted_threads(self) -> int:
        """Return how many threads there should be. With the lock."""
        now = self.clock()
        wanted = sum(max(job.wanted(now), job.announced) for job in self.jobs if not job.over)
        return min(self.connections, wanted)

    def threads_to_wake(self) -> int:
        """Return how many idle threads have work, at least one for stragglers. With the lock."""
        return max(1, self.wanted_threads() - sum(len(job.running) for job in self.jobs))

    def exceeds_share(self, job: Job[Any], *, by_more_urgent: bool = False) -> bool:
        """Whether the job has more threads than its share, and another fewer. With the lock.

        With `by_more_urgent`, only more urgent ones count. Called between chunks, so shares are
        computed every 10 ms only.
        """
        now = self.clock()
        if now >= self._counted_at + _SHARES_SECONDS:
            self._counted_at, self._parts = now, {}
            for (each, _), part in self._shares(now).items():
                self._parts[each] = self._parts.get(each, 0) + part
        return len(job.running) > self._parts.get(job, len(job.running)) and any(
            len(other.running) < part
            for other, part in self._parts.items()
            if not other.over and (other.urgency < job.urgency or not by_more_urgent)
        )

    def reclaim(self) -> None:
        """End silent attempts that keep other jobs below their shares. With the lock.

        A thread that receives bytes hands its piece over itself; one that waits for a stalled
        source cannot. Another origin's share is freed almost at once; within one origin, a slow
        attempt has more time.
        """
        observe = self.activity.observe
        since = {attempt: observe(attempt) for job in self.jobs for attempt in job.running}
        self.activity.update_stalled()
        now = self.clock()
        for job in self.jobs:
            if job.running:
                job.is_silent = all(
                    now - since[attempt] >= self.activity.patience(attempt)
                    or (job.is_silent and not self.activity.is_flowing(attempt))
                    for attempt in job.running
                )
        parts, running = self._shares(now), _running(self.jobs)
        lacking = {origin for (job, origin), part in parts.items() if running[job, origin] < part}
        for (job, origin), part in parts.items():
            excess = running[job, origin] - part
            if excess <= 0 or not lacking:
                continue
            hurry, grace = lacking != {origin}, self._stuck
            if job.is_silent:
                grace = 0.0
            elif hurry:
                grace = 0.0 if self.activity.is_stalled(origin) else _GRACE_SECONDS
            here = [attempt for attempt in job.running if attempt.origin == origin]
            silent = [attempt for attempt in here if now - since[attempt] >= grace]
            bound = [  # these would not hand over
                attempt
                for attempt in here
                if hurry and attempt not in silent and not job.hands_over
            ]
            excess -= sum(attempt.ended for attempt in here)
            youngest_first = (*reversed(silent), *reversed(bound))
            ending = [attempt for attempt in youngest_first if not attempt.ended]
            for attempt in ending[: max(0, excess)]:
                attempt.end()

    def finish(self, job: Job[Any]) -> None:
        """Set a job's outcome once no thread works on it any more. Without the lock."""
        with self.lock:
            if not job.over or job.running or job not in self.jobs:
                return
            self.jobs.remove(job)
            self._parts.pop(job, None)
            job.pending.clear()
        if job.error is not None and not job.done.done():
            job.done.set_exception(job.error)
        elif not job.done.done():
            job.done.set_result(job.result)


def _running(jobs: Iterable[Job[Any]]) -> Counter[_Stream]:
    """Count the attempts of each job at each origin."""
    return Counter((job, attempt.origin) for job in jobs for attempt in job.running)


# -- threads ---------------------------------------------------------------------------------------


class WorkerPool:
    """Worker threads, which end after `idle` seconds without work, and a timer thread.

    The timer thread spawns workers (spawning is too slow for callers), expires jobs, and wakes
    waiting retries and stragglers' relief.
    """

    def __init__(self, scheduler: DownloadScheduler, pool: ConnectionPool, idle: float) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._idle = idle
        self._workers: set[Thread] = set()
        self._timer: Thread | None = None
        self._spawning = Lock()
        self._wake = Event()
        self.closed = False

    def submit(self, job: Job[Any]) -> None:
        """Start a job. Quick. Raises `FetchError` once the pool is closed."""
        with self._scheduler.lock:
            if self.closed:
                raise FetchError("the downloader is closed", retryable=False)
            self._scheduler.jobs.append(job)
            self._scheduler.changed.notify(job.wanted(self._scheduler.clock()))
        failure = None
        with self._spawning:
            if self._timer is None and not self.closed:
                self._timer = Thread(target=self._keep_time, name="lorax-http-clock", daemon=True)
                try:
                    self._timer.start()
                except RuntimeError:
                    self._timer = None
                    failure = FetchError("the process may start no more threads")
        if failure is not None:
            job.cancel(failure)
        self._wake.set()
        self._scheduler.finish(job)

    def close(self) -> None:
        """Cancel all jobs, and wait until the threads have ended, but for the caller's own."""
        with self._scheduler.lock:
            self.closed = True
            jobs = list(self._scheduler.jobs)
            self._scheduler.changed.notify_all()
        self._wake.set()
        for job in jobs:
            job.cancel(FetchError("the downloader was closed"))
        while (thread := self._running_thread()) is not None:
            thread.join()

    def _running_thread(self) -> Thread | None:
        with self._spawning, self._scheduler.lock:
            threads = [*self._workers, self._timer]
        return next((thread for thread in threads if thread not in {None, current_thread()}), None)

    def _spawn(self) -> None:
        """Start the threads that jobs want now, or soon. On the timer thread."""
        while True:
            with self._spawning:
                with self._scheduler.lock:
                    if len(self._workers) >= self._scheduler.wanted_threads():
                        return
                    worker = Thread(target=self._work, name="lorax-http", daemon=True)
                    self._workers.add(worker)
                try:
                    worker.start()
                except RuntimeError:  # at the limit of threads the existing workers go on
                    self._workers.discard(worker)
                    return

    def _work(self) -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        while (task := self._next()) is not None:
            self._run(*task, buffer)
            del task  # an idle thread keeps no job alive

    def _next(self) -> Task | None:
        """Wait for a task; None after `idle` seconds, or once the pool is closed."""
        scheduler = self._scheduler
        with scheduler.lock:
            late = scheduler.clock() + self._idle
            while not self.closed:
                task = scheduler.next()
                if task is not None:
                    return task
                if scheduler.clock() >= late:
                    break
                scheduler.changed.wait(self._idle)
            self._workers.discard(current_thread())
            return None

    def _run(
        self, job: Job[Any], piece: DownloadPiece, attempt: Attempt, buffer: memoryview
    ) -> None:
        failure: Exception | None = None
        try:
            job.work(piece, attempt, buffer)
        except AbortedError:
            pass  # what is left of the piece is put back, if the job goes on
        except (RetryableError, LoraxError) as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - it ends this job, and no other
            failure = InternalError(f"a fetch failed: {type(error).__name__}")
            failure.__cause__ = error
        with self._scheduler.lock:
            job.leave(attempt, failure)
            # This thread looks itself; another one, too, where not all went well.
            if failure is not None or attempt.ended:
                self._scheduler.changed.notify()
        self._scheduler.finish(job)

    def _keep_time(self) -> None:
        while (pause := self._tick()) is not None:
            self._wake.wait(pause)
            self._wake.clear()

    def _tick(self) -> float | None:
        """Spawn, expire, reclaim and wake; return the next pause, or None when all is done."""
        self._spawn()
        scheduler = self._scheduler
        with scheduler.lock:
            now = scheduler.clock()
            late = [job for job in scheduler.jobs if not job.over and job.deadline <= now]
            for job in late:
                job.fail(FetchTimeoutError("the file did not arrive within its time"))
            scheduler.reclaim()
            busy = bool(scheduler.jobs)  # their connections may return after the next tick
        for job in late:
            scheduler.finish(job)
        kept = self._pool.expire() or busy
        with scheduler.lock:
            if scheduler.jobs and not self.closed:
                scheduler.changed.notify(scheduler.threads_to_wake())
                return _TICK_SECONDS
            if self.closed or not kept:
                self._timer = None
                return None
            return _TICK_SECONDS * 4
