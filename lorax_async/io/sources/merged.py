"""Merges of a source's adapters, computed into host memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch

from lorax_async.adapter import AdapterKey, MergedKey
from lorax_async.config import Limits
from lorax_async.core.layout import ModelLayout
from lorax_async.core.merge_plan import (
    MergePlan,
    PartFile,
    Piece,
    part_words,
    plan_merge,
)
from lorax_async.core.runs import Span
from lorax_async.errors import AdapterError, FetchError, LoraxError
from lorax_async.io.host_copies import HostCopies, HostCopy, Reservation
from lorax_async.io.merging import combine, concatenate, seeded
from lorax_async.io.ports import AdapterFile, Demand, Source
from lorax_async.io.remote.workers import ended, outcome
from lorax_async.io.snapshot import host_memory
from lorax_async.io.staging import TORCH_DTYPES, Buffer
from lorax_async.verification import Verification, weakest

_T = TypeVar("_T")


class Merger:
    """Opens the parts of a merge, and computes it in a thread of its own, one merge at a time.

    Parameters
    ----------
    source
        Has the parts.
    copies
        Where room is reserved and the result kept.
    layout, dtype, limits, threads
        As for `MemorySource`.
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
        self._source = source
        self._copies = copies
        self._layout = layout
        self._dtype = dtype
        self._limits = limits
        self._planning = threads
        self._computing = ThreadPoolExecutor(1, "lorax-merge")

    async def merge(self, key: MergedKey, demand: Demand) -> HostCopy:
        """Compute a merge and keep it. Raises what a load of a part does, naming the part."""
        plan, files = await self._planned(key, demand)
        room: Reservation | None = None
        try:
            room = await self._reserve(plan.nbytes, demand)
            verification = await self._bring(key, files, demand)
            content = await self._computed(key, plan, files, demand)
            head = plan.config, len(plan.prefix)
            copy = HostCopy(key, *head, content, room, verification)
            room = None
        finally:
            _close(files)
            if room is not None:
                room.end()
        return self._copies.put(copy)

    def close(self) -> None:
        """Blocks. Tasks are to be ended before."""
        self._computing.shutdown()

    async def _planned(
        self, key: MergedKey, demand: Demand
    ) -> tuple[MergePlan, Sequence[AdapterFile]]:
        """Open and plan; parts that were refused and outdated are opened once more."""
        loop, outdated = asyncio.get_running_loop(), False
        while True:
            files = await self._open_parts(key, demand)
            parts = [PartFile(file.config, file.prefix, file.reader.nbytes) for file in files]
            plan = partial(
                plan_merge, key, parts, self._layout, dtype=self._dtype, limits=self._limits
            )
            try:
                return await loop.run_in_executor(self._planning, plan), files
            except AdapterError as error:
                if not await _refused(files, error) or outdated:
                    raise
                outdated = True
            except BaseException:
                _close(files)
                raise

    async def _open_parts(self, key: MergedKey, demand: Demand) -> Sequence[AdapterFile]:
        return await _all(
            [
                _of_part(key, number, self._source.open(part, demand))
                for number, part in enumerate(key.merge.parts)
                if isinstance(part, AdapterKey)
            ],
            lambda file: file.reader.close(),
        )

    async def _reserve(self, nbytes: int, demand: Demand) -> Reservation:
        """Wait for room for as long as the merge is wanted."""
        reserving = asyncio.ensure_future(self._copies.reserve(nbytes, lambda: None))

        def look() -> None:
            if demand.ended:
                reserving.cancel()

        try:
            with demand.watched(look):
                await asyncio.wait([reserving])
        except asyncio.CancelledError:
            reserving.cancel()
            reserving.add_done_callback(partial(_undo, Reservation.end))
            raise
        if reserving.cancelled():
            raise FetchError("nobody waits for the merge any more")
        return reserving.result()

    async def _bring(
        self, key: MergedKey, files: Sequence[AdapterFile], demand: Demand
    ) -> Verification:
        bringing = []
        for number, file in enumerate(files):
            whole = [[Span(len(file.prefix), file.reader.nbytes)]]
            work = self._source.bring(file, whole, lambda _: None, demand)
            bringing.append(_of_part(key, number, work))
        return weakest(await _all(bringing, lambda _: None))

    async def _computed(
        self, key: MergedKey, plan: MergePlan, files: Sequence[AdapterFile], demand: Demand
    ) -> torch.Tensor:
        future = self._computing.submit(compute, key, plan, files, demand)
        try:
            return await outcome(future)
        except asyncio.CancelledError:
            demand.end()
            await ended(future)
            raise


def compute(
    key: MergedKey, plan: MergePlan, files: Sequence[AdapterFile], demand: Demand
) -> torch.Tensor:
    """Return the merged file, uint8 `[nbytes]`. Blocks; `FetchError` once `demand` ends."""
    merge, dtype = key.merge, TORCH_DTYPES[plan.dtype]
    content = host_memory(plan.nbytes, plan.prefix)
    generator = seeded(merge, plan.new_layers)
    for tensor in plan.tensors:
        if demand.ended:
            raise FetchError("nobody waits for the merge any more")
        out = content[tensor.start : tensor.stop].view(dtype).view(tensor.shape)
        if tensor.is_padded(merge):
            out.zero_()
        tensors = [_read(key, files, piece) for piece in tensor.pieces]
        factors = [(piece.weight, piece.scale) for piece in tensor.pieces]
        if merge.strategy == "linear":
            concatenate(out, tensor.factor, tensors, factors)
        else:
            combined = combine(merge, tensor.factor, tensors, factors, generator)
            rows, columns = combined.shape
            out[:rows, :columns].copy_(combined)
    return content


def _read(key: MergedKey, files: Sequence[AdapterFile], piece: Piece) -> torch.Tensor:
    span = piece.span
    content = torch.empty(span.stop - span.start, dtype=torch.uint8)
    try:
        files[piece.part].reader.read_into([Buffer.of(content).memory], span.start)
    except LoraxError as error:
        raise error.prefixed(part_words(key, piece.part)) from error.__cause__
    return content.view(TORCH_DTYPES[span.dtype]).view(span.shape)


async def _refused(files: Iterable[AdapterFile], error: LoraxError) -> bool:
    """Refuse and close the parts; return whether one of them may be another now."""
    remaining = list(files)
    outdated = False
    try:
        while remaining:
            outdated = await remaining.pop(0).refused(error) or outdated
    finally:
        _close(remaining)
    return outdated


def _close(files: Iterable[AdapterFile]) -> None:
    for file in files:
        file.reader.close()


async def _of_part(key: MergedKey, number: int, work: Coroutine[Any, Any, _T]) -> _T:
    try:
        return await work
    except LoraxError as error:
        raise error.prefixed(part_words(key, number)) from error.__cause__


async def _all(works: Sequence[Coroutine[Any, Any, _T]], undo: Callable[[_T], None]) -> list[_T]:
    """Await side by side. On an error or a cancellation end the others and undo their results."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
            task.add_done_callback(partial(_undo, undo))
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _undo(undo: Callable[[_T], None], task: asyncio.Future[_T]) -> None:
    if not task.cancelled() and task.exception() is None:
        undo(task.result())
