"""A disk cache in memory, for tests of servers and of this package: what it holds ends with it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from threading import RLock

from lorax_async.core.cache_names import CacheKey, FileRole
from lorax_async.core.cache_record import FileRecord, Record, record_of
from lorax_async.core.disk_budget import DiskBudget, Stored
from lorax_async.core.file_digest import Digest
from lorax_async.core.policies import Policy
from lorax_async.errors import CapacityError, FetchError, IntegrityError, InternalError, LoraxError
from lorax_async.io.cache.failures import CrowdedError
from lorax_async.io.cache.ports import contradiction
from lorax_async.io.fake_cache_files import FakeCacheFile, FakeCacheReader, digest_of
from lorax_async.io.ports import Demand, Reader

_POLL_SECONDS = 0.001


@dataclass(slots=True)
class _Whole:
    record: Record
    contents: dict[FileRole, bytearray]
    used_ns: int
    scopes: dict[str, float] = field(default_factory=dict)


class FakeCache:
    """The `Cache` of one process, without a disk: nothing is ever killed or full but by budget.

    Parameters
    ----------
    nbytes, policy
        As for a `DiskCache`.

    `fail` lets the next writes fail; `alter` damages an entry.
    """

    def __init__(self, nbytes: int, policy: Policy) -> None:
        self.lock = RLock()
        self.held: Counter[str] = Counter()
        self.open_readers = 0
        self._budget = DiskBudget(nbytes, policy)
        self._entries: dict[str, _Whole] = {}
        self._partials: dict[str, dict[FileRole, FakeCacheFile]] = {}
        self._downloading: set[str] = set()
        self._failures: list[LoraxError] = []
        self._now_ns = 0
        self._answers: dict[str, tuple[str, str]] = {}

    def fail(self, error: LoraxError, times: int = 1) -> None:
        """Raise `error` at the next `times` writes."""
        self._failures += [error] * times

    def alter(self, key: CacheKey, role: FileRole, content: bytes) -> None:
        """Let a file of an entry hold something else than was published."""
        self._entries[key.name].contents[role][:] = content

    def used(self) -> int:
        """Bytes of adapters' files that it holds now."""
        with self.lock:
            self._observe()
            return self._budget.used

    def open(self, key: CacheKey, *, check: bool = False) -> FakeEntry | None:
        with self.lock:
            whole = self._entries.get(key.name)
            if whole is None:
                return None
            if not all(_is_good(whole, file, check=check) for file in whole.record.files):
                del self._entries[key.name]
                return None
            whole.used_ns = self._tick()
            self._budget.use(key.name, Stored(whole.record.nbytes, whole.used_ns))
            self.held[key.name] += 1
            return FakeEntry(self, whole)

    def try_begin(
        self, key: CacheKey, scope: str, *, alone: bool = False
    ) -> FakeEntry | FakeDownload | int:
        with self.lock:
            entry = self.open(key)
            if entry is not None:
                return entry
            if key.name in self._downloading and not alone:
                return 0
            left = {} if key.name in self._downloading else self._partials.get(key.name, {})
            self._downloading.add(key.name)
            return FakeDownload(self, key, scope, left)

    def begin(self, key: CacheKey, scope: str, demand: Demand) -> FakeEntry | FakeDownload:
        while not demand.ended:
            begun = self.try_begin(key, scope)
            if not isinstance(begun, int):
                return begun
            demand.wait(_POLL_SECONDS)
        raise FetchError("the fetch was cancelled before it began")

    def note_version(self, question: str, source: str, version: str) -> None:
        self._answers[question] = (source, version)

    def last_version(self, question: str) -> tuple[str, str] | None:
        return self._answers.get(question)

    def condemn(self, key: CacheKey) -> None:
        with self.lock:
            self._entries.pop(key.name, None)

    def remove(self, key: CacheKey) -> bool:
        with self.lock:
            if key.name in self._downloading or self.held[key.name]:
                return False
            self._entries.pop(key.name, None)
            self._partials.pop(key.name, None)
            return True

    def close(self) -> None:
        """Nothing is open that is not somebody else's."""

    def make_room(self, nbytes: int) -> None:
        """Raises `CapacityError`; for its files."""
        self._observe()
        budget = self._budget
        held = {name for name, count in self.held.items() if count}
        if budget.fits_beside(nbytes, held | {f"{name}." for name in self._downloading}):
            for name in budget.victims():
                if budget.free >= nbytes:
                    break
                if name not in held and name.removesuffix(".") not in self._downloading:
                    budget.forget(name, evicted=True)
                    self._entries.pop(name, None)
                    self._partials.pop(name.removesuffix("."), None)
        if budget.free < nbytes:
            kind = CrowdedError if nbytes <= budget.nbytes else CapacityError
            raise kind(
                f"{nbytes:,} bytes do not fit into the cache's {budget.nbytes:,} beside what is in"
                " use; raise its budget",
                stage="fetch",
                retryable=nbytes <= budget.nbytes,
            )

    def maybe_fail(self) -> None:
        if self._failures:
            raise self._failures.pop(0).located()

    def leave(self, key: CacheKey, files: dict[FileRole, FakeCacheFile]) -> None:
        """A download of these files has ended; they stay."""
        with self.lock:
            self._downloading.discard(key.name)
            self._partials.pop(key.name, None)
            if files:
                self._partials[key.name] = files

    def hold_partial(self, key: CacheKey, files: dict[FileRole, FakeCacheFile]) -> None:
        self._partials[key.name] = files

    def published(self, key: CacheKey) -> Record | None:
        """What the entry, if there is one, says of itself."""
        with self.lock:
            whole = self._entries.get(key.name)
            return None if whole is None else whole.record

    def publish(self, key: CacheKey, scope: str, whole: _Whole) -> FakeEntry:
        with self.lock:
            self.leave(key, {})
            whole.scopes[scope] = time.monotonic()
            whole.used_ns = self._tick()
            self._entries[key.name] = whole
            self._budget.use(key.name, Stored(whole.record.nbytes, whole.used_ns))
            self.held[key.name] += 1
            return FakeEntry(self, whole)

    def _observe(self) -> None:
        entries = {
            name: Stored(whole.record.nbytes, whole.used_ns)
            for name, whole in self._entries.items()
        }
        partials = {
            f"{name}.": Stored(sum(file.room for file in files.values()), 0)
            for name, files in self._partials.items()
        }
        self._budget.observe(entries, partials)

    def _tick(self) -> int:
        self._now_ns += 1
        return self._now_ns


class FakeEntry:
    """The `CacheEntry` of a `FakeCache`."""

    mappable = False

    def __init__(self, cache: FakeCache, whole: _Whole) -> None:
        self.record = whole.record
        self._cache = cache
        self._whole = whole
        self._open = True

    def reader(self, role: FileRole) -> Reader:
        content = self._whole.contents.get(role)
        if content is None:
            raise InternalError(f"the cache's entry has no {role.file_name}")
        return FakeCacheReader(self._cache, content, len(content), lambda _start, _stop: True)

    def granted(self, scope: str) -> float | None:
        since = self._whole.scopes.get(scope)
        return None if since is None else time.monotonic() - since

    def grant(self, scope: str) -> None:
        self._whole.scopes[scope] = time.monotonic()

    def close(self) -> None:
        with self._cache.lock:
            if self._open:
                self._open = False
                self._cache.held[self.record.name] -= 1


class FakeDownload:
    """The `CacheDownload` of a `FakeCache`; `left` are the files of the one before."""

    mappable = False

    def __init__(
        self, cache: FakeCache, key: CacheKey, scope: str, left: dict[FileRole, FakeCacheFile]
    ) -> None:
        self.key = key
        self._cache = cache
        self._scope = scope
        self._left = left
        self._files: dict[FileRole, FakeCacheFile] = {}
        self._open = True
        cache.hold_partial(key, left)

    def file(
        self, role: FileRole, nbytes: int | None, expected: Digest | None = None
    ) -> FakeCacheFile:
        self._require_open()
        if role in self._files:
            raise InternalError(f"{role.file_name} was added to the download twice")
        with self._cache.lock:
            left = self._left.pop(role, None)
            file = FakeCacheFile(self._cache, role, expected)
            if left is not None and left.nbytes == nbytes:
                file.take_over(left)
            elif nbytes is not None:
                file.ends_at(nbytes)
            self._files[role] = file
            self._cache.hold_partial(self.key, self._left | self._files)
        return file

    def publish(self) -> FakeEntry:
        self._require_open()
        if not self._files:
            raise InternalError("a download without files was to be published")
        try:
            records = tuple(
                FileRecord(file.role, len(file.content), 0, file.checked_digest())
                for file in sorted(self._files.values(), key=lambda file: file.role)
            )
        except IntegrityError:
            self.discard()
            raise
        theirs = self._cache.published(self.key)
        if theirs is not None and theirs.contradicts(records):
            self.discard()
            raise contradiction()
        self._open = False
        contents = {file.role: file.content for file in self._files.values()}
        whole = _Whole(record_of(self.key, records), contents, 0)
        return self._cache.publish(self.key, self._scope, whole)

    def discard(self) -> None:
        if self._open:
            self._open = False
            self._cache.leave(self.key, {})

    def close(self) -> None:
        if self._open:
            self._open = False
            files = self._left | self._files
            kept = {role: file for role, file in files.items() if file.is_worth_keeping()}
            self._cache.leave(self.key, kept)

    def _require_open(self) -> None:
        if not self._open:
            raise InternalError("the download has ended")


def _is_good(whole: _Whole, file: FileRecord, *, check: bool) -> bool:
    content = whole.contents[file.role]
    if len(content) != file.nbytes:
        return False
    return not check or digest_of(file.digest.kind, content) == file.digest
