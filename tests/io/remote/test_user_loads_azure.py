"""`loader.load("az://…")` from Azurite, over a link that is slow where told."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from azurite import ACCOUNT, KEY, Azurite, azurite
from obstore.store import AzureStore
from slow_proxy import SlowProxy
from store_process import set_environment
from stored import Bucket
from user_loads import (
    CONNECTIONS,
    contents,
    has,
    loader,
    secretless,
    stored_in,
    streams,
    version_of,
    written,
)

import split_files
import tiny
from lorax_async import AccessDeniedError, AdapterNotFoundError, Allow, FetchError
from lorax_async.adapter import AdapterRef
from tools import tool

pytestmark = [pytest.mark.needs("azurite-blob"), pytest.mark.usefixtures("nothing_left")]

ALLOW = (Allow("az", "adapters"),)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    binary = tool("azurite-blob")
    assert binary is not None
    with azurite(str(binary), tmp_path_factory.mktemp("azurite")) as running:
        yield running


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [written(tmp_path_factory.mktemp("saved") / str(n), n, rank=64) for n in range(2)]


@pytest.fixture
def link(server: Azurite, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowProxy]:
    """What the environment names as the account's endpoint."""
    with SlowProxy(server.port) as link:
        endpoint = {"AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{link.port}/{ACCOUNT}"}
        set_environment(monkeypatch, server.environment | endpoint)
        yield link


@pytest.fixture
def prefix(link: SlowProxy, request: pytest.FixtureRequest) -> str:
    """Of this test alone, for the server is everybody's."""
    return f"{request.node.originalname}/{link.port}"


def put(prefix: str, adapter: Path) -> None:
    container = Bucket(AzureStore("adapters"))
    for name, data in contents(adapter).items():
        container.put(f"{prefix}/{name}", data)


async def test_the_first_layer_is_there_before_15_percent(
    prefix: str, link: SlowProxy, tmp_path: Path
) -> None:
    large = written(tmp_path / "large")
    put(prefix, large)
    async with loader(tmp_path, allow=ALLOW, connections=CONNECTIONS) as there:
        version = await streams(there, f"az://adapters/{prefix}", large, link)
        assert version.startswith("etags-")
    assert stored_in(tmp_path) == (1, 0)


async def test_a_new_version_and_a_store_that_is_down(
    prefix: str, link: SlowProxy, adapters: list[Path], tmp_path: Path
) -> None:
    id = f"az://adapters/{prefix}"
    put(prefix, adapters[0])
    async with (
        loader(tmp_path, allow=ALLOW, revalidate=0) as there,
        await there.load(id) as old,
    ):
        await old.verified()
        put(prefix, adapters[1])
        version = await has(there, id, adapters[1])
        assert version != version_of(old)
        tiny.assert_equal_to_file(old, adapters[0])
    link.close()
    async with loader(tmp_path, allow=ALLOW) as there:
        await has(there, AdapterRef(id, revision=version), adapters[1])
        await has(there, AdapterRef(id, revision=version_of(old)), adapters[0])
        with pytest.raises(FetchError, match="refuses connections"):
            await there.load(id)


async def test_refusals(
    prefix: str, adapters: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is not there, and a wrong key, which opens nothing that a right one has brought."""
    put(prefix, adapters[0])
    allow = (*ALLOW, Allow("az", "no-such-container"))
    async with loader(tmp_path, allow=allow) as there:
        for id in (f"az://no-such-container/{prefix}", "az://adapters/nothing/here"):
            with pytest.raises(AdapterNotFoundError, match="no such bucket"):
                await there.load(id)
        await has(there, f"az://adapters/{prefix}", adapters[0])
    wrong = base64.b64encode(b"wrong" * 12).decode()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", wrong)
    async with loader(tmp_path, allow=allow) as there:
        with pytest.raises(AccessDeniedError, match="environment's credentials") as caught:
            await there.load(f"az://adapters/{prefix}")
        secretless(caught.value, wrong, KEY, "sig=")


async def test_weights_in_several_files(prefix: str, tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", 3, layers=16, rank=64)
    put(prefix, split_files.split(whole, tmp_path / "several"))
    async with loader(tmp_path, layers=16, allow=ALLOW) as there:
        await has(there, f"az://adapters/{prefix}", whole)
    assert stored_in(tmp_path) == (1, 0)
