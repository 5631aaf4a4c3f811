"""Entries of spilled tensors that other loaders, or killed processes, have in the same folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
from cache_inputs import content_of, stored
from disk_cache_world import open_below
from source_inputs import CONFIG, tensors
from spilling_world import SIZE, World, entry_key

from common import until
from lorax_async.adapter import AdapterKey
from lorax_async.core.cache_names import CONFIG_FILE, CacheKey
from lorax_async.core.policies import policy
from lorax_async.errors import CapacityError
from lorax_async.io.disk_cache import DiskCache

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskCache]:
    cache = DiskCache(tmp_path, 1 << 30, policy("lru"))
    yield cache
    cache.close()
    assert open_below(tmp_path) == []


@pytest.fixture
def on_disk(disk: DiskCache) -> Iterator[World]:
    with ThreadPoolExecutor(2) as threads:
        world = World(disk, threads)
        yield world
        world.close()


async def test_two_loaders_share_an_entry(on_disk: World, disk: DiskCache) -> None:
    with ThreadPoolExecutor(2) as threads:
        other_cache = DiskCache(_folder(disk), 1 << 30, policy("lru"))
        other = World(other_cache, threads)
        key = await on_disk.take(1)
        await on_disk.take(2)
        written = _inode(disk, key)
        assert await other.take(1) == key
        await other.take(3)
        assert _inode(disk, key) == written
        on_disk.source.copies.drop(key)
        await on_disk.take(4)  # after what was to be removed
        await on_disk.take(5)
        assert _inode(disk, key) == written
        await other.assert_is(key, 1)
        other.close()
        assert _inode(disk, key) is None
        other_cache.close()


CHILD = """
import asyncio, os, signal, sys
sys.path += ["tests", "tests/io"]
from concurrent.futures import ThreadPoolExecutor
from lorax_async.core.policies import policy
from lorax_async.io.disk_cache import DiskCache
from spilling_world import World

async def main():
    cache = DiskCache(sys.argv[1], 1 << 30, policy("lru"))
    world = World(cache, ThreadPoolExecutor(2))
    await world.take(1)
    if sys.argv[2] == "half":
        from lorax_async.io.cache.download import DiskDownload
        DiskDownload.publish = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    await world.take(2)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def killed(folder: Path, when: str) -> None:
    """A process that spilled adapter 1, or was about to publish it."""
    root = Path(__file__).parent.parent.parent
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), when],
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{root}:{root}/kernels"},
        timeout=120,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL


async def test_what_a_killed_process_left_is_taken_up(on_disk: World, disk: DiskCache) -> None:
    killed(_folder(disk), "whole")

    async def main() -> None:
        key = await on_disk.take(1)
        left = _inode(disk, key)
        assert left is not None
        await on_disk.take(2)
        assert _inode(disk, key) == left
        await on_disk.assert_is(key, 1)

    await main()
    on_disk.source.copies.clear()
    await until(lambda: disk.used() == 0)


def test_what_a_killed_process_left_makes_room_for_anybody(disk: DiskCache, tmp_path: Path) -> None:
    killed(tmp_path, "whole")
    assert disk.used() > SIZE
    small = DiskCache(tmp_path, 2 * SIZE, policy("lru"))
    stored(small, CacheKey("hub:org/name", "1"), bytes(SIZE)).close()
    assert small.used() < 2 * SIZE
    small.close()


async def test_what_was_half_written_is_written_anew(on_disk: World, disk: DiskCache) -> None:
    killed(_folder(disk), "half")
    partials = list((_folder(disk) / "partials").iterdir())
    (file,) = (path for part in partials for path in part.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))  # and the disk has lost its bytes
    key = await on_disk.take(1)
    await on_disk.take(2)
    assert on_disk.is_spilled(key)
    await on_disk.assert_is(key, 1)
    assert list((_folder(disk) / "partials").iterdir()) == []


@pytest.mark.parametrize("wrong", ["damaged", "another's"])
async def test_wrong_bytes_under_its_name_are_never_read(
    on_disk: World, disk: DiskCache, wrong: str
) -> None:
    key = await on_disk.take(1)
    content = safetensors.torch.save(tensors(1))
    other = bytes(len(content))
    stored(disk, entry_key(key), other if wrong == "another's" else content, CONFIG).close()
    if wrong == "damaged":
        path = _folder(disk) / "entries" / entry_key(key).name / "adapter_model.safetensors"
        times = path.stat()
        path.write_bytes(other)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        await on_disk.take(2)
    else:
        with pytest.raises(CapacityError, match="other bytes under the name"):
            await on_disk.take(2)
        assert not on_disk.is_spilled(key)
        await on_disk.take(2)
    assert on_disk.is_spilled(key)
    await on_disk.assert_is(key, 1)
    entry = disk.open(entry_key(key))
    assert entry is not None
    assert content_of(entry, CONFIG_FILE) == CONFIG
    entry.close()


def _folder(disk: DiskCache) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{disk.shelves.place.entries.fd}")).parent


def _inode(disk: DiskCache, key: AdapterKey) -> int | None:
    """Which entry it is."""
    status = disk.shelves.place.entries.status(entry_key(key).name)
    return None if status is None else status.st_ino
