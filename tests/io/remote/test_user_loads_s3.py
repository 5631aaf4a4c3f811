"""`loader.load("s3://…")` from SeaweedFS, over a link that is slow where told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from obstore.store import S3Store
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
from weed import KEY, SECRET, Weed, weed

import split_files
import tiny
from lorax_async import AccessDeniedError, AdapterNotFoundError, Allow, FetchError
from lorax_async.adapter import AdapterRef
from tools import tool

pytestmark = [pytest.mark.needs("weed"), pytest.mark.usefixtures("nothing_left"), pytest.mark.slow]

ALLOW = (Allow("s3", "adapters"),)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    binary = tool("weed")
    assert binary is not None
    with weed(str(binary), tmp_path_factory.mktemp("weed")) as running:
        yield running


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [written(tmp_path_factory.mktemp("saved") / str(n), n, rank=64) for n in range(2)]


@pytest.fixture
def link(server: Weed, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowProxy]:
    """What the environment names as the store; signatures are for its address."""
    with SlowProxy(server.port) as link:
        endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{link.port}"}
        set_environment(monkeypatch, server.environment | endpoint)
        yield link


@pytest.fixture
def prefix(link: SlowProxy, request: pytest.FixtureRequest) -> str:
    """Of this test alone, for the server is everybody's."""
    return f"{request.node.originalname}/{link.port}"


def put(prefix: str, adapter: Path) -> None:
    bucket = Bucket(S3Store("adapters"))
    for name, data in contents(adapter).items():
        bucket.put(f"{prefix}/{name}", data)


async def test_the_first_layer_is_there_before_15_percent(
    prefix: str, link: SlowProxy, tmp_path: Path
) -> None:
    large = written(tmp_path / "large")
    put(prefix, large)
    async with loader(tmp_path, allow=ALLOW, connections=CONNECTIONS) as there:
        version = await streams(there, f"s3://adapters/{prefix}", large, link)
        assert version.startswith("etags-")
    assert stored_in(tmp_path) == (1, 0)


async def test_after_a_put_the_next_load_is_the_new_version(
    prefix: str, adapters: list[Path], tmp_path: Path
) -> None:
    id = f"s3://adapters/{prefix}"
    put(prefix, adapters[0])
    async with (
        loader(tmp_path, allow=ALLOW, revalidate=0) as there,
        await there.load(id) as old,
    ):
        await old.verified()
        put(prefix, adapters[1])
        assert await has(there, id, adapters[1]) != version_of(old)
        tiny.assert_equal_to_file(old, adapters[0])
        # The older one cannot be had from the bucket, and is in the cache.
        await has(there, AdapterRef(id, revision=version_of(old)), adapters[0])


async def test_while_the_store_is_down(
    prefix: str, link: SlowProxy, adapters: list[Path], tmp_path: Path
) -> None:
    """What is pinned comes from the cache; what may have moved does for who says so."""
    id = f"s3://adapters/{prefix}"
    put(prefix, adapters[0])
    async with loader(tmp_path, allow=ALLOW) as there:
        version = await has(there, id, adapters[0])
    link.close()
    async with loader(tmp_path, allow=ALLOW) as there:
        pinned = await there.load(AdapterRef(id, revision=version))
        with pytest.raises(FetchError, match="refuses connections") as caught:
            await there.load(id)
        assert caught.value.retryable
        async with pinned, await there.load(AdapterRef(id, allow_stale=True)) as stale:
            tiny.assert_equal_to_file(stale, adapters[0])
            assert (pinned.stale, stale.stale) == (False, True)
    async with loader(tmp_path, allow=ALLOW, offline=True) as there:
        await has(there, id, adapters[0])


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
async def test_wrong_credentials(
    prefix: str,
    adapters: list[Path],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Nor do they open what the right ones have brought into the cache."""
    id = f"s3://adapters/{prefix}"
    put(prefix, adapters[0])
    async with loader(tmp_path, allow=ALLOW) as there:
        await has(there, id, adapters[0])
    monkeypatch.setenv(name, "not-the-right-one")
    async with loader(tmp_path, allow=ALLOW) as there:
        with pytest.raises(AccessDeniedError, match="environment's credentials") as caught:
            await there.load(id)
        secretless(caught.value, "not-the-right-one", SECRET, KEY, "Signature")


async def test_what_is_not_there_or_not_allowed(prefix: str, tmp_path: Path) -> None:
    async with loader(tmp_path, allow=(*ALLOW, Allow("s3", "no-such-bucket"))) as there:
        for id in (f"s3://no-such-bucket/{prefix}", f"s3://adapters/{prefix}"):
            with pytest.raises(AdapterNotFoundError, match="no such bucket"):
                await there.load(id)
        with pytest.raises(AccessDeniedError, match="Allow"):
            await there.load(f"s3://public/{prefix}")
    assert stored_in(tmp_path) == (0, 0)


@pytest.mark.parametrize("cut", [split_files.split, split_files.deal])
async def test_weights_in_several_files(
    prefix: str, link: SlowProxy, cut: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    """Cut by huggingface_hub, and so that every file has a part of every layer."""
    whole = written(tmp_path / "whole", 3, layers=16, rank=64)
    several = cut(whole, tmp_path / "several")
    id = f"s3://adapters/{prefix}"
    put(prefix, several)
    async with loader(tmp_path, layers=16, allow=ALLOW) as there:
        version = await has(there, id, whole)
    link.close()
    async with loader(tmp_path, layers=16, allow=ALLOW) as there:
        await has(there, AdapterRef(id, revision=version), whole)
    assert stored_in(tmp_path) == (1, 0)
