"""What every staging pool keeps to. A test class derives from `StagingConformance`.

Its module has a fixture `new_staging`, which makes pools. The oracles are numpy's rounding, and for
bfloat16, which numpy does not have, IEEE 754's rounding to nearest even worked out on the bits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import pytest
import torch
from device_groups import BytesReader

from lorax_async.core.moves import Convert
from lorax_async.errors import FetchError, InternalError
from lorax_async.io.staging import StagingRing

BUFFER = 4096
POISON = 0xA5
ITEM = {"F32": 4, "F16": 2, "BF16": 2}
DTYPES = sorted(ITEM)
PAIRS = [(source, target) for source in DTYPES for target in DTYPES]


class NewStaging(Protocol):
    def __call__(self, nbytes: int = 2 * BUFFER, move_bytes: int = BUFFER) -> StagingRing: ...


def as_float32(content: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(content, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(content, {"F32": "<f4", "F16": "<f2"}[dtype]).astype("<f4")


def rounded(values: np.ndarray, dtype: str) -> bytes:
    """Float32 values as `dtype`, to nearest, ties to even. NaN stays NaN, of whatever payload."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    bits = values.view("<u4").astype(np.uint64)
    bits += 0x7FFF + ((bits >> 16) & 1)
    half = (bits >> 16).astype("<u2")
    return np.where(np.isnan(values), np.uint16(0x7FC0), half).astype("<u2").tobytes()


def hard_values(dtype: str) -> bytes:
    """Ties, both infinities, NaN, zeros, the largest, the smallest, and every exponent."""
    if dtype != "F32":
        return np.arange(0, 1 << 16, 37, dtype="<u2").tobytes()
    words = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F800000, 0xFF800000, 0x7FC00000, 0, 1 << 31]
    words += [0x7F7FFFFF, 1, 0x80000001, 0x33000000, 0x33000001, 0x477FEFFF, 0x477FF000, 0x387FE000]
    words += [exponent << 23 | 0x123456 for exponent in range(255)]
    return np.array(words, "<u4").tobytes()


def flat(content: bytes, dtype: str, offset: int = 0, target: int = 0) -> Convert:
    count = len(content) // ITEM[dtype]
    return Convert(offset, len(content), dtype, 1, count, target, count)


def converted(staging: StagingRing, content: bytes, moves: Sequence[Convert], dtype: str) -> bytes:
    """What a poisoned extent holds afterwards."""
    extent = torch.full((3 * BUFFER,), POISON, dtype=torch.uint8)
    with staging.buffer() as scratch:
        scratch.convert(BytesReader(content), tuple(moves), dtype, extent)
    return extent.numpy().tobytes()


def nan_places(content: bytes, dtype: str) -> np.ndarray:
    places: np.ndarray = np.isnan(as_float32(content, dtype))
    return places


class StagingConformance:
    @pytest.mark.parametrize(("source", "target"), PAIRS)
    def test_casts_round_to_nearest_even(
        self, new_staging: NewStaging, source: str, target: str
    ) -> None:
        content = hard_values(source)
        expected = rounded(as_float32(content, source), target)
        extent = converted(new_staging(), content, [flat(content, source, target=64)], target)
        assert extent[:64] == bytes([POISON]) * 64
        got, rest = extent[64 : 64 + len(expected)], extent[64 + len(expected) :]
        assert set(rest) == {POISON}
        nan = nan_places(expected, target)
        assert (nan_places(got, target) == nan).all()
        kind = f"<u{ITEM[target]}"
        assert (np.frombuffer(got, kind) == np.frombuffer(expected, kind))[~nan].all()

    @pytest.mark.parametrize(("source", "target"), PAIRS)
    def test_casts_as_torch_does(self, new_staging: NewStaging, source: str, target: str) -> None:
        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        values = torch.randn(700, generator=torch.Generator().manual_seed(3)).to(kinds[source])
        content = values.view(torch.uint8).numpy().tobytes()
        extent = converted(new_staging(), content, [flat(content, source)], target)
        expected = values.to(kinds[target]).view(torch.uint8).numpy().tobytes()
        assert extent[: len(expected)] == expected

    @pytest.mark.parametrize(("source", "target"), PAIRS)
    def test_columns_are_padded_with_zeros(
        self, new_staging: NewStaging, source: str, target: str
    ) -> None:
        """B of rank 3 in rows of 8, between bytes that are not the move's."""
        whole = np.arange(1, 31, dtype="<f4")
        content = b"odd" + rounded(whole, source)
        move = Convert(3, 30 * ITEM[source], source, rows=10, columns=3, target=128, row_pitch=8)
        extent = converted(new_staging(), content, [move], target)
        padded = np.zeros((10, 8), "<f4")
        padded[:, :3] = whole.reshape(10, 3)
        expected = rounded(padded, target)
        assert extent[128 : 128 + len(expected)] == expected
        assert set(extent[:128] + extent[128 + len(expected) :]) == {POISON}

    def test_every_move_goes_to_its_place(self, new_staging: NewStaging) -> None:
        """The second move is shorter: the buffer still holds the end of the first."""
        first, second = np.arange(1000, dtype="<f4"), np.arange(50, 60, dtype="<f2")
        content = second.tobytes() + first.tobytes()
        moves = [
            flat(first.tobytes(), "F32", offset=20, target=256),
            flat(second.tobytes(), "F16", offset=0, target=64),
        ]
        extent = converted(new_staging(), content, moves, "F16")
        assert extent[256:2256] == first.astype("<f2").tobytes()
        assert extent[64:84] == second.tobytes()
        assert set(extent[:64] + extent[84:256] + extent[2256:]) == {POISON}

    def test_a_move_may_fill_the_buffer_and_no_more(self, new_staging: NewStaging) -> None:
        staging = new_staging()
        content = np.arange(BUFFER // 4 + 1, dtype="<f4").tobytes()
        extent = converted(staging, content, [flat(content[:BUFFER], "F32")], "F32")
        assert extent[:BUFFER] == content[:BUFFER]
        with pytest.raises(InternalError, match="4100 bytes exceeds"):
            converted(staging, content, [flat(content, "F32")], "F32")
        assert staging.free == staging.buffers

    def test_the_budget_is_kept(self, new_staging: NewStaging) -> None:
        for nbytes, buffers in ((BUFFER, 1), (3 * BUFFER - 1, 2), (3 * BUFFER, 3)):
            staging = new_staging(nbytes)
            assert (staging.buffers, staging.free) == (buffers, buffers)
            with staging.buffer() as buffer:
                assert len(buffer.memory) == buffer.tensor.nbytes == BUFFER
                assert staging.free == buffers - 1

    def test_nobody_shares_a_buffer(self, new_staging: NewStaging) -> None:
        staging = new_staging(2 * BUFFER)
        with staging.buffer() as one, staging.buffer() as two:
            assert staging.free == 0
            for buffer, byte in ((one, 1), (two, 2)):
                buffer.tensor.fill_(byte)
            assert one.memory.tobytes() == bytes([1]) * BUFFER
            assert two.memory.tobytes() == bytes([2]) * BUFFER

    def test_who_finds_none_waits(self, new_staging: NewStaging) -> None:
        staging, started, got = new_staging(BUFFER), threading.Event(), threading.Event()

        def take() -> None:
            started.set()
            with staging.buffer():
                got.set()

        with staging.buffer():
            taking = threading.Thread(target=take)
            taking.start()
            assert started.wait(10)
            assert not got.wait(0.05)
        assert got.wait(10)
        taking.join()
        assert staging.free == 1

    def test_a_buffer_is_the_same_bytes_twice(self, new_staging: NewStaging) -> None:
        with new_staging().buffer() as buffer:
            buffer.memory[10:13] = b"abc"
            assert buffer.tensor[10:13].tolist() == list(b"abc")
            assert (buffer.memory.format, buffer.memory.readonly) == ("B", False)

    def test_two_at_once_or_none(self, new_staging: NewStaging) -> None:
        """Who waits for two does not hold the one that is free."""
        staging, got = new_staging(2 * BUFFER), threading.Event()

        def take() -> None:
            for buffer in staging.take(2):
                staging.release(buffer)
            got.set()

        with staging.buffer():
            taking = threading.Thread(target=take)
            taking.start()
            assert not got.wait(0.05)
            assert staging.free == 1
        assert got.wait(10)
        taking.join()

    def test_takers_of_two_do_not_block_each_other(self, new_staging: NewStaging) -> None:
        """With three buffers, two of them could hold one each and wait for the other's."""
        staging = new_staging(3 * BUFFER)

        def take(_: int) -> bool:
            one, two = staging.take(2)
            time.sleep(0.0001)
            staging.release(one)
            staging.release(two)
            return one is not two

        with ThreadPoolExecutor(6) as threads:
            assert all(threads.map(take, range(300), timeout=30))
        assert staging.free == 3

    def test_who_came_first_is_served_first(self, new_staging: NewStaging) -> None:
        """Those who want one do not pass one who waits for two."""
        staging, served = new_staging(2 * BUFFER), list[int]()

        def take(number: int, count: int) -> None:
            buffers = staging.take(count)
            served.append(number)
            for buffer in buffers:
                staging.release(buffer)

        with staging.buffer():
            takers = [
                threading.Thread(target=take, args=(n, count)) for n, count in enumerate((2, 1, 1))
            ]
            for waiting, taker in enumerate(takers):
                taker.start()
                while len(staging._turns) <= waiting:
                    time.sleep(0.001)
            assert (served, staging.free) == ([], 1)
        for taker in takers:
            taker.join(10)
        assert served[0] == 0
        assert sorted(served) == [0, 1, 2]

    def test_what_the_ring_does_not_have(self, new_staging: NewStaging) -> None:
        staging = new_staging(2 * BUFFER)
        with pytest.raises(InternalError, match="3 buffers of a ring of 2"):
            staging.take(3)
        assert len(staging.take(2)) == 2
        for nbytes, move_bytes in ((BUFFER - 1, BUFFER), (BUFFER, 63)):
            with pytest.raises(InternalError, match="no buffer"):
                new_staging(nbytes, move_bytes)

    def test_buffers_start_on_cache_lines(self, new_staging: NewStaging) -> None:
        """So that every element in them is aligned."""
        staging = new_staging(1_000, 333)
        assert (staging.move_bytes, staging.buffers) == (320, 3)
        assert {buffer.tensor.storage_offset() % 64 for buffer in staging.take(3)} == {0}

    def test_never_more_moves_than_buffers(self, new_staging: NewStaging) -> None:
        """Eight threads, two buffers, and every extent comes out right."""
        staging, running, most = new_staging(2 * BUFFER), [0], [0]
        lock, full = threading.Lock(), threading.Barrier(2)

        def before() -> None:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            full.wait(10)  # both buffers are in use at this moment
            with lock:
                running[0] -= 1

        def convert(number: int) -> bool:
            values = np.full(1000, number, "<f4")
            extent = torch.empty(2000, dtype=torch.uint8)
            move = (flat(values.tobytes(), "F32"),)
            with staging.buffer() as scratch:
                scratch.convert(BytesReader(values.tobytes(), before), move, "F16", extent)
            return extent.numpy().tobytes() == values.astype("<f2").tobytes()

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(convert, range(40)))
        assert (most[0], staging.free) == (2, 2)

    def test_a_failed_read_gives_the_buffer_back(self, new_staging: NewStaging) -> None:
        staging, content = new_staging(BUFFER), bytes(64)

        def fail() -> None:
            assert staging.free == 0
            raise FetchError("the disk is on fire")

        extent = torch.full((64,), POISON, dtype=torch.uint8)
        with pytest.raises(FetchError, match="on fire"), staging.buffer() as scratch:
            scratch.convert(BytesReader(content, fail), (flat(content, "F32"),), "F32", extent)
        assert staging.free == 1
        assert (extent == POISON).all()
