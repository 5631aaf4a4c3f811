"""Merges as a source has them: a file that is computed, of parts that belong to another source."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from threading import Barrier, Event
from typing import Any

import pytest
import safetensors.torch
import torch
from cancelling import was_cancelled
from merged_world import MergedWorld
from populate_conformance import PopulateConformance
from source_conformance import SourceConformance
from source_inputs import CONFIG, groups_of, read

import tiny
from lorax_async import Merge
from lorax_async.adapter import AdapterKey, MergedKey
from lorax_async.core.runs import Span
from lorax_async.errors import FetchError, IntegrityError, UsageError
from lorax_async.io.ports import AdapterFile, Demand

LINEAR = Merge("linear", ["a", "b", "c"], [1, -0.5, 0.25])
DRAWN = Merge("dare_linear", ["a", "b", "c"], [1, -0.5, 0.25], density=0.3, seed=4)
BOTH = [pytest.param(merge, id=merge.strategy) for merge in (LINEAR, DRAWN)]


@pytest.fixture(params=[False, True], ids=["read ahead", "held"])
def world(request: pytest.FixtureRequest) -> Iterator[MergedWorld]:
    with ThreadPoolExecutor(2) as threads:
        world = MergedWorld(threads, request.param)
        yield world
    assert world.inner.counts.open_readers == 0
    assert world.inner.counts.open_holds == 0


class TestPlainKeys(SourceConformance):
    """Whatever is no merge, the other source answers."""


class TestPlainHolds(PopulateConformance):
    pass


async def whole(world: MergedWorld, key: MergedKey) -> bytes:
    """The merged file, brought and read in one piece."""
    file = await world.source.open(key, Demand())
    with closing(file.reader) as reader:
        await world.source.bring(file, [[Span(0, reader.nbytes)]], lambda _: None, Demand())
        return await asyncio.to_thread(read, reader, 0, reader.nbytes)


@pytest.mark.parametrize("merge", BOTH)
async def test_it_is_a_safetensors_file(world: MergedWorld, merge: Merge) -> None:
    content = await whole(world, world.key(merge))
    found = safetensors.torch.load(content)
    parts = [tiny.tensors(seed) for seed in range(3)]
    assert found.keys() == parts[0].keys()
    if merge is LINEAR:
        for name, tensor in found.items():
            along = 0 if "lora_A" in name else 1
            factors = merge.weights if "lora_A" in name else (1, 1, 1)
            scale = 2.0 if "lora_A" in name else 1.0
            expected = [w * scale * part[name] for w, part in zip(factors, parts, strict=True)]
            assert torch.equal(tensor, torch.cat(expected, dim=along))


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


async def test_a_group_is_here_with_the_last_of_its_parts(world: MergedWorld) -> None:
    key = world.key(LINEAR)
    content = await whole(world, key)
    world.inner._versions[key.merge.parts[1]].here.clear()  # type: ignore[index]
    file = await world.source.open(key, Demand())
    world.inner.hold("b")
    seen: list[int] = []
    bringing = asyncio.create_task(
        world.source.bring(file, groups_of(content), seen.append, Demand())
    )
    await asyncio.sleep(0.02)
    assert seen == []
    world.inner.allow("b", 0)
    await asyncio.sleep(0.02)
    assert seen == [0]
    world.inner.allow("b")
    await bringing
    assert seen == [0, 1, 2]
    file.reader.close()


async def test_a_fetch_that_nobody_wants_ends(world: MergedWorld) -> None:
    file = await world.source.open(world.key(LINEAR), Demand())
    world.inner.hold("c")
    demand = Demand()
    bringing = asyncio.create_task(
        world.source.bring(file, [[Span(0, file.reader.nbytes)]], lambda _: None, demand)
    )
    await asyncio.sleep(0.01)
    demand.end()
    with pytest.raises(FetchError, match="part 3"):
        await bringing
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


@pytest.mark.parametrize("late", [0.0, 0.003])
async def test_cancelled_at_any_await(world: MergedWorld, late: float) -> None:
    key = world.key(DRAWN)
    ends = [await was_cancelled(world.source.open(key, Demand()), at, late) for at in range(12)]
    assert ends.count(True) >= 1
    assert ends == sorted(ends, reverse=True)


@pytest.mark.parametrize("id", ["a", "b", "c"])
@pytest.mark.parametrize("step", ["open", "bring", "populate"])
async def test_a_part_that_fails_is_named(world: MergedWorld, id: str, step: Any) -> None:
    key = world.key(LINEAR)
    world.inner.fail(step, FetchError("ordered"), id=id)
    with pytest.raises(FetchError, match=rf"part {'abc'.index(id) + 1} \('memory:{id}'\): ord"):
        if step == "populate":
            await world.source.populate(key)
        else:
            await whole(world, key)


async def test_a_reader_reads_these_bytes_and_no_others(world: MergedWorld) -> None:
    key = world.key(LINEAR)
    content = await whole(world, key)
    file = await world.source.open(key, Demand())
    reader = file.reader
    with pytest.raises(IntegrityError, match="ends before byte"):
        read(reader, len(content) - 3, len(content) + 1)
    world.put("b", CONFIG, safetensors.torch.save(tiny.tensors(8)))
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


async def test_closed_while_it_is_read_it_reads_to_the_end(world: MergedWorld) -> None:
    key = world.key(DRAWN)
    content = await whole(world, key)
    file = await world.source.open(key, Demand())
    began, go_on = Event(), Event()
    inner = file.reader.opened.files[2].reader  # type: ignore[attr-defined]
    plainly = inner._read

    def slowly(*given: Any) -> Any:
        began.set()
        assert go_on.wait(20)
        return plainly(*given)

    inner._read = slowly
    reading = asyncio.create_task(asyncio.to_thread(read, file.reader, 0, len(content)))
    await asyncio.to_thread(began.wait, 20)
    file.reader.close()
    assert world.inner.counts.open_readers == 3
    go_on.set()
    assert await reading == content
    assert world.inner.counts.open_readers == 0


async def test_a_merge_has_no_digest(world: MergedWorld) -> None:
    key = world.key(LINEAR)
    with pytest.raises(UsageError, match="its parts have theirs"):
        await world.source.digest(key)


async def test_nothing_of_it_is_held(world: MergedWorld) -> None:
    hold = await world.source.populate(world.key(LINEAR))
    assert world.inner.counts.populates == 3
    assert (hold.nbytes, hold.locked, world.inner.counts.open_holds) == (0, False, 0)
    hold.close()
