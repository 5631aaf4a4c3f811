"""From what a caller asks for to a lease, or to an error that says how far it came."""

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
    IncompatibleAdapterError,
    IntegrityError,
    InternalError,
    LoraxError,
    Stage,
    UnsupportedAdapterError,
    UsageError,
)
from lorax_async.ids.parsing import origins_of
from lorax_async.lifecycle.adapter_state import WantedTier
from lorax_async.runtime.digest_checks import DigestChecks
from lorax_async.runtime.driver import Driver
from lorax_async.runtime.leases import Lease
from lorax_async.runtime.resolver import Resolver
from lorax_async.runtime.waiters import LoadWish
from lorax_async.tracing.recorder import Recorder, name_of
from lorax_async.types import (
    AdapterKey,
    AdapterRef,
    FileIdentity,
    Merge,
    MergedKey,
    Ref,
    RemoteKey,
    is_stale,
    text_of,
)


class PrioritySemaphore:
    """Let `most` callers go on at a time: the highest priority first, then the longest wait.

    A turn that lasts longer than `seconds` is lent: the next caller begins beside it, if its origin
    has fewer than `most` turns.
    """

    def __init__(self, most: int, seconds: float = inf) -> None:
        self._most = most
        self._seconds = seconds
        self._free = most
        self._order = count()
        self._held: Counter[Hashable] = Counter()
        self._waiting: dict[Hashable, list[tuple[int, int, asyncio.Future[None]]]] = {}

    @asynccontextmanager
    async def turn(self, priority: int, origin: Hashable = None) -> AsyncIterator[None]:
        await self._take(priority, origin)
        timer: asyncio.TimerHandle | None = None
        overdue = False

        def lend() -> None:
            nonlocal overdue
            overdue = True
            self._free += 1
            self._pass_on()

        try:
            if self._seconds != inf:
                timer = asyncio.get_running_loop().call_later(self._seconds, lend)
            yield
        finally:
            if timer is not None:
                timer.cancel()
            self._end(origin, freed=not overdue)

    async def _take(self, priority: int, origin: Hashable) -> None:
        if self._free and self._held[origin] < self._most:
            self._begin(origin)
            return
        mine = asyncio.get_running_loop().create_future()
        heappush(self._waiting.setdefault(origin, []), (-priority, next(self._order), mine))
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():  # it came in the same turn of the loop
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
        self._pass_on()

    def _pass_on(self) -> None:
        while self._free > 0:
            for origin in list(self._waiting):
                self._drop_gone(origin)
            able = [each for each in self._waiting if self._held[each] < self._most]
            if not able:
                return
            origin = min(able, key=lambda each: self._waiting[each][0][:2])
            _, _, following = heappop(self._waiting[origin])
            self._begin(origin)
            following.set_result(None)

    def _drop_gone(self, origin: Hashable) -> None:
        waiting = self._waiting[origin]
        while waiting and waiting[0][2].done():
            heappop(waiting)
        if not waiting:
            del self._waiting[origin]


class OrderedCalls:
    """Calls with one name come to pass in the order in which they began."""

    def __init__(self) -> None:
        self._last: dict[Hashable, asyncio.Future[None]] = {}

    @contextmanager
    def place(self, name: Hashable) -> Iterator[Callable[[], Awaitable[None]]]:
        """Stand behind those who came before; what it gives waits until they are through.

        Who leaves early leaves a gap: those behind still wait for those before.
        """
        before = self._last.get(name)
        mine = self._last[name] = asyncio.get_running_loop().create_future()

        async def come_first() -> None:
            if before is not None:
                await asyncio.wait([before])

        def end(_: object) -> None:
            mine.set_result(None)
            if self._last.get(name) is mine:
                del self._last[name]

        try:
            yield come_first
        finally:
            if before is None or before.done():
                end(None)
            else:
                before.add_done_callback(end)


AT_ONCE = 8
"""Begun in one turn of the loop: thousands of hints must not hold it."""

Hint = tuple[str, Callable[[], asyncio.Task[None]]]
"""An id, and what begins to bring it."""


class Prefetch:
    """What `AdapterLoader.prefetch` started. It goes on whether or not anybody waits for it.

    Awaiting it waits until every adapter has arrived at its tier, failed or was cancelled, and then
    raises the first error, in the order of the ids. Cancelling who waits does not cancel it.
    """

    def __init__(self, hints: Sequence[Hint]) -> None:
        self._hints = tuple(hints)
        self._begun: list[asyncio.Task[None]] = []
        self._cancelled = False
        self.task = asyncio.get_running_loop().create_task(self._run(), name="lorax prefetch")
        """Done when all is."""

    @property
    def done(self) -> bool:
        """Whether nothing of it is under way."""
        begun = self._cancelled or len(self._begun) == len(self._hints)
        return begun and all(task.done() for task in self._begun)

    @property
    def errors(self) -> Mapping[str, LoraxError]:
        """Why adapters did not arrive, by id, so far."""
        found: dict[str, LoraxError] = {}
        for (id, _), task in zip(self._hints, self._begun, strict=False):
            error = task.exception() if task.done() and not task.cancelled() else None
            if isinstance(error, LoraxError):
                found[id] = error
        return MappingProxyType(found)

    def cancel(self) -> None:
        """Want the adapters that have not arrived no longer; other wishes for them stay."""
        self._cancelled = True
        for task in self._begun:
            task.cancel()

    async def _run(self) -> None:
        for number, (_, begin) in enumerate(self._hints):
            if self._cancelled:
                break
            self._begun.append(begin())
            if number % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
        if self._begun:
            await asyncio.wait(self._begun)

    def __await__(self) -> Generator[object, None, None]:
        yield from self._wait().__await__()

    async def _wait(self) -> None:
        await asyncio.wait([self.task])
        for error in self.errors.values():
            raise error

    def __repr__(self) -> str:
        arrived = sum(task.done() for task in self._begun)
        return f"<Prefetch of {len(self._hints)} adapters, {arrived} of them done>"


MAX_PRIORITY = 1_000_000
"""Either way of 0: as seconds of waiting, levels stay numbers that can be told apart."""

BACKGROUND = 2
"""Prefetches that are resolved and opened at a time: what a load has to wait for, at most."""

BACKGROUND_SECONDS = 1.0
"""A prefetch that takes longer than this holds up those from other origins no more."""

MAX_ATTEMPTS = 3
"""Attempts of one call, where a file left the disk cache before it was read, or what an interrupted
download left is not what the source has."""


SETTLE_SECONDS = 0.05
"""Files that have not changed for this long are taken to be saved whole."""

MAX_SETTLE_SECONDS = 2.0
"""Files that go on changing for longer are loaded as they are."""

_RECENT_NS = 1_000_000_000

_EMPTY, _MISSING = "empty", "missing"

_AS_CHANGED = (
    IntegrityError,
    AdapterFormatError,
    IncompatibleAdapterError,
    UnsupportedAdapterError,
)
"""What a load says of files that are saved while it reads them: half a file, or two versions."""


def require_priority(priority: int) -> None:
    """What cannot be compared with others would hold up everybody who waits."""
    plain = isinstance(priority, int) and not isinstance(priority, bool)
    if not (plain and abs(priority) <= MAX_PRIORITY):
        raise UsageError(f"a priority is a whole number up to {MAX_PRIORITY:,}, not {priority!r}")


@dataclass(slots=True)
class _LoadAttempts:
    """Attempts of one call that the cache let fail, and whether a changed file was loaded again."""

    failed: int = 0
    reloaded: bool = False


class Acquirer:
    """Resolves and wants adapters within a deadline; `check_open` raises once nothing may begin."""

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
        self._tracer = driver.telemetry.tracer

    def known(self, ref: Ref) -> AdapterKey | None:
        """Which key `ref` last was; touches no file."""
        return ref if isinstance(ref, AdapterKey) else self._resolver.known(ref)

    async def acquire(
        self, ref: Ref, tier: WantedTier, seconds: float, *, priority: int, foreground: bool = True
    ) -> Lease | None:
        """Wait until the adapter is at `tier`; the lease is None for who takes none.

        And until it was held against the digest in `ref`, if there is one; who streams waits for
        that later. On an error or a cancellation the wish is withdrawn.
        """
        require_priority(priority)
        recorder = self._tracer.on
        asked = self._acquire(ref, tier, seconds, priority=priority, foreground=foreground)
        if recorder is None:
            return await asked
        return await _recorded(recorder, ref, tier, foreground, asked)

    async def _acquire(
        self, ref: Ref, tier: WantedTier, seconds: float, *, priority: int, foreground: bool
    ) -> Lease | None:
        key = ref if isinstance(ref, AdapterKey) else None
        pending_load: LoadWish | None = None
        tries = _LoadAttempts()
        lease: Lease | None = None
        granted = False
        waiter_table = self._driver.waiter_table
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                while not granted:
                    # Threads take what they are given in the order in which it came: a load must
                    # not find thousands of hints before it.
                    async with nullcontext() if foreground else self._turn(ref, priority):
                        if not isinstance(ref, AdapterKey):
                            key = await self._resolve(ref)
                        self._check_open()  # nobody would tell a wish that begins later
                        assert key is not None
                        if isinstance(key, MergedKey) and not waiter_table.calls.in_memory(key):
                            self._driver.forget(key)  # idle, it has to be computed again
                        pending_load = waiter_table.begin(
                            key, tier, foreground=foreground, priority=priority
                        )
                        if not foreground:
                            await self._driver.files.opened(key)
                    try:
                        lease = await self._granted(pending_load, tier)
                        granted = True
                    except AdapterError as error:
                        waiter_table.abandon(pending_load)
                        await self._require_retry(tries, ref, key, error)
                assert key is not None
                await self._hold_to_digest(ref, key, tier, lease)
                return lease
        except BaseException as error:
            late = deadline.expired() and isinstance(error, TimeoutError)
            problem = self._timed_out(ref, key, seconds, granted=granted) if late else error
            if pending_load is not None:
                waiter_table.abandon(pending_load)
            if isinstance(problem, LoraxError):
                raise problem.located(id=text_of(ref)) from problem.__cause__
            if isinstance(problem, Exception):
                raise InternalError(f"a wish failed: {problem!r}", id=text_of(ref)) from problem
            raise

    def _turn(self, ref: Ref, priority: int) -> AbstractAsyncContextManager[None]:
        return self._turns.turn(priority, origins_of(ref))

    async def _require_retry(
        self, tries: _LoadAttempts, ref: Ref, key: AdapterKey, error: AdapterError
    ) -> None:
        """Raise the error unless what `ref` was has gone, or `ref` means something else now."""
        if isinstance(error, EvictedError | LeftoverError):
            tries.failed += 1
            if tries.failed < MAX_ATTEMPTS:
                return
        if self._resolver.outdated(ref, key):
            return
        if not await self._is_changed(ref, key, error):
            raise error
        if tries.reloaded:
            raise _changed_again(error) from None
        assert not isinstance(ref, AdapterKey)
        await self._settled(ref)
        tries.reloaded = True

    async def _resolve(self, ref: AdapterRef | Merge) -> AdapterKey:
        """Ask once more if a file is empty, as it is while it is saved in place."""
        try:
            return await self._resolver.resolve(ref)
        except AdapterFormatError as error:
            if not error.retryable:
                raise
        await self._settled(ref)
        return await self._resolver.resolve(ref)

    async def has_changed(self, ref: Ref, key: AdapterKey, error: LoraxError) -> bool:
        """Return whether a load of `key` failed because its files were saved meanwhile.

        If so, wait until they are at rest.
        """
        if isinstance(ref, AdapterKey) or not await self._is_changed(ref, key, error):
            return False
        await self._settled(ref)
        return True

    async def _is_changed(self, ref: Ref, key: AdapterKey, error: LoraxError) -> bool:
        """Return whether `ref` means other local files by now, where the error can come of that."""
        local = bool(key.files) and not isinstance(key, RemoteKey)
        if isinstance(ref, AdapterKey) or not local or not isinstance(error, _AS_CHANGED):
            return False
        latest = await self._latest(ref)
        if latest is _MISSING or (latest == key and _is_recent(key.files)):
            await asyncio.sleep(SETTLE_SECONDS)  # its writer may only be slow
            latest = await self._latest(ref)
        return latest is not _MISSING and latest != key

    async def _settled(self, ref: AdapterRef | Merge) -> None:
        """Wait until the files of `ref` do not change any more, or have done so for too long."""
        loop = asyncio.get_running_loop()
        end, before = loop.time() + MAX_SETTLE_SECONDS, await self._latest(ref)
        while loop.time() < end:
            await asyncio.sleep(SETTLE_SECONDS)
            now = await self._latest(ref)
            if now == before:
                return
            before = now

    async def _latest(self, ref: AdapterRef | Merge) -> AdapterKey | str:
        """Return what `ref` means now, or that a file of it is empty or missing."""
        try:
            return await self._resolver.resolve(ref)
        except AdapterFormatError:
            return _EMPTY
        except AdapterError:
            return _MISSING

    async def _granted(self, pending_load: LoadWish, tier: WantedTier) -> Lease | None:
        """Who streams has the adapter before its file was opened, which may have gone: that is
        seen while it can still be fetched again. Raises `EvictedError` then.
        """
        lease = await self._driver.waiter_table.granted(pending_load)
        if (
            lease is None
            or tier is not WantedTier.STREAM
            or not isinstance(pending_load.key, RemoteKey | MergedKey)
        ):
            return lease
        if not lease.occupancy.complete:
            try:
                await self._driver.files.readable(pending_load.key)
            except EvictedError:
                # Which is also said of what was read to its end. The copies know; and until they
                # have failed, the lifecycle takes the file for present, and would not fetch it.
                await lease.occupancy.ready(lease.occupancy.layers[-1], lease.check)
        return lease

    async def _hold_to_digest(
        self, ref: Ref, key: AdapterKey, tier: WantedTier, lease: Lease | None
    ) -> None:
        if lease is None:
            await self._digests.compare(ref, key, self._driver.files.verifications.get(key))
            return
        lease.stale = is_stale(key)
        if tier is WantedTier.STREAM:
            self._digests.watch(ref, key, lease)
        else:
            await self._digests.hold(ref, key, lease)

    def try_lease(self, ref: Ref) -> Lease | None:
        """A lease on what is resident, if `ref` was told to mean it lately; touches no file."""
        key = ref if isinstance(ref, AdapterKey) else self._resolver.recent(ref)
        lease = self._driver.waiter_table.try_lease(key) if key is not None else None
        if key is None or lease is None:
            return None
        if not self._digests.agrees(ref, key, lease.occupancy.verification):
            lease.end()
            return None
        lease.stale = is_stale(key)
        return lease

    async def lease(self, ref: Ref, tier: WantedTier, seconds: float, *, priority: int) -> Lease:
        """As `acquire`, for who takes one."""
        lease = await self.acquire(ref, tier, seconds, priority=priority)
        assert lease is not None
        return lease

    async def pin(self, ref: Ref, seconds: float, *, priority: int) -> None:
        """Wait until the adapter is resident, and keep it there on behalf of `ref`."""
        loop, pinned = asyncio.get_running_loop(), False
        deadline = loop.time() + seconds
        while not pinned:  # an unload may come between: it is waited for, and the load repeated
            left = max(0.0, deadline - loop.time())
            lease = await self.lease(ref, WantedTier.DEVICE, left, priority=priority)
            lease.id = text_of(ref)
            try:
                if not self._resolver.outdated(ref, lease.occupancy.key):  # else it was replaced
                    pinned = self._driver.waiter_table.pin(ref, lease)
            finally:
                lease.end()

    def _timed_out(
        self, ref: Ref, key: AdapterKey | None, seconds: float, *, granted: bool
    ) -> AdapterTimeoutError:
        """Where the adapter is now, before the wish for it is withdrawn."""
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


def _is_recent(files: Sequence[FileIdentity]) -> bool:
    newest = max(max(file.mtime_ns, file.ctime_ns) for file in files)
    return abs(time.time_ns() - newest) < _RECENT_NS


def _changed_again(error: AdapterError) -> IntegrityError:
    return IntegrityError(
        "its files were changed while they were loaded, and again while they were loaded once"
        f" more: {error.problem}; save to a new folder, and rename it into place",
        stage=error.stage,
    )


async def _recorded(
    recorder: Recorder,
    ref: Ref,
    tier: WantedTier,
    foreground: bool,
    asked: Coroutine[None, None, Lease | None],
) -> Lease | None:
    """What was asked for, as a span of a trace, however it ends."""
    call = {WantedTier.DEVICE: "load", WantedTier.STREAM: "stream"}.get(tier, tier.name.lower())
    what = call if foreground else f"prefetch to {tier.name.lower()}"
    name = name_of(ref)
    span = recorder.begin("requests", None, f"{what} {name}", adapter=name)
    outcome: dict[str, object] = {"outcome": "failed"}
    try:
        lease = await asked
    except asyncio.CancelledError:
        outcome["outcome"] = "cancelled"
        raise
    except LoraxError as error:
        outcome.update(outcome=type(error).__name__, stage=error.stage)
        raise
    else:
        outcome["outcome"] = "done"
        if lease is not None:
            outcome["stay"] = recorder.stay_in(lease.occupancy.grant.slot.index).number
        return lease
    finally:
        recorder.end(span, **outcome)
