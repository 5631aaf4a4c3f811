"""`loader.load` of an id alone: the hub, a folder behind a URL, a store; as users do it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_server import Asked, Client, FaultServer
from hub_stand_in import HubStandIn

import tiny
from lorax_async import (
    AccessDeniedError,
    AdapterLoader,
    Allow,
    InvalidAdapterIdError,
    LoaderConfig,
)
from lorax_async.adapter import RemoteKey

pytestmark = pytest.mark.usefixtures("no_socket_left", "nothing_left", "hub_client")

NAMES = ("adapter_config.json", "adapter_model.safetensors")


def over(tmp_path: Path, **settings: object) -> AdapterLoader:
    plain: dict[str, object] = {
        "device_bytes": 8 << 20,
        "max_slots": 4,
        "io_threads": 2,
        "timeout": 30,
        "cache_dir": tmp_path / "cache",
        "hub_cache_dir": tmp_path / "hub",
    }
    return AdapterLoader(tiny.layout(), LoaderConfig(**(plain | settings)))  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


def at_store(hub: HubStandIn) -> Allow:
    """Where its large files lie: by plain http on loopback, which has to be allowed."""
    host, _, port = hub.store_netloc.partition(":")
    return Allow("http", host, int(port))


async def test_from_the_hub(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", rank=64)
    with HubStandIn() as hub:
        commit = hub.put("org/name", contents(folder))

        async def body() -> None:
            allow = (Allow("hub"), at_store(hub))
            async with over(tmp_path, hub_endpoint=hub.endpoint, allow=allow) as loader:
                async with await loader.load("org/name") as handle:
                    tiny.assert_equal_to_file(handle, folder)
                    assert isinstance(handle.key, RemoteKey)
                    assert handle.key.version == commit
                begun = len(hub.asked)
                (await loader.load("org/name")).release()
                assert len(hub.asked) == begun, "for a while nobody is asked again"
                with pytest.raises(AccessDeniedError, match="to whoever has no token"):
                    await loader.load("org/other")

        await body()


async def test_from_a_folder_behind_a_url(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", rank=64)
    there = {f"/adapters/one/{name}": data for name, data in contents(folder).items()}
    with FaultServer(b"") as server:

        def behave(asked: Asked, client: Client) -> None:
            data = there.get(asked.target)
            if data is None:
                client.head("404 Not Found", "Content-Length: 0")
            else:
                FaultServer(data, etag=f'"{len(data)}"').right(asked, client)

        server.behave = behave
        allow = (Allow("http", "127.0.0.1", server.port, "adapters/"),)

        async def body() -> None:
            async with over(tmp_path, allow=allow) as loader:
                async with await loader.load(server.url("/adapters/one")) as handle:
                    tiny.assert_equal_to_file(handle, folder)
                with pytest.raises(AccessDeniedError, match="Allow"):
                    await loader.load(server.url("/secrets/one"))
                with pytest.raises(InvalidAdapterIdError):
                    await loader.load(server.url("/adapters/../secrets"))

        await body()
