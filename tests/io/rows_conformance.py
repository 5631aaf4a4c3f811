"""What every `Source`'s readers keep to where they read rows that lie apart in the file."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import pytest
from source_inputs import CONFIG, header_bytes, weights

from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.core.runs import Span
from lorax_async.errors import FetchError, IntegrityError, InternalError
from lorax_async.io.ports import AdapterFile, Demand, Reader, Source


class World(Protocol):
    source: Source

    def put(self, name: str, config: bytes, weights: bytes) -> AdapterRef:
        """Add an adapter, or replace it."""


Run = Callable[[Coroutine[Any, Any, Any]], Any]


def read_rows(reader: Reader, span: Span) -> bytes:
    content = bytearray(span.nbytes)
    reader.read_rows(memoryview(content), span.start, span.rows, span.pitch)
    return bytes(content)


def rows_of(content: bytes, span: Span) -> bytes:
    return b"".join(content[start:stop] for start, stop in span.ranges())


class RowsConformance:
    @pytest.mark.parametrize("reopened", [False, True])
    @pytest.mark.parametrize(
        ("first", "size", "rows", "pitch"),
        [
            (0, 12, 4, 96),
            (84, 12, 4, 96),
            (3, 5, 7, 11),  # at no multiple of an element
            (0, 16, 5, 16),  # without a gap
            (200, 1, 90, 2),
            (50, 300, 1, 0),
        ],
    )
    async def test_rows_come_one_after_the_other(
        self, world: World, first: int, size: int, rows: int, pitch: int, reopened: bool
    ) -> None:
        content = weights(1)
        start = header_bytes(content) + first
        span = Span(start, start + size, rows, pitch)
        file, key = await brought(world, content, Span(0, len(content)))
        reader = world.source.reopen(key) if reopened else file.reader
        assert read_rows(reader, span) == rows_of(content, span)
        file.reader.close()
        reader.close()

    async def test_rows_fill_a_matrix_of_bytes_too(self, world: World) -> None:
        content = weights(1)
        start = header_bytes(content)
        file, _ = await brought(world, content, Span(0, len(content)))
        view = memoryview(bytearray(48)).cast("B", (4, 12))
        file.reader.read_rows(view, start, 4, 96)
        assert view.tobytes() == rows_of(content, Span(start, start + 12, 4, 96))
        file.reader.close()

    async def test_no_more_is_brought_than_the_rows(self, world: World) -> None:
        """They can be read; a source that knows what is here tells of what is not."""
        content = weights(1)
        start = header_bytes(content)
        span = Span(start + 24, start + 48, 4, 96)
        file, _ = await brought(world, content, span)
        assert read_rows(file.reader, span) == rows_of(content, span)
        wider = Span(span.start, span.stop + 1, 4, 96)
        try:
            assert read_rows(file.reader, wider) == rows_of(content, wider)
        except InternalError as error:
            assert "before they arrived" in str(error)
        file.reader.close()

    @pytest.mark.parametrize("beyond", [1, 97, 1000])
    async def test_rows_beyond_the_end_are_an_error(self, world: World, beyond: int) -> None:
        """The last ends within the file, or begins behind it."""
        content = weights(1)
        start = len(content) + beyond - 2 * 96 - 12
        file, _ = await brought(world, content, Span(0, len(content)))
        with pytest.raises(IntegrityError, match="ends before byte"):
            read_rows(file.reader, Span(start, start + 12, 3, 96))
        file.reader.close()

    async def test_rows_are_of_the_version_that_was_opened(self, world: World) -> None:
        content = weights(1)
        start = header_bytes(content)
        file, key = await brought(world, content, Span(0, len(content)))
        world.put("one", CONFIG, weights(2))
        for reader in (file.reader, world.source.reopen(key)):
            rows = Span(start, start + 12, 4, 96)
            try:
                assert read_rows(reader, rows) == rows_of(content, rows)
            except IntegrityError as error:
                assert "again" in str(error)
            reader.close()

    async def test_a_closed_reader_reads_no_rows(self, world: World) -> None:
        file, _ = await brought(world, weights(1), Span(0, 8))
        file.reader.close()
        with pytest.raises(FetchError):
            read_rows(file.reader, Span(0, 2, 2, 4))


async def brought(world: World, content: bytes, span: Span) -> tuple[AdapterFile, AdapterKey]:
    """An adapter that is opened, and these bytes of it are here."""
    key = await world.source.resolve(world.put("one", CONFIG, content))
    file = await world.source.open(key, Demand())
    await world.source.bring(file, [[span]], lambda _: None, Demand())
    return file, key
