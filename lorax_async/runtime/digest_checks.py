"""Comparisons of adapters' weights with digests from callers."""

from __future__ import annotations

from collections.abc import Callable

from lorax_async.concurrency import SharedTasks, result_of
from lorax_async.errors import IntegrityError
from lorax_async.runtime.leases import Lease
from lorax_async.sources.base import Source
from lorax_async.types import AdapterKey, AdapterRef, Ref, Verification

MAX_REMEMBERED = 65_536
"""Digests kept; the oldest is dropped first."""


class DigestChecks:
    """Compares digests, and lets `source` hash weights of unknown digest, once for all callers.

    `check_open` raises once the store or loader is closing.
    """

    def __init__(self, source: Source, check_open: Callable[[], None]) -> None:
        self._check_open = check_open
        self._known: dict[AdapterKey, str] = {}
        self._source = source
        self._hashing = SharedTasks(self._run, lambda key: f"lorax digest {key}")
        self._waiting: set[Lease] = set()

    async def compare(
        self, ref: Ref, key: AdapterKey, known: Verification | None
    ) -> Verification | None:
        """Compare the weights of `key` with the digest in `ref`, if any; hash them if needed.

        `known` is the key's verification, if it is known. Return the verification by the digest.
        Raise `IntegrityError` for a mismatch, and what hashing raises.
        """
        expected = _expected_digest(ref)
        if expected is None:
            return None
        digest = self._known_digest(key, known) or await self._hash(key)
        if digest != expected:
            raise _mismatch(key, digest, expected)
        return Verification("sha256", expected)

    def agrees(self, ref: Ref, key: AdapterKey, known: Verification | None) -> bool:
        """Return whether the digest in `ref`, if any, is known to match."""
        expected = _expected_digest(ref)
        return expected is None or self._known_digest(key, known) == expected

    async def require(self, ref: Ref, key: AdapterKey, lease: Lease) -> None:
        """Compare a lease's weights with the digest in `ref`, if any, once all bytes are here.

        Raise as `compare`, the slot's error, or `LoaderClosedError` when the loader is closing.
        """
        if _expected_digest(ref) is None:
            return

        def check() -> None:
            self._check_open()
            lease.check()

        self._waiting.add(lease)
        try:
            verification = await lease.verified(check)
        finally:
            self._waiting.discard(lease)
        lease.verified_by_caller = await self.compare(ref, key, verification)

    async def stop(self) -> None:
        """End all waits and tasks, once `check_open` raises; leases stay."""
        for lease in self._waiting:
            lease.occupancy.wake_tasks()
        await self._hashing.stop()

    def _known_digest(self, key: AdapterKey, known: Verification | None) -> str | None:
        """Return the known sha256 of `key`, or None."""
        by_sha256 = known is not None and known.kind in ("sha256", "transport")
        digest = known.digest if known is not None and by_sha256 else None
        return digest or self._known.get(key)

    async def _hash(self, key: AdapterKey) -> str:
        with self._hashing.join(key) as task:
            return await result_of(task, "verify", self._check_open)

    async def _run(self, key: AdapterKey) -> str:
        digest = self._known[key] = await self._source.digest(key)
        if len(self._known) > MAX_REMEMBERED:
            del self._known[next(iter(self._known))]
        return digest


def has_digest(ref: Ref) -> bool:
    """Return whether the caller gave a digest."""
    return _expected_digest(ref) is not None


def _expected_digest(ref: Ref) -> str | None:
    return ref.digest if isinstance(ref, AdapterRef) else None


def _mismatch(key: AdapterKey, digest: str, expected: str) -> IntegrityError:
    return IntegrityError(
        f"its weights have the sha256 {digest}, not {expected} as requested; request the"
        " version with that digest, or correct the digest",
        key=key,
        stage="verify",
        retryable=False,
    )
