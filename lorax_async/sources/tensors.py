"""The source of adapters in host memory: tensors passed by the program, and merges."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future

import torch

from lorax_async.concurrency import FetchControl
from lorax_async.config import Limits
from lorax_async.errors import AdapterNotFoundError, EvictedError, FetchError, UsageError
from lorax_async.files import Reader, sha256_of
from lorax_async.formats.spans import ByteSpan
from lorax_async.planning.layout import ModelLayout
from lorax_async.sources.base import AdapterFile, PinnedPages, Source
from lorax_async.sources.host_copies import CopyReader, HostCopies, HostCopy, TensorSnapshot
from lorax_async.sources.merges import Merger
from lorax_async.types import AdapterKey, AdapterRef, MergedKey, TensorsKey, Verification

_GONE = "its tensors were dropped; pass them again to load_tensors"


class MemorySource:
    """The `Source` of `TensorsKey`s and `MergedKey`s; passes other keys on to `source`.

    Tensors stay from `take` until they are dropped. A merge is computed when it is opened, and
    stays in memory until other copies need the room.

    Parameters
    ----------
    copies
        The copies in memory, within their budget.
    layout, dtype
        The base's modules, in whose order merges draw random numbers; and the dtype of merges:
        "F32", "F16" or "BF16".
    limits
        Limits of tensors and merges.
    threads
        Copy tensors, some milliseconds at a time, and plan merges.
    """

    def __init__(
        self,
        source: Source,
        copies: HostCopies,
        layout: ModelLayout,
        *,
        dtype: str,
        limits: Limits,
        threads: Executor,
    ) -> None:
        self.copies = copies
        self._source = source
        self._limits = limits
        self._threads = threads
        self._merger = Merger(self, copies, layout, dtype=dtype, limits=limits, threads=threads)

    async def take(
        self, tensors: Mapping[str, torch.Tensor], config: bytes, check_open: Callable[[], None]
    ) -> AdapterKey:
        """Copy tensors as they are now and keep the copy, unless there is one with equal content.

        `check_open` raises once the loader is closing. Raise as `TensorSnapshot` does, and
        `CapacityError` if the budget has no room. Nothing is left on an error or a cancellation.
        """
        snapshot, loop = TensorSnapshot(tensors, config, self._limits), asyncio.get_running_loop()
        nbytes = await loop.run_in_executor(self._threads, snapshot.measure)
        room = await self.copies.reserve(nbytes, check_open)
        running: Future[bool] | None = None
        try:
            more = True
            while more:
                check_open()
                running = self._threads.submit(snapshot.step)
                more = await asyncio.wrap_future(running)
        except BaseException:
            if running is None:
                room.end()
            else:  # a thread that still copies uses the memory
                running.add_done_callback(lambda _: room.end())
            raise
        header = len(snapshot.prefix)
        copy = HostCopy(snapshot.key, config, header, snapshot.content, room)
        return self.copies.put(copy).key

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        return await self._source.resolve(ref)

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:
        if not isinstance(key, TensorsKey | MergedKey):
            return await self._source.open(key, control)
        copy = self.copies.get(key)
        if isinstance(key, MergedKey):
            copy = copy or await self._merger.merge(key, control)
        elif copy is None:
            raise AdapterNotFoundError(_GONE, stage="fetch")
        reader, loop = copy.open(), asyncio.get_running_loop()
        try:
            prefix = await loop.run_in_executor(self._threads, reader.prefix)
        except BaseException:
            reader.close()
            raise
        return AdapterFile(copy.config, prefix, reader)

    def reopen(self, key: AdapterKey) -> Reader:
        if not isinstance(key, TensorsKey | MergedKey):
            return self._source.reopen(key)
        copy = self.copies.get(key)
        return _Missing(key) if copy is None else copy.open()

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[ByteSpan]],
        arrived: Callable[[int], None],
        control: FetchControl,
    ) -> Verification:
        """Return at once for an adapter in memory."""
        if not isinstance(file.reader, CopyReader):
            return await self._source.bring(file, groups, arrived, control)
        if control.cancelled:
            raise FetchError("no caller waits for the adapter any more")
        return file.reader.copy.verification

    async def digest(self, key: AdapterKey) -> str:
        """Return the sha256 of the file made of tensors. Raise `UsageError` for a merge."""
        if isinstance(key, MergedKey):
            raise UsageError(
                "a merge has no digest; its parts have theirs, as AdapterRef(digest=…)"
            )
        if not isinstance(key, TensorsKey):
            return await self._source.digest(key)
        reader = self._known(key).open()
        try:
            return await sha256_of(reader, self._threads)
        finally:
            reader.close()

    async def populate(self, key: AdapterKey) -> PinnedPages:
        """Read a spilled file ahead; bytes in memory need no hold."""
        if not isinstance(key, TensorsKey | MergedKey):
            return await self._source.populate(key)
        reader, loop = self._known(key).open(), asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, reader.read_ahead)
        finally:
            reader.close()
        return _NoPages()

    def close(self) -> None:
        """End threads and remove spill files. Drop all copies before. Blocks."""
        self._merger.close()
        self.copies.close()

    def _known(self, key: AdapterKey) -> HostCopy:
        copy = self.copies.get(key)
        if copy is None:
            raise _missing(key)
        return copy


class _Missing:
    """The `Reader` of a copy that was dropped."""

    def __init__(self, key: AdapterKey) -> None:
        self._key = key

    @property
    def nbytes(self) -> int:
        raise _missing(self._key)

    def read_into(self, _: Sequence[memoryview], __: int) -> None:
        raise _missing(self._key)

    def read_rows(self, _: memoryview, __: int, ___: int, ____: int) -> None:
        raise _missing(self._key)

    def close(self) -> None:
        """Nothing is open."""


def _missing(key: AdapterKey) -> FetchError:
    if isinstance(key, MergedKey):
        return EvictedError("the merge made room in memory; load it again")
    return FetchError(_GONE, retryable=False)


class _NoPages:
    nbytes = 0
    locked = False

    def close(self) -> None:
        """Nothing is held."""
