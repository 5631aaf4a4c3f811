"""Adapters that are known, and whose files have made room for others in the disk cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from remote_world import RemoteWorld

import tiny
from common import Run, until
from lorax_async import AdapterHandle, AdapterLoader, EvictedError, LoaderConfig
from lorax_async.io.cache.upkeep import ls, rm
from lorax_async.io.remote.cached import EntryReader, ReopenedReader, gone

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
def test_it_is_fetched_again_and_nobody_is_told(run: Run, tmp_path: Path, device: str) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        folder = stocked(world, tmp_path)

        async def body() -> None:
            async with over(world, device) as loader:
                await leave(world, loader, "one")
                async with await loader.load(world.ref("one")) as handle:
                    tiny.assert_equal_to_file(handle, folder)

        run(body())


@DEVICES
def test_it_is_fetched_again_for_who_streams(run: Run, tmp_path: Path, device: str) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        folder = stocked(world, tmp_path)

        async def body() -> None:
            async with over(world, device) as loader:
                for _ in range(5):
                    await leave(world, loader, "one")
                    async with loader.stream(world.ref("one")) as handle:
                        await all_of(handle)
                        tiny.assert_equal_to_file(handle, folder)
                    async with loader.stream(world.ref("one")) as handle:
                        assert handle.resident

        run(body())


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
