"""Adapters that are known, and whose files have made room for others in the disk cache."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event

import pytest
from remote_world import RemoteWorld
from safetensors.torch import load, save

import tiny
from common import until
from lorax_async import AdapterHandle, AdapterLoader, EvictedError, LoaderConfig, Merge
from lorax_async.io.cache.upkeep import ls, rm
from lorax_async.io.remote.beginning import FIRST_BYTES
from lorax_async.io.remote.cached import EntryReader, ReopenedReader, gone
from merges import assert_halves

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

DEVICES = pytest.mark.parametrize("device", ["cpu", "simulated"])


def over(world: RemoteWorld, device: str) -> AdapterLoader:
    config = LoaderConfig(
        device=device, device_bytes=1 << 20, max_slots=1, io_threads=2, timeout=20
    )
    return AdapterLoader(tiny.layout(), config, source=world.source)


async def leave(world: RemoteWorld, loader: AdapterLoader, name: str) -> None:
    """It is loaded, and then neither on the device nor on the disk; the loader knows it still."""
    (await loader.load(world.ref(name))).release()
    (await loader.load(world.ref("another"))).release()
    await until(lambda: all(rm(world.cache, entry.name) for entry in ls(world.cache)))


def stocked(world: RemoteWorld, folder: Path) -> Path:
    for seed, name in enumerate(("one", "another")):
        world.put(name, *tiny.files(tiny.write(folder / name, seed)))
    return folder / "one"


@DEVICES
async def test_it_is_fetched_again_and_nobody_is_told(tmp_path: Path, device: str) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        folder = stocked(world, tmp_path)
        async with over(world, device) as loader:
            await leave(world, loader, "one")
            async with await loader.load(world.ref("one")) as handle:
                tiny.assert_equal_to_file(handle, folder)


@DEVICES
async def test_it_is_fetched_again_for_who_streams(tmp_path: Path, device: str) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        folder = stocked(world, tmp_path)
        async with over(world, device) as loader:
            for _ in range(5):
                await leave(world, loader, "one")
                async with loader.stream(world.ref("one")) as handle:
                    await all_of(handle)
                    tiny.assert_equal_to_file(handle, folder)
                async with loader.stream(world.ref("one")) as handle:
                    assert handle.resident


async def all_of(handle: AdapterHandle) -> None:
    for layer in range(tiny.LAYERS):
        await handle.layer_ready(layer)


def test_what_was_gone_once_stays_gone() -> None:
    """All who read are told the same, though it may come back meanwhile."""
    opened = 0

    def open() -> EntryReader:
        nonlocal opened
        opened += 1
        raise gone()

    reader = ReopenedReader(open)
    for _ in range(2):
        with pytest.raises(EvictedError):
            reader.read_into([memoryview(bytearray(1))], 0)
    assert opened == 1
    reader.close()


def test_many_first_reads_open_it_once() -> None:
    begun, go_on = [], Event()

    class Opened:
        nbytes = 1

        def close(self) -> None:
            pass

    def open() -> EntryReader:
        begun.append(1)
        assert go_on.wait(20)
        return Opened()  # type: ignore[return-value]

    reader = ReopenedReader(open)
    with ThreadPoolExecutor(2) as threads:
        reading = [threads.submit(lambda: reader.nbytes) for _ in range(2)]
        assert not wait(reading, timeout=0.05).done
        go_on.set()
    assert len(begun) == 1
    reader.close()


async def test_parts_of_a_merge_are_fetched_again(tmp_path: Path) -> None:
    """All of them, for no tensor comes with the first bytes."""
    note = {"note": "long" * FIRST_BYTES}
    with RemoteWorld(tmp_path / "cache") as world:
        for seed, name in enumerate("abc"):
            config, content = tiny.files(tiny.write(tmp_path / name, seed))
            world.put(name, config, save(load(content), note))
        refs = [world.ref(name) for name in "ab"]
        merge = Merge("linear", refs, [0.5, -2])
        async with over(world, "cpu") as loader:
            (await loader.load(merge)).release()
            (await loader.load(world.ref("c"))).release()
            await until(lambda: all(rm(world.cache, entry.name) for entry in ls(world.cache)))
            async with await loader.load(merge) as handle:
                assert_halves(handle, tmp_path)
