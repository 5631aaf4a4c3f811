"""Adapters that were given as tensors, beside another source's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import TypeVar

import torch

from lorax_async.adapter import AdapterKey, AdapterRef, TensorsKey
from lorax_async.config import Limits
from lorax_async.core.runs import Span
from lorax_async.errors import AdapterNotFoundError, FetchError
from lorax_async.io.cache.ports import Cache
from lorax_async.io.hashing import sha256_of
from lorax_async.io.host_copies import Claim, HostCopies, HostReader
from lorax_async.io.ports import AdapterFile, Demand, Hold, Reader, Source
from lorax_async.io.snapshot import Snapshot
from lorax_async.io.spilled import SpilledReader
from lorax_async.io.spilling import Spilling
from lorax_async.verification import UNCHECKED, Verification

_T = TypeVar("_T")


class MemorySource:
    """A `Source` whose keys may also be `TensorsKey`s, of tensors that `take` copied.

    Parameters
    ----------
    source
        Has everything else.
    nbytes
        Budget of the copies in memory. They are kept until they are dropped.
    limits
        What of them is accepted.
    threads
        Where tensors are copied, a few milliseconds at a time.
    cache
        Gives the disk cache (it blocks) where copies go on for which memory has no room; None
        leaves them in memory.
    """

    def __init__(
        self,
        source: Source,
        *,
        nbytes: int,
        limits: Limits,
        threads: Executor,
        cache: Callable[[], Cache] | None = None,
    ) -> None:
        self.copies = HostCopies(nbytes)
        self._spilling = None if cache is None else Spilling(self.copies, cache)
        self._source = source
        self._limits = limits
        self._threads = threads

    async def take(
        self,
        tensors: Mapping[str, torch.Tensor],
        config: bytes,
        check_open: Callable[[], None],
    ) -> AdapterKey:
        """Copy tensors as they are now, and keep the copy; content that is here joins it.

        `check_open` raises once nothing may begin. Raises what `Snapshot` does, and
        `CapacityError` if the budget has no room. Nothing is left on an error or a cancellation.
        """
        snapshot = Snapshot(tensors, config, self._limits)
        claim = await self._claim(await self._in_thread(snapshot.measure), check_open)
        running: Future[bool] | None = None
        try:
            more = True
            while more:
                check_open()
                running = self._threads.submit(snapshot.step)
                more = await asyncio.wrap_future(running)
        except BaseException:
            if running is None:
                claim.end()
            else:  # a thread that still copies has its memory
                running.add_done_callback(lambda _: claim.end())
            raise
        return self.copies.put(snapshot.file(), claim)

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        return await self._source.resolve(ref)

    async def open(self, key: AdapterKey, demand: Demand) -> AdapterFile:
        if not isinstance(key, TensorsKey):
            return await self._source.open(key, demand)
        copy = self.copies.get(key)
        if copy is None:
            raise AdapterNotFoundError(_GONE, stage="fetch")
        reader = copy.open()
        if isinstance(reader, SpilledReader):
            return await self._opened(reader)
        assert isinstance(reader, HostReader)
        return AdapterFile(reader.config, reader.prefix, reader)

    def reopen(self, key: AdapterKey) -> Reader:
        if not isinstance(key, TensorsKey):
            return self._source.reopen(key)
        copy = self.copies.get(key)
        return _Nothing() if copy is None else copy.open()

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[Span]],
        arrived: Callable[[int], None],
        demand: Demand,
    ) -> Verification:
        """Of what was given, all is here already; nobody says what it should come to."""
        if not isinstance(file.reader, HostReader | SpilledReader):
            return await self._source.bring(file, groups, arrived, demand)
        if demand.ended:
            raise FetchError("nobody waits for the adapter any more")
        return UNCHECKED

    async def digest(self, key: AdapterKey) -> str:
        """Of tensors, that of the file which they became."""
        if not isinstance(key, TensorsKey):
            return await self._source.digest(key)
        copy = self.copies.get(key)
        if copy is None:
            raise FetchError(_GONE, retryable=False)
        reader = copy.open()
        try:
            return await sha256_of(reader, self._threads)
        finally:
            reader.close()

    async def populate(self, key: AdapterKey) -> Hold:
        """What is in memory needs no hold; what is on disk is read ahead."""
        if not isinstance(key, TensorsKey):
            return await self._source.populate(key)
        copy = self.copies.get(key)
        if copy is None:
            raise FetchError(_GONE, retryable=False)
        reader = copy.open()
        try:
            if isinstance(reader, SpilledReader):
                await self._in_thread(reader.read_ahead)
        finally:
            reader.close()
        return _NoHold()

    @property
    def spills(self) -> int:
        """Copies that went to disk so far."""
        return 0 if self._spilling is None else self._spilling.count

    def close(self) -> None:
        """Leave nothing in the disk cache. Copies are to be dropped, and readers closed. Blocks."""
        if self._spilling is not None:
            self._spilling.close()

    async def _claim(self, nbytes: int, check_open: Callable[[], None]) -> Claim:
        if self._spilling is None:
            return self.copies.claim(nbytes)
        return await self._spilling.claim(nbytes, check_open)

    async def _opened(self, reader: SpilledReader) -> AdapterFile:
        try:
            config, prefix = await self._in_thread(partial(reader.head, self._limits))
        except BaseException:
            reader.close()
            raise
        return AdapterFile(config, prefix, reader)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


_GONE = "its tensors were let go; give them again with load_tensors"


class _Nothing:
    """The `Reader` of what is gone."""

    nbytes = 0

    def read_into(self, _: Sequence[memoryview], __: int) -> None:
        raise FetchError(_GONE, retryable=False)

    def read_rows(self, _: memoryview, __: int, ___: int, ____: int) -> None:
        raise FetchError(_GONE, retryable=False)

    def close(self) -> None:
        """There is nothing to let go."""


class _NoHold:
    nbytes = 0
    locked = False

    def close(self) -> None:
        """There is nothing to let go."""
