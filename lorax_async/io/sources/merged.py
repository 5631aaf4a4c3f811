"""Merges of another source's adapters, as adapters of their own."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import CancelledError, Executor
from functools import partial
from typing import Any, TypeVar

from lorax_async.adapter import AdapterKey, AdapterRef, MergedKey
from lorax_async.config import Limits
from lorax_async.core.layout import ModelLayout
from lorax_async.core.merge_plan import MergePlan, PartFile, part_words, plan_merge
from lorax_async.core.runs import Span
from lorax_async.errors import AdapterError, EvictedError, FetchError, LoraxError, UsageError
from lorax_async.io.ports import AdapterFile, Demand, Hold, Reader, Source
from lorax_async.io.sources.merged_reader import MergedReader, Opened
from lorax_async.verification import Verification, weakest

_T = TypeVar("_T")

MAX_LAYOUTS = 16_384
"""As many as the lifecycle remembers idle adapters."""


class MergedSource:
    """A `Source` whose keys may also be `MergedKey`s over keys of another source.

    A merge is not kept anywhere: it is computed group by group where its bytes are read, the first
    time and whenever it comes back to the device, and the same bytes come out.

    Parameters
    ----------
    source
        Has the parts; everything that is no merge is its business alone.
    layout
        The base's modules, in whose order random numbers are drawn.
    dtype
        "F32", "F16" or "BF16": what a merge is stored as on the device.
    limits
        What of a part, and of a merge, is accepted.
    threads
        Where merges are planned.
    """

    def __init__(
        self, source: Source, layout: ModelLayout, *, dtype: str, limits: Limits, threads: Executor
    ) -> None:
        self._source = source
        self._layout = layout
        self._dtype = dtype
        self._limits = limits
        self._threads = threads
        self._layouts: OrderedDict[MergedKey, bytes] = OrderedDict()
        """Digests of the headers by which the last merges are read when they come back."""

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        return await self._source.resolve(ref)

    async def open(self, key: AdapterKey, demand: Demand) -> AdapterFile:
        if not isinstance(key, MergedKey):
            return await self._source.open(key, demand)
        opened = await self._open(key, demand)
        plan = opened.plan
        self._remember(key, plan)

        async def refuse(error: LoraxError, *, weights: bool) -> bool:
            return not weights and await _refused(opened.files, error)

        return AdapterFile(plan.config, plan.prefix, MergedReader(key, opened), refuse=refuse)

    def reopen(self, key: AdapterKey) -> Reader:
        if not isinstance(key, MergedKey):
            return self._source.reopen(key)
        loop = asyncio.get_running_loop()
        return MergedReader(key, None, partial(self._open_from_thread, key, loop))

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[Span]],
        arrived: Callable[[int], None],
        demand: Demand,
    ) -> Verification:
        """A group is here when every part's bytes of it are."""
        reader = file.reader
        if not isinstance(reader, MergedReader):
            return await self._source.bring(file, groups, arrived, demand)
        assert reader.opened is not None
        return await self._bring(reader.key, reader.opened, groups, arrived, demand)

    async def digest(self, key: AdapterKey) -> str:
        """Of a part. A merge is in no file: `UsageError`."""
        if isinstance(key, MergedKey):
            raise UsageError(
                "a merge has no digest; its parts have theirs, as AdapterRef(digest=…)"
            )
        return await self._source.digest(key)

    async def populate(self, key: AdapterKey) -> Hold:
        """Of a merge the parts are read ahead, and nothing is held."""
        if not isinstance(key, MergedKey):
            return await self._source.populate(key)
        for number, part in enumerate(_part_keys(key)):
            hold = await _of_part(key, number, self._source.populate(part))
            await asyncio.wrap_future(self._threads.submit(hold.close))
        return _NothingHeld()

    async def _open(self, key: MergedKey, demand: Demand) -> Opened:
        """Open the parts and plan the merge; parts that were refused and outdated, once more."""
        files = await self._open_parts(key, demand)
        try:
            return Opened(await self._planned(key, files), tuple(files))
        except AdapterError as error:
            if not await _refused(files, error):
                raise
        files = await self._open_parts(key, demand)
        try:
            return Opened(await self._planned(key, files), tuple(files))
        except AdapterError as error:
            await _refused(files, error)
            raise

    async def _open_parts(self, key: MergedKey, demand: Demand) -> list[AdapterFile]:
        openings = [
            _of_part(key, number, self._source.open(part, demand))
            for number, part in enumerate(_part_keys(key))
        ]
        return await _all(openings, lambda file: file.reader.close())

    async def _planned(self, key: MergedKey, files: Sequence[AdapterFile]) -> MergePlan:
        """On an error other than an `AdapterError` the files are closed."""
        try:
            parts = [PartFile(file.config, file.prefix, file.reader.nbytes) for file in files]
            plan = partial(
                plan_merge, key, parts, self._layout, dtype=self._dtype, limits=self._limits
            )
            return await asyncio.get_running_loop().run_in_executor(self._threads, plan)
        except AdapterError:
            raise
        except BaseException:
            for file in files:
                file.reader.close()
            raise

    def _remember(self, key: MergedKey, plan: MergePlan) -> None:
        self._layouts[key] = _layout_of(plan)
        self._layouts.move_to_end(key)
        if len(self._layouts) > MAX_LAYOUTS:
            self._layouts.popitem(last=False)

    async def _bring(
        self,
        key: MergedKey,
        opened: Opened,
        groups: Sequence[Sequence[Span]],
        arrived: Callable[[int], None],
        demand: Demand,
    ) -> Verification:
        parts = range(len(opened.files))
        needed = [[opened.plan.spans(part, group) for group in groups] for part in parts]
        left = [sum(bool(spans[group]) for spans in needed) for group in range(len(groups))]

        def count(group: int) -> None:
            left[group] -= 1
            if not left[group]:
                arrived(group)

        brought = await _all(
            [
                _of_part(
                    key, part, self._bring_part(opened.files[part], needed[part], count, demand)
                )
                for part in parts
            ],
            lambda _: None,
        )
        return weakest(brought)

    async def _bring_part(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[Span]],
        arrived: Callable[[int], None],
        demand: Demand,
    ) -> Verification:
        """As `bring`, with groups in which the part has nothing; tells of all the others."""
        numbers = [number for number, spans in enumerate(groups) if spans]
        told: set[int] = set()

        def tell(n: int) -> None:
            told.add(n)
            arrived(numbers[n])

        wanted = [groups[number] for number in numbers]
        verification = await self._source.bring(file, wanted, tell, demand)
        for n in range(len(numbers)):
            if n not in told:
                tell(n)
        return verification

    def _open_from_thread(self, key: MergedKey, loop: asyncio.AbstractEventLoop) -> Opened:
        """The parts once more, with whatever of them is no longer here. Blocks."""
        try:
            return asyncio.run_coroutine_threadsafe(self._reopen(key), loop).result()
        except CancelledError:
            raise FetchError("the loader was closed") from None

    async def _reopen(self, key: MergedKey) -> Opened:
        demand = Demand()
        opened = await self._open(key, demand)
        plan = opened.plan
        try:
            if self._layouts.get(key, _layout_of(plan)) != _layout_of(plan):
                raise EvictedError("a part of the merge is another by now; load it again")
            whole = [[Span(len(plan.prefix), plan.nbytes)]]
            await self._bring(key, opened, whole, lambda _: None, demand)
        except BaseException:
            opened.close()
            raise
        return opened


def _layout_of(plan: MergePlan) -> bytes:
    return hashlib.sha256(plan.prefix).digest()


async def _refused(files: Iterable[AdapterFile], error: LoraxError) -> bool:
    """Refuse the parts of a merge; whether one of them may be another now. It closes them all."""
    remaining = list(files)
    outdated = False
    try:
        while remaining:
            outdated = await remaining.pop(0).refused(error) or outdated
    finally:
        for file in remaining:
            file.reader.close()
    return outdated


class _NothingHeld:
    nbytes = 0
    locked = False

    def close(self) -> None:
        """There is nothing to let go."""


def _part_keys(key: MergedKey) -> Iterable[AdapterKey]:
    return (part for part in key.merge.parts if isinstance(part, AdapterKey))


async def _of_part(key: MergedKey, number: int, work: Coroutine[Any, Any, _T]) -> _T:
    try:
        return await work
    except LoraxError as error:
        raise error.prefixed(part_words(key, number)) from error.__cause__


async def _all(works: Sequence[Coroutine[Any, Any, _T]], undo: Callable[[_T], None]) -> list[_T]:
    """Side by side. On an error or a cancellation the others are ended, what they gave undone."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
            task.add_done_callback(partial(_undo, undo))
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _undo(undo: Callable[[_T], None], task: asyncio.Task[_T]) -> None:
    if not task.cancelled() and task.exception() is None:
        undo(task.result())
