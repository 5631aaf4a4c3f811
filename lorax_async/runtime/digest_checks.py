"""Adapters held against the digests that callers gave for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from lorax_async.errors import IntegrityError, InternalError, LoaderClosedError, LoraxError
from lorax_async.runtime.leases import DigestPromise, Lease, SlotOccupancy
from lorax_async.runtime.telemetry import Telemetry
from lorax_async.sources.base import Source
from lorax_async.types import AdapterKey, AdapterRef, Merge, MergedKey, Ref, Verification

MAX_REMEMBERED = 65_536
"""Digests kept; the one that was found longest ago goes first."""


@dataclass(slots=True, eq=False)
class _Hashing:
    """One hashing that is under way, and how many wait for it."""

    task: asyncio.Task[str]
    waiting: int = 0


class DigestChecks:
    """Compares, and lets `source` hash what nobody hashed before: once, for all who ask.

    `check_open` raises once the loader is closing.
    """

    def __init__(
        self, source: Source, telemetry: Telemetry, check_open: Callable[[], None]
    ) -> None:
        self._source = source
        self._telemetry = telemetry
        self._check_open = check_open
        self._known: dict[AdapterKey, str] = {}
        self._asking: dict[AdapterKey, _Hashing] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: set[Lease] = set()

    async def compare(self, ref: Ref, key: AdapterKey, known: Verification | None) -> None:
        """Wait until what `key` is has been held against what `ref` promises.

        `known` is what is known of the key. Raises `IntegrityError` if it is something else, and
        what hashing raises.
        """
        for part, digest in _promised(ref, key):
            found = self._found(part, key, known) or await self._digest(part)
            if found != digest:
                raise _differs(part, found, digest)

    def agrees(self, ref: Ref, key: AdapterKey, known: Verification | None) -> bool:
        """Whether `compare` would raise nothing, as far as can be told without waiting."""
        return all(self._found(part, key, known) == digest for part, digest in _promised(ref, key))

    def watch(self, ref: Ref, key: AdapterKey, lease: Lease) -> None:
        """Compare once all bytes are here. If they are others, the lease fails."""
        if _promised(ref, key):
            promise = DigestPromise().join(lease)
            watching = self._watch(promise, ref, key, lease.occupancy)
            loop = asyncio.get_running_loop()
            promise.task = loop.create_task(watching, name=f"lorax compare {key}")
            self._tasks.add(promise.task)
            promise.task.add_done_callback(self._tasks.discard)

    async def hold(self, ref: Ref, key: AdapterKey, lease: Lease) -> None:
        """As `watch`, and wait for it. Raises `LoaderClosedError` when the loader is closing."""

        def check() -> None:
            self._check_open()
            lease.check()

        self.watch(ref, key, lease)
        if lease.promise is not None:
            self._waiting.add(lease)
            try:
                await lease.verified(check)
            finally:
                self._waiting.discard(lease)

    def begin_close(self) -> None:
        """Nobody waits any more; who has a lease may go on."""
        for lease in self._waiting:
            lease.occupancy.wake_tasks()

    async def stop(self) -> None:
        """End what is under way."""
        tasks = [*self._tasks, *(question.task for question in self._asking.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(
        self, promise: DigestPromise, ref: Ref, key: AdapterKey, occupancy: SlotOccupancy
    ) -> None:
        error: LoraxError | None = None
        try:
            await occupancy.until(lambda: occupancy.verification is not None, occupancy.check)
            await self.compare(ref, key, occupancy.verification)
        except LoraxError as problem:
            error = problem.located(key=key, story=self._telemetry.story(key))
        except Exception as problem:  # noqa: BLE001 - who holds the lease is told
            error = InternalError(f"a digest was not compared: {problem!r}", key=key)
            error.__cause__ = problem
        promise.settle(_kept(ref), error)
        occupancy.wake_threads()
        occupancy.wake_tasks()

    def _found(self, part: AdapterKey, key: AdapterKey, known: Verification | None) -> str | None:
        """A sha256, where there is one."""
        by_sha256 = known is not None and known.kind in ("sha256", "transport")
        digest = known.digest if known is not None and by_sha256 and part == key else None
        return digest or self._known.get(part)

    async def _digest(self, key: AdapterKey) -> str:
        question = self._asking.get(key) or self._ask(key)
        question.waiting += 1
        try:
            return await asyncio.shield(question.task)
        except LoraxError as error:
            raise error.located() from error.__cause__
        except asyncio.CancelledError:
            waiter = asyncio.current_task()
            if question.task.cancelled() and waiter is not None and not waiter.cancelling():
                raise LoaderClosedError("the loader was closed", stage="verify") from None
            raise
        finally:
            question.waiting -= 1
            if not question.waiting and not question.task.done():
                del self._asking[key]
                question.task.cancel()

    def _ask(self, key: AdapterKey) -> _Hashing:
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._source.digest(key), name=f"lorax digest {key}")
        question = self._asking[key] = _Hashing(task)
        task.add_done_callback(lambda _: self._answered(key, question))
        return question

    def _answered(self, key: AdapterKey, question: _Hashing) -> None:
        if self._asking.get(key) is question:
            del self._asking[key]
        task = question.task
        if task.cancelled() or task.exception() is not None:
            return
        self._known[key] = task.result()
        if len(self._known) > MAX_REMEMBERED:
            del self._known[next(iter(self._known))]


def _promised(ref: Ref, key: AdapterKey) -> list[tuple[AdapterKey, str]]:
    """Keys, with the digests that were given for them: of an id, or of the parts of a merge."""
    asked: tuple[Ref, ...] = (ref,)
    found: tuple[object, ...] = (key,)
    if isinstance(ref, Merge) and isinstance(key, MergedKey):
        asked, found = ref.parts, key.merge.parts
    return [
        (part, named.digest)
        for named, part in zip(asked, found, strict=True)
        if isinstance(part, AdapterKey)
        and isinstance(named, AdapterRef)
        and named.digest is not None
    ]


def _kept(ref: Ref) -> Verification | None:
    """What is known of an adapter by a caller's word."""
    digest = ref.digest if isinstance(ref, AdapterRef) else None
    return None if digest is None else Verification("sha256", digest)


def _differs(key: AdapterKey, found: str, digest: str) -> IntegrityError:
    return IntegrityError(
        f"its weights have the sha256 {found}, not {digest} as was asked for; ask for the version"
        " that you mean, or correct the digest",
        key=key,
        stage="verify",
        retryable=False,
    )
