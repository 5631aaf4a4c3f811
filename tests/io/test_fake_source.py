"""The fake source keeps to the port, and does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from itertools import pairwise
from typing import Any

import pytest
import uvloop
from populate_conformance import PopulateConformance
from source_conformance import Run, SourceConformance, T, bring_all
from source_inputs import CONFIG, groups_of, read, weights

from lorax_async.adapter import AdapterRef
from lorax_async.core.runs import Span
from lorax_async.errors import FetchError, IntegrityError, InternalError
from lorax_async.io.ports import AdapterFile, Demand
from lorax_async.testing import FakeSource
from lorax_async.verification import Verification


class FakeWorld:
    def __init__(self, *, holds: bool = False) -> None:
        self.holds = holds
        self.source = FakeSource(holdable=holds)

    def put(self, name: str, config: bytes, weights: bytes) -> AdapterRef:
        self.source.put(name, config, weights)
        return AdapterRef(name)

    def ref(self, name: str) -> AdapterRef:
        return AdapterRef(name)


@pytest.fixture(params=[False, True], ids=["read ahead", "held"])
def world(request: pytest.FixtureRequest) -> Iterator[FakeWorld]:
    world = FakeWorld(holds=request.param)
    yield world
    assert world.source.counts.open_readers == 0
    assert world.source.counts.open_holds == 0


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def run(main: Coroutine[Any, Any, T]) -> T:
        new_loop: Callable[[], asyncio.AbstractEventLoop] = request.param
        with asyncio.Runner(loop_factory=new_loop) as runner:
            return runner.run(main)

    return run


class TestConformance(SourceConformance):
    pass


class TestPopulate(PopulateConformance):
    pass


async def opened(source: FakeSource, content: bytes, name: str = "one") -> AdapterFile:
    return await source.open(source.put(name, CONFIG, content), Demand())


async def test_it_counts(world: FakeWorld) -> None:
    content = weights(1)
    ref = world.put("one", CONFIG, content)
    key = await world.source.resolve(ref)
    files = [await world.source.open(key, Demand()) for _ in range(2)]
    readers = [world.source.reopen(key) for _ in range(3)]
    counts = world.source.counts
    assert counts.open_readers == 5
    await bring_all(world.source, files[0], content)
    hold = await world.source.populate(key)
    assert counts.open_holds == 1
    hold.close()
    assert hold.locked is world.holds
    assert counts.open_holds == 0
    read(files[0].reader, 0, 10)
    read(readers[0], 5, 7)
    for reader in [*readers, *(file.reader for file in files)]:
        reader.close()
    assert (counts.resolves, counts.opens, counts.reopens) == (1, 2, 3)
    assert (counts.brings, counts.populates, counts.bytes_read) == (1, 1, 12)


async def test_bytes_that_have_not_arrived_cannot_be_read(world: FakeWorld) -> None:
    content = weights(1)
    file = await opened(world.source, content)
    spans = [(span.start, span.stop) for (span,) in groups_of(content)]
    late = [(spans[0][0], spans[0][1]), (0, len(content)), (spans[1][0], spans[1][0] + 1)]
    for start, stop in late:
        with pytest.raises(InternalError, match="before they arrived"):
            read(file.reader, start, stop)
    await world.source.bring(file, [[Span(*spans[1])]], lambda _: None, Demand())
    assert read(file.reader, 0, spans[1][1]) == content[: spans[1][1]]
    with pytest.raises(InternalError, match="before they arrived"):
        read(file.reader, spans[1][0], spans[1][1] + 1)
    file.reader.close()


async def test_a_held_group_waits_until_it_is_allowed(world: FakeWorld) -> None:
    content = weights(1)
    file = await opened(world.source, content)
    world.source.hold("one")
    seen: list[int] = []
    bringing = asyncio.ensure_future(
        world.source.bring(file, groups_of(content), seen.append, Demand())
    )
    await asyncio.sleep(0.02)
    assert seen == []
    world.source.allow("one", 0, 2)
    await asyncio.sleep(0.02)
    assert seen == [0]
    world.source.allow("one")
    await bringing
    assert seen == [0, 1, 2]
    file.reader.close()


async def test_a_cancelled_fetch_does_not_wait_for_its_group(world: FakeWorld) -> None:
    content = weights(1)
    file = await opened(world.source, content)
    world.source.hold("one")
    demand = Demand()
    asyncio.get_running_loop().call_later(0.01, demand.end)
    with pytest.raises(FetchError):
        await world.source.bring(file, groups_of(content), lambda _: None, demand)
    file.reader.close()


async def test_groups_keep_the_pace() -> None:
    source, content = FakeSource(pace=0.02), weights(1)
    loop = asyncio.get_running_loop()
    file = await opened(source, content)
    times = [loop.time()]
    await source.bring(file, groups_of(content), lambda _: times.append(loop.time()), Demand())
    waits = [after - before for before, after in pairwise(times)]
    assert len(waits) == 3
    assert min(waits) >= 0.0199
    file.reader.close()


@pytest.mark.parametrize("step", ["resolve", "open", "digest", "populate"])
async def test_steps_fail_to_order(world: FakeWorld, step: Any) -> None:
    order = FetchError("the disk is on fire")
    ref = world.put("one", CONFIG, weights(1))
    other = world.put("two", CONFIG, weights(1))
    key, other_key = [await world.source.resolve(each) for each in (ref, other)]
    world.source.fail(step, order, id="one", times=2)
    call = getattr(world.source, step)
    more = (Demand(),) if step == "open" else ()
    for _ in range(2):
        with pytest.raises(FetchError, match="on fire") as caught:
            await call(ref if step == "resolve" else key, *more)
        assert caught.value is not order
    for each in (other, ref) if step == "resolve" else (other_key, key):
        close_if_open(await call(each, *more))


def close_if_open(opened: object) -> None:
    reader = getattr(opened, "reader", opened)
    if hasattr(reader, "close"):
        reader.close()


async def test_a_group_fails_to_order(world: FakeWorld) -> None:
    content = weights(1)
    file = await opened(world.source, content)
    world.source.fail("bring", FetchError("cut off"), at=1)
    seen: list[int] = []
    with pytest.raises(FetchError, match="cut off"):
        await world.source.bring(file, groups_of(content), seen.append, Demand())
    assert seen == [0]
    assert await bring_all(world.source, file, content) == [0, 1, 2]
    file.reader.close()


async def test_a_file_that_is_here_is_verified_to_order(world: FakeWorld) -> None:
    content, known = weights(1), Verification("transport", "0" * 64)
    source, seen = world.source, list[int]()
    file = await opened(source, content)
    source.hold_verification("one")
    source.verifications["one"] = known
    source.fail("verify", IntegrityError("other bytes"))
    for _ in range(2):
        seen.clear()
        demand = Demand()
        bringing = asyncio.ensure_future(
            source.bring(file, groups_of(content), seen.append, demand)
        )
        await asyncio.sleep(0.02)
        assert seen == [0, 1, 2]
        assert not bringing.done()
        demand.end()
        with pytest.raises(FetchError, match="nobody waits"):
            await bringing
    source.allow_verification("one")
    with pytest.raises(IntegrityError, match="other bytes"):
        await bring_all(source, file, content)
    with pytest.raises(InternalError, match="before they arrived"):
        read(file.reader, len(content) - 8, len(content))
    assert await source.bring(file, groups_of(content), seen.append, Demand()) == known
    assert read(file.reader, len(content) - 8, len(content)) == content[-8:]
    file.reader.close()


async def test_a_read_fails_to_order(world: FakeWorld) -> None:
    content = weights(1)
    file = await opened(world.source, content)
    await bring_all(world.source, file, content)
    world.source.fail("read", OSError("a foreign error"), at=100)
    assert read(file.reader, 0, 100) == content[:100]
    assert read(file.reader, 101, 200) == content[101:200]
    with pytest.raises(OSError, match="foreign"):
        read(file.reader, 90, 101)
    assert read(file.reader, 90, 101) == content[90:101]
    file.reader.close()


async def test_a_removed_adapter_is_gone(world: FakeWorld) -> None:
    content = weights(1)
    file = await opened(world.source, content)
    world.source.remove("one")
    with pytest.raises(IntegrityError):
        await bring_all(world.source, file, content)
    file.reader.close()


async def test_a_fetch_cancelled_on_its_way_ends_before_the_next_group(world: FakeWorld) -> None:
    content = weights(1)
    file = await opened(world.source, content)
    demand = Demand()
    seen: list[int] = []

    def arrived(group: int) -> None:
        seen.append(group)
        demand.end()

    with pytest.raises(FetchError):
        await world.source.bring(file, groups_of(content), arrived, demand)
    assert seen == [0]
    file.reader.close()
