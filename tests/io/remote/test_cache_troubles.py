"""A disk cache that takes no more, or is emptied meanwhile: what is here already is served."""

from __future__ import annotations

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
from common import Run
from lorax_async import AdapterLoader, Allow, FetchError, LoaderConfig
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


def test_an_answer_that_cannot_be_noted_holds_up_nobody(
    hub: HubStandIn, run: Run, tmp_path: Path
) -> None:
    async def body() -> None:
        async with over(hub, tmp_path) as loader:
            async with await loader.load("org/one") as handle:
                await handle.verified()  # nobody writes to the cache any more
            shutil.rmtree(tmp_path / "cache" / "answers")
            async with await loader.load("org/one", revision="tag") as handle:
                tiny.assert_equal_to_file(handle, tmp_path / "one")

    run(body())


@pytest.mark.parametrize("offline", [False, True])
def test_a_cache_that_can_only_be_read(
    hub: HubStandIn, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, offline: bool
) -> None:
    hub.put("org/two", dict.fromkeys(NAMES, b""))

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def made(path: Any, *_: object, dir_fd: int | None = None) -> None:
        with suppress(FileNotFoundError):
            os.stat(path, dir_fd=dir_fd)
            raise FileExistsError
        read_only()

    async def body() -> None:
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

    run(body())


def test_a_folder_that_is_gone_is_told_of(hub: HubStandIn, run: Run, tmp_path: Path) -> None:
    hub.put("org/two", dict.fromkeys(NAMES, b""))

    async def body() -> None:
        async with over(hub, tmp_path) as loader:
            async with await loader.load("org/one") as handle:
                await handle.verified()  # nobody writes to the cache any more
            shutil.rmtree(tmp_path / "cache")
            with pytest.raises(FetchError, match="make a new loader"):
                await loader.load("org/two")

    run(body())


def test_nobody_makes_room_of_what_is_being_held(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

        async def body() -> None:
            config = LoaderConfig(device_bytes=1 << 20, io_threads=2, timeout=20)
            async with AdapterLoader(tiny.layout(), config, source=world.source) as loader:
                await loader.prefetch(world.ref("one"), tier="host")
                assert removed == [False]

        run(body())
