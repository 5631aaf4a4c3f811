"""Page-locked images: adapters that come back to the device without their file."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny
from common import until
from lorax_async import AdapterLoader, FetchError, TransferError
from lorax_async.testing import FakeSource
from tiny_loaders import ONE
from tiny_sources import is_at, over, simulated, state, stocked, where

pytestmark = pytest.mark.usefixtures("nothing_left")

PADDED = 2 * ONE
"""Rank 4 as rank 8, the least on this device."""


async def read_for(loader: AdapterLoader, base: Path, name: str) -> int:
    """Bytes of its file that loading it takes."""
    source = loader._machinery._source
    assert isinstance(source, FakeSource)
    before = source.counts.bytes_read
    async with await loader.load(name) as handle:
        tiny.assert_equal_to_file(handle, base / name)
    return source.counts.bytes_read - before


def pinned(loader: AdapterLoader) -> int:
    return sum(each.pinned_bytes for each in loader.residency().values())


async def test_a_reload_reads_no_byte_of_the_file(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    settings = {"device": "simulated", "max_slots": 1, "pinned_bytes": 1 << 20}
    async with over(source, **settings) as there:
        assert await read_for(there, tmp_path, "a") == ONE
        assert where(there, "a").pinned_bytes == PADDED
        assert await read_for(there, tmp_path, "b") == ONE
        found = where(there, "a")
        assert (found.tier, found.device_bytes, found.pinned_bytes) == ("host", 0, PADDED)
        assert (found.host_bytes, found.locked) == (0, True)
        await there.prefetch("a", tier="host")
        assert source.counts.populates == 0, "it is there already"
        for name in "abab":
            assert await read_for(there, tmp_path, name) == 0
        assert there.statistics().bytes_moved == 6 * PADDED


async def test_their_budget_is_kept_and_the_coldest_goes(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b", "c")
    settings = {"device": "simulated", "max_slots": 1, "pinned_bytes": 2 * PADDED}
    async with over(source, **settings) as there:
        read = []
        for name in "abcbcab":
            read.append(await read_for(there, tmp_path, name))
            assert pinned(there) <= 2 * PADDED
        # c takes the image of a, b and c come back warm, a takes that of b, b that of c
        assert read == [ONE, ONE, ONE, 0, 0, ONE, ONE]
        assert pinned(there) == 2 * PADDED


async def test_one_that_is_too_large_goes_without(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    settings = {"device": "simulated", "max_slots": 1, "pinned_bytes": PADDED - 64}
    async with over(source, **settings) as there:
        for name in "aba":
            assert await read_for(there, tmp_path, name) == ONE
            assert pinned(there) == 0
        assert is_at(there, "b", "disk")


async def test_half_an_image_is_completed_from_the_file(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    settings = {"device": "simulated", "pinned_bytes": 1 << 20, "io_threads": 1}
    async with over(source, **settings) as there:
        simulated(there).failing = {2}
        with pytest.raises(TransferError):
            await there.load("a")
        await until(lambda: state(there, "a") == "present")
        assert where(there, "a").tier == "disk"
        assert await read_for(there, tmp_path, "a") == ONE // tiny.LAYERS
        assert simulated(there).copies == 2 * tiny.LAYERS


async def test_no_image_outlives_the_file_that_was_lost(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    settings = {"device": "simulated", "pinned_bytes": 1 << 20, "io_threads": 1}
    async with over(source, **settings) as there:
        _, weights = tiny.files(tmp_path / "a")
        source.fail("read", FetchError("torn"), at=len(weights) - 1)
        with pytest.raises(FetchError, match="torn"):
            await there.load("a")
        await until(lambda: not there.residency())
        assert await read_for(there, tmp_path, "a") == ONE
        assert source.counts.opens == 2


@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_none_where_none_is_asked_for(tmp_path: Path, device: str) -> None:
    """Nor on a device whose arena is host memory itself."""
    source = stocked(tmp_path, "a", "b")
    pinned_bytes = 1 << 20 if device == "cpu" else 0
    async with over(source, device=device, max_slots=1, pinned_bytes=pinned_bytes) as there:
        for name in "aba":
            assert await read_for(there, tmp_path, name) == ONE
        assert pinned(there) == 0
