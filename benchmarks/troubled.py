"""Local adapters of which some never arrive and some cannot be read to their end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from lorax_async.concurrency import FetchControl
from lorax_async.errors import FetchError
from lorax_async.files import Reader
from lorax_async.formats.spans import ByteSpan
from lorax_async.sources.base import AdapterFile, Source
from lorax_async.types import AdapterKey, AdapterRef, Verification

_POLL_SECONDS = 0.01


class FailingReader:
    """Reads what lies before the middle of the file, as from a disk with a bad block."""

    def __init__(self, inner: Reader) -> None:
        self._inner = inner
        self.nbytes = inner.nbytes

    def read_into(
        self, buffers: Sequence[memoryview], offset: int, rows: int = 1, pitch: int = 0
    ) -> None:
        if offset + (rows - 1) * pitch >= self.nbytes // 2:
            raise FetchError("the disk was told to fail")
        self._inner.read_into(buffers, offset, rows, pitch)

    def close(self) -> None:
        self._inner.close()


class TroubledSource:
    """As `inner`, but for the adapters in the folders `stalled` and `failing`."""

    def __init__(self, inner: Source, *, stalled: Path, failing: Path) -> None:
        self._inner = inner
        self._stalled = str(stalled.resolve())
        self._failing = str(failing.resolve())
        self._stalling: set[int] = set()

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        return await self._inner.resolve(ref)

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:
        file = await self._inner.open(key, control)
        if key.location == self._stalled:
            self._stalling.add(id(file.reader))
        if key.location == self._failing:
            return AdapterFile(file.config, file.prefix, FailingReader(file.reader))
        return file

    def reopen(self, key: AdapterKey) -> Reader:
        reader = self._inner.reopen(key)
        return FailingReader(reader) if key.location == self._failing else reader

    async def fetch_groups(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[ByteSpan]],
        arrived: Callable[[int], None],
        control: FetchControl,
    ) -> Verification:
        if id(file.reader) in self._stalling:
            while not control.cancelled:  # noqa: ASYNC110 - it is a threading.Event
                await asyncio.sleep(_POLL_SECONDS)
            self._stalling.discard(id(file.reader))
        return await self._inner.fetch_groups(file, groups, arrived, control)

    async def digest(self, key: AdapterKey) -> str:
        return await self._inner.digest(key)
