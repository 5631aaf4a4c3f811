"""Acquire adapters: from a ref to a lease within a deadline; prefetches."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import inf

from lorax_async.cache.base import LeftoverError
from lorax_async.errors import (
    AdapterError,
    AdapterFormatError,
    AdapterTimeoutError,
    CapacityError,
    EvictedError,
    FetchError,
    IncompatibleAdapterError,
    IntegrityError,
    LoraxError,
    SavedDuringLoadError,
    Stage,
    UnsupportedAdapterError,
    UsageError,
    as_lorax_error,
    shorten,
)
from lorax_async.ids import origin_of
from lorax_async.lifecycle.adapter_state import WantedTier
from lorax_async.runtime.digest_checks import DigestChecks, has_digest
from lorax_async.runtime.driver import Driver
from lorax_async.runtime.leases import Lease
from lorax_async.runtime.prefetch import Prefetch
from lorax_async.runtime.resolver import Resolver
from lorax_async.runtime.waiters import PendingLoad
from lorax_async.types import AdapterKey, AdapterRef, Ref, RemoteKey, is_stale, text_of


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


MAX_PRIORITY = 1_000_000
"""The largest absolute priority: levels must stay distinct when added to seconds of waiting."""

BACKGROUND = 2
"""Prefetches that are resolved and opened at a time: a load waits for at most this many."""

BACKGROUND_SECONDS = 1.0
"""Seconds after which a prefetch no longer delays those from other origins."""

MAX_ATTEMPTS = 3
"""Attempts of one call, if an entry is evicted before it is read, or a partial download has other
bytes than the source."""

SHOWN = 4
"""Adapters, and tasks of each, that the error of a queue's timeout names."""

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
    """The attempts of one call: the version and waiter of the last one.

    `failed` counts those that failed because of the cache.
    """

    key: AdapterKey | None
    waiter: PendingLoad | None = None
    failed: int = 0
    reloaded: bool = False


@dataclass(slots=True)
class PrefetchedKeys:
    """The adapters of one prefetch, none of which makes room for another.

    `full` is set once one of them has not fitted: later ones are not tried.
    """

    keys: set[AdapterKey] = field(default_factory=set)
    full: bool = False


class Acquirer:
    """Acquires leases within deadlines; `check_open` raises once the loader is closing."""

    def __init__(
        self,
        resolver: Resolver,
        driver: Driver,
        digests: DigestChecks,
        check_open: Callable[[], None],
    ) -> None:
        self._resolver = resolver
        self._driver = driver
        self._digests = digests
        self._check_open = check_open
        self._turns = PrioritySemaphore(BACKGROUND, BACKGROUND_SECONDS)
        self._prefetching: set[asyncio.Task[None]] = set()

    async def acquire(
        self,
        ref: Ref,
        tier: WantedTier,
        seconds: float,
        *,
        priority: int,
        siblings: PrefetchedKeys | None = None,
        preempts: bool = True,
    ) -> Lease | None:
        """Wait until the adapter is at `tier`; return a lease for tiers that have one, else None.

        Also wait for the comparison with the digest in `ref`. On an error or a
        cancellation the waiter is withdrawn. `siblings` are those of its prefetch, None for a load.
        Unless it `preempts`, no adapter in use makes room for it.
        """
        require_priority(priority)
        name = "stream" if tier is WantedTier.STREAM else "load"
        if siblings is not None:
            name = f"prefetch to {tier.name.lower()}"
        with self._driver.telemetry.tracer.span("requests", None, name, ref) as span:
            try:
                key = self._known_key(ref) if siblings is None else None
                lease = None
                if key is not None and tier >= WantedTier.STREAM:
                    lease = self._driver.waiter_table.lease_resident(key)
                if lease is None:
                    if tier is WantedTier.STREAM and has_digest(ref):
                        tier = WantedTier.DEVICE  # it is compared before the first lease
                    lease = await self._acquire(
                        *(ref, key, tier, seconds),
                        priority=priority,
                        siblings=siblings,
                        preempts=preempts,
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
        key = self._resolver.recent(ref, look=True)
        return None if key is None or is_stale(key) else key

    async def _acquire(
        self,
        ref: Ref,
        known: AdapterKey | None,
        tier: WantedTier,
        seconds: float,
        *,
        priority: int,
        siblings: PrefetchedKeys | None,
        preempts: bool,
    ) -> Lease | None:
        """Acquire through a waiter. A `known` key of local files is resolved only for a retry."""
        attempts = _LoadAttempts(ref if isinstance(ref, AdapterKey) else None)
        lease: Lease | None = None
        granted = False
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                while not granted:
                    if siblings is None:
                        await self._begin(attempts, ref, known, tier, priority, preempts=preempts)
                    else:
                        await self._begin_prefetch(attempts, ref, tier, priority, siblings)
                    assert attempts.key is not None
                    assert attempts.waiter is not None
                    try:
                        lease = await self._wait_for_lease(attempts.waiter, tier)
                        granted = True
                    except AdapterError as error:
                        self._driver.waiter_table.abandon(attempts.waiter)
                        await self._require_retry(attempts, ref, attempts.key, error)
                assert attempts.key is not None
                await self._compare_digest(ref, attempts.key, lease)
                return lease
        except BaseException as error:
            late = deadline.expired() and isinstance(error, TimeoutError)
            problem: BaseException = error
            if late:
                problem = self._timeout_error(ref, attempts.key, seconds, granted=granted)
            if attempts.waiter is not None:
                self._driver.waiter_table.abandon(attempts.waiter)
            if isinstance(problem, LoraxError):
                raise problem.located(id=text_of(ref)) from problem.__cause__
            if isinstance(problem, Exception):
                failed = as_lorax_error(problem, "a load failed").located(id=text_of(ref))
                raise failed from problem
            raise

    async def _begin(
        self,
        attempts: _LoadAttempts,
        ref: Ref,
        known: AdapterKey | None,
        tier: WantedTier,
        priority: int,
        *,
        siblings: PrefetchedKeys | None = None,
        preempts: bool = True,
    ) -> None:
        """Resolve the ref and add its waiter."""
        first = attempts.waiter is None
        key = known if known is not None and known.files and first else None
        if key is None:
            key = await self._resolver.resolve(ref)
        self._check_open()  # closing fails only waiters that exist
        waiter_table = self._driver.waiter_table
        attempts.key = key
        attempts.waiter = waiter_table.begin(
            key,
            tier,
            foreground=siblings is None,
            priority=priority,
            beside=() if siblings is None else siblings.keys,
            preempts=preempts,
        )

    async def _begin_prefetch(
        self,
        attempts: _LoadAttempts,
        ref: Ref,
        tier: WantedTier,
        priority: int,
        siblings: PrefetchedKeys,
    ) -> None:
        """Add the waiter of a prefetch, and wait until it is opened."""
        # The threads' queues are FIFO: a load must not queue behind thousands of prefetches.
        async with self._turns.turn(priority, origin_of(ref)):
            if siblings.full and not self._has_slot(ref):
                raise CapacityError("earlier adapters of its prefetch take all the room")
            await self._begin(attempts, ref, None, tier, priority, siblings=siblings)
            assert attempts.key is not None
            siblings.keys.add(attempts.key)
            await self._driver.files.opened(attempts.key)

    def _has_slot(self, ref: Ref) -> bool:
        key = self._resolver.known(ref)
        return key is not None and key in self._driver.lease_table.occupancies

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
            raise SavedDuringLoadError(
                f"it was saved while it was loaded, and again during the retry: {error.problem};"
                " save to a new folder and rename it into place",
                stage=error.stage,
            ) from None
        attempts.reloaded = True

    async def _is_changed(self, ref: Ref, key: AdapterKey, error: LoraxError) -> bool:
        """Return whether `ref` means other local files now, and `error` may result from that."""
        local = bool(key.files) and not isinstance(key, RemoteKey) and ref != key
        if not local or not isinstance(error, _ERRORS_OF_CHANGED_FILES):
            return False
        return await self._resolver.resolve(ref) != key

    async def _wait_for_lease(self, pending_load: PendingLoad, tier: WantedTier) -> Lease | None:
        """Wait for the lease; raise a `FetchError` if a streamed file has left the cache.

        A streaming caller gets its slot before the file is opened. Verify that the file still
        exists while a re-fetch is possible.
        """
        lease = await pending_load.future
        if lease is not None:
            lease.stale = is_stale(pending_load.key)
        streamed = tier is WantedTier.STREAM and isinstance(pending_load.key, RemoteKey)
        if lease is not None and streamed and not lease.occupancy.complete:
            try:
                await self._driver.files.require_readable(pending_load.key)
            except FetchError:
                # Also raised if the file was read to its end, and its reader closed, so let the
                # copies decide. Until they have failed, the lifecycle takes the file for present
                # and would not fetch it.
                await lease.occupancy.ready(lease.occupancy.layers[-1], lease.check)
        return lease

    async def _compare_digest(self, ref: Ref, key: AdapterKey, lease: Lease | None) -> None:
        try:
            if lease is not None:
                await self._digests.require(ref, key, lease)
            else:
                known = self._driver.files.verifications.get(key)
                await self._digests.compare(ref, key, known)
        except LoraxError as error:
            story = self._driver.telemetry.story(key)
            raise error.located(key=key, story=story) from error.__cause__

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
        siblings = PrefetchedKeys()

        async def load(ref: Ref) -> bool:
            try:
                await self.acquire(ref, tier, seconds, priority=priority, siblings=siblings)
            except CapacityError as error:
                if len(refs) == 1 or error.stage != "queue" or not error.retryable:
                    raise
                siblings.full = True
                return False
            return True

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
        queued = stage == "queue" and life is not None and life.wants_slot
        why = f"; {self._describe_holders()}" if queued else ""
        return AdapterTimeoutError(
            f"it was not ready within {seconds:g} s{why}",
            id=text_of(ref),
            key=key,
            attempt=life.attempt if life is not None else 0,
            stage="verify" if granted else stage,
            story=() if key is None else driver.telemetry.story(key),
        )

    def _describe_holders(self) -> str:
        """Say who holds the slots, and what to raise."""
        driver = self._driver
        device, states = driver.lifecycle.budgets.device, driver.lifecycle.states
        held: list[str] = []
        for key in driver.lease_table.occupancies:
            leases, pins = driver.lease_table.leases.get(key, ()), states[key].pins
            holders = sorted({lease.holder or "no task" for lease in leases})
            count = "1 handle" if len(leases) == 1 else f"{len(leases)} handles"
            by = [f"{count} of {', '.join(holders[:SHOWN])}"] if leases else []
            by += ["pinned"] if pins else []
            if by:
                id = next((lease.id for lease in leases if lease.id), str(key))
                held.append(f"{shorten(id, 60)!r} ({'; '.join(by)})")
        full = device.slots_used == device.max_slots
        what = f"all {device.max_slots} slots are" if full else "the device's memory is"
        more = f" and {len(held) - SHOWN} more" if len(held) > SHOWN else ""
        return (
            f"{what} in use, by {', '.join(held[:SHOWN]) or 'loads'}{more}; release handles sooner,"
            f" unpin, or raise {'max_slots' if full else 'device_bytes'}"
        )


def _outcome_of(error: BaseException) -> dict[str, object]:
    """Return how a call that raised ended, as the trace shows it."""
    if isinstance(error, LoraxError):
        return {"outcome": type(error).__name__, "stage": error.stage}
    return {"outcome": "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"}
