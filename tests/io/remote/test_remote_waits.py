"""What waits for what, where adapters come from elsewhere; and what has ended when that is told."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread, current_thread
from typing import Any, NoReturn

import pytest
from cache_inputs import begun
from cancelling import was_cancelled
from disk_cache_world import open_below
from fault_server import Asked, Client
from remote_world import RemoteWorld, brought, opened, stocked
from source_inputs import CONFIG

from common import until
from lorax_async import AdapterError, AdapterFormatError, FetchError
from lorax_async.adapter import AdapterRef, RemoteKey
from lorax_async.core.cache_names import INDEX_FILE, WEIGHTS_FILE, CacheKey
from lorax_async.core.runs import Span
from lorax_async.io.cache.upkeep import ls
from lorax_async.io.ports import Demand
from lorax_async.io.remote import opening
from lorax_async.io.remote.jobs import followed
from lorax_async.io.remote.ports import Located
from lorax_async.io.sources.local_hold import LocalHold

pytestmark = [pytest.mark.usefixtures("nothing_left", "no_socket_left"), pytest.mark.each_loop]


def in_use(world: RemoteWorld) -> list[bool]:
    return [listed.in_use for listed in ls(world.cache)]


class SlowToEnd:
    """A job whose threads leave some turns of the loop after it was cancelled."""

    def __init__(self) -> None:
        self.done: Future[None] = Future()

    def cancel(self, error: Exception) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self.done.set_exception, error)


async def test_jobs_end_with_whoever_follows_them() -> None:
    jobs: list[Any] = [SlowToEnd(), SlowToEnd()]
    with pytest.raises(ZeroDivisionError):
        async with followed(Demand(urgent=False), *jobs):
            raise ZeroDivisionError
    assert all(job.done.done() for job in jobs)


@pytest.mark.parametrize("late", [0.0, 0.01])
async def test_bringing_is_cancelled_at_any_await(tmp_path: Path, late: float) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        ends = []
        for at in range(8):
            stocked(world, tmp_path, f"number{at}", at)
            file = await opened(world, f"number{at}")
            bringing = world.source.bring(file, [], lambda _: None, Demand())
            ends.append(await was_cancelled(bringing, at, late))
            file.reader.close()
        assert {True, False} == set(ends)
        assert not any(in_use(world))


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("late", [0.0, 0.01])
async def test_opening_what_is_here_is_cancelled_at_any_await(
    tmp_path: Path, late: float, pinned: bool
) -> None:
    """By a key whose files were located, and by one that the cache itself has told."""
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)
        version = world.locator.there["one"].version
        (await brought(world)).reader.close()

    with RemoteWorld(tmp_path / "cache", revalidate=60 if pinned else 0) as world:
        stocked(world, tmp_path / "again")
        ref = replace(world.ref("one"), revision=version if pinned else None)
        key = await world.source.resolve(ref)
        assert world.locator.located == (0 if pinned else 1)
        ends = [await was_cancelled(world.source.open(key, Demand()), at, late) for at in range(8)]
        assert {True, False} == set(ends)
        assert not any(in_use(world))


async def test_an_entry_stays_for_as_long_as_it_is_read(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)
        file = await brought(world)
        assert in_use(world) == [True]
        file.reader.close()
        assert in_use(world) == [False]


async def test_groups_are_told_of_on_the_loop(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)
        file, told = await opened(world), list[tuple[int, Thread]]()
        half, nbytes = file.reader.nbytes // 2, file.reader.nbytes

        def note(group: int) -> None:
            told.append((group, current_thread()))

        groups = [[Span(0, half)], [Span(half, nbytes)]]
        await world.source.bring(file, groups, note, Demand())
        assert told == [(0, current_thread()), (1, current_thread())]
        file.reader.close()


async def test_a_reader_that_is_closed_while_it_is_brought_keeps_nothing(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)
        file = await opened(world)
        bringing = asyncio.create_task(world.source.bring(file, [], lambda _: None, Demand()))
        await asyncio.sleep(0)
        file.reader.close()
        await bringing
        assert in_use(world) == [False]


async def test_a_download_has_ended_when_its_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plainly = opening._end

    def slowly(*given: Any) -> None:
        Event().wait(0.05)
        plainly(*given)

    monkeypatch.setattr(opening, "_end", slowly)
    with RemoteWorld(tmp_path / "cache") as world:
        world.put("one", CONFIG, b"no header at all")
        with pytest.raises(AdapterError):
            await opened(world)
        assert ls(world.cache) == []


@pytest.mark.parametrize("what", ["the same", "room"])
async def test_who_waits_for_others_ends_with_the_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """For who downloads the same, and for who has the room that it needs."""
    monkeypatch.setattr(opening, "PATIENCE_SECONDS", 60)
    with RemoteWorld(tmp_path / "cache", cache_bytes=1_000_000) as world:
        stocked(world, tmp_path)
        key = await world.source.resolve(world.ref("one"))
        assert isinstance(key, RemoteKey)
        other = CacheKey(key.location, key.version if what == "the same" else "another")
        download, demand = begun(world.cache, other), Demand()
        download.file(WEIGHTS_FILE, 900_000)
        waiting = asyncio.create_task(world.source.open(key, demand))
        await asyncio.wait([waiting], timeout=0.2)
        assert not waiting.done()
        demand.end()
        with pytest.raises(FetchError, match="nobody waits"):
            await waiting
        download.discard()


@pytest.mark.parametrize("question", ["where its files are", "where its shards are"])
async def test_a_question_to_the_source_ends_with_the_demand(tmp_path: Path, question: str) -> None:
    """Also where the source does not answer: no caller waits for it any more."""
    now = [0.0]
    with RemoteWorld(tmp_path / "cache", clock=lambda: now[0]) as world:
        stocked(world, tmp_path)
        cancelled = []

        async def no_answer(*_: object) -> Any:
            cancelled.append(False)
            try:
                await asyncio.Event().wait()
            finally:
                cancelled[0] = True
            raise AssertionError("unreachable")

        if question == "where its shards are":
            hand_out_an_index(world)
            world.locator.shards = no_answer  # type: ignore[assignment,method-assign]
        key = await world.source.resolve(world.ref("one"))
        if question == "where its files are":
            now[0] = 10_000.0  # the answer is too old: signed URLs expire
            world.locator.locate = no_answer  # type: ignore[assignment,method-assign]
        demand = Demand()
        opening = asyncio.create_task(world.source.open(key, demand))
        await until(lambda: cancelled)
        assert not opening.done()
        demand.end()
        with pytest.raises(FetchError, match="nobody waits"):
            await opening
        assert cancelled == [True]
        assert not any(in_use(world))


async def test_comparing_a_refused_entry_ends_with_the_demand(tmp_path: Path) -> None:
    now = [0.0]
    with RemoteWorld(tmp_path / "cache", clock=lambda: now[0]) as world:
        world.locator.promises = False  # so its source is asked, and nothing is hashed
        stocked(world, tmp_path)
        asked = []

        async def no_answer(*_: object) -> NoReturn:
            asked.append(True)
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        (await brought(world)).reader.close()
        demand = Demand()
        file = await opened(world, demand=demand)
        now[0] = 10_000.0
        world.locator.locate = no_answer  # type: ignore[assignment,method-assign]
        refusing = asyncio.create_task(file.refused(AdapterFormatError("it does not fit")))
        await until(lambda: asked)
        demand.end()
        assert not await asyncio.wait_for(refusing, 5)
        assert not any(in_use(world))


def hand_out_an_index(world: RemoteWorld) -> None:
    """Serve the adapter's weights as if they were in several files."""
    content = b'{"metadata": {}, "weight_map": {"a": "adapter_model-00001-of-00002.safetensors",'
    content += b'"b": "adapter_model-00002-of-00002.safetensors"}}'
    locate, serve = world.locator.locate, world.serve

    async def located(ref: AdapterRef) -> Located:
        found = await locate(ref)
        index = world.locator.file(ref, INDEX_FILE, content)
        return replace(found, files=(found.files[0], index))

    def served(asked: Asked, client: Client) -> None:
        if asked.target.endswith(INDEX_FILE.file_name):
            world.answer(asked, client, content, '"index"')
        else:
            serve(asked, client)

    world.locator.locate = located  # type: ignore[method-assign]
    world.server.behave = served


async def test_a_hold_is_settled_when_all_of_it_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on no file is open."""
    told: list[str] = []
    populate, settle = LocalHold.populate, LocalHold.settle

    def slowly(hold: LocalHold, start: int) -> None:
        Event().wait(0.05)
        populate(hold, start)
        told.append("here")

    def settled(hold: LocalHold) -> None:
        settle(hold)
        told.append("settled")

    monkeypatch.setattr(LocalHold, "populate", slowly)
    monkeypatch.setattr(LocalHold, "settle", settled)
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)
        key = await world.source.resolve(world.ref("one"))
        (await brought(world)).reader.close()
        hold = await world.source.populate(key)
        assert told == ["here", "settled"]
        assert len(open_below(tmp_path / "cache")) == 5  # the cache's own folders
        hold.close()
