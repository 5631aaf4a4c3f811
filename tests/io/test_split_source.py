"""Local folders whose weights are several files: opened as one, told apart from changed ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from cancelling import was_cancelled
from local_world import WEIGHTS_NAME, LocalWorld, nothing_left_open
from rows_conformance import read_rows, rows_of
from source_inputs import CONFIG, read, tensors
from split_world import FILES, cut, put, replace, touch

from lorax_async import errors
from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.core.runs import Span
from lorax_async.core.split_index import SplitIndex
from lorax_async.io.ports import Demand, Reader
from lorax_async.io.sources import local_folder
from lorax_async.io.sources.checked_open import identity_of
from split_files import INDEX, write


@pytest.fixture
def world(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path) as world:
        yield world


@pytest.fixture
def folder(world: LocalWorld) -> Path:
    return put(world.roots[0] / "one")


async def opened(world: LocalWorld, key: AdapterKey, *, again: bool = False) -> Reader:
    file = await world.source.open(key, Demand())
    if not again:
        return file.reader
    file.reader.close()
    return world.source.reopen(key)


async def test_a_key_names_every_file(world: LocalWorld, folder: Path) -> None:
    key = await world.source.resolve(AdapterRef("./one"))
    assert key.location == str(folder)
    assert key.files == tuple(identity_of((folder / name).stat()) for name in FILES)
    assert await world.source.resolve(AdapterRef(folder)) == key


async def test_one_file_of_weights_comes_first(world: LocalWorld, folder: Path) -> None:
    safetensors.torch.save_file(tensors(2), folder / WEIGHTS_NAME)
    key = await world.source.resolve(AdapterRef(folder))
    assert len(key.files) == 2
    assert key.files[1].inode == (folder / WEIGHTS_NAME).stat().st_ino


@pytest.mark.parametrize("again", [False, True], ids=["opened", "reopened"])
async def test_it_is_read_as_one_file(world: LocalWorld, folder: Path, again: bool) -> None:
    key = await world.source.resolve(AdapterRef(folder))
    file = await world.source.open(key, Demand())
    assert file.config == CONFIG
    file.reader.close()
    reader = await opened(world, key, again=again)
    content = read(reader, 0, reader.nbytes)
    assert content.startswith(file.prefix)
    loaded = safetensors.torch.load(content)
    assert loaded.keys() == tensors(1).keys()
    assert all(torch.equal(loaded[name], t) for name, t in tensors(1).items())
    middle = len(content) // 2
    halves = [(0, middle), (middle, len(content))]
    reads = await asyncio.gather(*(asyncio.to_thread(read, reader, *half) for half in halves))
    assert b"".join(reads) == content
    first = len(file.prefix)
    rows = Span(first + 5, first + 17, (len(content) - first - 17) // 40, 40)
    assert read_rows(reader, rows) == rows_of(content, rows)
    with pytest.raises(errors.IntegrityError, match="before byte"):
        read(reader, len(content) - 1, len(content) + 1)
    reader.close()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [touch, cut, replace])
async def test_another_version_of_any_file_is_another_adapter(
    world: LocalWorld, folder: Path, name: str, change: Callable[[Path], None]
) -> None:
    key = await world.source.resolve(AdapterRef(folder))
    change(folder / name)
    reader = world.source.reopen(key)
    works = (
        lambda: world.source.open(key, Demand()),
        lambda: asyncio.to_thread(read, reader, reader.nbytes - 1, reader.nbytes),
        lambda: world.source.populate(key),
    )
    for work in works:
        with pytest.raises(errors.IntegrityError, match=f"{name}.*again"):
            await work()
    reader.close()
    if name != INDEX or change is not cut:
        assert await world.source.resolve(AdapterRef(folder)) != key


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("change", [touch, cut])
async def test_a_read_notices_that_its_file_changed(
    world: LocalWorld, folder: Path, number: int, change: Callable[[Path], None]
) -> None:
    key = await world.source.resolve(AdapterRef(folder))
    reader = await opened(world, key)
    change(folder / FILES[1 + number])
    with pytest.raises(errors.IntegrityError, match=FILES[1 + number]):
        read(reader, 0, reader.nbytes)
    reader.close()


@pytest.mark.parametrize("late", [0.0, 0.003])
@pytest.mark.parametrize("step", ["resolve", "open", "populate"])
async def test_cancelled_at_any_await(
    world: LocalWorld, folder: Path, step: str, late: float
) -> None:
    ref = AdapterRef(folder)
    key = await world.source.resolve(ref)
    works: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "resolve": lambda: world.source.resolve(ref),
        "open": lambda: world.source.open(key, Demand()),
        "populate": lambda: world.source.populate(key),
    }
    ends = [await was_cancelled(works[step](), at, late) for at in range(12)]
    assert ends.count(True) >= 1
    assert ends == sorted(ends, reverse=True)


async def test_many_may_open_at_once(world: LocalWorld, folder: Path) -> None:
    key = await world.source.resolve(AdapterRef(folder))
    files = await asyncio.gather(*(world.source.open(key, Demand()) for _ in range(20)))
    assert len({file.prefix for file in files}) == 1
    for file in files:
        file.reader.close()
        with pytest.raises(errors.FetchError):
            read(file.reader, 0, 8)


async def test_an_index_is_read_once_until_it_changes(
    world: LocalWorld, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request for the adapter resolves its id."""
    read_index, reads = local_folder.read_index, []

    def counted(*given: Any) -> SplitIndex:
        reads.append(given)
        return read_index(*given)

    monkeypatch.setattr(local_folder, "read_index", counted)
    key = await world.source.resolve(AdapterRef(folder))
    assert {await world.source.resolve(AdapterRef("./one")) for _ in range(5)} == {key}
    assert len(reads) == 1
    touch(folder / FILES[3])
    assert await world.source.resolve(AdapterRef(folder)) != key
    assert len(reads) == 1
    write(folder, [tensors(1)])
    assert len((await world.source.resolve(AdapterRef(folder))).files) == 3
    assert len(reads) == 2
