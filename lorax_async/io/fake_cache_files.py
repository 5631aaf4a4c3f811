"""The files of a `FakeCache`: bytes in memory that arrive in any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from lorax_async.core.cache_names import FileRole
from lorax_async.core.file_digest import Digest, DigestKind, FileHash
from lorax_async.core.spans import Span, SpanSet
from lorax_async.errors import FetchError, IntegrityError, InternalError
from lorax_async.io.cache.ports import LeftoverError


class Holder(Protocol):
    """What files need of their cache."""

    @property
    def lock(self) -> AbstractContextManager[bool]: ...

    open_readers: int

    def make_room(self, nbytes: int) -> None: ...

    def maybe_fail(self) -> None: ...


class FakeCacheFile:
    """The `CacheFile` of a `FakeCache`."""

    def __init__(self, cache: Holder, role: FileRole, expected: Digest | None) -> None:
        self.role = role
        self.content = bytearray()
        self.nbytes: int | None = None
        self._cache = cache
        self.expected = expected
        self._kind: DigestKind = "transport" if expected is None else expected.kind
        self._here = SpanSet()
        self._left = False
        self._hash: FileHash | None = None

    @property
    def resumed(self) -> bool:
        return self._left

    @property
    def room(self) -> int:
        return len(self.content)

    def take_over(self, left: FakeCacheFile) -> None:
        self.content, self._here = left.content, SpanSet(left._here)
        self._left = self._here.nbytes > 0
        self._know(len(self.content))

    def ends_at(self, nbytes: int) -> None:
        with self._cache.lock:
            if self.nbytes not in {None, nbytes} or self._here.end > nbytes:
                raise IntegrityError(
                    f"{self.role.file_name} is said to have {nbytes:,} bytes, but has others"
                )
            if self.nbytes is None:
                self._grow(nbytes)
                self._know(nbytes)

    def missing(self, start: int = 0, stop: int | None = None) -> list[Span]:
        end = self.nbytes if stop is None else stop
        if end is None:
            raise InternalError(f"nobody knows yet where {self.role.file_name} ends")
        with self._cache.lock:
            return self._here.missing(start, end)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        content = b"".join(buffers)
        stop = offset + len(content)
        if not content:
            return
        with self._cache.lock:
            self._cache.maybe_fail()
            if self.nbytes is not None and stop > self.nbytes:
                raise IntegrityError(
                    f"{self.role.file_name} goes on after its {self.nbytes:,} bytes"
                )
            if self._left:
                self._compare(content, offset, stop)
            self._grow(stop)
            self.content[offset:stop] = content
            self._here.add(offset, stop)

    def _compare(self, content: bytes, start: int, stop: int) -> None:
        for first, last in SpanSet(self._here.missing(start, stop)).missing(start, stop):
            if self.content[first:last] != content[first - start : last - start]:
                raise LeftoverError(
                    f"what an interrupted download left of {self.role.file_name} is not what the"
                    " source has now; load it again"
                )

    def hash_along(self) -> int:
        with self._cache.lock:
            if self._hash is None:
                return 0
            stop = self._here.reach(self._hash.done)
            self._hash.feed(memoryview(bytes(self.content[self._hash.done : stop])))
            return self._hash.done

    def reader(self) -> FakeCacheReader:
        if self.nbytes is None:
            raise InternalError(f"nobody knows yet where {self.role.file_name} ends")
        return FakeCacheReader(self._cache, self.content, self.nbytes, self._here.covers)

    def checked_digest(self) -> Digest:
        """The digest of the whole; `IntegrityError` if it is not the expected one."""
        if self.nbytes is None or self.missing():
            raise InternalError(
                f"{self.role.file_name} was to be published before all of it was here"
            )
        self.hash_along()
        assert self._hash is not None
        found = self._hash.digest()
        if self.expected not in {None, found}:
            raise IntegrityError(
                f"{self.role.file_name} has not the {found.kind} digest that was promised; load it"
                " again"
            )
        return found

    def is_worth_keeping(self) -> bool:
        return self.nbytes is not None and self._here.nbytes > 0

    def _know(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._hash = FileHash(self._kind, nbytes)

    def _grow(self, to: int) -> None:
        more = to - len(self.content)
        if more > 0:
            self._cache.make_room(more)
            self.content.extend(bytes(more))


class FakeCacheReader:
    """The `Reader` of bytes in a `FakeCache`, those of [start, stop) if they are `here`."""

    def __init__(
        self, cache: Holder, content: bytearray, nbytes: int, here: Callable[[int, int], bool]
    ) -> None:
        self.nbytes = nbytes
        self._cache = cache
        self._content = content
        self._here = here
        self._open = True
        with cache.lock:
            cache.open_readers += 1

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        with self._cache.lock:
            if not self._open:
                raise FetchError("the reader was closed before it was read")
            stop = offset + sum(buffer.nbytes for buffer in buffers)
            if stop > offset and not self._here(offset, stop):
                raise InternalError(f"bytes {offset:,} to {stop:,} were read too early")
            if stop > self.nbytes:
                raise IntegrityError(f"the file ends before byte {stop:,}")
            for buffer in buffers:
                buffer.cast("B")[:] = self._content[offset : offset + buffer.nbytes]
                offset += buffer.nbytes

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        content = buffer.cast("B")
        size = content.nbytes // rows
        for n in range(rows):
            self.read_into([content[n * size : (n + 1) * size]], offset + n * pitch)

    def close(self) -> None:
        with self._cache.lock:
            if self._open:
                self._open = False
                self._cache.open_readers -= 1


def digest_of(kind: DigestKind, content: bytes | bytearray) -> Digest:
    found = FileHash(kind, len(content))
    found.feed(memoryview(content))
    return found.digest()
