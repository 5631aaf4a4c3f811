"""The staging ring keeps to its port. It is memory and nothing else, so that it needs no fake."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from device_groups import BytesReader
from staging_conformance import BUFFER, POISON, NewStaging, StagingConformance

from lorax_async.core.moves import Convert, Read, Zero
from lorax_async.core.runs import Span
from lorax_async.io.staging import Buffer, StagingRing, read, zero


class TestStagingRing(StagingConformance):
    @pytest.fixture
    def new_staging(self) -> NewStaging:
        def make(nbytes: int = 2 * BUFFER, move_bytes: int = BUFFER) -> StagingRing:
            return StagingRing(torch.empty(nbytes, dtype=torch.uint8), move_bytes)

        return make


def test_zeros_go_where_they_belong() -> None:
    extent = torch.full((100,), POISON, dtype=torch.uint8)
    zero((Zero(10, 5), Zero(40, 0), Zero(90, 10)), extent)
    expected = [POISON] * 10 + [0] * 5 + [POISON] * 75 + [0] * 10
    assert extent.tolist() == expected


class CountingReader(BytesReader):
    """Remembers where its calls began, and into how many buffers each read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.calls: list[tuple[int, int]] = []
        self.rows: list[tuple[int, int, int]] = []

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        self.calls.append((offset, len(buffers)))
        super().read_into(buffers, offset)

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        self.rows.append((offset, rows, pitch))
        super().read_rows(buffer, offset, rows, pitch)


def test_one_call_reads_what_adjoins_in_the_file() -> None:
    reader, extent = CountingReader(bytes(range(100))), bytearray([POISON]) * 64
    moves = (Read(20, 10, 0), Read(50, 8, 16), Read(0, 20, 32), Read(30, 5, 56))
    read(reader, moves, memoryview(extent))
    assert reader.calls == [(0, 3), (50, 1)]
    gap = bytes([POISON])
    assert extent == (
        bytes(range(20, 30))
        + 6 * gap
        + bytes(range(50, 58))
        + 8 * gap
        + bytes(range(20))
        + 4 * gap
        + bytes(range(30, 35))
        + 3 * gap
    )


def test_one_call_reads_all_rows_of_a_strided_move() -> None:
    """Beside neighbours in the file, and between its rows, with which it shares no call."""
    reader, extent = CountingReader(bytes(range(100))), bytearray([POISON]) * 40
    moves = (
        Read(60, 4, 36),
        Read(0, 10, 0),
        Read(10, 12, 16, 3, 20),
        Read(54, 6, 10),
        Read(22, 2, 28),
    )
    read(reader, moves, memoryview(extent))
    assert (reader.calls, reader.rows) == ([(0, 1), (22, 1), (54, 2)], [(10, 3, 20)])
    rows = [*range(10, 14), *range(30, 34), *range(50, 54)]
    assert list(extent[:28]) == [*range(10), *range(54, 60), *rows]
    assert list(extent[28:]) == [22, 23, *[POISON] * 6, *range(60, 64)]


def test_one_call_reads_all_rows_of_a_cast() -> None:
    """Two rows of four F32 and one of two: what a cut inside rows leaves."""
    values = torch.arange(64, dtype=torch.float32)
    reader = CountingReader(values.view(torch.uint8).numpy().tobytes())
    pieces = (Span(16, 32, 2, 48), Span(112, 120))
    move = Convert(16, 40, "F32", rows=1, columns=10, target=4, row_pitch=10, pieces=pieces)
    buffer = Buffer.of(torch.zeros(64, dtype=torch.uint8))
    target = torch.zeros(32, dtype=torch.uint8)
    buffer.convert(reader, (move,), "BF16", target)
    assert (reader.calls, reader.rows) == ([(112, 1)], [(16, 2, 48)])
    expected = [0, 0, *range(4, 8), *range(16, 20), 28, 29, *[0] * 4]
    assert target.view(torch.bfloat16).tolist() == expected


def test_the_kernel_takes_no_more_than_1024_buffers_at_once() -> None:
    reader, extent = CountingReader(bytes(range(250)) * 10), bytearray(2500)
    moves = tuple(Read(n, 1, 2499 - n) for n in range(2500))
    read(reader, moves, memoryview(extent))
    assert reader.calls == [(0, 1024), (1024, 1024), (2048, 452)]
    assert extent == bytes(reversed(bytes(range(250)) * 10))


def test_a_buffer_keeps_its_memory() -> None:
    buffer = Buffer.of(torch.full((1 << 20,), 7, dtype=torch.uint8))
    others = [torch.zeros(1 << 20, dtype=torch.uint8) for _ in range(4)]
    assert buffer.memory.tobytes() == bytes([7]) * (1 << 20)
    assert len(others) == 4


class Breaking(StagingRing):
    """Whoever wants two buffers fails once that was ordered."""

    broken = False

    def _is_served(self, turn: object, count: int) -> bool:
        if self.broken and count == 2:
            raise ZeroDivisionError
        return super()._is_served(turn, count)


def test_who_leaves_the_line_wakes_the_next() -> None:
    """The second needs nothing but its turn."""
    ring = Breaking(torch.zeros(128, dtype=torch.uint8), 64)
    with ThreadPoolExecutor(2) as threads, ring.buffer():
        takers: list[Future[list[Buffer]]] = []
        for count in (2, 1):
            takers.append(threads.submit(ring.take, count))
            while len(ring._turns) < len(takers):
                time.sleep(0.001)
        with ring._changed:
            ring.broken = True
            ring._changed.notify(1)  # the first
        with pytest.raises(ZeroDivisionError):
            takers[0].result(10)
        (taken,) = takers[1].result(5)
        ring.release(taken)
