"""Acquire adapters: from a ref, or from tensors, to a lease within a deadline; prefetches."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from lorax_async.cache.base import LeftoverError
from lorax_async.concurrency import OrderedCalls, PrioritySemaphore
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
    class_name,
    shorten,
)
from lorax_async.ids import origin_of
from lorax_async.lifecycle.adapter_state import WantedTier
from lorax_async.runtime.driver import Driver, PendingLoad
from lorax_async.runtime.leases import DigestChecks, Lease
from lorax_async.runtime.resolver import Resolver
from lorax_async.sources.tensors import MemorySource
from lorax_async.types import (
    AdapterKey,
    AdapterRef,
    Ref,
    RemoteKey,
    TensorsKey,
    expected_digest,
    is_stale,
    text_of,
)

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
class PrefetchedKeys:
    """The adapters of one prefetch, none of which makes room for another.

    `full` is set once one of them has not fitted: later ones are not tried.
    """

    keys: set[AdapterKey] = field(default_factory=set)
    full: bool = False


@dataclass(slots=True)
class _Acquisition:
    """A call of `acquire`, with the version and the waiter of its last attempt.

    `known` is the key of the ref if no source has to be asked for it. `failed` counts the attempts
    that failed because of the cache.
    """

    ref: Ref
    tier: WantedTier
    priority: int
    siblings: PrefetchedKeys | None
    preempts: bool
    known: AdapterKey | None
    key: AdapterKey | None = None
    waiter: PendingLoad | None = None
    failed: int = 0
    reloaded: bool = False


@dataclass(eq=False)
class Acquirer:
    """Acquires leases within deadlines; `check_open` raises once the loader is closing."""

    resolver: Resolver
    driver: Driver
    digests: DigestChecks
    check_open: Callable[[], None]

    def __post_init__(self) -> None:
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

        Also wait for the comparison with the digest in `ref`. On an error or a cancellation the
        waiter is withdrawn. `siblings` are those of its prefetch, None for a load. Unless it
        `preempts`, no adapter in use makes room for it.
        """
        require_priority(priority)
        name = "stream" if tier is WantedTier.STREAM else "load"
        if siblings is not None:
            name = f"prefetch to {tier.name.lower()}"
        with self.driver.telemetry.tracer.span("requests", None, name, ref) as span:
            try:
                known = self._known_key(ref) if siblings is None else None
                lease = None
                if known is not None and tier >= WantedTier.STREAM:
                    lease = self.driver.waiter_table.lease_resident(known)
                if lease is None:
                    call = _Acquisition(ref, tier, priority, siblings, preempts, known)
                    lease = await self._acquire(call, seconds)
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
        key = self.resolver.recent(ref, look=True)
        return None if key is None or is_stale(key) else key

    async def _acquire(self, call: _Acquisition, seconds: float) -> Lease | None:
        """Acquire through a waiter. A known key of local files is resolved only for a retry."""
        ref, granted = call.ref, False
        if isinstance(ref, AdapterKey):
            call.key = ref
        if call.tier is WantedTier.STREAM and expected_digest(ref) is not None:
            call.tier = WantedTier.DEVICE  # it is compared before the first lease
        lease: Lease | None = None
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                while not granted:
                    begin = self._begin if call.siblings is None else self._begin_prefetch
                    pending_load = await begin(call)
                    try:
                        lease = await self._wait_for_lease(pending_load, call.tier)
                        granted = True
                    except AdapterError as error:
                        self.driver.waiter_table.abandon(pending_load)
                        await self._require_retry(call, pending_load.key, error)
                await self._compare_digest(ref, pending_load.key, lease)
                return lease
        except BaseException as error:
            problem: BaseException = error
            if deadline.expired() and isinstance(error, TimeoutError):
                problem = self._timeout_error(ref, call.key, seconds, granted=granted)
            if call.waiter is not None:
                self.driver.waiter_table.abandon(call.waiter)
            if isinstance(problem, LoraxError):
                raise problem.located(id=text_of(ref)) from problem.__cause__
            if isinstance(problem, Exception):
                failed = as_lorax_error(problem, "a load failed").located(id=text_of(ref))
                raise failed from problem
            raise

    async def _begin(self, call: _Acquisition) -> PendingLoad:
        """Resolve the ref and add its waiter."""
        key, call.known = call.known, None
        if key is None or not key.files:
            key = await self.resolver.resolve(call.ref)
        self.check_open()  # closing fails only waiters that exist
        call.key = key
        call.waiter = self.driver.waiter_table.begin(
            key,
            call.tier,
            foreground=call.siblings is None,
            priority=call.priority,
            beside=() if call.siblings is None else call.siblings.keys,
            preempts=call.preempts,
        )
        return call.waiter

    async def _begin_prefetch(self, call: _Acquisition) -> PendingLoad:
        """Add the waiter of a prefetch, and wait until it is opened."""
        assert call.siblings is not None
        # The threads' queues are FIFO: a load must not queue behind thousands of prefetches.
        async with self._turns.turn(call.priority, origin_of(call.ref)):
            if call.siblings.full and not self._has_slot(call.ref):
                raise CapacityError("earlier adapters of its prefetch take all the room")
            pending_load = await self._begin(call)
            call.siblings.keys.add(pending_load.key)
            await self.driver.files.opened(pending_load.key)
            return pending_load

    def _has_slot(self, ref: Ref) -> bool:
        key = self.resolver.known(ref)
        return key is not None and key in self.driver.lease_table.occupancies

    async def _require_retry(
        self, call: _Acquisition, key: AdapterKey, error: AdapterError
    ) -> None:
        """Raise the error unless the adapter was evicted, or its ref means another version now."""
        if isinstance(error, EvictedError | LeftoverError):
            call.failed += 1
            if call.failed < MAX_ATTEMPTS:
                return
        if self.resolver.is_outdated(call.ref, key):
            return
        if not await self._is_changed(call.ref, key, error):
            raise error
        if call.reloaded:
            raise SavedDuringLoadError(
                f"it was saved while it was loaded, and again during the retry: {error.problem};"
                " save to a new folder and rename it into place",
                stage=error.stage,
            ) from None
        call.reloaded = True

    async def _is_changed(self, ref: Ref, key: AdapterKey, error: LoraxError) -> bool:
        """Return whether `ref` means other local files now, and `error` may result from that."""
        local = bool(key.files) and not isinstance(key, RemoteKey) and ref != key
        if not local or not isinstance(error, _ERRORS_OF_CHANGED_FILES):
            return False
        return await self.resolver.resolve(ref) != key

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
                await self.driver.files.require_readable(pending_load.key)
                # A copy may have failed meanwhile, and the file been fetched again for others.
                lease.require_sound()
            except FetchError:
                # Also raised if the file was read to its end, and its reader closed, so let the
                # copies decide. Until they have failed, the lifecycle takes the file for present
                # and would not fetch it.
                await lease.occupancy.ready(lease.occupancy.layers[-1], lease.check)
        return lease

    async def _compare_digest(self, ref: Ref, key: AdapterKey, lease: Lease | None) -> None:
        try:
            if lease is not None:
                await self.digests.require(ref, key, lease)
            else:
                known = self.driver.files.verifications.get(key)
                await self.digests.compare(ref, key, known)
        except LoraxError as error:
            story = self.driver.telemetry.story(key)
            raise error.located(key=key, story=story) from error.__cause__

    def try_lease(self, ref: Ref) -> Lease | None:
        """Return a lease if `ref` was resolved lately and its adapter is resident. No I/O."""
        key = self.resolver.recent(ref)
        lease = self.driver.lease_table.try_lease(key) if key is not None else None
        if key is None or lease is None:
            return None
        self.driver.telemetry.hits["device"] += 1
        if not self.digests.agrees(ref, key, lease.occupancy.verification):
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
                if not self.resolver.is_outdated(ref, lease.occupancy.key):
                    pinned = self.driver.pins.pin(ref, lease)
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
        driver = self.driver
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
        driver = self.driver
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
        return {"outcome": class_name(error), "stage": error.stage}
    return {"outcome": "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"}


# -- prefetches ------------------------------------------------------------------------------------

STARTS_PER_TURN = 8
"""Loads started in one turn of the loop: thousands of ids must not block it."""


class Prefetch:
    """The loads started by `AdapterLoader.prefetch`. They need not be awaited.

    Awaiting a prefetch waits until every adapter is at its tier, has failed, was cancelled or left
    out, and then raises the first error in the order of the ids. Cancelling the awaiting task does
    not cancel the prefetch.
    """

    def __init__(
        self, refs: Sequence[Ref], load: Callable[[Ref], Coroutine[None, None, bool]]
    ) -> None:
        """Start `load` for each ref; it returns False if the adapter does not fit."""
        self._refs = refs
        self._load = load
        self._tasks: list[asyncio.Task[bool]] = []
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

    @property
    def left_out(self) -> tuple[str, ...]:
        """The ids so far that do not fit beside those before them, in order."""
        pairs = zip(self._refs, self._tasks, strict=False)
        ended = ((ref, task) for ref, task in pairs if task.done() and not task.cancelled())
        return tuple(text_of(ref) for ref, task in ended if not (task.exception() or task.result()))

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
        left_out = len(self.left_out)
        done = sum(task.done() for task in self._tasks) - left_out
        more = f", {left_out} left out" if left_out else ""
        return f"<Prefetch of {len(self._refs)} adapters, {done} of them done{more}>"


def _retrieve_error(task: asyncio.Task[bool]) -> None:
    """Retrieve a task's error, which asyncio would log: a prefetch need not be awaited."""
    if not task.cancelled():
        task.exception()


# -- ids that mean tensors -------------------------------------------------------------------------


@dataclass(eq=False)
class TensorAdapters:
    """Assigns ids to tensors, and unassigns them.

    The host copy in `source` is kept while an id is assigned to it, a call loads it, or the adapter
    has waiters, leases or pins. `check_open` raises once the loader is closing.
    """

    source: MemorySource
    resolver: Resolver
    acquiring: Acquirer
    driver: Driver
    check_open: Callable[[], None]
    _order: OrderedCalls = field(default_factory=OrderedCalls, init=False)
    _calls: Counter[AdapterKey] = field(default_factory=Counter, init=False)

    async def load(
        self,
        ref: AdapterRef,
        tensors: Mapping[str, torch.Tensor],
        config: bytes,
        seconds: float,
        *,
        priority: int,
        replaces: bool,
    ) -> Lease:
        """Load the tensors, assign `ref` to them, and return a lease.

        Raise `UsageError` if `ref` is assigned to other tensors, unless `replaces`. On an error or
        a cancellation the assignment does not change.
        """
        require_priority(priority)
        deadline = asyncio.get_running_loop().time() + seconds
        stage: Stage = "fetch"
        limit = asyncio.timeout_at(deadline)
        try:
            with self._order.enter(ref) as turn, ExitStack() as kept:
                async with limit:
                    key = await self.source.take(tensors, config, self.check_open)
                    kept.enter_context(self._keep(key))
                    stage = "queue"
                    await turn
                assigned = self.resolver.names.get(ref)
                if assigned is not None and assigned != key and not replaces:
                    raise UsageError(
                        "the name means other tensors already; replace them with `replace`, unload"
                        " them first, or choose another name"
                    )
                return await self._load_and_assign(ref, key, deadline, priority)
        except Exception as error:  # noqa: BLE001 - raised below, without frames
            problem = as_lorax_error(error.with_traceback(None), "tensors were not loaded")
            if isinstance(error, TimeoutError) and limit.expired():
                problem = AdapterTimeoutError(f"it was not ready within {seconds:g} s", stage=stage)
        raise problem.located(id=ref.text)  # its original frames refer to the bytes

    def unassign(self, ref: Ref, key: AdapterKey) -> None:
        """Remove the assignment of `ref` to `key`, after `key` was unloaded by it."""
        self.resolver.names.unassign(ref, key)
        if isinstance(key, TensorsKey):
            self._unload_if_unassigned(key)

    async def _load_and_assign(
        self, ref: AdapterRef, key: AdapterKey, deadline: float, priority: int
    ) -> Lease:
        clock = asyncio.get_running_loop().time
        while True:  # an adapter that must go cannot be pinned: load it again
            left = max(0.0, deadline - clock())
            lease = await self.acquiring.lease(key, WantedTier.DEVICE, left, priority=priority)
            with ExitStack() as failing:
                failing.callback(lease.end)
                if self._assign(ref, key, lease):
                    failing.pop_all()
                    return lease

    def _assign(self, ref: AdapterRef, key: AdapterKey, lease: Lease) -> bool:
        """Move the id and its pins in one step; return False if the new version must go."""
        pins = self.driver.pins
        names = [name for name in pins.names if self.resolver.names.covers(ref, name)]
        if not all(pins.pin(name, lease) for name in names):
            return False
        before = self.resolver.known(ref)
        self.resolver.names.assign(ref, key)
        if before is not None and before != key:
            self._unload_if_unassigned(before)
        return True

    @contextmanager
    def _keep(self, key: AdapterKey) -> Iterator[None]:
        self._calls[key] += 1
        self.driver.keep(key)
        try:
            yield
        finally:
            self._calls -= Counter([key])  # keeps positive counts only
            self._unload_if_unassigned(key)

    def _unload_if_unassigned(self, key: AdapterKey) -> None:
        """Unload the adapter once it is idle, unless an id is assigned to it or a call loads it."""
        if not self.resolver.names.has_id(key) and key not in self._calls:
            self.driver.unload_when_idle(key, self._forget)

    def _forget(self, key: AdapterKey) -> None:
        if isinstance(key, TensorsKey):
            self.driver.forget(key)
            self.source.copies.drop(key)
