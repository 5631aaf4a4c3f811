"""What there is to do, and for whom: jobs, cut into pieces, and who may use how many threads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition
from typing import Any, Generic, TypeVar

from lorax_async.core.retries import Retries
from lorax_async.core.sharing import Claim, shares
from lorax_async.errors import FetchTimeoutError, LoraxError
from lorax_async.io.http.attempt import Attempt
from lorax_async.io.http.failures import SetbackError

T = TypeVar("T")

_SHARES_SECONDS = 0.01
_PROGRESS = 1 << 20
"""After so many bytes a piece counts its failures anew."""

_QUIET_SECONDS = 0.25
_MOST_QUIET_SECONDS = 4.0
"""An origin that sends nothing for this long is stalled, unless longer pauses are its way."""

_SUSPECT_SECONDS = 2.0

_PAUSE_FADES = 0.9
"""Per answer."""

_ANSWER_BYTES = 64 << 10

_GRACE_SECONDS = 0.05
"""An attempt that has brought nothing for this long is ended for another origin's sake.

At a stalled origin, any that is too many is.
"""

_ORIGINS_KEPT = 1024
"""More than there are connections: none is forgotten while it is waited for."""


@dataclass(slots=True, eq=False)
class Piece:
    """Bytes [at, stop) that are still to come, of which those before `claimed` are being read."""

    order: int
    at: int
    stop: int
    claimed: int = 0
    failed: int = 0
    came: int = 0
    mark: int = 0
    rate: float | None = None
    not_before: float = 0.0
    tried: bool = False
    """A request for it failed, or was ended for others."""


class Job(ABC, Generic[T]):
    """Something that threads work on. All but `done`, `work` and `cancel` needs the desk's lock.

    Attributes
    ----------
    done
        Its outcome, or one typed error; set when its last thread has left it.
    announced
        How many connections will be wanted when it is done: threads for them start meanwhile.
    """

    def __init__(self, desk: Desk, urgency: int, deadline: float) -> None:
        self.desk = desk
        self.urgency = urgency
        self.deadline = deadline
        self.done: Future[T] = Future()
        self.done.set_running_or_notify_cancel()
        self.running: dict[Attempt, Piece] = {}
        self.pending: list[Piece] = []
        self.limit = float(desk.connections)
        self.announced = 0
        self.not_before = 0.0
        self.came = 0
        self.over = False
        self.error: LoraxError | None = None
        self.result: T | None = None

    @property
    def origin(self) -> Hashable:
        """Where its next piece is asked for."""
        return None

    def hands_over(self, piece: Piece) -> bool:  # noqa: ARG002 - some jobs do
        """Return whether the thread that reads the piece gives it up when another job needs one."""
        return False

    @abstractmethod
    def work(self, piece: Piece, attempt: Attempt, buffer: memoryview) -> None:
        """Bring the piece, by way of the thread's own buffer. Raises what `left` shall be told."""

    def cancel(self, error: LoraxError) -> None:
        """End it with this error; `done` follows when its threads have left. Quick."""
        self.desk.fail(self, error)

    def hasten(self, urgency: int) -> None:
        """It is as urgent as that from now on. From any thread. Quick."""
        with self.desk.changed:
            self.urgency = urgency

    def wanted(self, now: float) -> int:
        """How many connections it can use now."""
        used = len(self.running)
        if now < self.not_before:
            return used
        return max(
            used, min(int(self.limit), used + sum(p.not_before <= now for p in self.pending))
        )

    def take(self, now: float) -> Piece | None:
        """The first piece that may be begun."""
        for n, piece in enumerate(self.pending):
            if piece.not_before <= now:
                return self.pending.pop(n)
        return None

    def is_retry(self, now: float) -> bool:
        """Whether the piece that `take` would return was tried before."""
        return next((piece.tried for piece in self.pending if piece.not_before <= now), False)

    def split(self, now: float) -> Piece | None:  # noqa: ARG002 - some jobs can
        """A part of a piece that somebody else is too slow with."""
        return None

    def put_back(self, piece: Piece) -> None:
        insort(self.pending, piece, key=lambda each: each.order)

    def left(self, attempt: Attempt, failure: Exception | None) -> None:
        """A thread is through with its piece, or failed."""
        self.desk.traffic.ended(attempt, self.running[attempt], failure)
        piece = self.running.pop(attempt)
        if self.over:
            return
        if isinstance(failure, SetbackError):
            self._set_back(piece, failure)
        elif isinstance(failure, LoraxError):
            self.fail(failure)
        else:
            piece.tried = piece.tried or attempt.ended
            self.settle(piece)

    @abstractmethod
    def settle(self, piece: Piece) -> None:
        """What of the piece is left, or else whether the job is done."""

    def fail(self, error: LoraxError) -> None:
        if not self.over:
            self.over, self.error = True, error
            for attempt in self.running:
                attempt.end()

    def _set_back(self, piece: Piece, setback: SetbackError) -> None:
        # Where we are too many, others' progress counts: it is not this piece that fails.
        came, enough = (self.came, 1) if setback.crowded else (piece.came, _PROGRESS)
        piece.failed = 1 if came - piece.mark >= enough else piece.failed + 1
        piece.mark = came
        now = self.desk.clock()
        wait = self.desk.retries.wait(piece.failed, self.desk.draw(), setback.retry_after)
        if wait is None or now + wait >= self.deadline:
            self.fail(setback.error)
            return
        piece.tried = True
        piece.not_before = now + wait
        if setback.crowded:
            self.not_before = max(self.not_before, piece.not_before)
            self.limit = max(1.0, min(self.limit, len(self.running)))
        self.put_back(piece)


class _Seen:
    """The last observation of an attempt: its origin, bytes received, and since when."""

    __slots__ = ("came", "origin", "since")

    def __init__(self, origin: Hashable, came: tuple[int, int], since: float) -> None:
        self.origin = origin
        self.came = came
        self.since = since


class _Quiet:
    """How long an origin has been silent.

    `since` is when it began to owe an answer (None: it owes none); `pause` is its longest pause
    lately. `came` counts bytes towards the next answer: the end of a request is one, and so are
    64 KiB.
    """

    __slots__ = ("came", "pause", "since", "until")

    def __init__(self) -> None:
        self.since: float | None = None
        self.pause = 0.0
        self.came = 0
        self.until = 0.0
        """It counts as stalled until then, whatever comes."""

    @property
    def patience(self) -> float:
        return max(_QUIET_SECONDS, min(2 * self.pause, _MOST_QUIET_SECONDS))


class Traffic:
    """Observes which origins send and which are stalled. Use with the lock.

    An origin is stalled when half of its attempts have brought nothing for `_QUIET_SECONDS`, or
    twice its longest pause lately; and for `_SUSPECT_SECONDS` after that, for it may answer small
    requests at once and stall with the others. It is, too, when no request to it has ended and
    fewer than `_ANSWER_BYTES` have come for so long, whichever attempts it had meanwhile; that ends
    with the next answer.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._attempts: dict[Attempt, _Seen] = {}
        self._origins: OrderedDict[Hashable, _Quiet] = OrderedDict()

    def begun(self, attempt: Attempt, piece: Piece) -> None:
        now = self._clock()
        self._attempts[attempt] = _Seen(attempt.origin, (piece.came, attempt.received), now)
        self._asked(attempt.origin, now)

    def look(self, attempt: Attempt, piece: Piece) -> float:
        """Record the bytes that an attempt received; return since when it has received none."""
        seen, now = self._attempts[attempt], self._clock()
        came = (piece.came, attempt.received)
        if attempt.origin != seen.origin:  # a redirect is an answer
            self._heard(seen, now, _ANSWER_BYTES)
            self._asked(attempt.origin, now)
            self._attempts[attempt] = _Seen(attempt.origin, came, now)
        elif came != seen.came:
            more = max(now_ - before for now_, before in zip(came, seen.came, strict=True))
            self._heard(seen, now, more)
            seen.came, seen.since = came, now
        return self._attempts[attempt].since

    def ended(self, attempt: Attempt, piece: Piece, failure: Exception | None) -> None:
        self.look(attempt, piece)
        seen = self._attempts.pop(attempt)
        reason = failure.error if isinstance(failure, SetbackError) else failure
        answered = not attempt.ended and not isinstance(reason, FetchTimeoutError)
        quiet = self._origins.get(seen.origin)
        if answered and quiet is not None:
            self._heard(seen, self._clock(), _ANSWER_BYTES)
            if all(other.origin != seen.origin for other in self._attempts.values()):
                quiet.since = None

    def judge(self) -> None:
        """Mark stalled origins. Call after `look` at all attempts."""
        now = self._clock()
        running, silent = Counter[Hashable](), Counter[Hashable]()
        for attempt, seen in self._attempts.items():
            if not attempt.ended:
                running[seen.origin] += 1
                silent[seen.origin] += now - seen.since >= self._origins[seen.origin].patience
        for origin, count in silent.items():
            if count and 2 * count >= running[origin]:
                self._origins[origin].until = now + _SUSPECT_SECONDS

    def is_stalled(self, origin: Hashable) -> bool:
        quiet, now = self._origins.get(origin), self._clock()
        if quiet is None:
            return False
        owes = quiet.since is not None and now - quiet.since >= quiet.patience
        return owes or now < quiet.until

    def _asked(self, origin: Hashable, now: float) -> None:
        quiet = self._origins.setdefault(origin, _Quiet())
        self._origins.move_to_end(origin)
        if quiet.since is None:
            quiet.since = now
        if len(self._origins) > _ORIGINS_KEPT:
            in_use = {seen.origin for seen in self._attempts.values()}
            del self._origins[next(each for each in self._origins if each not in in_use)]

    def _heard(self, seen: _Seen, now: float, nbytes: int) -> None:
        quiet = self._origins.get(seen.origin)
        if quiet is None:
            return
        quiet.pause = max(now - seen.since, quiet.pause)
        quiet.came += nbytes
        if quiet.came >= _ANSWER_BYTES:
            quiet.pause = max(now - seen.since, _PAUSE_FADES * quiet.pause)
            quiet.came, quiet.since = 0, now


class Desk:
    """The jobs of one engine. `changed` is its lock, and told of whenever there is more to do."""

    def __init__(
        self,
        connections: int,
        retries: Retries,
        clock: Callable[[], float],
        draw: Callable[[], float],
        stuck: float,
    ) -> None:
        self.changed = Condition()
        self.connections = connections
        self.retries = retries
        self.clock = clock
        self.draw = draw
        self.jobs: list[Job[Any]] = []
        self.traffic = Traffic(clock)
        self._counted = 0.0
        self._parts: dict[Job[Any], int] = {}
        self._stuck = stuck

    def next(self) -> tuple[Job[Any], Piece, Attempt] | None:
        """What a free thread should do. With the lock."""
        now = self.clock()
        jobs = [job for job in self.jobs if not job.over]
        if len(jobs) == 1:  # there is nobody to share with
            return self._begun_of(jobs[0], now)
        parts = self._shares(now)
        running = _running(jobs)
        owed = Counter[Hashable]()  # how many connections each origin lacks
        for place, part in parts.items():
            owed[place[1]] += part - running[place]

        def need(job: Job[Any]) -> tuple[object, ...]:
            place = (job, job.origin)
            lacks = parts.get(place, 0) - running[place]
            return job.urgency, job.is_retry(now), -owed[job.origin], -lacks

        by_need = sorted(jobs, key=need)
        for job in by_need:
            place = (job, job.origin)
            if running[place] < parts.get(place, 0) and (piece := job.take(now)) is not None:
                return self._begun(job, piece)
        for job in by_need:
            if (piece := job.split(now)) is not None:
                return self._begun(job, piece)
        return None

    def _begun_of(self, job: Job[Any], now: float) -> tuple[Job[Any], Piece, Attempt] | None:
        free = len(job.running) < min(self.connections, job.wanted(now))
        piece = job.take(now) if free else None
        piece = piece or job.split(now)
        return None if piece is None else self._begun(job, piece)

    def balance(self, origin: Hashable, urgency: int) -> int:
        """Return how many connections to cut a new download for. Call without the lock.

        A wave of 16 pieces on 15 connections would take two rounds; on 8, it is as good as any.
        """
        with self.changed:
            _, claims = self._claims(self.clock())
        others = [claim for claim in claims if claim.origin != origin]
        if not others:
            return self.connections
        all_of_it = Claim(urgency, self.connections, origin)
        part = shares([*others, all_of_it], self.connections)[-1]
        return part if 2 * part > self.connections else self.connections

    def _shares(self, now: float) -> dict[_Place, int]:
        """How many connections each job may have at each origin."""
        places, claims = self._claims(now)
        soon = max(
            (
                job.announced
                for job in self.jobs
                if not job.over and not self.traffic.is_stalled(job.origin)
            ),
            default=0,
        )
        return dict(zip(places, shares(claims, self.connections, soon=soon), strict=True))

    def _claims(self, now: float) -> tuple[list[_Place], list[Claim]]:
        places: list[_Place] = []
        claims: list[Claim] = []
        for job in self.jobs:
            if job.over:
                continue
            pieces: dict[Hashable, list[Piece]] = {}
            for attempt, piece in job.running.items():
                pieces.setdefault(attempt.origin, []).append(piece)
            more = job.wanted(now) - len(job.running)
            if more or not pieces:
                pieces.setdefault(job.origin, [])
            for origin, read in pieces.items():
                begins = more if origin == job.origin else 0
                retried = all(piece.tried for piece in read) and (not begins or job.is_retry(now))
                stalled = self.traffic.is_stalled(origin)
                places.append((job, origin))
                claims.append(Claim(job.urgency, len(read) + begins, origin, stalled, retried))
        return places, claims

    def _begun(self, job: Job[Any], piece: Piece) -> tuple[Job[Any], Piece, Attempt]:
        attempt = Attempt(job.origin)
        job.running[attempt] = piece
        self.traffic.begun(attempt, piece)
        return job, piece, attempt

    def wanted(self) -> int:
        """How many threads there should be. With the lock."""
        now = self.clock()
        wanted = sum(max(job.wanted(now), job.announced) for job in self.jobs if not job.over)
        return min(self.connections, wanted)

    def overdrawn(self, job: Job[Any]) -> bool:
        """Whether the job has more threads than its share, and another less. With the lock.

        Asked between chunks, so that shares are counted every 10 ms only.
        """
        if len(self.jobs) < 2:
            return False
        now = self.clock()
        if now >= self._counted + _SHARES_SECONDS:
            self._counted, self._parts = now, {}
            for (each, _), part in self._shares(now).items():
                self._parts[each] = self._parts.get(each, 0) + part
        return len(job.running) > self._parts.get(job, len(job.running)) and any(
            len(other.running) < part for other, part in self._parts.items() if not other.over
        )

    def reclaim(self) -> None:
        """End silent attempts that keep other jobs below their shares. With the lock.

        A thread that receives bytes hands its piece over itself; one that waits for a stalled
        source cannot. Another origin's share is freed almost at once; within one origin, a slow
        attempt has more time.
        """
        now = self.clock()
        since = {
            attempt: self.traffic.look(attempt, piece)
            for job in self.jobs
            for attempt, piece in job.running.items()
        }
        self.traffic.judge()
        parts, running = self._shares(now), _running(self.jobs)
        lacking = {origin for (job, origin), part in parts.items() if running[job, origin] < part}
        for (job, origin), part in parts.items():
            excess = running[job, origin] - part
            if excess > 0 and lacking:
                elsewhere = any(other != origin for other in lacking)
                self._end(job, origin, excess, since, hurry=elsewhere)

    def _end(
        self,
        job: Job[Any],
        origin: Hashable,
        excess: int,
        since: dict[Attempt, float],
        *,
        hurry: bool,
    ) -> None:
        """End `excess` attempts, youngest first: silent ones, then those that do not hand over."""
        now, grace = self.clock(), self._stuck
        if hurry:
            grace = 0.0 if self.traffic.is_stalled(origin) else _GRACE_SECONDS
        here = [attempt for attempt in job.running if attempt.origin == origin]
        excess -= sum(attempt.ended for attempt in here)
        silent = [attempt for attempt in here if now - since[attempt] >= grace]
        bound = [
            attempt
            for attempt in here
            if hurry and attempt not in silent and not job.hands_over(job.running[attempt])
        ]
        ending = [each for each in (*reversed(silent), *reversed(bound)) if not each.ended]
        for attempt in ending[: max(0, excess)]:
            attempt.end()

    def fail(self, job: Job[Any], error: LoraxError) -> None:
        """From any thread, without the lock."""
        with self.changed:
            job.fail(error)
        self.finish(job)

    def expire(self) -> list[Job[Any]]:
        """Jobs whose time ran out just now. With the lock."""
        now = self.clock()
        late = [job for job in self.jobs if not job.over and job.deadline <= now]
        for job in late:
            job.fail(FetchTimeoutError("not all of it came within the time it had"))
        return late

    def finish(self, job: Job[Any]) -> None:
        """Tell a job's outcome once nobody works on it any more. Without the lock."""
        with self.changed:
            if not job.over or job.running or job not in self.jobs:
                return
            self.jobs.remove(job)
            self._parts.pop(job, None)
            job.pending.clear()
        if job.error is not None:
            job.done.set_exception(job.error)
        else:
            job.done.set_result(job.result)


_Place = tuple[Job[Any], Hashable]
"""A job and one of its attempts' origins."""


def _running(jobs: Iterable[Job[Any]]) -> Counter[_Place]:
    """Count the attempts of each job at each origin."""
    return Counter((job, attempt.origin) for job in jobs for attempt in job.running)
