"""Comparisons of adapters' weights with digests from callers."""

from __future__ import annotations

from collections.abc import Callable

from lorax_async.concurrency import SharedTasks, result_of
from lorax_async.errors import IntegrityError
from lorax_async.runtime.leases import Lease
from lorax_async.sources.base import Source
from lorax_async.types import AdapterKey, AdapterRef, Merge, MergedKey, Ref, Verification

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

    async def require(self, ref: Ref, key: AdapterKey, lease: Lease) -> None:
        """Compare a lease's weights with the digests in `ref`, if any, once all bytes are here.

        Raise as `compare`, the slot's error, or `LoaderClosedError` when the loader is closing.
        """
        if not _expected_digests(ref, key):
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


def has_digest(ref: Ref) -> bool:
    """Return whether the caller gave a digest for the adapter or one of its parts."""
    parts = ref.parts if isinstance(ref, Merge) else (ref,)
    return any(isinstance(part, AdapterRef) and part.digest is not None for part in parts)


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
