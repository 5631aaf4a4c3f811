"""Acquire adapters: from a ref to a lease within a deadline; prefetches."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Hashable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from math import inf
from types import MappingProxyType

from lorax_async.cache.base import LeftoverError
from lorax_async.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterTimeoutError,
    EvictedError,
    FetchError,
    IncompatibleAdapterError,
    IntegrityError,
    InternalError,
    LoraxError,
    Stage,
    UnsupportedAdapterError,
    UsageError,
)
from lorax_async.ids import origins_of
from lorax_async.lifecycle.adapter_state import WantedTier
from lorax_async.runtime.digest_checks import DigestChecks
from lorax_async.runtime.driver import Driver
from lorax_async.runtime.leases import Lease
from lorax_async.runtime.resolver import Resolver
from lorax_async.runtime.waiters import PendingLoad
from lorax_async.types import AdapterKey, AdapterRef, MergedKey, Ref, RemoteKey, is_stale, text_of


class PrioritySemaphore:
    """A semaphore of `limit` turns: the highest priority first, then the longest wait.

    A turn that lasts longer than `seconds` frees its place early, for callers of origins that have
    fewer than `limit` turns.
    """

    def __init__(self, limit: int, seconds: float = inf) -> None:
        self._limit = limit
        self._seconds = seconds
        self._free = limit
        self._order = count()
        self._held: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, list[tuple[int, int, asyncio.Future[None]]]] = {}

    @asynccontextmanager
    async def turn(self, priority: int, origin: Hashable = None) -> AsyncIterator[None]:
        await self._take(priority, origin)
        timer: asyncio.TimerHandle | None = None
        overdue = False

        def free_early() -> None:
            nonlocal overdue
            overdue = True
            self._free += 1
            self._start_next()

        try:
            if self._seconds != inf:
                timer = asyncio.get_running_loop().call_later(self._seconds, free_early)
            yield
        finally:
            if timer is not None:
                timer.cancel()
            self._end(origin, freed=not overdue)

    async def _take(self, priority: int, origin: Hashable) -> None:
        if self._free and self._held[origin] < self._limit:
            self._begin(origin)
            return
        turn = asyncio.get_running_loop().create_future()
        heappush(self._waiting.setdefault(origin, []), (-priority, next(self._order), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it began in the same turn of the loop
                self._end(origin, freed=True)
            raise

    def _begin(self, origin: Hashable) -> None:
        self._free -= 1
        self._held[origin] += 1

    def _end(self, origin: Hashable, *, freed: bool) -> None:
        self._free += freed
        self._held[origin] -= 1
        if not self._held[origin]:
            del self._held[origin]
        self._start_next()

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
            _, _, turn = heappop(self._waiting[origin])
            self._begin(origin)
            turn.set_result(None)


class OrderedCalls:
    """Lets calls with one name take effect in the order in which they began."""

    def __init__(self) -> None:
        self._last: dict[Hashable, asyncio.Future[None]] = {}

    @contextmanager
    def place(self, name: Hashable) -> Iterator[Callable[[], Awaitable[None]]]:
        """Yield a function that waits until all earlier calls have left the block.

        If a call leaves early, later ones still wait for its predecessors.
        """
        before = self._last.get(name)
        ended = self._last[name] = asyncio.get_running_loop().create_future()

        async def wait_for_turn() -> None:
            if before is not None:
                await asyncio.wait([before])

        def end(_: object) -> None:
            ended.set_result(None)
            if self._last.get(name) is ended:
                del self._last[name]

        try:
            yield wait_for_turn
        finally:
            if before is None or before.done():
                end(None)
            else:
                before.add_done_callback(end)


STARTS_PER_TURN = 8
"""Loads started in one turn of the loop: thousands of ids must not block it."""


class Prefetch:
    """The loads started by `AdapterLoader.prefetch`. They need not be awaited.

    Awaiting a prefetch waits until every adapter is at its tier, has failed or was cancelled, and
    then raises the first error in the order of the ids. Cancelling the awaiting task does not
    cancel the prefetch.
    """

    def __init__(
        self, refs: Sequence[Ref], load: Callable[[Ref], Coroutine[None, None, None]]
    ) -> None:
        self._refs = refs
        self._load = load
        self._tasks: list[asyncio.Task[None]] = []
        self._cancelled = False
        self.task = asyncio.get_running_loop().create_task(self._run(), name="lorax prefetch")
        """Done when all loads are."""

    @property
    def done(self) -> bool:
        """Whether all loads have ended."""
        started = self._cancelled or len(self._tasks) == len(self._refs)
        return started and all(task.done() for task in self._tasks)

    @property
    def errors(self) -> Mapping[str, LoraxError]:
        """The errors so far, by id."""
        errors: dict[str, LoraxError] = {}
        for ref, task in zip(self._refs, self._tasks, strict=False):
            error = task.exception() if task.done() and not task.cancelled() else None
            if isinstance(error, LoraxError):
                errors[text_of(ref)] = error
        return MappingProxyType(errors)

    def cancel(self) -> None:
        """Cancel the loads that have not ended; other calls for the same adapters go on."""
        self._cancelled = True
        for task in self._tasks:
            task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        for number, ref in enumerate(self._refs, 1):
            if self._cancelled:
                break
            task = loop.create_task(self._load(ref), name=f"lorax prefetch {text_of(ref)}")
            task.add_done_callback(_retrieve_error)
            self._tasks.append(task)
            if number % STARTS_PER_TURN == 0:
                await asyncio.sleep(0)
        if self._tasks:
            await asyncio.wait(self._tasks)

    def __await__(self) -> Generator[object, None, None]:
        yield from asyncio.wait([self.task]).__await__()
        for error in self.errors.values():
            raise error

    def __repr__(self) -> str:
        done = sum(task.done() for task in self._tasks)
        return f"<Prefetch of {len(self._refs)} adapters, {done} of them done>"


def _retrieve_error(task: asyncio.Task[None]) -> None:
    """Retrieve a task's error, lest asyncio log it: a prefetch need not be awaited."""
    if not task.cancelled():
        task.exception()


MAX_PRIORITY = 1_000_000
"""The largest absolute priority: levels must stay distinct when added to seconds of waiting."""

BACKGROUND = 2
"""Prefetches that are resolved and opened at a time: a load waits for at most this many."""

BACKGROUND_SECONDS = 1.0
"""Seconds after which a prefetch no longer delays those from other origins."""

MAX_ATTEMPTS = 3
"""Attempts of one call, if an entry is evicted before it is read, or a partial download has other
bytes than the source."""

SETTLE_SECONDS = 0.05
"""Seconds without a change after which files count as completely saved."""

MAX_SETTLE_SECONDS = 2.0
"""Seconds after which files that still change are loaded as they are."""

_RECENT_NS = 1_000_000_000

_EMPTY, _MISSING = "empty", "missing"

_ERRORS_OF_CHANGED_FILES = (
    IntegrityError,
    AdapterFormatError,
    IncompatibleAdapterError,
    UnsupportedAdapterError,
)
"""Errors of loads whose files are saved meanwhile: half a file, or parts of two versions."""


def require_priority(priority: int) -> None:
    """Raise `UsageError` unless the priority is an int within the limits.

    NaN or another incomparable value would break the order of the queue.
    """
    plain = isinstance(priority, int) and not isinstance(priority, bool)
    if not (plain and abs(priority) <= MAX_PRIORITY):
        raise UsageError(f"a priority is a whole number up to {MAX_PRIORITY:,}, not {priority!r}")


@dataclass(slots=True)
class _LoadAttempts:
    """The attempts of one call that failed because of the cache, and whether it was reloaded."""

    failed: int = 0
    reloaded: bool = False


class Acquirer:
    """Acquires leases within deadlines; `check_open` raises once the loader is closing.

    For `file_seconds` after a thread has looked at a path's files, the loop does.
    """

    def __init__(
        self,
        resolver: Resolver,
        driver: Driver,
        digests: DigestChecks,
        check_open: Callable[[], None],
        *,
        file_seconds: float,
    ) -> None:
        self._file_seconds = file_seconds
        self._resolver = resolver
        self._driver = driver
        self._digests = digests
        self._check_open = check_open
        self._turns = PrioritySemaphore(BACKGROUND, BACKGROUND_SECONDS)
        self._prefetching: set[asyncio.Task[None]] = set()

    async def acquire(
        self, ref: Ref, tier: WantedTier, seconds: float, *, priority: int, foreground: bool = True
    ) -> Lease | None:
        """Wait until the adapter is at `tier`; return a lease for tiers that have one, else None.

        Also wait for the comparison with the digest in `ref`, unless streaming. On an error or a
        cancellation the waiter is withdrawn.
        """
        require_priority(priority)
        name = "stream" if tier is WantedTier.STREAM else "load"
        if not foreground:
            name = f"prefetch to {tier.name.lower()}"
        with self._driver.telemetry.tracer.span("requests", None, name, ref) as span:
            try:
                key = self._known_key(ref) if foreground else None
                lease = None
                if key is not None and tier >= WantedTier.STREAM:
                    lease = self._driver.waiter_table.lease_resident(key)
                if lease is None:
                    lease = await self._acquire(
                        ref, key, tier, seconds, priority=priority, foreground=foreground
                    )
            except BaseException as error:
                span.set(**_outcome_of(error))
                raise
            span.set(outcome="done")
            if lease is not None:
                span.set_slot(lease.occupancy.grant.slot.index)
            return lease

    def _known_key(self, ref: Ref) -> AdapterKey | None:
        """Return what `ref` means now, if that is known without a thread, a request or a digest."""
        plain = isinstance(ref, AdapterRef) and ref.digest is None and not ref.allow_stale
        if not (plain or isinstance(ref, AdapterKey)):
            return None
        key = self._resolver.recent(ref, files=self._file_seconds)
        return None if key is None or is_stale(key) else key

    async def _acquire(
        self,
        ref: Ref,
        known: AdapterKey | None,
        tier: WantedTier,
        seconds: float,
        *,
        priority: int,
        foreground: bool,
    ) -> Lease | None:
        """Acquire through a waiter. A `known` key of local files is resolved only for a retry."""
        key = ref if isinstance(ref, AdapterKey) else None
        pending_load: PendingLoad | None = None
        attempts = _LoadAttempts()
        lease: Lease | None = None
        granted = False
        waiter_table = self._driver.waiter_table
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                while not granted:
                    # The threads' queues are FIFO: a load must not queue behind thousands of
                    # prefetches.
                    async with nullcontext() if foreground else self._turn(ref, priority):
                        if known is not None and known.files and pending_load is None:
                            key = known
                        else:
                            key = await self._resolve(ref)
                        self._check_open()  # closing fails only waiters that exist
                        if isinstance(key, MergedKey) and not waiter_table.in_memory(key):
                            self._driver.forget(key)  # its bytes have to be computed again
                        pending_load = waiter_table.begin(
                            key, tier, foreground=foreground, priority=priority
                        )
                        if not foreground:
                            await self._driver.files.opened(key)
                    try:
                        lease = await self._wait_for_lease(pending_load, tier)
                        granted = True
                    except AdapterError as error:
                        waiter_table.abandon(pending_load)
                        await self._require_retry(attempts, ref, key, error)
                assert key is not None
                await self._compare_digest(ref, key, tier, lease)
                return lease
        except BaseException as error:
            late = deadline.expired() and isinstance(error, TimeoutError)
            problem = self._timeout_error(ref, key, seconds, granted=granted) if late else error
            if pending_load is not None:
                waiter_table.abandon(pending_load)
            if isinstance(problem, LoraxError):
                raise problem.located(id=text_of(ref)) from problem.__cause__
            if isinstance(problem, Exception):
                raise InternalError(f"a load failed: {problem!r}", id=text_of(ref)) from problem
            raise

    def _turn(self, ref: Ref, priority: int) -> AbstractAsyncContextManager[None]:
        return self._turns.turn(priority, origins_of(ref))

    async def _require_retry(
        self, attempts: _LoadAttempts, ref: Ref, key: AdapterKey, error: AdapterError
    ) -> None:
        """Raise the error unless the adapter was evicted, or `ref` means another version now."""
        if isinstance(error, EvictedError | LeftoverError):
            attempts.failed += 1
            if attempts.failed < MAX_ATTEMPTS:
                return
        if self._resolver.is_outdated(ref, key):
            return
        if not await self._is_changed(ref, key, error):
            raise error
        if attempts.reloaded:
            raise IntegrityError(
                f"its files changed while they were loaded, and again during the retry:"
                f" {error.problem}; save to a new folder and rename it into place",
                stage=error.stage,
            ) from None
        await self._wait_until_settled(ref)
        attempts.reloaded = True

    async def _resolve(self, ref: Ref) -> AdapterKey:
        """Resolve `ref`; retry once if a file is empty, as it is while it is saved in place."""
        try:
            return await self._resolver.resolve(ref)
        except AdapterFormatError as error:
            if not error.retryable:
                raise
        await self._wait_until_settled(ref)
        return await self._resolver.resolve(ref)

    async def has_changed(self, ref: Ref, key: AdapterKey, error: LoraxError) -> bool:
        """Return whether a load of `key` failed because its files were saved meanwhile.

        If so, wait until they stop changing.
        """
        changed = await self._is_changed(ref, key, error)
        if changed:
            await self._wait_until_settled(ref)
        return changed

    async def _is_changed(self, ref: Ref, key: AdapterKey, error: LoraxError) -> bool:
        """Return whether `ref` means other local files now, and `error` may result from that."""
        local = bool(key.files) and not isinstance(key, RemoteKey) and ref != key
        if not local or not isinstance(error, _ERRORS_OF_CHANGED_FILES):
            return False
        latest = await self._latest(ref)
        saved = max(max(file.mtime_ns, file.ctime_ns) for file in key.files)
        recent = abs(time.time_ns() - saved) < _RECENT_NS
        if latest is _MISSING or (latest == key and recent):
            await asyncio.sleep(SETTLE_SECONDS)  # the writer may not be done yet
            latest = await self._latest(ref)
        return latest is not _MISSING and latest != key

    async def _wait_until_settled(self, ref: Ref) -> None:
        """Wait until the files of `ref` stop changing, at most `MAX_SETTLE_SECONDS`."""
        loop = asyncio.get_running_loop()
        end, before = loop.time() + MAX_SETTLE_SECONDS, await self._latest(ref)
        while loop.time() < end:
            await asyncio.sleep(SETTLE_SECONDS)
            now = await self._latest(ref)
            if now == before:
                return
            before = now

    async def _latest(self, ref: Ref) -> AdapterKey | str:
        """Return the key of `ref` now, or `_EMPTY` or `_MISSING` for one of its files."""
        try:
            return await self._resolver.resolve(ref)
        except AdapterFormatError:
            return _EMPTY
        except AdapterError:
            return _MISSING

    async def _wait_for_lease(self, pending_load: PendingLoad, tier: WantedTier) -> Lease | None:
        """Wait for the lease; raise a `FetchError` if a streamed file has left the cache.

        A streaming caller gets its slot before the file is opened. Verify that the file still
        exists while a re-fetch is possible.
        """
        lease = await pending_load.future
        if lease is not None:
            lease.stale = is_stale(pending_load.key)
        evictable = isinstance(pending_load.key, RemoteKey | MergedKey)
        streamed = tier is WantedTier.STREAM and evictable
        if lease is not None and streamed and not lease.occupancy.complete:
            try:
                await self._driver.files.require_readable(pending_load.key)
            except FetchError:
                # Also raised if the file was read to its end, and its reader closed, so let the
                # copies decide. Until they have failed, the lifecycle takes the file for present
                # and would not fetch it.
                await lease.occupancy.ready(lease.occupancy.layers[-1], lease.check)
        return lease

    async def _compare_digest(
        self, ref: Ref, key: AdapterKey, tier: WantedTier, lease: Lease | None
    ) -> None:
        if lease is None:
            await self._digests.compare(ref, key, self._driver.files.verifications.get(key))
        elif tier is WantedTier.STREAM:
            self._digests.watch(ref, key, lease)
        else:
            await self._digests.watch_and_wait(ref, key, lease)

    def try_lease(self, ref: Ref) -> Lease | None:
        """Return a lease if `ref` was resolved lately and its adapter is resident. No I/O."""
        key = self._resolver.recent(ref)
        lease = self._driver.lease_table.try_lease(key) if key is not None else None
        if key is None or lease is None:
            return None
        self._driver.telemetry.hits["device"] += 1
        if not self._digests.agrees(ref, key, lease.occupancy.verification):
            lease.end()
            return None
        lease.stale = is_stale(key)
        return lease

    async def lease(self, ref: Ref, tier: WantedTier, seconds: float, *, priority: int) -> Lease:
        """Acquire the adapter at a tier that has leases; see `acquire`."""
        lease = await self.acquire(ref, tier, seconds, priority=priority)
        assert lease is not None
        return lease

    async def pin(self, ref: Ref, seconds: float, *, priority: int) -> None:
        """Wait until the adapter is resident, and pin it for `ref`."""
        loop, pinned = asyncio.get_running_loop(), False
        deadline = loop.time() + seconds
        while not pinned:  # repeat the load if an unload or a replace intervenes
            left = max(0.0, deadline - loop.time())
            lease = await self.lease(ref, WantedTier.DEVICE, left, priority=priority)
            lease.id = text_of(ref)
            try:
                if not self._resolver.is_outdated(ref, lease.occupancy.key):
                    pinned = self._driver.pins.pin(ref, lease)
            finally:
                lease.end()

    def prefetch(
        self, refs: Sequence[Ref], tier: WantedTier, seconds: float, priority: int
    ) -> Prefetch:
        """Start one task per ref; `stop` waits for those that are left."""
        require_priority(priority)

        async def load(ref: Ref) -> None:
            await self.acquire(ref, tier, seconds, priority=priority, foreground=False)

        prefetch = Prefetch(refs, load)
        self._prefetching.add(prefetch.task)
        prefetch.task.add_done_callback(self._prefetching.discard)
        return prefetch

    async def stop(self) -> None:
        """Wait for prefetches, once closing has failed their waiters."""
        await asyncio.gather(*self._prefetching, return_exceptions=True)

    def _timeout_error(
        self, ref: Ref, key: AdapterKey | None, seconds: float, *, granted: bool
    ) -> AdapterTimeoutError:
        """Return the error with the adapter's stage now. Call before the waiter is withdrawn."""
        driver = self._driver
        stage: Stage = "resolve" if key is None else driver.lifecycle.stage(key)
        life = None if key is None else driver.lifecycle.states.get(key)
        return AdapterTimeoutError(
            f"it was not ready within {seconds:g} s",
            id=text_of(ref),
            key=key,
            attempt=life.attempt if life is not None else 0,
            stage="verify" if granted else stage,
            story=() if key is None else driver.telemetry.story(key),
        )


def _outcome_of(error: BaseException) -> dict[str, object]:
    """Return how a call that raised ended, as the trace shows it."""
    if isinstance(error, LoraxError):
        return {"outcome": type(error).__name__, "stage": error.stage}
    return {"outcome": "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"}
