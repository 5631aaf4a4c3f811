"""The staging ring, and what is cast, padded and read through it: oracles are numpy and the bits."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from device_groups import BytesReader
from event_loops import until

from lorax_async.devices.staging import StagingRing
from lorax_async.errors import InternalError
from lorax_async.planning.transfer_plan import ConvertMove

BUFFER = 4096
POISON = 0xA5
ITEM = {"BF16": 2, "F16": 2, "F32": 4}
PAIRS = list(product(ITEM, ITEM))


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


def new_staging(nbytes: int = 2 * BUFFER, move_bytes: int = BUFFER) -> StagingRing:
    return StagingRing(torch.empty(nbytes, dtype=torch.uint8), move_bytes)


def converted(content: bytes, move: ConvertMove, dtype: str) -> bytes:
    extent = torch.full((3 * BUFFER,), POISON, dtype=torch.uint8)
    staging = new_staging()
    staging.take(1)[0].convert(BytesReader(content), (move,), dtype, extent)
    return extent.numpy().tobytes()


class TestCasts:
    @pytest.mark.parametrize(("source", "target"), PAIRS)
    def test_round_to_nearest_even(self, source: str, target: str) -> None:
        content = hard_values(source)
        expected, count = rounded(as_float32(content, source), target), len(content) // ITEM[source]
        move = ConvertMove(0, len(content), source, 1, count, 64, count)
        extent = converted(content, move, target)
        got = extent[64 : 64 + len(expected)]
        assert set(extent[:64] + extent[64 + len(expected) :]) == {POISON}
        nan: np.ndarray = np.isnan(as_float32(expected, target))
        assert (np.isnan(as_float32(got, target)) == nan).all()
        kind = f"<u{ITEM[target]}"
        assert (np.frombuffer(got, kind) == np.frombuffer(expected, kind))[~nan].all()


async def waiting_in(staging: StagingRing, count: int) -> None:
    await until(lambda: f"{count} waiting" in repr(staging))


class TestStagingRing:
    def test_refuses_what_does_not_fit(self) -> None:
        for ask, named in (
            (lambda: new_staging(BUFFER - 1), "hold no buffer of 4096"),
            (lambda: new_staging().take(3), "3 buffers of a ring of 2"),
            (
                lambda: converted(b"", ConvertMove(0, BUFFER + 4, "F32", 1, 1025, 0, 1025), "F32"),
                "a move of",
            ),
        ):
            with pytest.raises(InternalError, match=named):
                ask()

    def test_buffers_are_apart_aligned_and_within_the_budget(self) -> None:
        for nbytes, count in ((BUFFER, 1), (3 * BUFFER - 1, 2), (3 * BUFFER, 3)):
            staging = new_staging(nbytes)
            assert (staging.buffers, staging.free) == (count, count)
            buffers = staging.take(count)
            assert staging.free == 0
            for byte, buffer in enumerate(buffers):
                buffer.tensor.fill_(byte)
            for byte, buffer in enumerate(buffers):
                assert buffer.memory.tobytes() == bytes([byte]) * BUFFER
                assert (buffer.memory.format, buffer.memory.readonly) == ("B", False)
        offsets = {buffer.tensor.storage_offset() for buffer in new_staging(999, 333).take(3)}
        assert not any(offset % 64 for offset in offsets)

    async def test_who_came_first_is_served_first(self) -> None:
        """Who waits for two does not hold the one that is free, and is not passed."""
        staging, served = new_staging(2 * BUFFER), list[int]()

        def take(count: int) -> None:
            buffers = staging.take(count)
            served.append(count)
            for buffer in buffers:
                staging.release(buffer)

        (taken,) = staging.take(1)
        with ThreadPoolExecutor(3) as threads:
            for waiting, count in enumerate((2, 1, 1), 1):
                threads.submit(take, count)
                await waiting_in(staging, waiting)
            assert served == []
            staging.release(taken)
        assert served == [2, 1, 1]
        assert repr(staging) == "<StagingRing: 2 of 2 buffers free, 0 waiting>"

    @pytest.mark.parametrize(("buffers", "count"), [(1, 1), (2, 2), (3, 2)])
    def test_takers_do_not_block_each_other(self, buffers: int, count: int) -> None:
        """With three buffers, two takers of two could hold one each and wait for the other's."""
        staging = new_staging(buffers * BUFFER)
        lock, taken = threading.Lock(), [0, 0]

        def take(_: int) -> None:
            mine = staging.take(count)
            with lock:
                taken[0] += count
                taken[1] = max(taken)
            time.sleep(0.0001)
            with lock:
                taken[0] -= count
            for buffer in mine:
                staging.release(buffer)

        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(take, range(200), timeout=30)) == [None] * 200
        assert (taken, staging.free) == ([0, count * (buffers // count)], buffers)
