"""The tier between disk and device: held pages, page-locked images, their budgets."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import tiny
from common import until
from lorax_async import (
    AdapterLoader,
    CapacityError,
    FetchError,
    LocalRoot,
    TransferError,
)
from lorax_async.io import mapped
from lorax_async.testing import FakeSource
from page_looks import cached_pages, drop_pages, map_sizes, may_lock, pages
from tiny_loaders import ONE, loader
from tiny_sources import WEIGHTS, is_at, over, simulated, state, stocked, where

pytestmark = pytest.mark.usefixtures("nothing_left")

PADDED = 2 * ONE
"""Rank 4 as rank 8, the least on the simulated device."""


def bytes_from_disk() -> int:
    """What this process made the kernel fetch from storage so far."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def dropped(folder: Path) -> Path:
    for name in ("adapter_config.json", WEIGHTS):
        drop_pages(folder / name)
    assert cached_pages(folder / WEIGHTS) == 0
    return folder / WEIGHTS


async def test_what_was_prefetched_to_the_host_is_read_without_a_disk(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", rank=64)
    weights = dropped(folder)
    async with loader(local_roots=[LocalRoot(tmp_path, immutable=True)]) as there:
        await there.prefetch(folder, tier="disk")
        found = where(there, folder)
        assert (found.tier, found.state, found.host_bytes) == ("disk", "present", 0)
        dropped(folder)
        before = bytes_from_disk()
        (await there.load(folder)).release()
        assert bytes_from_disk() - before >= weights.stat().st_size // 2, "as it should be told"
        await there.unload(folder)
        dropped(folder)
        await there.prefetch(folder, tier="host")
        assert cached_pages(weights) == pages(weights.stat().st_size)
        found = where(there, folder)
        assert (found.tier, found.state, found.slot) == ("host", "held", None)
        assert (found.host_bytes, found.device_bytes) == (weights.stat().st_size, 0)
        assert found.locked is may_lock(found.host_bytes)
        before = bytes_from_disk()
        async with await there.load(folder) as handle:
            assert bytes_from_disk() == before
            tiny.assert_equal_to_file(handle, folder)
            found = where(there, folder)
            assert (found.tier, found.state, found.leases) == ("device", "resident", 1)
            assert (found.device_bytes, found.host_bytes) == (handle.nbytes, found.host_bytes)
        await there.unload(folder)
        assert not map_sizes(weights)
        dropped(folder)


async def test_what_may_change_is_read_ahead_each_time(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", rank=64)
    weights = folder / WEIGHTS
    async with loader(host_bytes=0) as there:
        for _ in range(2):
            dropped(folder)
            await there.prefetch(folder, tier="host")
            await until(lambda: cached_pages(weights) == pages(weights.stat().st_size))
            found = where(there, folder)
            assert (found.tier, found.state) == ("host", "read ahead")
            assert (found.host_bytes, found.locked) == (0, False)
        assert not map_sizes(weights)


async def test_where_the_kernel_does_not_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.write(tmp_path / "a")
    monkeypatch.setattr(mapped, "lock_on_fault", lambda *_: errno.ENOMEM)
    async with loader(local_roots=[LocalRoot(tmp_path, immutable=True)]) as there:
        await there.prefetch(folder, tier="host")
        found = where(there, folder)
        assert (found.state, found.locked) == ("held", False)
        assert found.host_bytes == (folder / WEIGHTS).stat().st_size


async def test_the_coldest_makes_room_within_the_budget(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b", "c", holdable=True)
    nbytes = (tmp_path / "a" / WEIGHTS).stat().st_size
    async with over(source, host_bytes=2 * nbytes) as there:
        for name in "ab":
            await there.prefetch(name, tier="host")
        (await there.load("a")).release()  # b is the colder one
        await there.unload("a")
        await there.prefetch("a", tier="host")
        (await there.load("b")).release()
        await there.prefetch("c", tier="host")
        assert not is_at(there, "a", "host")
        held = {name: where(there, name).host_bytes for name in "abc"}
        assert held == {"a": 0, "b": nbytes, "c": nbytes}
        assert source.counts.open_holds == 2


async def test_what_is_larger_than_the_budget_is_refused(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", holdable=True)
    nbytes = (tmp_path / "a" / WEIGHTS).stat().st_size
    async with over(source, host_bytes=nbytes - 1) as there:
        with pytest.raises(CapacityError, match="raise host_bytes") as caught:
            await there.prefetch("a", tier="host")
        assert (caught.value.retryable, caught.value.id) == (False, "a")
        await there.prefetch("a")
        await there.unload("a")
        assert (source.counts.populates, source.counts.open_holds) == (0, 0)


async def test_who_was_pushed_off_the_device_goes_on_in_host_memory(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b", "c", holdable=True)
    nbytes = (tmp_path / "a" / WEIGHTS).stat().st_size
    async with over(source, max_slots=1, host_bytes=nbytes) as there:
        for name in "ab":
            (await there.load(name)).release()
        await until(lambda: state(there, "a") == "held")
        assert where(there, "a").host_bytes == nbytes
        (await there.load("c")).release()
        await until(lambda: state(there, "b") == "held")
        assert where(there, "a").tier == "disk"
        await there.unload("c")
        assert where(there, "c").tier == "disk"
        assert (source.counts.populates, source.counts.open_holds) == (2, 1)


async def test_unloading_what_was_read_ahead_beside_one_who_wants_room(tmp_path: Path) -> None:
    """It keeps nothing open."""
    source = stocked(tmp_path, "a", "b", holdable=True)
    nbytes = (tmp_path / "a" / WEIGHTS).stat().st_size
    async with over(source, host_bytes=nbytes) as there:
        await there.prefetch("a", tier="host")
        await there.prefetch("b", tier="disk")
        source.holdable = False
        source.put("ahead", *tiny.files(tmp_path / "a"))
        await there.prefetch("ahead", tier="host")
        assert (source.counts.populates, source.counts.open_holds) == (2, 1)
        source.holdable = True
        key = next(key for key in there.residency() if key.location == "memory:b")
        hint = there.prefetch(key, tier="host")
        await there.unload("ahead")
        await hint
        assert is_at(there, "b", "host")
        assert where(there, "a").host_bytes == 0


# -- page-locked images ---------------------------------------------------------------------------


async def read_for(loader: AdapterLoader, source: FakeSource, base: Path, name: str) -> int:
    """Bytes of its file that loading it takes."""
    before = source.counts.bytes_read
    async with await loader.load(name) as handle:
        tiny.assert_equal_to_file(handle, base / name)
    return source.counts.bytes_read - before


async def test_a_reload_reads_no_byte_of_the_file(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    settings = {"device": "simulated", "max_slots": 1, "pinned_bytes": 1 << 20}
    async with over(source, **settings) as there:
        assert await read_for(there, source, tmp_path, "a") == ONE
        assert where(there, "a").pinned_bytes == PADDED
        assert await read_for(there, source, tmp_path, "b") == ONE
        found = where(there, "a")
        assert (found.tier, found.device_bytes, found.pinned_bytes) == ("host", 0, PADDED)
        assert (found.host_bytes, found.locked) == (0, True)
        await there.prefetch("a", tier="host")
        assert source.counts.populates == 0, "it is there already"
        for name in "abab":
            assert await read_for(there, source, tmp_path, name) == 0
        assert there.statistics().bytes_moved == 6 * PADDED


async def test_their_budget_is_kept_and_the_coldest_goes(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b", "c")
    settings = {"device": "simulated", "max_slots": 1, "pinned_bytes": 2 * PADDED}
    async with over(source, **settings) as there:
        read = []
        for name in "abcbcab":
            read.append(await read_for(there, source, tmp_path, name))
            assert there.usage().pinned_bytes.used <= 2 * PADDED
        # c takes the image of a, b and c come back warm, a takes that of b, b that of c
        assert read == [ONE, ONE, ONE, 0, 0, ONE, ONE]
        assert there.usage().pinned_bytes.used == 2 * PADDED


async def test_half_an_image_is_completed_from_the_file(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source, device="simulated", pinned_bytes=1 << 20, io_threads=1) as there:
        simulated(there).failing = {2}
        with pytest.raises(TransferError):
            await there.load("a")
        await until(lambda: state(there, "a") == "present")
        assert where(there, "a").tier == "disk"
        assert await read_for(there, source, tmp_path, "a") == ONE // tiny.LAYERS
        assert simulated(there).copies == 2 * tiny.LAYERS


async def test_no_image_outlives_the_file_that_was_lost(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source, device="simulated", pinned_bytes=1 << 20, io_threads=1) as there:
        _, weights = tiny.files(tmp_path / "a")
        source.fail("read", FetchError("torn"), at=len(weights) - 1)
        with pytest.raises(FetchError, match="torn"):
            await there.load("a")
        await until(lambda: not there.residency())
        assert await read_for(there, source, tmp_path, "a") == ONE
        assert source.counts.opens == 2


@pytest.mark.parametrize(
    ("device", "pinned_bytes"), [("cpu", 1 << 20), ("simulated", 0), ("simulated", PADDED - 64)]
)
async def test_there_is_no_image_without_room_or_need(
    tmp_path: Path, device: str, pinned_bytes: int
) -> None:
    """Nor on a device whose arena is host memory itself."""
    source = stocked(tmp_path, "a", "b")
    async with over(source, device=device, max_slots=1, pinned_bytes=pinned_bytes) as there:
        for name in "aba":
            assert await read_for(there, source, tmp_path, name) == ONE
        assert there.usage().pinned_bytes.used == 0
        assert is_at(there, "b", "disk")
