"""The host tier of local folders: what may be mapped, and that nothing of it is left behind."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
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
from source_inputs import CONFIG, weights
from split_world import FILES, cut, put, replace, touch

from lorax_async import errors
from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.config import LocalRoot
from lorax_async.io import mapped
from lorax_async.io.mapped import MappedFile
from lorax_async.io.ports import Demand, Hold
from lorax_async.io.sources import local_hold
from lorax_async.io.sources.local import LocalSource


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path, immutable=True) as world:
        yield world


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


async def key_of(host: LocalWorld, content: bytes) -> AdapterKey:
    return await host.source.resolve(host.put("one", CONFIG, content))


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_file_outside_of_the_root_leaves_all_unheld(host: LocalWorld, number: int) -> None:
    folder, other = put(host.roots[0] / "one"), put(host.outside / "two")
    (folder / FILES[number]).unlink()
    (folder / FILES[number]).symlink_to(other / FILES[number])
    assert not is_held(host.source, folder, host.outside.parent)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, *FILES[2:]])
@pytest.mark.parametrize("change", [touch, cut, replace])
@pytest.mark.parametrize("when", ["before", "during", "after"])
async def test_a_file_that_changes_is_not_held(
    host: LocalWorld,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Callable[[Path], None],
    when: str,
) -> None:
    """Of several, none is."""
    folder = host.roots[0] / "one"
    fill = host.fill if name == WEIGHTS_NAME else put
    populate = local_hold.LocalHold.populate
    path = fill(folder) / name

    def changing(hold: local_hold.LocalHold, start: int) -> None:
        last = start == hold.starts[-1]
        if when == "during" and not start:
            change(path)
        populate(hold, start)
        if when == "after" and last:
            change(path)

    key = await host.source.resolve(AdapterRef("./one"))
    if when == "before":
        change(path)
    monkeypatch.setattr(local_hold.LocalHold, "populate", changing)
    with pytest.raises(errors.IntegrityError, match=f"{name}.*again"):
        await host.source.populate(key)
    assert maps_below(folder) == []


@pytest.mark.parametrize("nth", [0, 1, 2, "populate"])
async def test_memory_that_cannot_be_had(
    host: LocalWorld, monkeypatch: pytest.MonkeyPatch, nth: int | str
) -> None:
    made: list[MappedFile] = []

    def refused(*given: Any) -> Any:
        if nth in (len(made), "populate"):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        made.append(MappedFile(*given))
        return made[-1]

    owner = mapped.MappedFile if nth == "populate" else local_hold
    monkeypatch.setattr(owner, nth if isinstance(nth, str) else "MappedFile", refused)
    put(host.roots[0] / "one")
    key = await host.source.resolve(AdapterRef("./one"))
    before, name = descriptors(), FILES[2 + (nth if isinstance(nth, int) else 0)]
    with pytest.raises(errors.FetchError, match=rf"{name} cannot be read \(ENOMEM\)"):
        await host.source.populate(key)
    made.clear()
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
