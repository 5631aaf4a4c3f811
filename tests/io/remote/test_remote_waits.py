"""What waits for what, where adapters come from elsewhere; and what has ended when that is told."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread, current_thread
from typing import Any

import pytest
from cache_inputs import begun
from cancelling import was_cancelled
from disk_cache_world import open_below
from fault_server import Asked, Client
from remote_world import RemoteWorld, stocked
from source_inputs import CONFIG, weights

from common import Run
from lorax_async import AdapterError, FetchError, IntegrityError, LoaderClosedError, LoaderConfig
from lorax_async.adapter import AdapterKey, RemoteKey
from lorax_async.core.cache_names import WEIGHTS_FILE, CacheKey
from lorax_async.core.runs import Span
from lorax_async.io import own_cache
from lorax_async.io.cache.upkeep import ls
from lorax_async.io.disk_cache import DiskCache
from lorax_async.io.own_cache import OwnCache
from lorax_async.io.ports import AdapterFile, Demand
from lorax_async.io.remote import elsewhere, opening
from lorax_async.io.remote.beginning import FIRST_BYTES
from lorax_async.io.remote.elsewhere import Elsewhere
from lorax_async.io.remote.jobs import followed
from lorax_async.io.sources.local_hold import LocalHold

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


async def opened(
    world: RemoteWorld, name: str = "one", demand: Demand | None = None
) -> AdapterFile:
    key = await world.source.resolve(world.ref(name))
    return await world.source.open(key, demand or Demand())


async def brought(world: RemoteWorld, name: str = "one") -> AdapterFile:
    file = await opened(world, name)
    await world.source.bring(file, [], lambda _: None, Demand())
    return file


def in_use(world: RemoteWorld) -> list[bool]:
    return [listed.in_use for listed in ls(world.cache)]


class SlowToEnd:
    """A job whose threads leave some turns of the loop after it was cancelled."""

    def __init__(self) -> None:
        self.done: Future[None] = Future()

    def cancel(self, error: Exception) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self.done.set_exception, error)


def test_jobs_end_with_whoever_follows_them(run: Run) -> None:
    async def body() -> None:
        jobs: list[Any] = [SlowToEnd(), SlowToEnd()]
        with pytest.raises(ZeroDivisionError):
            async with followed(Demand(urgent=False), *jobs):
                raise ZeroDivisionError
        assert all(job.done.done() for job in jobs)

    run(body())


@pytest.mark.parametrize("late", [0.0, 0.01])
def test_bringing_is_cancelled_at_any_await(run: Run, tmp_path: Path, late: float) -> None:
    with RemoteWorld(tmp_path / "cache") as world:

        async def body() -> None:
            ends = []
            for at in range(8):
                stocked(world, tmp_path, f"number{at}", at)
                file = await opened(world, f"number{at}")
                bringing = world.source.bring(file, [], lambda _: None, Demand())
                ends.append(await was_cancelled(bringing, at, late))
                file.reader.close()
            assert {True, False} == set(ends)
            assert not any(in_use(world))

        run(body())


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("late", [0.0, 0.01])
def test_opening_what_is_here_is_cancelled_at_any_await(
    run: Run, tmp_path: Path, late: float, pinned: bool
) -> None:
    """By a key whose files were located, and by one that the cache itself has told."""
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)
        version = world.locator.there["one"].version
        run(brought(world)).reader.close()

    with RemoteWorld(tmp_path / "cache", revalidate=60 if pinned else 0) as world:
        stocked(world, tmp_path / "again")

        async def body() -> None:
            ref = replace(world.ref("one"), revision=version if pinned else None)
            key = await world.source.resolve(ref)
            assert world.locator.located == (0 if pinned else 1)
            ends = [
                await was_cancelled(world.source.open(key, Demand()), at, late) for at in range(8)
            ]
            assert {True, False} == set(ends)
            assert not any(in_use(world))

        run(body())


def test_an_entry_stays_for_as_long_as_it_is_read(run: Run, tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)

        async def body() -> None:
            file = await brought(world)
            assert in_use(world) == [True]
            file.reader.close()
            assert in_use(world) == [False]

        run(body())


def test_groups_are_told_of_on_the_loop(run: Run, tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)

        async def body() -> None:
            file, told = await opened(world), list[tuple[int, Thread]]()
            half, nbytes = file.reader.nbytes // 2, file.reader.nbytes

            def note(group: int) -> None:
                told.append((group, current_thread()))

            groups = [[Span(0, half)], [Span(half, nbytes)]]
            await world.source.bring(file, groups, note, Demand())
            assert told == [(0, current_thread()), (1, current_thread())]
            file.reader.close()

        run(body())


def test_a_reader_that_is_closed_while_it_is_brought_keeps_nothing(
    run: Run, tmp_path: Path
) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)

        async def body() -> None:
            file = await opened(world)
            bringing = asyncio.create_task(world.source.bring(file, [], lambda _: None, Demand()))
            await asyncio.sleep(0)
            file.reader.close()
            await bringing
            assert in_use(world) == [False]

        run(body())


def test_a_download_has_ended_when_its_failure_is_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plainly = opening._end

    def slowly(*given: Any) -> None:
        Event().wait(0.05)
        plainly(*given)

    monkeypatch.setattr(opening, "_end", slowly)
    with RemoteWorld(tmp_path / "cache") as world:
        world.put("one", CONFIG, b"no header at all")
        with pytest.raises(AdapterError):
            run(opened(world))
        assert ls(world.cache) == []


@pytest.mark.parametrize("what", ["the same", "room"])
def test_who_waits_for_others_ends_with_the_demand(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """For who downloads the same, and for who has the room that it needs."""
    monkeypatch.setattr(opening, "PATIENCE_SECONDS", 60)
    with RemoteWorld(tmp_path / "cache", cache_bytes=1_000_000) as world:
        stocked(world, tmp_path)

        async def body() -> None:
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

        run(body())


def test_small_files_are_checked_before_they_are_used(run: Run, tmp_path: Path) -> None:
    """The rest is on its way by then, and nothing is published yet."""
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)

        def other_config(asked: Asked, client: Client) -> None:
            data, etag = world.content(asked.target)
            world.answer(asked, client, data if asked.span else data[::-1], etag)

        world.server.behave = other_config
        with pytest.raises(IntegrityError, match=r"adapter_config.json has not the sha256"):
            run(opened(world))


def test_who_was_let_have_it_has_it_while_the_source_is_down(run: Run, tmp_path: Path) -> None:
    """Not only who it was fetched for; and nobody else."""
    with RemoteWorld(tmp_path / "cache") as world:
        stocked(world, tmp_path)
        first, second, stranger = (replace(world.ref("one"), token=token) for token in "abc")
        version = world.locator.there["one"].version

        async def body() -> None:
            for ref in (first, second):
                file = await world.source.open(await world.source.resolve(ref), Demand())
                await world.source.bring(file, [], lambda _: None, Demand())
                file.reader.close()
            world.locator.error = FetchError("it is down")
            for ref in (first, second):
                await world.source.resolve(replace(ref, revision=version))
            with pytest.raises(FetchError, match="it is down"):
                await world.source.resolve(replace(stranger, revision=version))

        run(body())


def test_the_last_version_is_what_is_stale(run: Run, tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:

        async def body() -> None:
            keys: list[AdapterKey] = []
            for seed in (1, 2):
                world.put("one", CONFIG, weights(seed))
                keys.append(await world.source.resolve(world.ref("one")))
                (await brought(world)).reader.close()
            world.locator.error = FetchError("it is down")
            found = await world.source.resolve(replace(world.ref("one"), allow_stale=True))
            assert isinstance(found, RemoteKey)
            assert found.stale
            assert replace(found, stale=False) == keys[1] != keys[0]

        run(body())


def test_another_version_is_not_stored_under_the_name_of_the_one(run: Run, tmp_path: Path) -> None:
    """It is located anew when the places that the source told have expired."""
    now = 0.0
    with RemoteWorld(tmp_path / "cache", clock=lambda: now) as world:

        async def body() -> None:
            nonlocal now
            key = await world.source.resolve(world.put("one", CONFIG, weights(1)))
            now = 3600.0
            world.put("one", CONFIG, weights(2))
            with pytest.raises(IntegrityError, match="another version by now"):
                await world.source.open(key, Demand())

        run(body())


def test_what_changes_between_two_answers_is_noticed(run: Run, tmp_path: Path) -> None:
    """Of a header that does not come with the first bytes."""
    with RemoteWorld(tmp_path / "cache") as world:
        world.locator.promises = False
        world.put("one", CONFIG, weights(1, {"note": "long" * FIRST_BYTES}))

        def changing(asked: Asked, client: Client) -> None:
            data, etag = world.content(asked.target)
            again = asked.span is not None and asked.span[1] != FIRST_BYTES
            world.answer(asked, client, data, '"another"' if again else etag)

        world.server.behave = changing
        with pytest.raises(IntegrityError, match="changed while it was asked for"):
            run(opened(world))


def test_a_hold_is_settled_when_all_of_it_is_here(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

        async def body() -> None:
            key = await world.source.resolve(world.ref("one"))
            (await brought(world)).reader.close()
            hold = await world.source.populate(key)
            assert told == ["here", "settled"]
            assert len(open_below(tmp_path / "cache")) == 5  # the cache's own folders
            hold.close()

        run(body())


def test_all_that_it_takes_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By several threads, and not after the end."""
    plainly, begun, go_on = elsewhere._made, [], Event()

    def slowly(*given: Any) -> Any:
        begun.append(given)
        go_on.wait(20)
        return plainly(*given)

    monkeypatch.setattr(elsewhere, "_made", slowly)
    config = LoaderConfig(cache_dir=tmp_path / "cache")
    own = OwnCache(config)
    there = Elsewhere(config, own)
    with ThreadPoolExecutor(2) as threads:
        made = [threads.submit(there._make) for _ in range(2)]
        assert not wait(made, timeout=0.05).done
        go_on.set()
        assert made[0].result() is made[1].result()
    assert len(begun) == 1
    there.close()
    there.close()
    with pytest.raises(LoaderClosedError):
        there._make()
    assert len(begun) == 1
    own.close()


def test_a_loaders_own_cache_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By several threads, and not after the end."""
    begun, go_on = list[object](), Event()

    def slowly(*given: Any) -> Any:
        begun.append(given)
        go_on.wait(20)
        return DiskCache(*given)

    monkeypatch.setattr(own_cache, "DiskCache", slowly)
    own = OwnCache(LoaderConfig(cache_dir=tmp_path / "cache"))
    with ThreadPoolExecutor(2) as threads:
        made = [threads.submit(own.get) for _ in range(2)]
        assert not wait(made, timeout=0.05).done
        go_on.set()
        assert made[0].result() is made[1].result()
    assert len(begun) == 1
    own.close()
    with pytest.raises(LoaderClosedError):
        own.get()
    assert len(begun) == 1
