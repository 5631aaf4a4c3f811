"""An event loop and threads beside it: inboxes, awaited work, shared tasks, turns, calls."""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import warnings
from collections import Counter, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Hashable,
    Iterable,
    Iterator,
)
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial, wraps
from heapq import heappop, heappush
from itertools import count
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar
from weakref import WeakValueDictionary

from lorax_async.errors import (
    FetchError,
    LoaderClosedError,
    LoraxError,
    Stage,
    UsageError,
    exhausted,
)


class FetchControl:
    """A caller's hold on a fetch. Change it on the loop; read it in any thread.

    `urgent` is False for a prefetch.
    """

    def __init__(self, *, urgent: bool = True) -> None:
        self.urgent = urgent
        self.refused: LoraxError | None = None
        """The error of a check that refused the bytes received so far."""
        self.cancelled = False
        """Whether the fetch is no longer needed; check it between chunks."""
        self._watchers: list[Callable[[], object]] = []

    def cancel(self) -> None:
        self.cancelled = True
        for changed in tuple(self._watchers):
            changed()

    def raise_priority(self) -> None:
        """Make a prefetch urgent; another caller has joined."""
        self.urgent = True
        for changed in tuple(self._watchers):
            changed()

    @contextmanager
    def watch(self, changed: Callable[[], object]) -> Iterator[None]:
        """Call `changed` on the loop: at once, and in the block at each change or new caller."""
        self._watchers.append(changed)
        try:
            changed()
            yield
        finally:
            self._watchers.remove(changed)


T = TypeVar("T")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that the calling thread runs, or None."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Inbox(Generic[T]):
    """Carries items from any thread to `handle`, called on the loop in the order of arrival.

    Waking a loop costs more than a small copy, so all items that arrive before the loop handles
    them share one wake-up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, handle: Callable[[T], None]) -> None:
        self._loop = loop
        self._handle = handle
        self.items: deque[T] = deque()
        """Those not handled yet. Threads append some before a `wake`; `handle` may take some."""
        self._wake_pending = False

    def put(self, item: T) -> None:
        """Add an item and wake the loop. Any thread; without effect once the loop is closed."""
        self.items.append(item)
        self.wake()

    def wake(self) -> None:
        """Have the loop handle all items. Any thread."""
        # The flag is cleared before the items are taken: an item added while it is set is handled.
        if self._wake_pending:
            return
        self._wake_pending = True
        try:
            self._loop.call_soon_threadsafe(self.take)
        except RuntimeError:  # the loop is closed
            self._wake_pending = False
            self.items.clear()

    def take(self) -> None:
        """Handle the items that have arrived. Call on the loop."""
        self._wake_pending = False
        try:
            while self.items:
                self._handle(self.items.popleft())
        finally:
            if self.items:  # `handle` raised: the rest must not wait for the next `wake`
                self._loop.call_soon(self.take)


R = TypeVar("R")
K = TypeVar("K", bound=Hashable)


def complete(future: Future[R], work: Callable[[], R]) -> None:
    """Call `work` and set its outcome, unless the future was cancelled before."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where it is awaited
            future.set_exception(error)


class ThreadPool(ThreadPoolExecutor):
    """A pool that also works in a process that can start no more threads."""

    def submit(self, work: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        """Call `work` in a thread. Raise `RuntimeError` if it will not be called.

        The standard pool raises, if it cannot start a thread, after it has queued the call: one of
        its other threads calls it, and the result, such as an open file, is lost.
        """
        future: Future[R] = Future()
        try:
            super().submit(complete, future, partial(work, *args, **kwargs))
        except RuntimeError:
            if future.cancel():
                raise
        return future


class WorkerThreads(ThreadPool):
    """A pool of its own for the disk cache, so that its waits do not delay local files."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads, "lorax-remote")

    async def run(self, work: Callable[[], R], undo: Callable[[R], None] | None = None) -> R:
        """Run `work` in a thread and return its result.

        On cancellation, wait for its end and call `undo` with the result.
        """
        future = self.submit(work)
        try:
            return await outcome(future)
        except asyncio.CancelledError:
            if not future.cancel():
                await wait_for_end(future)
                if undo is not None and future.exception() is None:
                    undo(future.result())
            raise

    async def finish(self, work: Callable[[], object]) -> None:
        """Run `work` to its end despite cancellation. For releasing resources."""
        future = self.submit(work)
        await wait_for_end(future)
        future.result()


class FairThreads:
    """Runs blocking calls in an executor, at most `max_per_origin` at a time for each origin.

    A running call cannot be interrupted: an unresponsive origin keeps its threads. Other origins
    find free ones if the executor has more than `max_per_origin`. Any thread.
    """

    def __init__(self, executor: Executor, max_per_origin: int) -> None:
        self._executor = executor
        self._max_per_origin = max_per_origin
        self._lock = Lock()
        self._running: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, deque[tuple[Future[Any], Callable[[], Any]]]] = {}

    def submit(self, origin: Hashable, work: Callable[[], R]) -> Future[R]:
        """Call `work` in a thread. Cancelling the future drops a call that has not begun."""
        future: Future[R] = Future()
        with self._lock:
            self._waiting.setdefault(origin, deque()).append((future, work))
            self._start(origin)
        return future

    def _start(self, origin: Hashable) -> None:
        """Start what may run. With the lock."""
        waiting = self._waiting.get(origin)
        while waiting and self._running[origin] < self._max_per_origin:
            future, work = waiting.popleft()
            try:
                self._executor.submit(self._run, origin, future, work)
            except RuntimeError as error:  # it is closed, or no thread can be started
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            else:
                self._running[origin] += 1
        if not waiting:
            self._waiting.pop(origin, None)

    def _run(self, origin: Hashable, future: Future[Any], work: Callable[[], Any]) -> None:
        complete(future, work)
        with self._lock:
            self._running[origin] -= 1
            if not self._running[origin]:
                del self._running[origin]
            self._start(origin)


async def outcome(future: Future[R]) -> R:
    """Await a thread's future. Cancelling the call does not cancel the future."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def set_done() -> None:
        if not done.done():
            done.set_result(None)

    def notify(_: Future[Any]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nothing waits
            loop.call_soon_threadsafe(set_done)

    future.add_done_callback(notify)
    await done
    return future.result()


async def call_in(
    threads: Executor, work: Callable[[], R], discard: Callable[[R], object] | None = None
) -> R:
    """Call `work` in one of the threads and await its result.

    The result takes one step to the loop, not the six of `run_in_executor`. Cancelling the call
    drops work that has not begun; a result that comes later goes to `discard`, in any thread.
    """
    return await _claimed(threads.submit(work), discard)


async def _claimed(future: Future[R], discard: Callable[[R], object] | None) -> R:
    try:
        return await outcome(future)
    except asyncio.CancelledError:

        def ended(future: Future[R]) -> None:
            if discard is not None and not future.cancelled() and future.exception() is None:
                discard(future.result())

        future.cancel()
        future.add_done_callback(ended)
        raise


async def wait_for_end(future: Future[Any]) -> None:
    """Wait until the future is done, despite errors and cancellation."""
    while not future.done():
        with suppress(asyncio.CancelledError, Exception):
            await outcome(future)


class SharedResource(Generic[T]):
    """A resource that threads share. `close` takes effect once no use is in progress.

    A `with` block is a use, and raises `FetchError` once it is closed. Give it `opened`, or `open`,
    which the first use calls. `freed` is called after `close`, when this no longer refers to the
    resource. If it `warns`, one that was forgotten is closed with a `ResourceWarning`.
    """

    def __init__(
        self,
        name: str,
        close: Callable[[T], object] | None = None,
        *,
        open: Callable[[], T] | None = None,
        opened: T | None = None,
        freed: Callable[[], object] | None = None,
        warns: bool = False,
    ) -> None:
        self.opened = opened
        """None until it is opened, and once it is closed."""
        self.closed = False
        self._open = open
        self._close = close
        self._freed = freed
        self._warns = warns
        self._name = name
        self._users = 0
        self._lock = Lock()
        self._opening = Lock()

    def __enter__(self) -> T:
        with self._lock:
            if self.closed:
                raise FetchError(f"{self._name} was closed before it was used")
            self._users += 1
        try:
            return self.opened if self.opened is not None else self._open_once()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            last = self.closed and not self._users
        if last:
            self._end()

    def close(self) -> None:
        """Close it now, or after the last use. Quick and idempotent."""
        with self._lock:
            unused = not self.closed and not self._users
            self.closed = True
        if unused:
            self._end()

    def __del__(self) -> None:
        if self._warns and self.opened is not None and not self.closed:
            warnings.warn(f"{self._name} was never closed", ResourceWarning, stacklevel=2)
            self.close()

    def _open_once(self) -> T:
        with self._opening:
            if self.opened is None:
                assert self._open is not None
                self.opened = self._open()
            return self.opened

    def _end(self) -> None:
        opened, self.opened = self.opened, None
        if opened is None:
            return
        if self._close is not None:
            self._close(opened)
        del opened
        if self._freed is not None:
            self._freed()


class Closable(Protocol):
    def close(self) -> None: ...


def close_all(resources: Iterable[Closable]) -> None:
    for resource in resources:
        resource.close()


IsWanted = Callable[[], bool]
"""Returns whether a caller still waits for the result; call it between steps."""


async def in_thread(work: Callable[[IsWanted], T], discard: Callable[[T], None] | None = None) -> T:
    """Run `work` in the running loop's executor and await its result, as `call_in` does.

    No thread is interrupted: after a cancellation `IsWanted` returns False.
    """
    abandoned, returned = Event(), Future[T]()
    asyncio.get_running_loop().run_in_executor(
        None, complete, returned, lambda: work(lambda: not abandoned.is_set())
    )
    try:
        return await _claimed(returned, discard)
    except asyncio.CancelledError:
        abandoned.set()
        raise


async def end_in_thread(name: str, work: Callable[[], None]) -> None:
    """Run `work`, which blocks and ends things, in a new daemon thread; wait for both to end.

    If the process may start no more threads, run it here: nothing may stay open.
    """
    ended = Future[None]()
    thread = Thread(target=complete, args=(ended, work), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        work()
        return
    await outcome(ended)
    thread.join()


class Lifetime:
    """The life of a `kind` ("loader") of object: entered once, on one loop of one process.

    `use` is how a program enters it.
    """

    def __init__(self, kind: str, use: str) -> None:
        self.kind = kind
        self._use = use
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self._is_open = False
        self._closing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def entering(self) -> AsyncIterator[None]:
        """Enter the object: open its parts within the block. If that fails, it may be repeated."""
        if self._loop is not None:
            raise UsageError(f"a {self.kind} can be entered once; create a new one")
        self._loop = asyncio.get_running_loop()
        try:
            yield
        except BaseException as error:
            self._loop = None
            short = exhausted(error, f"the {self.kind} did not open")
            if short is None:
                raise
            raise short from error
        self._is_open = True

    async def close(self, end: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `end` once, to its end even if the caller is cancelled. Idempotent."""
        self.check_loop()
        if self._closing is None:
            self._closing = asyncio.create_task(end(), name="lorax close")
        await asyncio.shield(self._closing)

    @property
    def closed(self) -> bool:
        """Whether it is closed or closing."""
        return self._closing is not None

    def warn_if_unclosed(self) -> None:
        """Warn if it was entered and never closed; for `__del__`."""
        if self._loop is not None and self._closing is None:
            text = f"a {self.kind} was never closed; use `{self._use}`"
            warnings.warn(text, ResourceWarning, stacklevel=3)

    def check_loop(self) -> None:
        """Raise `UsageError` on another loop than the one that entered, or in another process."""
        kind = self.kind
        if self._loop is None or not self._is_open:
            raise UsageError(f"enter the {kind} first: `{self._use}`")
        if os.getpid() != self._pid:
            raise UsageError(f"a {kind} belongs to one process; create one per process")
        if running_loop() is not self._loop:
            raise UsageError(
                f"a {kind} belongs to the event loop that entered it; "
                "from another thread, use asyncio.run_coroutine_threadsafe"
            )

    def check_open(self) -> None:
        """Call `check_loop`; raise `LoaderClosedError` once it is closing."""
        self.check_loop()
        if self._closing is not None:
            raise LoaderClosedError(f"the {self.kind} is closed")

    def check_readable(self) -> None:
        """Allow what only reads on the loop, and in any thread once the loop is closed."""
        if self._loop is None or not self._loop.is_closed():
            self.check_loop()


class SharedTasks(Generic[K, R]):
    """One running task per key, joined by equal calls. Use it on the loop.

    A task is cancelled when its last caller leaves early. `unused` is called with each ended task
    once no caller is left.
    """

    def __init__(
        self,
        run: Callable[[K], Coroutine[Any, Any, R]],
        name: Callable[[K], str],
        *,
        unused: Callable[[asyncio.Task[R]], None] | None = None,
    ) -> None:
        self._run = run
        self._name = name
        self._unused = unused
        self._shared: dict[K, asyncio.Task[R]] = {}
        self._callers: Counter[asyncio.Task[R]] = Counter()
        """Also of tasks that are being cancelled, or have ended."""

    @contextmanager
    def join(self, key: K) -> Iterator[asyncio.Task[R]]:
        """Start the task or join it; await it with `result_of` within the block."""
        task = self._shared.get(key)
        if task is None or (task.done() and task not in self._callers):  # its last caller has left
            loop = asyncio.get_running_loop()
            task = self._shared[key] = loop.create_task(self._run(key), name=self._name(key))
            task.add_done_callback(partial(self._end, key))
        self._callers[task] += 1
        try:
            yield task
        finally:
            self._callers[task] -= 1
            if not self._callers[task]:
                if task.done():
                    self._forget(task)
                else:
                    # Remove it first: the next caller must not join one that is being cancelled.
                    del self._shared[key]
                    task.cancel()

    async def stop(self) -> None:
        """Cancel all tasks, and wait for their end, once what has them is closing."""
        tasks = tuple(self._callers)
        for task in tasks:
            if not task.cancelling():  # a second time would interrupt its undoing
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, key: K, task: asyncio.Task[R]) -> None:
        if self._shared.get(key) is task:
            del self._shared[key]
        if not self._callers[task]:
            self._forget(task)

    def _forget(self, task: asyncio.Task[R]) -> None:
        if self._callers.pop(task, None) is not None and self._unused is not None:
            self._unused(task)


async def result_of(task: asyncio.Task[R], stage: Stage, check_open: Callable[[], None]) -> R:
    """Await a shared task without cancelling it; raise what `check_open` does if `stop` has.

    Each caller raises its own copy of the task's error.
    """
    try:
        return await asyncio.shield(task)
    except LoraxError as error:
        raise error.located() from error.__cause__
    except asyncio.CancelledError:
        caller = asyncio.current_task()
        if task.cancelled() and caller is not None and not caller.cancelling():
            try:
                check_open()
            except LoraxError as error:
                raise error.located(stage=stage) from None
        raise


# -- turns -----------------------------------------------------------------------------------------


class PrioritySemaphore:
    """A semaphore of `limit` permits: the highest priority first, then the longest wait.

    A turn that lasts longer than `seconds` releases its permit early, to callers of origins that
    have fewer than `limit` turns.
    """

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit = self._free = limit
        self._seconds = seconds
        self._order = count()
        self._held: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, list[tuple[int, int, asyncio.Future[None]]]] = {}

    @asynccontextmanager
    async def turn(self, priority: int, origin: Hashable = None) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        began, has_permit = loop.create_future(), True
        timer: asyncio.TimerHandle | None = None

        def release_permit() -> None:
            nonlocal has_permit
            self._free += has_permit
            has_permit = False
            self._start_next()

        heappush(self._waiting.setdefault(origin, []), (-priority, next(self._order), began))
        self._start_next()
        try:
            await began
            timer = loop.call_later(self._seconds, release_permit)
            yield
        finally:
            if timer is not None:
                timer.cancel()
            if not began.cancelled():  # else the caller left before its turn
                self._held[origin] -= 1
                if not self._held[origin]:
                    del self._held[origin]
                release_permit()

    def _start_next(self) -> None:
        while self._free > 0:
            for origin, waiting in list(self._waiting.items()):
                while waiting and waiting[0][2].done():  # its caller was cancelled
                    heappop(waiting)
                if not waiting:
                    del self._waiting[origin]
            eligible = [origin for origin in self._waiting if self._held[origin] < self._limit]
            if not eligible:
                return
            origin = min(eligible, key=lambda origin: self._waiting[origin][0][:2])
            _, _, began = heappop(self._waiting[origin])
            self._free -= 1
            self._held[origin] += 1
            began.set_result(None)


class OrderedCalls:
    """Lets calls with one name take effect in the order in which they began."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()

    @contextmanager
    def enter(self, name: Hashable) -> Iterator[Awaitable[object]]:
        """Yield what to await until all earlier calls have left the block.

        If a call leaves early, later ones still wait for its predecessors.
        """
        lock = self._locks.setdefault(name, asyncio.Lock())
        turn = asyncio.get_running_loop().create_task(lock.acquire())
        try:
            yield turn
        finally:
            if turn.done() and not turn.cancelled():
                lock.release()
            else:
                turn.cancel()


# -- calls -----------------------------------------------------------------------------------------


P = ParamSpec("P")
C = TypeVar("C", bound=AbstractAsyncContextManager[Any])


class ContextCall(Coroutine[Any, Any, C]):
    """A call whose result is an async context manager that is entered already.

    Await it and end the result yourself, or use it with `async with`. It is a coroutine, so tasks
    may be made of it.
    """

    __slots__ = ("_call", "_result")

    def __init__(self, call: Coroutine[Any, Any, C]) -> None:
        self._call = call

    def __await__(self) -> Generator[Any, Any, C]:
        return self._call.__await__()

    def send(self, value: Any) -> Any:
        return self._call.send(value)

    def throw(self, *error: Any) -> Any:
        return self._call.throw(*error)

    def close(self) -> None:
        self._call.close()

    if not TYPE_CHECKING:  # where an attribute of what was not awaited is an error

        def __getattr__(self, name: str) -> object:
            """Show asyncio the coroutine's name and frames, for the repr and stack of a task."""
            return getattr(self._call, name)

    async def __aenter__(self) -> C:
        self._result = await self._call
        return self._result

    async def __aexit__(self, *error: Any) -> None:
        await self._result.__aexit__(*error)


def context_call(method: Callable[P, Coroutine[Any, Any, C]]) -> Callable[P, ContextCall[C]]:
    """Let calls of a coroutine method be used with `async with` too."""

    @wraps(method)
    def call(*args: P.args, **options: P.kwargs) -> ContextCall[C]:
        return ContextCall(method(*args, **options))

    if sys.version_info >= (3, 12):  # frameworks await what such a function returns
        inspect.markcoroutinefunction(call)
    return call
