"""Local folders whose weights are several files: opened as one, refused by the names of all."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import safetensors.torch
import torch
from cancelling import was_cancelled
from local_world import CONFIG_NAME, LIMITS, WEIGHTS_NAME, LocalWorld, nothing_left_open, refusal
from source_inputs import CONFIG, header_bytes, read, read_rows, rows_of, tensors
from split_world import FILES, cut, parts, put, replace, touch

from common import Run
from lorax_async import errors
from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.config import Limits
from lorax_async.core.runs import Span
from lorax_async.core.split_file import Head, SplitPlan, plan_split
from lorax_async.core.split_index import SplitIndex, parse_index
from lorax_async.errors import FetchError, IntegrityError
from lorax_async.io.ports import Demand, Reader
from lorax_async.io.sources import local_folder
from lorax_async.io.sources.checked_open import identity_of
from lorax_async.io.sources.split_reader import SplitFiles, SplitReader
from split_files import INDEX, contents_of, index_of, name_of, write


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


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES[2:], CONFIG_NAME])
def test_a_file_that_is_not_there(world: LocalWorld, folder: Path, name: str) -> None:
    (folder / name).unlink()
    for id in ("./one", folder):
        error = refusal(world, id)
        assert type(error) is errors.AdapterNotFoundError
        assert name in error.problem


def cut_short(folder: Path) -> None:
    cut(folder / FILES[3])


def cut_in_the_header(folder: Path) -> None:
    os.truncate(folder / FILES[3], 30)


def longer(folder: Path) -> None:
    with (folder / FILES[3]).open("ab") as file:
        file.write(b"x")


def more_tensors(folder: Path) -> None:
    safetensors.torch.save_file(parts(1)[1] | {"more": torch.ones(1)}, folder / FILES[3])


def fewer_tensors(folder: Path) -> None:
    last = dict(list(parts(1)[1].items())[1:])
    safetensors.torch.save_file(last, folder / FILES[3])


def swapped(folder: Path) -> None:
    (folder / FILES[3]).rename(folder / "x")
    (folder / FILES[2]).rename(folder / FILES[3])
    (folder / "x").rename(folder / FILES[2])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut_short, f"{FILES[3]}: tensor .* ends 1 bytes before"),
        (cut_in_the_header, f"{FILES[3]}: .*ends inside its header"),
        (longer, f"{FILES[3]}: .*1 bytes after the last tensor"),
        (more_tensors, f"{FILES[3]}: has tensor 'more'.*nowhere"),
        (fewer_tensors, f"{FILES[3]}: has no tensor 'base_model"),
        (swapped, f"{FILES[2]}: has tensor .* is in {FILES[3]}"),
    ],
)
async def test_files_that_do_not_belong_together(
    world: LocalWorld, folder: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(folder)

    key = await world.source.resolve(AdapterRef(folder))
    for work in (world.source.open(key, Demand()), asyncio.to_thread(first_byte, world, key)):
        with pytest.raises(errors.AdapterFormatError, match=words):
            await work


def first_byte(world: LocalWorld, key: AdapterKey) -> bytes:
    reader = world.source.reopen(key)
    try:
        return read(reader, 0, 1)
    finally:
        reader.close()


def weight_map(**files: str) -> bytes:
    return json.dumps({"weight_map": files}).encode()


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (weight_map(a="../two/adapter_model.safetensors"), "'../two/adapter_model.safetensors'"),
        (weight_map(a=WEIGHTS_NAME), WEIGHTS_NAME),
        (weight_map(a="/etc/passwd"), "'/etc/passwd'"),
        (weight_map(a=name_of(1, 99_999)), "99,999 files"),
        (b'{"weight_map": {"a": "x", "a": "x"}}', "'a'"),
        (index_of(parts(1)).replace(b"lora_B", b"lora_A"), "stands there twice"),
        (index_of(parts(1)).ljust(LIMITS.max_header_bytes + 1), "over the limit of 1,048,576"),
        (b"", "is empty"),
    ],
)
def test_an_index_of_a_stranger(world: LocalWorld, folder: Path, index: bytes, words: str) -> None:
    (folder / INDEX).write_bytes(index)
    error = refusal(world, folder)
    assert type(error) is errors.AdapterFormatError
    assert INDEX in error.problem
    assert words in error.problem


def test_limits_hold_for_all_files_together(world: LocalWorld, folder: Path) -> None:
    for name in FILES[2:4]:
        os.truncate(folder / name, LIMITS.max_adapter_bytes // 2)
    error = refusal(world, folder)
    assert type(error) is errors.AdapterFormatError
    assert f"the files up to {FILES[4]} have" in error.problem


@pytest.mark.parametrize("name", [INDEX, FILES[3]])
def test_no_ordinary_file(world: LocalWorld, folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    error = refusal(world, folder)
    assert type(error) is errors.AdapterFormatError
    assert f"{name} is a FIFO" in error.problem


@pytest.mark.parametrize("name", [INDEX, FILES[3]])
def test_links_stay_in_the_folder(world: LocalWorld, folder: Path, run: Run, name: str) -> None:
    (folder / "sub").mkdir()
    (folder / name).rename(folder / "sub" / "file")
    (folder / name).symlink_to("sub/file")
    run(world.source.resolve(AdapterRef("./one")))
    other = put(world.roots[0] / "other")
    for target in (other / name, other / "nothing"):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        error = refusal(world, "./one")
        assert type(error) is errors.AccessDeniedError
        assert name in error.problem
    (folder / name).unlink()
    (folder / name).symlink_to(other / name)
    key = run(world.source.resolve(AdapterRef(folder)))
    assert key.files[FILES.index(name)].inode == (other / name).stat().st_ino


async def test_the_hub_cache_keeps_its_links(world: LocalWorld) -> None:
    repository = world.roots[0] / "models--o--n"
    folder = put(repository / "snapshots" / ("c" * 40))
    (repository / "blobs").mkdir()
    for n, name in enumerate(FILES):
        blob = repository / "blobs" / (f"{n}" * 64)
        (folder / name).rename(blob)
        (folder / name).symlink_to(os.path.relpath(blob, folder))
    key = await world.source.resolve(AdapterRef(str(folder)))
    file = await world.source.open(key, Demand())
    content = read(file.reader, 0, file.reader.nbytes)
    assert safetensors.torch.load(content).keys() == tensors(1).keys()
    file.reader.close()
    secret = put(world.roots[0] / "secret")
    (folder / FILES[4]).unlink()
    (folder / FILES[4]).symlink_to(secret / FILES[4])
    with pytest.raises(errors.AccessDeniedError):
        await world.source.resolve(AdapterRef(str(folder)))


# -- several readers as one -----------------------------------------------------------------------

PARTS = [
    {"a": torch.randn(4, 8), "b": torch.randn(3)},
    {"empty": torch.randn(0, 2)},
    {"c": torch.randn(4, 8), "d": torch.arange(7, dtype=torch.int8)},
    {"e": torch.randn(16)},
]


class Bytes:
    """A reader of bytes in memory; it tells what was asked for, and may be held up."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.calls: list[str] = []
        self.closed = 0
        self.entered, self.go = Event(), Event()
        self.go.set()

    @property
    def nbytes(self) -> int:
        return len(self.content)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        self.calls.append("read_into")
        self.entered.set()
        assert self.go.wait(20)
        assert not self.closed
        for buffer in buffers:
            flat = buffer.cast("B")
            flat[:] = self.content[offset : offset + len(flat)]
            offset += len(flat)

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        self.calls.append("read_rows")
        size = buffer.nbytes // rows
        buffer.cast("B")[:] = rows_of(self.content, Span(offset, offset + size, rows, pitch))

    def close(self) -> None:
        self.closed += 1


class JoinedWorld:
    def __init__(self) -> None:
        contents = contents_of(PARTS)
        index = parse_index(index_of(PARTS), Limits())
        heads = (Head(content, len(content)) for content in contents)
        self.plan: SplitPlan = plan_split(index, heads, Limits())
        self.content = self.plan.prefix + b"".join(c[header_bytes(c) :] for c in contents)
        self.files = [Bytes(content) for content in contents]
        self.reader = SplitReader(SplitFiles(self.plan, tuple(self.files)))


@pytest.fixture
def joined() -> Iterator[JoinedWorld]:
    world = JoinedWorld()
    yield world
    world.reader.close()
    assert [file.closed for file in world.files] == [1] * len(PARTS)


def test_any_cut_gives_the_bytes(joined: JoinedWorld) -> None:
    size = len(joined.content)
    assert joined.reader.nbytes == size
    for step in (1, 7, 64, 1000):
        cuts = [*range(0, size, step), size]
        result = memoryview(bytearray(size))
        joined.reader.read_into([result[a:b] for a, b in pairwise(cuts)], 0)
        assert result == joined.content
        assert b"".join(read(joined.reader, a, b) for a, b in pairwise(cuts)) == joined.content
    assert read(joined.reader, 5, 5) == b""
    border = joined.plan.places[1].stop
    view = memoryview(bytearray(48)).cast("B", (6, 8))
    joined.reader.read_into([view], border - 20)
    assert view.tobytes() == joined.content[border - 20 :][:48]


@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize("pitch", [12, 13, 100])
def test_rows_come_from_whichever_file_has_them(joined: JoinedWorld, size: int, pitch: int) -> None:
    rows = (len(joined.content) - size) // pitch
    for start in (0, 3, len(joined.content) - (rows - 1) * pitch - size):
        span = Span(start, start + size, rows, pitch)
        assert read_rows(joined.reader, span) == rows_of(joined.content, span)
    view = memoryview(bytearray(48)).cast("B", (4, 12))
    joined.reader.read_rows(view, 100, 4, 96)
    assert view.tobytes() == rows_of(joined.content, Span(100, 112, 4, 96))


def test_what_is_in_one_file_is_one_call_and_asks_no_other(joined: JoinedWorld) -> None:
    start, size = joined.plan.places[3].start, len(joined.content)
    span = Span(start + 8, start + 16, 4, 32)
    assert read_rows(joined.reader, span) == rows_of(joined.content, span)
    assert [file.calls for file in joined.files] == [[], [], ["read_rows"], []]
    place = joined.plan.places[4]
    assert read(joined.reader, place.start, place.stop) == joined.content[place.start :]
    with pytest.raises(IntegrityError, match=f"end before byte {size + 1:,}"):
        read(joined.reader, size - 3, size + 1)
    with pytest.raises(IntegrityError, match="end before byte"):
        read_rows(joined.reader, Span(size - 50, size - 40, 3, 25))
    assert [len(file.calls) for file in joined.files] == [0, 0, 1, 1]


def test_a_read_across_a_border_ends_before_its_files_are_closed(joined: JoinedWorld) -> None:
    first = joined.files[0]
    first.go.clear()
    place = joined.plan.places[1]
    found: list[bytes] = []

    def work() -> None:
        found.append(read(joined.reader, place.stop - 8, place.stop + 8))

    thread = Thread(target=work)
    thread.start()
    assert first.entered.wait(20)
    joined.reader.close()
    assert not any(file.closed for file in joined.files)
    first.go.set()
    thread.join()
    assert found == [joined.content[place.stop - 8 : place.stop + 8]]


def test_many_first_reads_open_it_once(joined: JoinedWorld) -> None:
    opened: list[int] = []

    def opener() -> SplitFiles:
        opened.append(1)
        Event().wait(0.05)  # others come meanwhile
        return SplitFiles(joined.plan, tuple(joined.files))

    reader = SplitReader(None, opener)
    with ThreadPoolExecutor(8) as threads:
        parts = [threads.submit(read, reader, 0, len(joined.content)) for _ in range(8)]
        assert {part.result() for part in parts} == {joined.content}
    assert opened == [1]
    unread = SplitReader(None, opener)
    for closed in (joined.reader, unread):
        closed.close()
        closed.close()
        with pytest.raises(FetchError, match="closed"):
            read(closed, 0, 1)
    assert opened == [1], "what was never read is never opened"

    def refuse() -> SplitFiles:
        raise IntegrityError("changed; load the adapter again")

    refused = SplitReader(None, refuse)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="again"):
            read(refused, 0, 1)
    refused.close()
