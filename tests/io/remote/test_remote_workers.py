"""What is done in threads for remote adapters, when whoever waits for it is cancelled."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
from remote_world import RemoteWorld, stocked

from common import until
from lorax_async.io.cache.upkeep import ls
from lorax_async.io.ports import Demand
from lorax_async.io.remote.cached import EntryReader, FetchReader, ReopenedReader, gone
from lorax_async.io.remote.workers import FairThreads, Workers

pytestmark = [pytest.mark.usefixtures("nothing_left", "no_socket_left"), pytest.mark.each_loop]


async def test_what_lets_go_is_done_though_it_was_cancelled_before_it_began() -> None:
    workers, busy, done = Workers(1), Event(), Event()
    workers.submit(busy.wait)
    letting_go = asyncio.create_task(workers.finish(done.set))
    for _ in range(3):
        await asyncio.sleep(0)
        letting_go.cancel()
    busy.set()
    await asyncio.wait([letting_go])
    assert done.is_set()
    workers.close()


def test_an_origin_that_does_not_answer_keeps_few_threads() -> None:
    """Its other calls wait, and are dropped when nobody waits for them; others' are made."""
    go, begun = Event(), list[int]()

    def hang(n: int) -> int:
        begun.append(n)
        go.wait(10)
        return n

    with ThreadPoolExecutor(4) as executor:
        threads = FairThreads(executor, 2)
        hanging = [threads.submit("a", partial(hang, n)) for n in range(5)]
        for n in range(9):
            assert threads.submit("b", partial(int, n)).result(5) == n
        assert sorted(begun) == [0, 1]
        assert not hanging[0].cancel()
        assert hanging[2].cancel()
        go.set()
        assert [hanging[n].result(5) for n in (0, 1, 3, 4)] == [0, 1, 3, 4]
        with pytest.raises(ZeroDivisionError):
            threads.submit("a", lambda: 1 // 0).result(5)


def test_closing_waits_for_what_was_submitted() -> None:
    workers, go = Workers(1), Event()
    submitted = workers.submit(lambda: go.wait(10))
    later = Timer(0.2, go.set)
    later.start()
    workers.close()
    assert submitted.done()
    later.join()


async def test_who_is_cancelled_waits_for_the_thread_and_undoes_what_it_did() -> None:
    workers, begun, go = Workers(1), Event(), Event()
    undone: list[bool] = []

    def work() -> bool:
        begun.set()
        return go.wait(10)

    running = asyncio.create_task(workers.run(work, undone.append))
    await until(begun.is_set)
    for _ in range(3):
        running.cancel()
        await asyncio.sleep(0)
    early = running.done()
    go.set()
    await asyncio.wait([running])
    assert running.cancelled()
    assert not early
    assert undone == [True]
    workers.close()


async def test_a_load_that_is_cancelled_twice_leaves_nothing_locked(tmp_path: Path) -> None:
    """All threads are at something else meanwhile."""
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)
        busy = Event()
        key = await world.source.resolve(world.ref("one"))
        file = await world.source.open(key, Demand())
        assert isinstance(file.reader, FetchReader)
        world.server.behave = lambda *_: None
        for _ in range(4):
            world.workers.submit(busy.wait)
        bringing = asyncio.create_task(world.source.bring(file, [], lambda _: None, Demand()))
        for _ in range(20):
            await asyncio.sleep(0.01)
            bringing.cancel()
        busy.set()
        await asyncio.wait([bringing])
        file.reader.close()
        assert not any(each.in_use for each in ls(world.cache))


async def test_who_is_cancelled_before_a_thread_opens_holds_no_entry(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)
        busy = Event()
        key = await world.source.resolve(world.ref("one"))
        file = await world.source.open(key, Demand())
        await world.source.bring(file, [], lambda _: None, Demand())
        file.reader.close()
        key = await world.source.resolve(world.ref("one"))
        plain, found = world.workers.run, Event()

        async def run_late(*args: Any) -> object:
            answer: object = await plain(*args)
            if not found.is_set():
                found.set()
                for _ in range(4):
                    world.workers.submit(busy.wait)
            return answer

        world.workers.run = run_late  # type: ignore[method-assign, assignment]
        opening = asyncio.create_task(world.source.open(key, Demand()))
        await until(found.is_set)
        await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait([opening])
        assert opening.cancelled()
        (entry,) = ls(world.cache)
        assert not entry.in_use
        busy.set()


def test_closing_waits_for_nobody_who_opens() -> None:
    """It is done on the loop, and the disk may be slow."""
    begun, slow, closed = Event(), Event(), []

    class Opened:
        nbytes = 1

        def close(self) -> None:
            closed.append(self)

    def open() -> EntryReader:
        begun.set()
        slow.wait(20)
        return Opened()  # type: ignore[return-value]

    reader, workers = ReopenedReader(open), Workers(2)
    reading = workers.submit(lambda: reader.nbytes)
    assert begun.wait(20)
    closing = workers.submit(reader.close)
    assert closing.result(10) is None
    slow.set()
    with pytest.raises(type(gone())):
        reading.result(20)
    assert len(closed) == 1
    workers.close()
