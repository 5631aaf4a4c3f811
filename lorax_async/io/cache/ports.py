"""The seam to a disk cache. All methods block and may be called from any thread, unless said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from lorax_async.core.cache_names import CacheKey, FileRole
from lorax_async.core.cache_record import Record
from lorax_async.core.file_digest import Digest
from lorax_async.core.spans import Span
from lorax_async.errors import IntegrityError
from lorax_async.io.ports import Demand, Reader


class LeftoverError(IntegrityError):
    """The bytes that an interrupted download left are not those that the source sends now."""


def contradiction() -> IntegrityError:
    """Return what `CacheDownload.publish` raises if another process has published other bytes."""
    return IntegrityError(
        "another process has stored other bytes of the same version meanwhile: the source changed"
        " them without saying so; load it again"
    )


@runtime_checkable
class CacheEntry(Protocol):
    """A whole adapter in the cache, which stays there until this is closed.

    `mappable`: nobody else changes its files, so that they may be mapped.
    """

    mappable: bool

    @property
    def record(self) -> Record:
        """Its files, their sizes and digests."""

    @property
    def folder(self) -> str:
        """Absolute path of the folder with its files."""

    def reader(self, role: FileRole) -> Reader:
        """A reader of one file. Quick: opened by the first read.

        It may outlive this, but when the entry is removed it raises `IntegrityError`. Raises
        `InternalError` for a file that the record does not name.
        """

    def granted(self, scope: str) -> float | None:
        """Seconds since its source last let this scope of authorization have it; None if never."""

    def grant(self, scope: str) -> None:
        """Its source has just let this scope have it."""

    def close(self) -> None:
        """Quick and idempotent."""


class CacheFile(Protocol):
    """One file of a download, written by many threads."""

    @property
    def nbytes(self) -> int | None:
        """Its size; None while nobody knows."""

    @property
    def resumed(self) -> bool:
        """Whether an interrupted download has left bytes of it."""

    @property
    def expected(self) -> Digest | None:
        """The digest that judges it at the end, if anybody promised one."""

    def ends_at(self, nbytes: int) -> None:
        """Its size, where that was not known before.

        Raises `IntegrityError` if more was written, or another size is known; `CapacityError` as
        `write` does.
        """

    def missing(self, start: int = 0, stop: int | None = None) -> list[Span]:
        """What of [start, stop) was not written yet, ascending; None is the end. Quick.

        Of a file whose size is not known, `stop` must be given.
        """

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        """The bytes from `offset` on, of all buffers together.

        What an interrupted download left is compared first: `LeftoverError` if it differs. Raises
        `IntegrityError` if the file ends before them, `CapacityError` if the disk is full
        (or the file may not be so large, or its owner may have no more), `FetchError` if it fails.
        """

    def hash_along(self) -> int:
        """Hash on, as far as all bytes are here; how many are hashed by now.

        For one thread beside those that write: what is left is hashed by `publish`. Nothing is
        hashed while the size is not known.
        """

    def reader(self) -> Reader:
        """A reader of what is here; whatever is not raises `InternalError`.

        Stays good when the download is published, and after. Its size must be known.
        """


@runtime_checkable
class CacheDownload(Protocol):
    """An adapter on its way into the cache. Nobody else downloads it meanwhile, if locks work.

    It is `mappable` if the entry will be.
    """

    mappable: bool

    def file(self, role: FileRole, nbytes: int | None, expected: Digest | None = None) -> CacheFile:
        """Add a file, with room for all of it where the size is known.

        What an interrupted download left of it is here already, if the size is the same. Without
        an `expected` digest our own is recorded. Raises `CapacityError` if there is no room.
        """

    def publish(self) -> CacheEntry:
        """All files are complete: check their digests and let everybody have them, at once.

        Where somebody else was faster, theirs is returned if it has the same digests. Raises
        `IntegrityError` for a digest that is not the expected one (or not theirs), and then nothing
        is left of the download; else as `write`.
        """

    def discard(self) -> None:
        """Leave nothing. Idempotent; does nothing after `publish`."""

    def close(self) -> None:
        """End it; what is here stays, and the next download of it goes on from there. Idempotent.

        No thread may write any more.
        """


class Cache(Protocol):
    """Whole adapters by key, and partial ones on their way, within a budget of bytes.

    The budget counts adapters' files; what makes room are partials that nobody downloads and
    entries that nobody holds, the first of the policy first.
    """

    def open(self, key: CacheKey, *, check: bool = False) -> CacheEntry | None:
        """The entry, which counts as a use of it; None if there is none.

        One whose files have not the recorded sizes is removed, and None. So is one whose bytes
        have not the recorded digests: they are hashed with `check`, or if a file was touched.
        """

    def try_begin(
        self, key: CacheKey, scope: str, *, alone: bool = False
    ) -> CacheEntry | CacheDownload | int:
        """Download `key` on the authority of `scope`, or have what another one downloaded.

        While somebody else downloads it: how many bytes he has. `alone` does not heed him.
        """

    def begin(self, key: CacheKey, scope: str, demand: Demand) -> CacheEntry | CacheDownload:
        """Download `key` on the authority of `scope`, or have what another one downloaded.

        Waits while somebody else downloads it and gets on. Raises `FetchError` when `demand` ends.
        """

    def note_version(self, question: str, source: str, version: str) -> None:
        """A source's latest answer to a question, whatever the cache has of it."""

    def last_version(self, question: str) -> tuple[str, str] | None:
        """Source and version that it answered last; None if nobody noted that."""

    def condemn(self, key: CacheKey) -> None:
        """Remove an entry whose bytes are wrong, even if it is held.

        Files that are open stay readable; a holder that opens another gets `IntegrityError`.
        """

    def remove(self, key: CacheKey) -> bool:
        """Remove the entry and partials of it; False if somebody holds or downloads it."""

    def used(self) -> int:
        """Bytes of adapters' files that it holds now, whole or not."""

    def close(self) -> None:
        """Entries and downloads are to be closed first; readers may stay open. Idempotent."""
