"""The interface of a disk cache. Methods block, and any thread may call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from lorax_async.cache.records import CacheKey, EntryRecord
from lorax_async.concurrency import FetchControl
from lorax_async.errors import IntegrityError
from lorax_async.files import Reader
from lorax_async.formats.digests import Digest
from lorax_async.formats.spans import ByteRange
from lorax_async.formats.split_weights import FileRole


class LeftoverError(IntegrityError):
    """The bytes that an interrupted download left are not those that the source sends now."""


@runtime_checkable
class CacheEntry(Protocol):
    """A whole adapter in the cache, leased: it stays until this is closed.

    `mappable`: no other program changes its files, so that they may be mapped.
    """

    mappable: bool

    @property
    def record(self) -> EntryRecord:
        """Its files, their sizes and digests."""

    @property
    def folder(self) -> str:
        """Absolute path of its folder, which PEFT can load as long as the lease lasts."""

    def reader(self, role: FileRole) -> Reader:
        """Return a reader of one file. Quick: opened by the first read.

        It may outlive this, but raises `IntegrityError` once the entry is removed. Raise
        `InternalError` for a file that the record does not name.
        """

    def granted(self, scope: str) -> float | None:
        """Return the seconds since the source last let this scope have it; None if never."""

    def grant(self, scope: str) -> None:
        """Record that the source has just let this scope have it."""

    def close(self) -> None:
        """Quick and idempotent."""


class CacheFile(Protocol):
    """One file of a download, written by many threads."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    @property
    def resumed(self) -> bool:
        """Whether an interrupted download left bytes of it."""

    @property
    def expected(self) -> Digest | None:
        """The digest that judges it at the end, if one was promised."""

    def missing(self) -> list[ByteRange]:
        """Return the ranges not written yet, ascending. Quick."""

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Write all buffers, one after the other, from `offset` on.

        Compare with the bytes of a partial download: `LeftoverError` if they differ. Raise
        `IntegrityError` beyond the file's end, `CapacityError` if the disk is full (or the file may
        not be so large, or its owner may have no more), `FetchError` if it fails.
        """

    def hash_along(self) -> int:
        """Continue hashing, up to the first missing byte; return how many bytes are hashed.

        For one thread beside those that write; `publish` hashes the rest.
        """

    def reader(self) -> Reader:
        """Return a reader of the bytes written; reading others raises `InternalError`.

        It stays good after publication.
        """


@runtime_checkable
class CacheDownload(Protocol):
    """An adapter on its way into the cache. If locks work, no other process downloads it.

    It is `mappable` if the entry will be.
    """

    mappable: bool

    def file(self, role: FileRole, nbytes: int, expected: Digest | None = None) -> CacheFile:
        """Add a file, with room for all of it, and the bytes of a partial download.

        Without an `expected` digest, record our own. Raise `CapacityError` without room.
        """

    def publish(self) -> CacheEntry:
        """Check the digests of the complete files, and publish them to all processes at once.

        Return the entry of a process that was faster, if it has the same digests. Raise
        `IntegrityError` for a digest that is not the expected one (or not theirs), and leave
        nothing of the download; else raise as `write`.
        """

    def discard(self) -> None:
        """Leave nothing. Idempotent; does nothing after `publish`."""

    def close(self) -> None:
        """End it; the next download resumes it. Idempotent.

        No thread may write any more.
        """


class Cache(Protocol):
    """Whole adapters by key, and partial ones on their way, within a budget of bytes.

    The budget counts adapters' files. Interrupted downloads make room first, then entries that are
    not leased, in the policy's order.
    """

    def open(self, key: CacheKey, *, check: bool = False) -> CacheEntry | None:
        """Lease the entry and count a use; None if there is none.

        Remove an entry whose files have not the recorded sizes, or whose bytes not the recorded
        digests: they are hashed with `check`, or if a file was touched.
        """

    def try_begin(
        self, key: CacheKey, scope: str, *, alone: bool = False
    ) -> CacheEntry | CacheDownload | int:
        """Return the entry, or begin to download it on the authority of `scope`.

        Return the progress of another download if there is one; begin a second if `alone`.
        """

    def begin(self, key: CacheKey, scope: str, control: FetchControl) -> CacheEntry | CacheDownload:
        """Call `try_begin`, waiting for another download while it makes progress.

        Raise `FetchError` when `control` ends.
        """

    def note_version(self, question: str, source: str, version: str) -> None:
        """Record a source's latest answer, whether the cache has that version or not."""

    def last_version(self, question: str) -> tuple[str, str] | None:
        """Return the source and version of the last answer; None if there is none."""

    def condemn(self, key: CacheKey) -> None:
        """Remove an entry whose bytes are wrong, even if it is leased.

        Open files stay readable; opening another raises `IntegrityError`.
        """

    def remove(self, key: CacheKey) -> bool:
        """Remove the entry and partials of it; False if any is in use."""

    def used(self) -> int:
        """Return the bytes of adapters' files in the cache now, partial ones included."""

    def close(self) -> None:
        """Close the cache. Close entries and downloads first; readers may stay open. Idempotent."""
