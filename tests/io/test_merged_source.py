"""Merges as a source has them: a file that is computed, of parts that belong to another source."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import pairwise
from threading import Barrier

import pytest
import safetensors.torch
from source_inputs import CONFIG, read, read_rows, rows_of

import tiny
from common import until
from lorax_async import Merge
from lorax_async.adapter import AdapterKey, MergedKey
from lorax_async.config import Limits
from lorax_async.core.merge_plan import MergedTensor
from lorax_async.core.runs import Span
from lorax_async.errors import (
    FetchError,
    IntegrityError,
    UsageError,
)
from lorax_async.io.ports import AdapterFile, Demand
from lorax_async.io.sources.merged import MergedSource
from lorax_async.io.sources.merged_reader import MergedReader
from lorax_async.testing import FakeSource


class MergedWorld:
    """A fake source of three adapters, and merges over it."""

    def __init__(self, threads: ThreadPoolExecutor, inner: FakeSource) -> None:
        self.inner, config = inner, json.dumps(tiny.config()).encode()
        self.source = MergedSource(
            inner, tiny.layout(), dtype="F32", limits=Limits(), threads=threads
        )
        self.keys = [
            inner.put(name, config, safetensors.torch.save(tiny.tensors(seed)))
            for seed, name in enumerate("abc")
        ]

    def key(self, merge: Merge) -> MergedKey:
        return MergedKey.of(merge, self.keys)


LINEAR = Merge("linear", ["a", "b", "c"], [1, -0.5, 0.25])

DRAWN = Merge("dare_linear", ["a", "b", "c"], [1, -0.5, 0.25], density=0.3, seed=4)

BOTH = [pytest.param(merge, id=merge.strategy) for merge in (LINEAR, DRAWN)]


@pytest.fixture
def world() -> Iterator[MergedWorld]:
    inner = FakeSource(holdable=True)
    with ThreadPoolExecutor(2) as threads:
        yield MergedWorld(threads, inner)
    assert (inner.counts.open_readers, inner.counts.open_holds) == (0, 0)


async def whole(world: MergedWorld, key: MergedKey) -> bytes:
    """The merged file, brought and read in one piece."""
    file = await world.source.open(key, Demand())
    with closing(file.reader) as reader:
        await world.source.bring(file, [[Span(0, reader.nbytes)]], lambda _: None, Demand())
        return await asyncio.to_thread(read, reader, 0, reader.nbytes)


@pytest.mark.parametrize("merge", BOTH)
@pytest.mark.parametrize("reopened", [False, True])
async def test_scattered_reads_give_the_file(
    world: MergedWorld, merge: Merge, reopened: bool
) -> None:
    """In any order, cut anywhere, and in several threads at once."""
    key = world.key(merge)
    content = await whole(world, key)
    file = await world.source.open(key, Demand())
    assert content.startswith(file.prefix)
    await world.source.bring(file, [[Span(0, len(content))]], lambda _: None, Demand())
    reader = world.source.reopen(key) if reopened else file.reader
    result = memoryview(bytearray(len(content)))
    cuts = [0, 0, 5, *range(len(file.prefix) - 3, len(content), 1000), len(content)]
    pieces = list(pairwise(cuts))
    together = Barrier(3)

    def work(mine: list[tuple[int, int]]) -> None:
        together.wait(20)
        for start, stop in mine:
            middle = (start + stop) // 2
            reader.read_into([result[start:middle], result[middle:stop]], start)

    await asyncio.gather(*(asyncio.to_thread(work, list(reversed(pieces[n::3]))) for n in range(3)))
    assert result == content
    assert await asyncio.to_thread(lambda: reader.nbytes) == len(content)
    reader.close()
    file.reader.close()


async def test_when_a_part_fails_the_others_have_ended(
    world: MergedWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source may have something to undo."""
    undone: list[str] = []
    open = world.inner.open

    async def slow(key: AdapterKey, demand: Demand) -> AdapterFile:
        file = await open(key, demand)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.sleep(0.01)
            file.reader.close()
            undone.append(key.location)
        return file

    key = world.key(LINEAR)
    world.inner.fail("open", FetchError("ordered"), id="b")
    monkeypatch.setattr(world.inner, "open", slow)
    with pytest.raises(FetchError, match="ordered"):
        await world.source.open(key, Demand())
    assert sorted(undone) == ["memory:a", "memory:c"]


async def test_a_reader_reads_these_bytes_and_no_others(world: MergedWorld) -> None:
    key = world.key(LINEAR)
    content = await whole(world, key)
    file = await world.source.open(key, Demand())
    reader = file.reader
    with pytest.raises(IntegrityError, match="ends before byte"):
        read(reader, len(content) - 3, len(content) + 1)
    world.inner.put("b", CONFIG, safetensors.torch.save(tiny.tensors(8)))
    with pytest.raises(IntegrityError, match="part 2 .*again"):
        read(reader, len(file.prefix), len(content))
    reader.close()
    reader.close()
    with pytest.raises(FetchError, match="closed"):
        read(reader, 0, 8)
    again = world.source.reopen(key)
    with pytest.raises(IntegrityError, match="part 2 .*again"):
        await asyncio.to_thread(read, again, 0, 8)
    again.close()
    again = world.source.reopen(key)
    again.close()


async def test_it_has_no_digest_and_nothing_of_it_is_held(world: MergedWorld) -> None:
    key = world.key(LINEAR)
    with pytest.raises(UsageError, match="its parts have theirs"):
        await world.source.digest(key)
    hold = await world.source.populate(key)
    assert world.inner.counts.populates == 3
    assert (hold.nbytes, hold.locked, world.inner.counts.open_holds) == (0, False, 0)
    hold.close()


async def test_who_reads_in_a_thread_hears_that_the_loop_has_ended(world: MergedWorld) -> None:
    """Whoever ends a loop cancels its tasks."""
    others = asyncio.all_tasks()
    world.inner.hold("b")
    reader = world.source.reopen(world.key(LINEAR))
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(read, reader, 0, 8)
        await until(lambda: world.inner.counts.brings == 3)
        for task in asyncio.all_tasks() - others:
            task.cancel()
        await until(reading.done)
        with pytest.raises(FetchError, match="the loader was closed"):
            reading.result()
    reader.close()


# -- rows that lie apart: a tensor is computed once for all of them -------------------------------


async def opened(world: MergedWorld, merge: Merge) -> tuple[MergedReader, bytes]:
    """A reader, and all that it reads."""
    file = await world.source.open(world.key(merge), Demand())
    assert isinstance(file.reader, MergedReader)
    await world.source.bring(file, [[Span(0, file.reader.nbytes)]], lambda _: None, Demand())
    return file.reader, read(file.reader, 0, file.reader.nbytes)


def columns(tensor: MergedTensor, part: int, parts: int) -> Span:
    """A part of a tensor's columns."""
    rows = tensor.shape[0]
    pitch = (tensor.stop - tensor.start) // rows
    start = tensor.start + part * pitch // parts
    return Span(start, start + pitch // parts, rows, pitch)


def tensors_of(reader: MergedReader) -> tuple[MergedTensor, ...]:
    assert reader.opened is not None
    return reader.opened.plan.tensors


def computed(world: MergedWorld, work: Callable[[], object]) -> int:
    """How many bytes of the parts are read: what tensors are computed from."""
    before = world.inner.counts.bytes_read
    work()
    return world.inner.counts.bytes_read - before


def read_whole(reader: MergedReader, *tensors: MergedTensor) -> None:
    for each in tensors:
        read(reader, each.start, each.stop)


@pytest.mark.parametrize("merge", BOTH)
async def test_columns_of_every_tensor_are_the_files(world: MergedWorld, merge: Merge) -> None:
    """A thread keeps the tensor that it reads until its end, or until it reads another."""
    reader, content = await opened(world, merge)
    tensors = tensors_of(reader)

    def read_parts(*parts: tuple[MergedTensor, int]) -> None:
        for tensor, part in parts:
            span = columns(tensor, part, 2)
            assert read_rows(reader, span) == rows_of(content, span)

    first, second, *_ = tensors
    once = computed(world, lambda: read_whole(reader, *tensors))
    turned = computed(world, lambda: read_whole(reader, first, second, first))
    for order, times in (((1, 0), 2), ((0, 1), 1)):
        parts = [(tensor, part) for tensor in tensors for part in order]
        assert computed(world, partial(read_parts, *parts)) == times * once
    turns = [(first, 0), (second, 0), (first, 0)]
    assert computed(world, partial(read_parts, *turns)) == turned
    for start in (0, 5, len(content) - 3000):
        span = Span(start, start + 70, 10, 300)
        assert read_rows(reader, span) == rows_of(content, span)
    with pytest.raises(IntegrityError, match="ends before byte"):
        read_rows(reader, Span(len(content) - 30, len(content) - 20, 3, 11))
    reader.close()
    with pytest.raises(FetchError, match="closed"):
        read_rows(reader, Span(0, 2, 2, 4))
