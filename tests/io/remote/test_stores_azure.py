"""Adapters in Azure Blob Storage, against Azurite; without it these tests are listed as not run."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from urllib.parse import parse_qs

import pytest
from azurite import KEY, Azurite, azurite
from fetching import DATA
from obstore.store import AzureStore
from store_process import set_environment
from stored import CONFIG, Bucket, brought, check_streams, located, locator

from lorax_async.adapter import AdapterRef
from lorax_async.core.cache_names import INDEX_FILE, FileRole
from lorax_async.errors import AccessDeniedError, AdapterNotFoundError, IntegrityError
from tools import tool

pytestmark = [pytest.mark.needs("azurite-blob"), pytest.mark.usefixtures("nothing_left")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    binary = tool("azurite-blob")
    assert binary is not None
    with azurite(str(binary), tmp_path_factory.mktemp("azurite")) as running:
        yield running


@pytest.fixture(autouse=True)
def _environment(server: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, server.environment)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """Of this test alone, for the server is everybody's."""
    return f"tests/{request.node.originalname}/"


def bucket() -> Bucket:
    return Bucket(AzureStore("adapters"))


def test_an_adapter_comes_by_ranges(prefix: str) -> None:
    bucket().put_adapter(prefix)
    found = check_streams(bucket(), f"az://adapters/{prefix}", prefix)
    assert found.source == f"az://adapters/{prefix}"
    assert found.version.startswith("etags-")


def test_a_replaced_file_is_another_version(prefix: str) -> None:
    id, store = f"az://adapters/{prefix}", bucket()
    store.put_adapter(prefix)
    first = located(id)
    etag = store.etag(f"{prefix}adapter_model.safetensors")
    assert located(id, etag).version == located(id, first.version).version == first.version
    store.put_adapter(prefix, weights=DATA[::-1])
    assert brought(located(id).files[1]) == DATA[::-1]
    with pytest.raises(AdapterNotFoundError, match="any more"):
        located(id, first.version)


async def test_weights_in_several_files(prefix: str) -> None:
    """Azure's listings have ETags without quotes; those of answers have them."""
    id, store = f"az://adapters/{prefix}", bucket()
    role, name = FileRole("weights", 1), "adapter_model-00001-of-00001.safetensors"
    store.put(f"{prefix}adapter_config.json", CONFIG)
    store.put(f"{prefix}adapter_model.safetensors.index.json", b"{}")
    store.put(f"{prefix}{name}", DATA)
    with locator() as made:
        found = await made.locate(AdapterRef(id))
        assert found.files[1].role == INDEX_FILE
        (shard,) = await made.shards(found, [role])
        assert shard.etag == store.etag(f"{prefix}{name}")
        assert brought(shard) == DATA
        store.put(f"{prefix}{name}", DATA)
        with pytest.raises(IntegrityError, match="were replaced"):
            await made.shards(found, [role])


def test_what_is_not_there(prefix: str) -> None:
    for container in ("adapters", "no-such-container"):
        with pytest.raises(AdapterNotFoundError, match="no such bucket"):
            located(f"az://{container}/{prefix}")


def test_a_wrong_key(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket().put_adapter(prefix)
    wrong = base64.b64encode(b"wrong" * 12).decode()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", wrong)
    with pytest.raises(AccessDeniedError, match="environment's credentials") as caught:
        located(f"az://adapters/{prefix}")
    assert wrong not in repr(caught.value)
    assert caught.value.__context__ is None


def test_a_token_that_somebody_else_signed(
    server: Azurite, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a token can sign nothing; it opens URLs as it is."""
    bucket().put_adapter(prefix)
    signed = located(f"az://adapters/{prefix}")
    token = server.token()
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", f"?{token}")
    found = located(f"az://adapters/{prefix}")
    assert brought(found.files[1]) == DATA
    assert found.version == signed.version
    assert found.scope != signed.scope
    signature = parse_qs(token)["sig"][0]
    assert signature not in repr(found)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", token.replace("se=2", "se=1"))
    with pytest.raises(AccessDeniedError) as caught:
        located(f"az://adapters/{prefix}")
    assert signature not in repr(caught.value)
    assert caught.value.__context__ is None


def test_nothing_tells_a_secret(prefix: str) -> None:
    bucket().put_adapter(prefix)
    found = located(f"az://adapters/{prefix}")
    assert KEY not in repr(found)
    assert "sig=" not in repr(found)
    assert "sig=" in found.files[1].target.url.text, "or nothing was looked for"
