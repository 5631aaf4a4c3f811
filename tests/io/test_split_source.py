"""Local folders whose weights are several files: opened as one, refused by the names of all."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import safetensors.torch
import torch
from cancelling import was_cancelled
from local_world import (
    CONFIG_NAME,
    FILES,
    LIMITS,
    WEIGHTS_NAME,
    LocalWorld,
    cut,
    nothing_left_open,
    put_split,
    refusal,
    replace,
    touch,
)
from source_inputs import CONFIG, read, read_rows, rows_of, tensors

from lorax_async import errors
from lorax_async.concurrency import FetchControl
from lorax_async.files import Reader, open_same
from lorax_async.formats.spans import ByteSpan
from lorax_async.sources import local_weights
from lorax_async.types import AdapterKey, AdapterRef
from split_files import INDEX, name_of


@pytest.fixture
def world(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path) as world:
        yield world


@pytest.fixture
def folder(world: LocalWorld) -> Path:
    return put_split(world.roots[0] / "one")


async def opened(world: LocalWorld, key: AdapterKey, *, again: bool = False) -> Reader:
    file = await world.source.open(key, FetchControl())
    if not again:
        return file.reader
    file.reader.close()
    return world.source.reopen(key)


async def test_one_file_of_weights_comes_first(world: LocalWorld, folder: Path) -> None:
    safetensors.torch.save_file(tensors(2), folder / WEIGHTS_NAME)
    key = await world.source.resolve(AdapterRef(folder))
    assert len(key.files) == 2
    assert key.files[1].inode == (folder / WEIGHTS_NAME).stat().st_ino


@pytest.mark.parametrize("again", [False, True], ids=["opened", "reopened"])
async def test_it_is_read_as_one_file(world: LocalWorld, folder: Path, again: bool) -> None:
    """Cut anywhere, by any rows, also across the borders of its files."""
    key = await world.source.resolve(AdapterRef(folder))
    file = await world.source.open(key, FetchControl())
    assert file.config == CONFIG
    file.reader.close()
    reader = await opened(world, key, again=again)
    size = reader.nbytes
    content = read(reader, 0, size)
    assert content.startswith(file.prefix)
    loaded = safetensors.torch.load(content)
    assert loaded.keys() == tensors(1).keys()
    assert all(torch.equal(loaded[name], t) for name, t in tensors(1).items())
    for step in (7, 64, 1000):
        cuts = [*range(0, size, step), size]
        result = memoryview(bytearray(size))
        reader.read_into([result[a:b] for a, b in pairwise(cuts)], 0)
        assert result == content
        assert b"".join(read(reader, a, b) for a, b in pairwise(cuts)) == content
    for nbytes, pitch in product((1, 5, 12), (12, 13, 100)):
        rows = (size - nbytes) // pitch
        for start in (0, 3, size - (rows - 1) * pitch - nbytes):
            span = ByteSpan(start, start + nbytes, rows, pitch)
            assert read_rows(reader, span) == rows_of(content, span)
    view = memoryview(bytearray(900)).cast("B", (30, 30))
    reader.read_into([view], size - 900)
    assert view.tobytes() == content[-900:]
    with pytest.raises(errors.IntegrityError, match="before byte"):
        read(reader, size - 1, size + 1)
    with pytest.raises(errors.IntegrityError, match="before byte"):
        read_rows(reader, ByteSpan(size - 50, size - 40, 3, 25))
    reader.close()
    with pytest.raises(errors.FetchError, match="closed"):
        read(reader, 0, 1)


async def test_many_first_reads(
    world: LocalWorld, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read ends before its files are closed; what was never read is never opened."""
    key, calls = await world.source.resolve(AdapterRef(folder)), list[str]()

    def counted(path: str, identity: Any) -> int:
        calls.append(Path(path).name)
        Event().wait(0.02)  # others come meanwhile
        return open_same(path, identity)

    monkeypatch.setattr(local_weights, "open_same", counted)
    unread = world.source.reopen(key)
    unread.close()
    assert calls == []
    reader = world.source.reopen(key)
    with ThreadPoolExecutor(8) as threads:
        parts = [threads.submit(read, reader, 0, 900) for _ in range(8)]
        assert len({part.result() for part in parts}) == 1
    assert sorted(calls) == FILES[2:]
    preadv = os.preadv

    def closing(fd: int, buffers: Any, offset: int) -> int:
        reader.close()
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", closing)
    assert safetensors.torch.load(read(reader, 0, reader.nbytes)).keys() == tensors(1).keys()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [touch, cut, replace])
async def test_another_version_of_any_file_is_another_adapter(
    world: LocalWorld, folder: Path, name: str, change: Callable[[Path], None]
) -> None:
    key = await world.source.resolve(AdapterRef(folder))
    change(folder / name)
    reader = world.source.reopen(key)
    works = (
        lambda: world.source.open(key, FetchControl()),
        lambda: asyncio.to_thread(read, reader, reader.nbytes - 1, reader.nbytes),
        lambda: world.source.populate(key),
    )
    for work in works:
        with pytest.raises(errors.IntegrityError, match=f"{name}.*again"):
            await work()
    reader.close()
    if name != INDEX or change is not cut:
        assert await world.source.resolve(AdapterRef(folder)) != key


@pytest.mark.parametrize("late", [0.0, 0.003])
@pytest.mark.parametrize("step", ["resolve", "open", "populate"])
async def test_cancelled_at_any_await(
    world: LocalWorld, folder: Path, step: str, late: float
) -> None:
    ref = AdapterRef(folder)
    key = await world.source.resolve(ref)
    works: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "resolve": lambda: world.source.resolve(ref),
        "open": lambda: world.source.open(key, FetchControl()),
        "populate": lambda: world.source.populate(key),
    }
    ends = [await was_cancelled(works[step](), at, late) for at in range(12)]
    assert ends.count(True) >= 1
    assert ends == sorted(ends, reverse=True)


@pytest.mark.parametrize("name", [*FILES[2:], CONFIG_NAME])
def test_a_file_that_is_not_there(world: LocalWorld, folder: Path, name: str) -> None:
    (folder / name).unlink()
    for id in ("./one", folder):
        error = refusal(world, id)
        assert type(error) is errors.AdapterNotFoundError
        assert name in error.problem


def first_byte(world: LocalWorld, key: AdapterKey) -> bytes:
    reader = world.source.reopen(key)
    try:
        return read(reader, 0, 1)
    finally:
        reader.close()


async def test_files_that_do_not_belong_together(world: LocalWorld, folder: Path) -> None:
    """What else may be wrong with them is a table of `plan_split`'s tests."""
    os.truncate(folder / FILES[3], 30)
    key = await world.source.resolve(AdapterRef(folder))
    for work in (world.source.open(key, FetchControl()), asyncio.to_thread(first_byte, world, key)):
        with pytest.raises(errors.AdapterFormatError, match=f"{FILES[3]}: .*inside its header"):
            await work


@pytest.mark.parametrize(
    ("file", "words"),
    [("../two/adapter_model.safetensors", "'../two/"), (name_of(1, 99_999), "99,999 files")],
)
def test_an_index_of_a_stranger(world: LocalWorld, folder: Path, file: str, words: str) -> None:
    """What else may be wrong with it is a table of `parse_index`'s tests."""
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    error = refusal(world, folder)
    assert type(error) is errors.AdapterFormatError
    assert INDEX in error.problem
    assert words in error.problem


def test_limits_hold_for_all_files_together(world: LocalWorld, folder: Path) -> None:
    for name in FILES[2:4]:
        os.truncate(folder / name, LIMITS.max_adapter_bytes // 2)
    assert f"the files up to {FILES[4]} have" in refusal(world, folder).problem
