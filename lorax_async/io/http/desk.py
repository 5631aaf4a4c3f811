"""What there is to do, and for whom: jobs, cut into pieces, and who may use how many threads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import insort
from collections.abc import Callable
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

    def split(self, now: float) -> Piece | None:  # noqa: ARG002 - some jobs can
        """A part of a piece that somebody else is too slow with."""
        return None

    def put_back(self, piece: Piece) -> None:
        insort(self.pending, piece, key=lambda each: each.order)

    def left(self, attempt: Attempt, failure: Exception | None) -> None:
        """A thread is through with its piece, or failed."""
        piece = self.running.pop(attempt)
        if self.over:
            return
        if isinstance(failure, SetbackError):
            self._set_back(piece, failure)
        elif isinstance(failure, LoraxError):
            self.fail(failure)
        else:
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
        piece.not_before = now + wait
        if setback.crowded:
            self.not_before = max(self.not_before, piece.not_before)
            self.limit = max(1.0, min(self.limit, len(self.running)))
        self.put_back(piece)


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
        self._counted = 0.0
        self._parts: dict[Job[Any], int] = {}
        self._stuck = stuck
        self._news: dict[Attempt, tuple[int, float]] = {}

    def next(self) -> tuple[Job[Any], Piece, Attempt] | None:
        """What a free thread should do. With the lock."""
        now = self.clock()
        parts = self._shares(now)
        by_need = sorted(parts, key=lambda job: (job.urgency, len(job.running) - parts[job]))
        for job in by_need:
            if len(job.running) < parts[job] and (piece := job.take(now)) is not None:
                return self._begun(job, piece)
        for job in by_need:
            if (piece := job.split(now)) is not None:
                return self._begun(job, piece)
        return None

    def _shares(self, now: float) -> dict[Job[Any], int]:
        jobs = [job for job in self.jobs if not job.over]
        claims = [Claim(job.urgency, job.wanted(now)) for job in jobs]
        return dict(zip(jobs, shares(claims, self.connections), strict=True))

    def _begun(self, job: Job[Any], piece: Piece) -> tuple[Job[Any], Piece, Attempt]:
        attempt = Attempt()
        job.running[attempt] = piece
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
            self._counted, self._parts = now, self._shares(now)
        return len(job.running) > self._parts.get(job, len(job.running)) and any(
            len(other.running) < part for other, part in self._parts.items() if not other.over
        )

    def reclaim(self) -> None:
        """End what brings nothing, as far as it keeps others from their shares. With the lock.

        Who reads chunks hands over by himself: a source that stalls would hold up all others.
        """
        now = self.clock()
        parts = self._shares(now)
        lacking = any(len(job.running) < part for job, part in parts.items())
        news = {}
        for job, part in parts.items():
            excess = len(job.running) - part
            for attempt, piece in job.running.items():
                came, since = self._news.get(attempt, (piece.came, now))
                news[attempt] = (came, since) if came == piece.came else (piece.came, now)
                if lacking and excess > 0 and now - news[attempt][1] >= self._stuck:
                    attempt.end()
                    excess -= 1
        self._news = news

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
