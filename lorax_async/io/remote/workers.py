"""Threads for what blocks on behalf of remote adapters, awaited to its end."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """A pool of its own: who waits for a disk here holds up nobody who opens a local file."""

    def __init__(self, threads: int) -> None:
        self.threads = ThreadPoolExecutor(threads, "lorax-remote")

    async def run(self, work: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
        """What `work` returns. On a cancellation it is waited for all the same, and undone."""
        future = self.threads.submit(work)
        try:
            return await outcome(future)
        except asyncio.CancelledError:
            if not future.cancel():
                await ended(future)
                if undo is not None and future.exception() is None:
                    undo(future.result())
            raise

    async def finish(self, work: Callable[[], object]) -> None:
        """Let it run to its end, however often that is cancelled: something is let go."""
        future = self.threads.submit(work)
        await ended(future)
        future.result()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Let it run, without waiting. From any thread."""
        return self.threads.submit(work)

    def close(self) -> None:
        """Wait for what was submitted. Blocks."""
        self.threads.shutdown()


class FairThreads:
    """Gives an executor's threads to calls that block, `most` at a time for each origin.

    A call that was begun cannot be cut short: an origin that does not answer keeps its threads, and
    others find free ones as long as the executor has more than `most`. From any thread.
    """

    def __init__(self, executor: Executor, most: int) -> None:
        self._executor = executor
        self._most = most
        self._lock = Lock()
        self._running: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[tuple[Future[Any], Callable[[], Any]]]] = {}

    def submit(self, origin: Hashable, work: Callable[[], T]) -> Future[T]:
        """Call `work` in a thread. Cancelling what is returned drops a call that was not begun."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting.setdefault(origin, deque()).append((future, work))
        self._start(origin)
        return future

    def _start(self, origin: Hashable) -> None:
        with self._lock:
            waiting = self._waiting.get(origin)
            while waiting and self._running[origin] < self._most:
                self._executor.submit(self._run, origin, *waiting.popleft())
                self._running[origin] += 1
            if not waiting:
                self._waiting.pop(origin, None)

    def _run(self, origin: Hashable, future: Future[Any], work: Callable[[], Any]) -> None:
        try:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
                    future.set_exception(error)
        finally:
            with self._lock:
                self._running[origin] -= 1
                if not self._running[origin]:
                    del self._running[origin]
            with suppress(RuntimeError):  # the executor was closed: nobody waits any more
                self._start(origin)


async def outcome(future: Future[T]) -> T:
    """What it brings, or raises. Cancelling leaves it as it is."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not done.done():
            done.set_result(None)

    def told(_: Future[Any]) -> None:
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
            loop.call_soon_threadsafe(tell)

    future.add_done_callback(told)
    await done
    return future.result()


async def ended(future: Future[Any]) -> None:
    """Wait until it is through, whatever comes of it, and however often that is cancelled."""
    while not future.done():
        with suppress(asyncio.CancelledError, Exception):
            await outcome(future)
