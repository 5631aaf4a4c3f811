"""The host tier of local folders: what may be mapped, and that nothing of it is left behind."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from local_world import (
    LIMITS,
    WEIGHTS_NAME,
    LocalWorld,
    descriptors,
    maps_below,
    nothing_left_open,
)
from populate_conformance import PopulateConformance
from source_conformance import SourceConformance
from source_inputs import CONFIG, weights

from common import until
from lorax_async import errors
from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.config import LocalRoot
from lorax_async.io import mapped
from lorax_async.io.ports import Demand, Hold
from lorax_async.io.sources import local_hold
from lorax_async.io.sources.local import LocalSource
from page_looks import cached_pages, drop_pages, map_sizes, pages


@pytest.fixture(params=[False, True], ids=["read ahead", "held"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path, immutable=request.param) as world:
        yield world


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path, immutable=True) as world:
        yield world


class TestConformance(SourceConformance):
    pass


class TestPopulate(PopulateConformance):
    pass


async def opened_and_held(source: LocalSource, ref: AdapterRef) -> tuple[bool, Hold]:
    key = await source.resolve(ref)
    file = await source.open(key, Demand())
    file.reader.close()
    return file.holdable, await source.populate(key)


def is_held(source: LocalSource, id: str | Path, base: Path) -> bool:
    holdable, hold = asyncio.run(opened_and_held(source, AdapterRef(id)))
    assert bool(hold.nbytes) is holdable
    assert len(maps_below(base)) == holdable
    hold.close()
    assert maps_below(base) == []
    return holdable


def test_only_what_lies_in_an_immutable_root_is_held(tmp_path: Path) -> None:
    with nothing_left_open(tmp_path) as world, ThreadPoolExecutor(1) as threads:
        first, second = world.roots
        roots = (first, LocalRoot(second, immutable=True))
        source = LocalSource(roots=roots, limits=LIMITS, threads=threads)
        for folder in (first / "one", second / "a" / "two", world.outside / "three", second):
            world.fill(folder)
        beside = world.fill(second.with_name(f"{second.name}2") / "four")
        (second / "out").symlink_to(world.outside / "three")
        (world.outside / "in").symlink_to(second / "a" / "two")
        for id in (second / "a" / "two", "./a/two", world.outside / "in", second):
            assert is_held(source, id, tmp_path)
        for id in ("./one", first / "one", world.outside / "three", beside, second / "out"):
            assert not is_held(source, id, tmp_path)


@pytest.mark.parametrize("of", ["file", "folder"])
def test_a_file_is_held_with_its_folder_or_not_at_all(host: LocalWorld, of: str) -> None:
    inside, outside = host.fill(host.roots[0] / "one"), host.fill(host.outside / "two")
    folder, target = (inside, outside) if of == "file" else (outside, inside)
    (folder / WEIGHTS_NAME).unlink()
    (folder / WEIGHTS_NAME).symlink_to(target / WEIGHTS_NAME)
    assert not is_held(host.source, folder, host.outside.parent)


@pytest.mark.parametrize(("immutable", "held"), [("", True), ("snapshots", False)])
def test_of_a_hub_cache_the_blob_is_what_counts(tmp_path: Path, immutable: str, held: bool) -> None:
    with nothing_left_open(tmp_path) as world, ThreadPoolExecutor(1) as threads:
        repository = world.roots[0] / "models--o--n"
        folder = world.fill(repository / "snapshots" / ("c" * 40))
        blob = repository / "blobs" / ("b" * 64)
        blob.parent.mkdir()
        (folder / WEIGHTS_NAME).rename(blob)
        (folder / WEIGHTS_NAME).symlink_to(os.path.relpath(blob, folder))
        roots = (world.roots[0], LocalRoot(repository / immutable, immutable=True))
        source = LocalSource(roots=roots, limits=LIMITS, threads=threads)
        for id in (str(folder), folder):
            assert is_held(source, id, tmp_path) is held


def test_an_immutable_root_may_be_a_link(tmp_path: Path) -> None:
    with nothing_left_open(tmp_path) as world, ThreadPoolExecutor(1) as threads:
        folder = world.fill(world.outside / "v1" / "one")
        (tmp_path / "current").symlink_to(world.outside / "v1")
        root = LocalRoot(tmp_path / "current", immutable=True)
        source = LocalSource(roots=[root], limits=LIMITS, threads=threads)
        for id in ("./one", folder):
            assert is_held(source, id, tmp_path)


async def test_dropped_pages_come_back_and_stay(host: LocalWorld) -> None:
    path = host.fill(host.roots[0] / "one") / WEIGHTS_NAME
    drop_pages(path)
    before = descriptors()
    hold = await host.source.populate(await host.source.resolve(AdapterRef("./one")))
    assert descriptors() == before
    assert hold.nbytes == path.stat().st_size
    (sizes,) = map_sizes(path)
    assert sizes["Rss"] == sizes["Size"] >= hold.nbytes
    assert sizes["Locked"] == (sizes["Size"] if hold.locked else 0)
    drop_pages(path)
    assert cached_pages(path) == pages(hold.nbytes)
    hold.close()


async def test_a_hold_without_the_right_to_lock(
    host: LocalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "lock_on_fault", lambda address, nbytes: errno.EPERM)
    content = weights(1)
    hold = await host.source.populate(await key_of(host, content))
    assert (hold.nbytes, hold.locked) == (len(content), False)
    hold.close()


async def key_of(host: LocalWorld, content: bytes) -> AdapterKey:
    return await host.source.resolve(host.put("one", CONFIG, content))


def touch(path: Path) -> None:
    os.utime(path, (5, 5))


def cut(path: Path) -> None:
    os.truncate(path, 0)


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").rename(path)


@pytest.mark.parametrize("change", [touch, cut, replace])
@pytest.mark.parametrize("when", ["before", "during", "after"])
async def test_a_file_that_changes_is_not_held(
    host: LocalWorld, monkeypatch: pytest.MonkeyPatch, change: Any, when: str
) -> None:
    path = host.roots[0] / "one" / WEIGHTS_NAME
    populate = local_hold.LocalHold.populate

    def changing(hold: local_hold.LocalHold, start: int) -> None:
        if when == "during":
            change(path)
        populate(hold, start)
        if when == "after":
            change(path)

    key = await key_of(host, weights(1))
    file = await host.source.open(key, Demand())
    file.reader.close()
    if when == "before":
        change(path)
    monkeypatch.setattr(local_hold.LocalHold, "populate", changing)
    with pytest.raises(errors.IntegrityError, match=rf"{WEIGHTS_NAME}.*again"):
        await host.source.populate(key)
    assert maps_below(path.parent) == []


@pytest.mark.parametrize("step", ["MappedFile", "populate"])
async def test_memory_that_cannot_be_had(
    host: LocalWorld, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    owner = local_hold if step == "MappedFile" else mapped.MappedFile
    monkeypatch.setattr(owner, step, refused)
    key = await key_of(host, weights(1))
    before = descriptors()
    with pytest.raises(errors.FetchError, match=rf"{WEIGHTS_NAME} cannot be read \(ENOMEM\)"):
        await host.source.populate(key)
    assert (descriptors(), maps_below(host.roots[0])) == (before, [])


async def test_others_have_their_turn_between_the_pieces(
    host: LocalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large adapter must not keep the few threads in which others are found and opened."""
    events: list[str] = []
    populate = local_hold.LocalHold.populate
    monkeypatch.setattr(local_hold, "PIECE_BYTES", 4096)
    root = LocalRoot(host.roots[0], immutable=True)
    with ThreadPoolExecutor(1) as threads:
        loop, began = asyncio.get_running_loop(), asyncio.Event()

        def noted(hold: local_hold.LocalHold, start: int) -> None:
            events.append("piece")
            loop.call_soon_threadsafe(began.set)
            populate(hold, start)

        monkeypatch.setattr(local_hold.LocalHold, "populate", noted)
        source = LocalSource(roots=[root], limits=LIMITS, threads=threads)
        key = await key_of(host, weights(1, {"note": "x" * 4096 * 40}))
        holding = asyncio.ensure_future(source.populate(key))
        await began.wait()
        await source.resolve(AdapterRef("./one"))
        events.append("other")
        (await holding).close()
    assert events.count("piece") in {41, 42}
    assert events.index("other") < 30


async def test_cancelled_while_a_thread_populates(
    host: LocalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go = threading.Event(), threading.Event()

    def slow(address: int, nbytes: int, advice: int) -> int:
        entered.set()
        assert go.wait(10)
        return 0

    monkeypatch.setattr(mapped, "madvise", slow)
    key = await key_of(host, weights(1))
    holding = asyncio.ensure_future(host.source.populate(key))
    await until(entered.is_set)
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    assert len(maps_below(host.roots[0])) == 1  # the thread is still in there
    go.set()
