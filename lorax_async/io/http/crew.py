"""The engine's threads: those that work, and the one that keeps time."""

from __future__ import annotations

from threading import Event, Lock, Thread, current_thread
from typing import Any

from lorax_async.errors import FetchError, InternalError, LoraxError
from lorax_async.io.http.attempt import Attempt
from lorax_async.io.http.desk import Desk, Job, Piece
from lorax_async.io.http.failures import AbortedError, SetbackError
from lorax_async.io.http.pool import Pool

BUFFER_BYTES = 1 << 20
"""Of each thread: the most that is read at once, and written on."""

_TICK = 0.05


class Crew:
    """Threads that begin with work, and end when there was none for `idle` seconds.

    The clock starts them, for that takes time that a caller has not; it ends what is late, and
    wakes who waits for a retry or for a straggler.
    """

    def __init__(self, desk: Desk, pool: Pool, idle: float) -> None:
        self._desk = desk
        self._pool = pool
        self._idle = idle
        self._threads: set[Thread] = set()
        self._watch: Thread | None = None
        self._hiring = Lock()
        self._woken = Event()
        self.closed = False

    def begin(self, job: Job[Any]) -> None:
        """Quick. Raises `FetchError` once it is closed."""
        with self._desk.changed:
            if self.closed:
                raise FetchError("the engine is closed", retryable=False)
            self._desk.jobs.append(job)
            self._desk.changed.notify_all()
        try:
            self._start_clock()
        except FetchError as error:
            job.cancel(error)
        self._woken.set()
        self._desk.finish(job)

    def close(self) -> None:
        """End all jobs, and wait until the threads have ended, but for the caller's own."""
        with self._desk.changed:
            self.closed = True
            jobs = list(self._desk.jobs)
            self._desk.changed.notify_all()
        self._woken.set()
        for job in jobs:
            job.cancel(FetchError("the engine was closed"))
        while (thread := self._some_thread()) is not None:
            thread.join()

    def _some_thread(self) -> Thread | None:
        with self._hiring, self._desk.changed:
            threads = [*self._threads, self._watch]
        return next((thread for thread in threads if thread not in {None, current_thread()}), None)

    def _start_clock(self) -> None:
        with self._hiring:
            with self._desk.changed:
                if self._watch is not None or self.closed:
                    return
                watch = Thread(target=self._keep_time, name="lorax-http-clock", daemon=True)
                self._watch = watch
            try:
                watch.start()
            except RuntimeError as error:
                self._watch = None
                raise FetchError("the process may have no more threads") from error

    def _hire(self) -> None:
        """Threads for all that may be begun now, or soon. By the clock: starting takes time."""
        while True:
            with self._hiring:
                with self._desk.changed:
                    if len(self._threads) >= self._desk.wanted():
                        return
                    thread = Thread(target=self._work, name="lorax-http", daemon=True)
                    self._threads.add(thread)
                try:
                    thread.start()
                except RuntimeError:  # no more threads: those that there are do it, or it is late
                    self._threads.discard(thread)
                    return

    def _work(self) -> None:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        while (task := self._next()) is not None:
            self._run(*task, buffer)
            del task  # an idle thread keeps no job alive

    def _next(self) -> tuple[Job[Any], Piece, Attempt] | None:
        """The next task; None when there was none for long, or the engine is closed."""
        with self._desk.changed:
            late = self._desk.clock() + self._idle
            while not self.closed:
                task = self._desk.next()
                if task is not None:
                    return task
                if self._desk.clock() >= late:
                    break
                self._desk.changed.wait(self._idle)
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
        """End what is late or stuck, close what is idle, wake who waits; None when all is done."""
        self._hire()
        with self._desk.changed:
            late = self._desk.expire()
            self._desk.reclaim()
            busy = bool(self._desk.jobs)  # their connections may come back after the next look
        for job in late:
            self._desk.finish(job)
        kept = self._pool.expire() or busy
        with self._desk.changed:
            if self._desk.jobs and not self.closed:
                self._desk.changed.notify_all()
                return _TICK
            if self.closed or not kept:
                self._watch = None
                return None
            return _TICK * 4
