"""Threads beside an event loop: its inbox, awaited work, shared openings, control of a fetch."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Event, Lock
from typing import Any, Generic, Protocol, TypeVar

from lorax_async.errors import LoraxError


class FetchControl:
    """How much a fetch is wanted. Changed on the loop, asked for in any thread.

    `urgent`: somebody waits for it, and it is no prefetch.
    """

    def __init__(self, *, urgent: bool = True) -> None:
        self.urgent = urgent
        self.refused: LoraxError | None = None
        """The error with which a check refused the bytes received so far."""
        self._ended = Event()
        self._watchers: list[Callable[[], None]] = []

    @property
    def ended(self) -> bool:
        """Nobody wants it any more; looked at between chunks."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so many seconds. Blocks."""
        return self._ended.wait(seconds)

    def end(self) -> None:
        self._ended.set()
        self._tell()

    def raise_priority(self) -> None:
        """Somebody waits for it now."""
        if not self.urgent:
            self.urgent = True
            self._tell()

    @contextmanager
    def watched(self, changed: Callable[[], None]) -> Iterator[None]:
        """Call `changed` at each change, on the loop, and once at the beginning. Quick."""
        self._watchers.append(changed)
        try:
            changed()
            yield
        finally:
            self._watchers.remove(changed)

    def _tell(self) -> None:
        for changed in tuple(self._watchers):
            changed()


T = TypeVar("T")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that the calling thread runs, if it runs one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Inbox(Generic[T]):
    """Carries items from any thread to `handle`, called on the loop in the order of arrival.

    Waking a loop costs more than a small copy, so that whatever arrives until the loop gets round
    to it shares one wake-up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, handle: Callable[[T], None]) -> None:
        self._loop = loop
        self._handle = handle
        self._items: deque[T] = deque()
        self._awake = False

    def put(self, item: T) -> None:
        """From any thread. Without effect once the loop is closed: nobody listens any more."""
        self.leave(item)
        self.wake()

    def leave(self, item: T) -> None:
        """From any thread: as `put`, for the next `wake`, which somebody must call after this."""
        self._items.append(item)

    def wake(self) -> None:
        """From any thread: let the loop handle what was left."""
        # The flag is cleared before the items are taken: what was left while it is set is seen.
        if self._awake:
            return
        self._awake = True
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            self._awake = False
            self._items.clear()

    def _drain(self) -> None:
        self._awake = False
        self.take()

    def take(self) -> None:
        """On the loop: handle what has arrived so far."""
        try:
            while self._items:
                self._handle(self._items.popleft())
        finally:
            if self._items:  # `handle` raised: the items behind must not wait for another one
                self._loop.call_soon(self._drain)


R = TypeVar("R")


class WorkerThreads:
    """A pool of its own: who waits for a disk here holds up nobody who opens a local file."""

    def __init__(self, threads: int) -> None:
        self.threads = ThreadPoolExecutor(threads, "lorax-remote")

    async def run(self, work: Callable[[], R], undo: Callable[[R], None] | None = None) -> R:
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

    def submit(self, work: Callable[[], R]) -> Future[R]:
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

    def submit(self, origin: Hashable, work: Callable[[], R]) -> Future[R]:
        """Call `work` in a thread. Cancelling what is returned drops a call that was not begun."""
        future: Future[R] = Future()
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


async def outcome(future: Future[R]) -> R:
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


class Closable(Protocol):
    def close(self) -> None: ...


def close_all(several: Iterable[Closable]) -> None:
    for each in several:
        each.close()
