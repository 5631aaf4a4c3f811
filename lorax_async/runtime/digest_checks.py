"""Comparisons of adapters' weights with digests from callers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lorax_async.concurrency import SharedTasks, result_of
from lorax_async.errors import IntegrityError, LoraxError, as_lorax_error
from lorax_async.runtime.leases import DigestPromise, Lease, SlotOccupancy
from lorax_async.runtime.telemetry import Telemetry
from lorax_async.sources.base import Source
from lorax_async.types import AdapterKey, AdapterRef, Merge, MergedKey, Ref, Verification

MAX_REMEMBERED = 65_536
"""Digests kept; the oldest is dropped first."""


class DigestChecks:
    """Compares digests, and lets `source` hash weights of unknown digest, once for all callers.

    `check_open` raises once the store or loader is closing.
    """

    def __init__(
        self, source: Source, telemetry: Telemetry, check_open: Callable[[], None]
    ) -> None:
        self._telemetry = telemetry
        self._check_open = check_open
        self._known: dict[AdapterKey, str] = {}
        self._source = source
        self._hashing = SharedTasks(self._run, lambda key: f"lorax digest {key}")
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: set[Lease] = set()

    async def compare(
        self, ref: Ref, key: AdapterKey, known: Verification | None
    ) -> Verification | None:
        """Compare the weights of `key` with the digests in `ref`; hash them if needed.

        `known` is the key's verification, if it is known. Return the verification by the digest of
        an `AdapterRef`, if it has one. Raise `IntegrityError` for a mismatch, and what hashing
        raises.
        """
        for part, expected in _expected_digests(ref, key):
            digest = self._known_digest(part, key, known) or await self._hash(part)
            if digest != expected:
                raise _mismatch(part, digest, expected)
        by_caller = ref.digest if isinstance(ref, AdapterRef) else None
        return None if by_caller is None else Verification("sha256", by_caller)

    def agrees(self, ref: Ref, key: AdapterKey, known: Verification | None) -> bool:
        """Return whether all digests in `ref` are known to match."""
        return all(
            self._known_digest(part, key, known) == expected
            for part, expected in _expected_digests(ref, key)
        )

    def watch(self, ref: Ref, key: AdapterKey, lease: Lease) -> None:
        """Compare once all bytes are here. The lease fails at a mismatch."""
        if _expected_digests(ref, key):
            promise = DigestPromise().join(lease)
            watching = self._watch(promise, ref, key, lease.occupancy)
            loop = asyncio.get_running_loop()
            promise.task = loop.create_task(watching, name=f"lorax compare {key}")
            self._tasks.add(promise.task)
            promise.task.add_done_callback(self._tasks.discard)

    async def watch_and_wait(self, ref: Ref, key: AdapterKey, lease: Lease) -> None:
        """Call `watch`, and wait for it; raise `LoaderClosedError` when the loader is closing."""

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
        """End the waits of `watch_and_wait`; leases stay."""
        for lease in self._waiting:
            lease.occupancy.wake_tasks()

    async def stop(self) -> None:
        """Cancel all tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, self._hashing.stop(), return_exceptions=True)

    async def _watch(
        self, promise: DigestPromise, ref: Ref, key: AdapterKey, occupancy: SlotOccupancy
    ) -> None:
        kept: Verification | None = None
        error: LoraxError | None = None
        try:
            await occupancy.until(lambda: occupancy.verification is not None, occupancy.check)
            kept = await self.compare(ref, key, occupancy.verification)
        except LoraxError as problem:
            error = problem.located(key=key, story=self._telemetry.story(key))
        except Exception as problem:  # noqa: BLE001 - becomes the lease's error
            error = as_lorax_error(problem, "a digest was not compared", key=key)
        promise.settle(kept, error)
        occupancy.wake_threads()
        occupancy.wake_tasks()

    def _known_digest(
        self, part: AdapterKey, key: AdapterKey, known: Verification | None
    ) -> str | None:
        """Return the known sha256 of a part of `key`, or None."""
        by_sha256 = known is not None and known.kind in ("sha256", "transport")
        digest = known.digest if known is not None and by_sha256 and part == key else None
        return digest or self._known.get(part)

    async def _hash(self, key: AdapterKey) -> str:
        with self._hashing.join(key) as task:
            return await result_of(task, "verify", self._check_open)

    async def _run(self, key: AdapterKey) -> str:
        digest = self._known[key] = await self._source.digest(key)
        if len(self._known) > MAX_REMEMBERED:
            del self._known[next(iter(self._known))]
        return digest


def _expected_digests(ref: Ref, key: AdapterKey) -> list[tuple[AdapterKey, str]]:
    """Return the keys with a digest in `ref`: its own, or those of the parts of a merge."""
    if isinstance(ref, AdapterKey):
        return []
    refs: tuple[Ref, ...] = (ref,)
    keys: tuple[object, ...] = (key,)
    if isinstance(ref, Merge) and isinstance(key, MergedKey):
        refs, keys = ref.parts, key.merge.parts
    return [
        (part_key, part.digest)
        for part, part_key in zip(refs, keys, strict=True)
        if isinstance(part_key, AdapterKey)
        and isinstance(part, AdapterRef)
        and part.digest is not None
    ]


def _mismatch(key: AdapterKey, digest: str, expected: str) -> IntegrityError:
    return IntegrityError(
        f"its weights have the sha256 {digest}, not {expected} as requested; request the"
        " version with that digest, or correct the digest",
        key=key,
        stage="verify",
        retryable=False,
    )
