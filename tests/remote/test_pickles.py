"""Weights that are a pickle only: an operator has them converted, once, into the disk cache."""

import asyncio
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_server import FaultServer
from hub_stand_in import HubStandIn
from safetensors.torch import load
from tiny_loaders import fails
from user_loads import at, contents, has, loader, stored_in, until, written
from web_folder import CONFIG, WEIGHTS, Folder

from lorax_async import AdapterLoader, Allow, errors
from lorax_async.engines.plugin_settings import PluginSettings

PICKLE, ID = "adapter_model.bin", "org/name"

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left", "hub_client")


class Call:
    """Pickles as a call of a function."""

    def __init__(self, seen: Path) -> None:
        self._seen = seen

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self._seen}'",)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return written(tmp_path / "adapter", layers=4, rank=4)


@pytest.fixture
def pickled(adapter: Path, tmp_path: Path) -> Path:
    """A folder with the same adapter, its weights a pickle."""
    folder = tmp_path / "pickled"
    shutil.copytree(adapter, folder)
    torch.save(load((folder / WEIGHTS).read_bytes()), folder / PICKLE)
    (folder / WEIGHTS).unlink()
    return folder


@pytest.fixture
def hub(pickled: Path) -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        hub.put(ID, contents(pickled))
        yield hub


def converting(folder: Path, hub: HubStandIn | None = None, **settings: Any) -> AdapterLoader:
    given: dict[str, Any] = {"convert_bin": True, **settings}
    if hub is not None:
        allow = Allow("hub"), at(hub.store_netloc)
        given |= {"allow": allow, "hub_endpoint": hub.endpoint}
    return loader(folder, layers=4, **given)


def children() -> set[str]:
    """Return the processes that threads of this one have started."""
    found = set[str]()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended
            found |= set((thread / "children").read_text().split())
    return found


def downloads(hub: HubStandIn) -> int:
    return sum(hub.is_at_store(asked) for asked in hub.asked)


async def test_from_the_hub_once(hub: HubStandIn, adapter: Path, tmp_path: Path) -> None:
    async with converting(tmp_path, hub) as there:
        version = await has(there, ID, adapter)
        asked = downloads(hub)
        assert asked
    async with converting(tmp_path, hub, revalidate=0.0) as there:
        assert await has(there, ID, adapter) == version
        async with there.fetch(ID) as folder:
            assert not folder.downloaded
            assert load((folder.path / WEIGHTS).read_bytes()).keys()
            assert not (folder.path / PICKLE).exists()
    assert downloads(hub) == asked
    assert stored_in(tmp_path) == (1, 0)


async def test_a_fetch_of_it_is_a_download(hub: HubStandIn, tmp_path: Path) -> None:
    async with converting(tmp_path, hub) as there, there.fetch(ID) as folder:
        assert folder.downloaded
        assert folder.verification.kind == "transport"


async def test_never_by_default(hub: HubStandIn, pickled: Path, tmp_path: Path) -> None:
    """The error names the command and the setting, and nothing of the weights is requested."""
    served = Folder(contents(pickled))
    with FaultServer(b"", served) as server:
        allow = Allow("hub"), at(hub.store_netloc), at(server.netloc)
        off = loader(tmp_path, layers=4, hub_endpoint=hub.endpoint, allow=allow)
        async with off as there:
            for id in (ID, pickled, server.url("/one/")):
                error = await fails(there.load(id), errors.AdapterError, PICKLE)
                assert "lorax-async convert" in str(error)
                assert "convert_bin=True" in str(error)
    assert not downloads(hub)


async def test_from_a_folder_behind_a_url(pickled: Path, adapter: Path, tmp_path: Path) -> None:
    served = Folder(contents(pickled))
    with FaultServer(b"", served) as server:
        id, allow = server.url("/one/"), (at(server.netloc),)
        async with converting(tmp_path, allow=allow) as there:
            first = await has(there, id, adapter)
        served.fields[PICKLE] = ['ETag: "another"']
        async with converting(tmp_path, allow=allow) as there:
            assert await has(there, id, adapter) != first
    assert stored_in(tmp_path) == (2, 0)


async def test_a_local_folder_is_not_written_to(
    pickled: Path, adapter: Path, tmp_path: Path
) -> None:
    """Its weights are converted into the disk cache, again only when a file of it changed."""
    before = contents(pickled)
    roots: dict[str, Any] = {"local_roots": (tmp_path,), "offline": True}
    trusted: Any = pickled
    async with converting(tmp_path, **roots) as there:
        version = await has(there, trusted, adapter)
    async with converting(tmp_path, **roots, revalidate_files=0.0) as there:
        assert await has(there, "./pickled", adapter) == version
        assert contents(pickled) == before
        assert stored_in(tmp_path) == (1, 0)
        state = {name: it * 2 for name, it in load((adapter / WEIGHTS).read_bytes()).items()}
        torch.save(state, pickled / PICKLE)
        async with await there.load(pickled) as handle:
            name = next(iter(handle.modules))
            a = state[f"base_model.model.{name}.lora_A.weight"]
            assert torch.equal(handle.modules[name].a, a)


@pytest.mark.parametrize("place", ["hub", "local"])
async def test_a_hostile_pickle(place: str, pickled: Path, tmp_path: Path) -> None:
    """It is not run, and nothing of it stays, neither in the cache nor as a process."""
    seen = tmp_path / "it ran"
    torch.save({"base_model.model.x.lora_A.weight": Call(seen)}, pickled / PICKLE)
    before = children()
    with HubStandIn() as hub:
        hub.put(ID, contents(pickled))
        async with converting(tmp_path, hub) as there:
            id = ID if place == "hub" else pickled
            error = await fails(there.load(id), errors.UnsafeFileError, "posix.system")
            assert error.stage == "verify"
            await until(lambda: stored_in(tmp_path) == (0, 0))
    assert not seen.exists()
    assert children() <= before


@pytest.mark.parametrize("name", [CONFIG, PICKLE])
async def test_a_converted_adapter_is_checked_as_any(
    name: str, pickled: Path, tmp_path: Path
) -> None:
    """What PEFT could not load is refused after one conversion; a damaged file is not converted."""
    if name == CONFIG:
        (pickled / CONFIG).write_text('{"peft_type": "IA3"}')
    else:
        (pickled / PICKLE).write_bytes(b"no zip")
    with HubStandIn() as hub:
        hub.put(ID, contents(pickled))
        async with converting(tmp_path, hub) as there:
            kind = errors.UnsupportedAdapterError if name == CONFIG else errors.AdapterFormatError
            await fails(there.load(ID), kind)
            asked = downloads(hub)
            assert asked <= 2
    assert stored_in(tmp_path) == (1 if name == CONFIG else 0, 0)


async def test_a_load_that_is_given_up(hub: HubStandIn, tmp_path: Path, adapter: Path) -> None:
    """Its process ends; the next load begins with the bytes that are here."""
    before = children()
    async with converting(tmp_path, hub) as there:
        loading = asyncio.create_task(there.load(ID))
        await until(lambda: children() - before)
        loading.cancel()
        await asyncio.wait([loading])
        await until(lambda: children() <= before)
        await has(there, ID, adapter)
    assert stored_in(tmp_path) == (1, 0)


def test_the_settings_of_the_plug_ins() -> None:
    settings = PluginSettings.from_environment({"LORAX_ASYNC_CONVERT_BIN": "1"})
    assert settings.store_settings()["convert_bin"] is True
    assert PluginSettings.from_environment({}).store_settings()["convert_bin"] is False
