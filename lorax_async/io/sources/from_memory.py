"""Adapters that were given as tensors, beside another source's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import TypeVar

import torch

from lorax_async.adapter import AdapterKey, AdapterRef, TensorsKey
from lorax_async.config import Limits
from lorax_async.core.runs import Span
from lorax_async.errors import AdapterNotFoundError, FetchError
from lorax_async.io.hashing import sha256_of
from lorax_async.io.host_copies import HostCopies, HostReader
from lorax_async.io.ports import AdapterFile, Demand, Hold, Reader, Source
from lorax_async.io.snapshot import Snapshot
from lorax_async.verification import UNCHECKED, Verification

_T = TypeVar("_T")


class MemorySource:
    """A `Source` whose keys may also be `TensorsKey`s, of tensors that `take` copied.

    Parameters
    ----------
    source
        Has everything else.
    nbytes
        Budget of the copies, which are kept until they are dropped.
    limits
        What of them is accepted.
    threads
        Where tensors are copied, a few milliseconds at a time.
    """

    def __init__(self, source: Source, *, nbytes: int, limits: Limits, threads: Executor) -> None:
        self.copies = HostCopies(nbytes)
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
        claim = self.copies.claim(await self._in_thread(snapshot.measure))
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
        return AdapterFile(copy.file.config, copy.file.prefix, copy.open())

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
        """Of what is in memory, all is here already; nobody says what it should come to."""
        if not isinstance(file.reader, HostReader):
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
        """What is in memory needs no hold."""
        if not isinstance(key, TensorsKey):
            return await self._source.populate(key)
        if self.copies.get(key) is None:
            raise FetchError(_GONE, retryable=False)
        return _NoHold()

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
