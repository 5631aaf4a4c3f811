"""Several readers as one: across their borders, and closed while they read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Event, Thread

import pytest
import torch
from rows_conformance import read_rows, rows_of
from source_inputs import header_bytes, read

from lorax_async.config import Limits
from lorax_async.core.runs import Span
from lorax_async.core.split_file import Head, SplitPlan, plan_split
from lorax_async.core.split_index import parse_index
from lorax_async.errors import FetchError, IntegrityError
from lorax_async.io.sources.split_reader import SplitFiles, SplitReader
from split_files import contents_of, index_of

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


class World:
    def __init__(self) -> None:
        contents = contents_of(PARTS)
        index = parse_index(index_of(PARTS), Limits())
        heads = (Head(content, len(content)) for content in contents)
        self.plan: SplitPlan = plan_split(index, heads, Limits())
        self.content = self.plan.prefix + b"".join(c[header_bytes(c) :] for c in contents)
        self.files = [Bytes(content) for content in contents]
        self.reader = SplitReader(SplitFiles(self.plan, tuple(self.files)))


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.reader.close()
    assert [file.closed for file in world.files] == [1] * len(PARTS)


def test_any_cut_gives_the_bytes(world: World) -> None:
    size = len(world.content)
    assert world.reader.nbytes == size
    for step in (1, 7, 64, 1000):
        cuts = [*range(0, size, step), size]
        result = memoryview(bytearray(size))
        world.reader.read_into([result[a:b] for a, b in pairwise(cuts)], 0)
        assert result == world.content
        assert b"".join(read(world.reader, a, b) for a, b in pairwise(cuts)) == world.content
    assert read(world.reader, 5, 5) == b""


def test_a_matrix_of_bytes_is_filled_across_a_border(world: World) -> None:
    border = world.plan.places[1].stop
    view = memoryview(bytearray(48)).cast("B", (6, 8))
    world.reader.read_into([view], border - 20)
    assert view.tobytes() == world.content[border - 20 :][:48]


@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize("pitch", [12, 13, 100])
def test_rows_come_from_whichever_file_has_them(world: World, size: int, pitch: int) -> None:
    rows = (len(world.content) - size) // pitch
    for start in (0, 3, len(world.content) - (rows - 1) * pitch - size):
        span = Span(start, start + size, rows, pitch)
        assert read_rows(world.reader, span) == rows_of(world.content, span)
    view = memoryview(bytearray(48)).cast("B", (4, 12))
    world.reader.read_rows(view, 100, 4, 96)
    assert view.tobytes() == rows_of(world.content, Span(100, 112, 4, 96))


def test_rows_in_one_file_are_one_call(world: World) -> None:
    start = world.plan.places[3].start
    span = Span(start + 8, start + 16, 4, 32)
    assert read_rows(world.reader, span) == rows_of(world.content, span)
    assert [file.calls for file in world.files] == [[], [], ["read_rows"], []]


def test_a_read_in_one_file_asks_no_other(world: World) -> None:
    place = world.plan.places[4]
    assert read(world.reader, place.start, place.stop) == world.content[place.start :]
    assert [len(file.calls) for file in world.files] == [0, 0, 0, 1]


def test_beyond_the_end_is_an_error(world: World) -> None:
    size = len(world.content)
    with pytest.raises(IntegrityError, match=f"end before byte {size + 1:,}"):
        read(world.reader, size - 3, size + 1)
    with pytest.raises(IntegrityError, match="end before byte"):
        read_rows(world.reader, Span(size - 50, size - 40, 3, 25))
    assert not any(file.calls for file in world.files)


def test_a_closed_reader_reads_no_more(world: World) -> None:
    world.reader.close()
    world.reader.close()
    for work in (lambda: read(world.reader, 0, 8), lambda: world.reader.nbytes):
        with pytest.raises(FetchError, match="closed"):
            work()


def test_a_read_across_a_border_ends_before_its_files_are_closed(world: World) -> None:
    first = world.files[0]
    first.go.clear()
    place = world.plan.places[1]
    found: list[bytes] = []

    def work() -> None:
        found.append(read(world.reader, place.stop - 8, place.stop + 8))

    thread = Thread(target=work)
    thread.start()
    assert first.entered.wait(20)
    world.reader.close()
    assert not any(file.closed for file in world.files)
    first.go.set()
    thread.join()
    assert found == [world.content[place.stop - 8 : place.stop + 8]]


def test_what_was_never_read_is_never_opened() -> None:
    def opener() -> SplitFiles:
        raise AssertionError("opened")

    reader = SplitReader(None, opener)
    reader.close()
    with pytest.raises(FetchError, match="closed"):
        read(reader, 0, 1)


def test_many_first_reads_open_it_once(world: World) -> None:
    opened: list[int] = []

    def opener() -> SplitFiles:
        opened.append(1)
        Event().wait(0.05)  # others come meanwhile
        return SplitFiles(world.plan, tuple(world.files))

    reader = SplitReader(None, opener)
    with ThreadPoolExecutor(8) as threads:
        parts = [threads.submit(read, reader, 0, len(world.content)) for _ in range(8)]
        assert {part.result() for part in parts} == {world.content}
    assert opened == [1]


def test_one_that_cannot_be_opened_says_so_to_each() -> None:
    def opener() -> SplitFiles:
        raise IntegrityError("changed; load the adapter again")

    reader = SplitReader(None, opener)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="again"):
            read(reader, 0, 1)
    reader.close()
