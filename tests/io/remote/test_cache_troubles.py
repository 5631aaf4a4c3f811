"""A disk cache that takes no more, or is emptied meanwhile: what is here already is served."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import HubStandIn
from remote_world import RemoteWorld

import tiny
from lorax_async import AdapterLoader, Allow, ConfigError, FetchError, LoaderConfig
from lorax_async.io.cache.upkeep import ls, rm
from lorax_async.io.sources.local_hold import LocalHold

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left", "hub_client")

NAMES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    """It has org/one, of which `main` and `tag` are the same."""
    folder = tiny.write(tmp_path / "one")
    with HubStandIn() as hub:
        commit = hub.put("org/one", {name: (folder / name).read_bytes() for name in NAMES})
        hub.repos["org/one"].refs["tag"] = commit
        yield hub


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


def over(hub: HubStandIn, tmp_path: Path, **settings: Any) -> AdapterLoader:
    host, _, port = hub.store_netloc.partition(":")
    config = LoaderConfig(
        device_bytes=1 << 20,
        io_threads=2,
        timeout=20,
        cache_dir=tmp_path / "cache",
        hub_cache_dir=tmp_path / "hub",
        hub_endpoint=hub.endpoint,
        allow=(Allow("hub"), Allow("http", host, int(port))),
        **settings,
    )
    return AdapterLoader(tiny.layout(), config)


async def test_an_answer_that_cannot_be_noted_holds_up_nobody(
    hub: HubStandIn, tmp_path: Path
) -> None:
    async with over(hub, tmp_path) as loader:
        async with await loader.load("org/one") as handle:
            await handle.verified()  # nobody writes to the cache any more
        shutil.rmtree(tmp_path / "cache" / "answers")
        async with await loader.load("org/one", revision="tag") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "one")


@pytest.mark.parametrize("offline", [False, True])
async def test_a_cache_that_can_only_be_read(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, offline: bool
) -> None:
    hub.put("org/two", dict.fromkeys(NAMES, b""))

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def made(path: Any, *_: object, dir_fd: int | None = None) -> None:
        with suppress(FileNotFoundError):
            os.stat(path, dir_fd=dir_fd)
            raise FileExistsError
        read_only()

    async with over(hub, tmp_path) as loader, await loader.load("org/one") as handle:
        await handle.verified()
    for name in ("utime", "rename", "unlink"):
        monkeypatch.setattr(os, name, read_only)
    monkeypatch.setattr(os, "mkdir", made)
    async with over(hub, tmp_path, offline=offline) as loader:
        async with await loader.load("org/one") as handle:
            await handle.verified()
            tiny.assert_equal_to_file(handle, tmp_path / "one")
        if not offline:
            with pytest.raises(FetchError, match="name another cache_dir"):
                await loader.load("org/two")
    monkeypatch.undo()


GONE = ["cache", "cache/entries", "cache/partials", "cache/locks", "cache/trash", "cache/answers"]


@pytest.mark.parametrize("gone", GONE)
@pytest.mark.parametrize("settings", [{}, {"host_bytes": 0}], ids=["held", "on disk"])
async def test_a_folder_that_is_removed_is_made_again(
    hub: HubStandIn, tmp_path: Path, gone: str, settings: dict[str, int]
) -> None:
    """Both what it had and what it had not can be loaded, now and by the next loader."""
    for n in range(2, 5):
        hub.put(f"org/{n}", read(tiny.write(tmp_path / str(n), seed=n)))

    async def loads(loader: AdapterLoader, id: str, adapter: str) -> None:
        async with await loader.load(id) as handle:
            await handle.verified()
            tiny.assert_equal_to_file(handle, tmp_path / adapter)

    async with over(hub, tmp_path, max_slots=1, **settings) as loader:
        await loads(loader, "org/one", "one")
        await loads(loader, "org/2", "2")
        shutil.rmtree(tmp_path / gone)
        await loads(loader, "org/3", "3")
        await loads(loader, "org/one", "one")
        await loads(loader, "org/2", "2")
        shutil.rmtree(tmp_path / gone)
        await asyncio.gather(*(loads(loader, f"org/{n}", str(n)) for n in (2, 3, 4)))
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        path.removeprefix("cache/") for path in GONE[1:]
    }
    async with over(hub, tmp_path, offline=True) as loader:
        await loads(loader, "org/4", "4")


async def test_a_folder_that_is_removed_during_downloads_fails_those_alone(
    hub: HubStandIn, tmp_path: Path
) -> None:
    """They say that another attempt may succeed, and it does; none lends a wrong byte."""
    for n in range(8):
        hub.put(f"org/{n}", read(tiny.write(tmp_path / str(n), seed=n)))

    async def one(loader: AdapterLoader, n: int) -> None:
        for _ in range(20):
            try:
                async with await loader.load(f"org/{n}") as handle:
                    await handle.verified()
                    tiny.assert_equal_to_file(handle, tmp_path / str(n))
                    return
            except FetchError as error:
                assert error.retryable, error
        raise AssertionError("twenty attempts failed")

    async with over(hub, tmp_path) as loader:
        for _ in range(4):
            loads = [asyncio.create_task(one(loader, n)) for n in range(8)]
            await asyncio.sleep(0.02)
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            await asyncio.gather(*loads)


async def test_a_folder_that_others_may_write_to_is_not_taken_for_the_removed_one(
    hub: HubStandIn, tmp_path: Path
) -> None:
    hub.put("org/two", read(tiny.write(tmp_path / "two", seed=2)))
    async with over(hub, tmp_path) as loader:
        async with await loader.load("org/one") as handle:
            await handle.verified()
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o777)
        with pytest.raises(ConfigError, match="others may write"):
            await loader.load("org/two")


async def test_nobody_makes_room_of_what_is_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file would look as if it was replaced, and it was not."""
    settle: Callable[[LocalHold], None] = LocalHold.settle
    removed = list[bool]()

    with RemoteWorld(tmp_path / "cache") as world:
        world.put("one", *tiny.files(tiny.write(tmp_path / "one")))

        def crowded(hold: LocalHold) -> None:
            removed.extend(rm(world.cache, entry.name) for entry in ls(world.cache))
            settle(hold)

        monkeypatch.setattr(LocalHold, "settle", crowded)
        config = LoaderConfig(device_bytes=1 << 20, io_threads=2, timeout=20)
        async with AdapterLoader(tiny.layout(), config, source=world.source) as loader:
            await loader.prefetch(world.ref("one"), tier="host")
            assert removed == [False]
