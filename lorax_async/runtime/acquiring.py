"""From what a caller asks for to a lease, or to an error that says how far it came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

from lorax_async.adapter import (
    AdapterKey,
    AdapterRef,
    FileIdentity,
    Merge,
    MergedKey,
    Ref,
    RemoteKey,
    is_stale,
    origins_of,
    text_of,
)
from lorax_async.core.waiters import Tier
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
from lorax_async.io.cache.ports import LeftoverError
from lorax_async.runtime.digests import Digests
from lorax_async.runtime.driver import Driver
from lorax_async.runtime.interest import Wish
from lorax_async.runtime.resolver import Resolver
from lorax_async.runtime.tenancy import Lease
from lorax_async.runtime.turns import Turns
from lorax_async.tracing.names import name_of
from lorax_async.tracing.recorder import Recorder

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
class _Tries:
    """Attempts of one call that the cache let fail, and whether a changed file was loaded again."""

    failed: int = 0
    reloaded: bool = False


class Acquiring:
    """Resolves and wants adapters within a deadline; `check_open` raises once nothing may begin."""

    def __init__(
        self,
        resolver: Resolver,
        driver: Driver,
        digests: Digests,
        check_open: Callable[[], None],
    ) -> None:
        self._resolver = resolver
        self._driver = driver
        self._digests = digests
        self._check_open = check_open
        self._turns = Turns(BACKGROUND, BACKGROUND_SECONDS)
        self._tracer = driver.journal.tracer

    def known(self, ref: Ref) -> AdapterKey | None:
        """Which key `ref` last was; touches no file."""
        return ref if isinstance(ref, AdapterKey) else self._resolver.known(ref)

    async def acquire(
        self, ref: Ref, tier: Tier, seconds: float, *, priority: int, foreground: bool = True
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
        self, ref: Ref, tier: Tier, seconds: float, *, priority: int, foreground: bool
    ) -> Lease | None:
        key = ref if isinstance(ref, AdapterKey) else None
        wish: Wish | None = None
        tries = _Tries()
        lease: Lease | None = None
        granted = False
        interest = self._driver.interest
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
                        if isinstance(key, MergedKey) and not interest.calls.in_memory(key):
                            self._driver.forget(key)  # idle, it has to be computed again
                        wish = interest.begin(key, tier, foreground=foreground, priority=priority)
                        if not foreground:
                            await self._driver.files.opened(key)
                    try:
                        lease = await self._granted(wish, tier)
                        granted = True
                    except AdapterError as error:
                        interest.abandon(wish)
                        await self._require_retry(tries, ref, key, error)
                assert key is not None
                await self._hold_to_digest(ref, key, tier, lease)
                return lease
        except BaseException as error:
            late = deadline.expired() and isinstance(error, TimeoutError)
            problem = self._timed_out(ref, key, seconds, granted=granted) if late else error
            if wish is not None:
                interest.abandon(wish)
            if isinstance(problem, LoraxError):
                raise problem.located(id=text_of(ref)) from problem.__cause__
            if isinstance(problem, Exception):
                raise InternalError(f"a wish failed: {problem!r}", id=text_of(ref)) from problem
            raise

    def _turn(self, ref: Ref, priority: int) -> AbstractAsyncContextManager[None]:
        return self._turns.turn(priority, origins_of(ref))

    async def _require_retry(
        self, tries: _Tries, ref: Ref, key: AdapterKey, error: AdapterError
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

    async def _granted(self, wish: Wish, tier: Tier) -> Lease | None:
        """Who streams has the adapter before its file was opened, which may have gone: that is
        seen while it can still be fetched again. Raises `EvictedError` then.
        """
        lease = await self._driver.interest.granted(wish)
        if (
            lease is None
            or tier is not Tier.STREAM
            or not isinstance(wish.key, RemoteKey | MergedKey)
        ):
            return lease
        if not lease.tenancy.complete:
            try:
                await self._driver.files.readable(wish.key)
            except EvictedError:
                # Which is also said of what was read to its end. The copies know; and until they
                # have failed, the lifecycle takes the file for present, and would not fetch it.
                await lease.tenancy.ready(lease.tenancy.layers[-1], lease.check)
        return lease

    async def _hold_to_digest(
        self, ref: Ref, key: AdapterKey, tier: Tier, lease: Lease | None
    ) -> None:
        if lease is None:
            await self._digests.compare(ref, key, self._driver.files.verifications.get(key))
            return
        lease.stale = is_stale(key)
        if tier is Tier.STREAM:
            self._digests.watch(ref, key, lease)
        else:
            await self._digests.hold(ref, key, lease)

    def try_lease(self, ref: Ref) -> Lease | None:
        """A lease on what is resident, if `ref` was told to mean it lately; touches no file."""
        key = ref if isinstance(ref, AdapterKey) else self._resolver.recent(ref)
        lease = self._driver.interest.try_lease(key) if key is not None else None
        if key is None or lease is None:
            return None
        if not self._digests.agrees(ref, key, lease.tenancy.verification):
            lease.end()
            return None
        lease.stale = is_stale(key)
        return lease

    async def lease(self, ref: Ref, tier: Tier, seconds: float, *, priority: int) -> Lease:
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
            lease = await self.lease(ref, Tier.DEVICE, left, priority=priority)
            lease.id = text_of(ref)
            try:
                if not self._resolver.outdated(ref, lease.tenancy.key):  # else it was replaced
                    pinned = self._driver.interest.pin(ref, lease)
            finally:
                lease.end()

    def _timed_out(
        self, ref: Ref, key: AdapterKey | None, seconds: float, *, granted: bool
    ) -> AdapterTimeoutError:
        """Where the adapter is now, before the wish for it is withdrawn."""
        driver = self._driver
        stage: Stage = "resolve" if key is None else driver.lifecycle.stage(key)
        life = None if key is None else driver.lifecycle.lives.get(key)
        return AdapterTimeoutError(
            f"it was not ready within {seconds:g} s",
            id=text_of(ref),
            key=key,
            attempt=life.attempt if life is not None else 0,
            stage="verify" if granted else stage,
            story=() if key is None else driver.journal.story(key),
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
    tier: Tier,
    foreground: bool,
    asked: Coroutine[None, None, Lease | None],
) -> Lease | None:
    """What was asked for, as a span of a trace, however it ends."""
    call = {Tier.DEVICE: "load", Tier.STREAM: "stream"}.get(tier, tier.name.lower())
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
            outcome["stay"] = recorder.stay_in(lease.tenancy.grant.slot.index).number
        return lease
    finally:
        recorder.end(span, **outcome)
