"""A source of adapters in memory, which delays, fails and changes them as a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from threading import Lock
from typing import Literal

from lorax_async.adapter import AdapterKey, AdapterRef, FileIdentity
from lorax_async.core.header import header_size
from lorax_async.core.runs import Span
from lorax_async.errors import (
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
    InternalError,
    LoraxError,
)
from lorax_async.io.ports import AdapterFile, Demand, Hold, Reader
from lorax_async.verification import UNCHECKED, Verification

Step = Literal["resolve", "open", "bring", "verify", "digest", "read", "populate"]

_POLL_SECONDS = 0.001


@dataclass(slots=True)
class SourceCounts:
    """How often each method of a `FakeSource` was called, counted when the call begins."""

    resolves: int = 0
    opens: int = 0
    reopens: int = 0
    brings: int = 0
    populates: int = 0
    digests: int = 0
    bytes_read: int = 0
    open_readers: int = 0
    open_holds: int = 0


@dataclass(slots=True)
class _Failure:
    step: Step
    error: Exception
    id: str | None
    at: int
    times: int


@dataclass(slots=True)
class Version:
    """One version of an adapter; `here` lists the byte ranges [start, stop) that have arrived."""

    id: str
    key: AdapterKey
    config: bytes
    weights: bytes
    here: list[tuple[int, int]] = field(default_factory=list)

    def add(self, spans: Sequence[tuple[int, int]]) -> None:
        merged: list[tuple[int, int]] = []
        for start, stop in sorted([*self.here, *spans]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        self.here = merged

    def has(self, start: int, stop: int) -> bool:
        return start == stop or any(first <= start and stop <= last for first, last in self.here)


class _Open:
    """Call `closed` on the first `close`, so that open objects can be counted."""

    def __init__(self, closed: Callable[[], None]) -> None:
        self._closed = closed
        self._lock = Lock()
        self._open = True

    def close(self) -> None:
        with self._lock:
            was_open, self._open = self._open, False
        if was_open:
            self._closed()


class FakeReader(_Open):
    """The `Reader` of a `FakeSource`; `read` returns the bytes of [start, stop), or raises."""

    def __init__(
        self,
        version: Version,
        read: Callable[[Version, int, int], memoryview],
        closed: Callable[[], None],
    ) -> None:
        super().__init__(closed)
        self.version = version
        self._read = read

    @property
    def nbytes(self) -> int:
        return len(self.version.weights)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        if not self._open:
            raise FetchError("the reader was closed before it was read")
        stop = offset + sum(buffer.nbytes for buffer in buffers)
        content = self._read(self.version, offset, stop)
        for buffer in buffers:
            buffer.cast("B")[:] = content[: buffer.nbytes]
            content = content[buffer.nbytes :]

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        content = buffer.cast("B")
        size = content.nbytes // rows
        for n in range(rows):
            self.read_into([content[n * size : (n + 1) * size]], offset + n * pitch)


class FakeHold(_Open):
    """The `Hold` of a `FakeSource`."""

    def __init__(self, nbytes: int, locked: bool, closed: Callable[[], None]) -> None:
        super().__init__(closed)
        self.nbytes = nbytes
        self.locked = locked


class FakeSource:
    """A `Source` of adapters in memory, whose bytes arrive group by group.

    Parameters
    ----------
    pace
        Seconds that each group takes to arrive.
    holdable
        Whether `populate` keeps an adapter's bytes in memory and reports them as locked.

    A test can hold back groups (`hold`, `allow`) or the end of a load (`hold_verification`), and
    make steps fail (`fail`). Reading bytes that have not arrived raises `InternalError`. Bytes stay
    once they have arrived, as in a disk cache. Methods that are not part of `Source` return at once
    and may be called from any thread.

    Attributes
    ----------
    verifications
        What `bring` returns, by id; `UNCHECKED` by default.
    """

    def __init__(self, *, pace: float = 0.0, holdable: bool = False) -> None:
        self.pace = pace
        self.holdable = holdable
        self.counts = SourceCounts()
        self.verifications: dict[str, Verification] = {}
        self._lock = Lock()
        self._numbers = count(1)
        self._current: dict[str, Version] = {}
        self._versions: dict[AdapterKey, Version] = {}
        self._allowed: dict[str, set[int]] = {}
        self._unverified: set[str] = set()
        self._failures: list[_Failure] = []

    def put(self, id: str, config: bytes, weights: bytes) -> AdapterKey:
        """Add an adapter or a new version of it; return the key of that version."""
        number = next(self._numbers)
        files = tuple(
            FileIdentity(0, number, len(content), number, number) for content in (config, weights)
        )
        key = AdapterKey(f"memory:{id}", files)
        self._current[id] = self._versions[key] = Version(id, key, config, weights)
        return key

    def remove(self, id: str) -> None:
        """Remove an adapter; its readers fail from now on."""
        del self._current[id]

    def hold(self, id: str) -> None:
        """Hold back each group of `id` until `allow` releases it."""
        self._allowed[id] = set()

    def allow(self, id: str, *groups: int) -> None:
        """Release these groups (indices into `bring`'s argument); all if none is named."""
        if not groups:
            self._allowed.pop(id, None)
        elif id in self._allowed:
            self._allowed[id].update(groups)

    def hold_verification(self, id: str) -> None:
        """Hold back the return of `bring` for `id` until `allow_verification` releases it."""
        self._unverified.add(id)

    def allow_verification(self, id: str) -> None:
        self._unverified.discard(id)

    def fail(
        self,
        step: Step,
        error: Exception,
        *,
        id: str | None = None,
        at: int = 0,
        times: int = 1,
    ) -> None:
        """Raise `error` at the next `times` such steps, of `id` or of any adapter.

        `at` is the group that does not arrive (bring) or the byte whose reading fails (read). After
        a failure to "verify", which comes when all groups have arrived, nothing of them is here.
        """
        self._failures.append(_Failure(step, error, id, at, times))

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        self.counts.resolves += 1
        await asyncio.sleep(0)
        self._maybe_fail("resolve", ref.text)
        version = self._current.get(ref.text)
        if version is None:
            raise AdapterNotFoundError("the fake source has no such adapter; put it there first")
        return version.key

    async def open(self, key: AdapterKey, demand: Demand) -> AdapterFile:  # noqa: ARG002 - the port's
        self.counts.opens += 1
        version = await self._version(key, "open")
        size = header_size(version.weights[:8], len(version.weights))
        with self._lock:
            version.add([(0, size)])
        prefix = version.weights[:size]
        return AdapterFile(version.config, prefix, self._reader(version), self.holdable)

    def reopen(self, key: AdapterKey) -> Reader:
        self.counts.reopens += 1
        return self._reader(self._versions[key])

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[Span]],
        arrived: Callable[[int], None],
        demand: Demand,
    ) -> Verification:
        self.counts.brings += 1
        reader = file.reader
        if not isinstance(reader, FakeReader):
            raise InternalError(f"a fake source cannot bring the bytes of a {type(reader)}")
        version = reader.version
        for group, spans in enumerate(groups):
            await self._group(version, group, demand)
            with self._lock:
                version.add([each for span in spans for each in span.ranges()])
            arrived(group)
        await self._verify(version, demand)
        return self.verifications.get(version.id, UNCHECKED)

    async def digest(self, key: AdapterKey) -> str:
        self.counts.digests += 1
        version = await self._version(key, "digest")
        return sha256(version.weights).hexdigest()

    async def populate(self, key: AdapterKey) -> Hold:
        self.counts.populates += 1
        version = await self._version(key, "populate")
        self._count(holds=1)
        nbytes = len(version.weights) if self.holdable else 0
        return FakeHold(nbytes, self.holdable, lambda: self._count(holds=-1))

    def _reader(self, version: Version) -> FakeReader:
        self._count(readers=1)
        return FakeReader(version, self._read, lambda: self._count(readers=-1))

    def _count(self, *, readers: int = 0, holds: int = 0) -> None:
        with self._lock:
            self.counts.open_readers += readers
            self.counts.open_holds += holds

    def _read(self, version: Version, start: int, stop: int) -> memoryview:
        self._maybe_fail("read", version.id, start, stop)
        self._require_current(version)
        if stop > len(version.weights):
            raise IntegrityError(f"the adapter ends before byte {stop:,}")
        with self._lock:
            if not version.has(start, stop):
                raise InternalError(f"bytes {start:,} to {stop:,} were read before they arrived")
            self.counts.bytes_read += stop - start
        return memoryview(version.weights)[start:stop]

    async def _group(self, version: Version, group: int, demand: Demand) -> None:
        """Wait until a group is due."""
        due = asyncio.get_running_loop().time() + self.pace
        while True:
            if demand.ended:
                raise FetchError("nobody waits for the adapter any more")
            left = due - asyncio.get_running_loop().time()
            if left <= 0 and group in self._allowed.get(version.id, (group,)):
                break
            await asyncio.sleep(max(_POLL_SECONDS, min(left, 10 * _POLL_SECONDS)))
        self._maybe_fail("bring", version.id, group, group + 1)
        self._require_current(version)

    async def _verify(self, version: Version, demand: Demand) -> None:
        while version.id in self._unverified:
            if demand.ended:
                raise FetchError("nobody waits for the adapter any more")
            await asyncio.sleep(_POLL_SECONDS)
        try:
            self._maybe_fail("verify", version.id)
        except Exception:
            with self._lock:
                version.here.clear()
            raise

    async def _version(self, key: AdapterKey, step: Step) -> Version:
        await asyncio.sleep(0)
        id = key.location.removeprefix("memory:")
        self._maybe_fail(step, id)
        version = self._current.get(id)
        if version is None or version.key != key:
            raise _changed()
        return version

    def _require_current(self, version: Version) -> None:
        if self._current.get(version.id) is not version:
            raise _changed()

    def _maybe_fail(self, step: Step, id: str, start: int = 0, stop: int = 1) -> None:
        with self._lock:
            for failure in self._failures:
                if (failure.step, failure.id or id) == (step, id) and start <= failure.at < stop:
                    failure.times -= 1
                    if failure.times == 0:
                        self._failures.remove(failure)
                    raise _fresh(failure.error)


def _changed() -> IntegrityError:
    return IntegrityError("the adapter was changed meanwhile; load it again")


def _fresh(error: Exception) -> Exception:
    """Copy a `LoraxError`, because a raised error collects frames."""
    return error.located() if isinstance(error, LoraxError) else error
