"""Adapters in S3, against SeaweedFS; without it these tests are listed as not run."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

import pytest
from fault_server import until
from fetching import DATA, engine, fetched
from store_process import NOWHERE, set_environment
from stored import CONFIG, Bucket, brought, check_streams, located, locator
from weed import KEY, SECRET, Weed, weed

from common import open_sockets
from lorax_async.adapter import AdapterRef
from lorax_async.core.cache_names import CONFIG_FILE, INDEX_FILE, FileRole
from lorax_async.errors import (
    AccessDeniedError,
    AdapterError,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
)
from tools import tool

pytestmark = [pytest.mark.needs("weed"), pytest.mark.usefixtures("nothing_left"), pytest.mark.slow]

SHARDS = [FileRole("weights", 1), FileRole("weights", 2)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    binary = tool("weed")
    assert binary is not None
    with weed(str(binary), tmp_path_factory.mktemp("weed")) as running:
        yield running


@pytest.fixture(autouse=True)
def _environment(server: Weed, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, server.environment)


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """Of this test alone, for the server is everybody's."""
    name = request.node.name.translate(str.maketrans("[]", "  "))
    return f"tests/{name}/"


def bucket(name: str = "adapters") -> Bucket:
    from obstore.store import S3Store

    return Bucket(S3Store(name))


def test_an_adapter_comes_by_ranges(prefix: str) -> None:
    bucket().put_adapter(prefix)
    found = check_streams(bucket(), f"s3://adapters/{prefix}", prefix)
    assert found.source == f"s3://adapters/{prefix}"
    assert [file.nbytes for file in found.files] == [len(CONFIG), len(DATA)]
    assert located(f"s3://adapters/{prefix.rstrip('/')}").version == found.version


def test_every_replaced_file_is_another_version(prefix: str) -> None:
    id, store = f"s3://adapters/{prefix}", bucket()
    store.put_adapter(prefix)
    first = located(id)
    assert first.version.startswith("etags-")
    store.put_adapter(prefix)
    assert located(id).version == first.version, "the same bytes"
    store.put_adapter(prefix, config=CONFIG + b" ")
    second = located(id)
    store.put_adapter(prefix, weights=DATA[::-1], config=CONFIG + b" ")
    third = located(id)
    assert len({first.version, second.version, third.version}) == 3
    assert brought(third.files[1]) == DATA[::-1]


def test_a_revision_is_what_the_handle_told_or_the_weights_etag(prefix: str) -> None:
    id, store = f"s3://adapters/{prefix}", bucket()
    store.put_adapter(prefix)
    version = located(id).version
    etag = store.etag(f"{prefix}adapter_model.safetensors")
    for revision in (version, etag, etag.strip('"')):
        assert located(id, revision).version == version
    with locator() as made:
        said = made.recalled(AdapterRef(id, revision=version))
        assert said == (id, version, located(id).scope)
        assert made.recalled(AdapterRef(id, revision=etag)) is None
        assert made.recalled(AdapterRef(id)) is None
    store.put(f"{prefix}adapter_model.safetensors", DATA[::-1])
    for revision in (version, etag, "main"):
        with pytest.raises(AdapterNotFoundError, match="only that can be had") as caught:
            located(id, revision)
        assert located(id).version in str(caught.value)


def test_a_bucket_that_keeps_versions(prefix: str) -> None:
    id, store = f"s3://versioned/{prefix}", bucket("versioned")
    path = f"{prefix}adapter_model.safetensors"
    store.put(f"{prefix}adapter_config.json", CONFIG)
    ids = []
    found = []
    for weights in (DATA[:100], DATA, DATA):
        ids.append(store.put(path, weights))
        found.append(located(id))
    assert all(each.version.startswith("versions-") for each in found)
    assert len({each.version for each in found}) == 3
    assert located(id, ids[2]).version == found[2].version
    with pytest.raises(AdapterNotFoundError, match="any more"):
        located(id, ids[0])
    check_streams(store, id, prefix)


def test_a_file_that_is_replaced_on_the_way(prefix: str) -> None:
    store = bucket()
    store.put_adapter(prefix)
    weights = located(f"s3://adapters/{prefix}").files[1]
    with engine() as fetching:
        known = fetching.ask(weights.target, 5_000, timeout=20).done.result(30)
        store.put(f"{prefix}adapter_model.safetensors", DATA[::-1])
        with pytest.raises(IntegrityError, match="changed"):
            fetched(fetching, known)
        late = fetching.ask(weights.target, 5_000, timeout=20).done.result(30)
        with pytest.raises(IntegrityError, match="replaced"):
            weights.checked(late)


async def test_weights_in_several_files(prefix: str) -> None:
    id, store = f"s3://adapters/{prefix}", bucket()
    names = [f"{prefix}adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    store.put(f"{prefix}adapter_config.json", CONFIG)
    store.put(f"{prefix}adapter_model.safetensors.index.json", b"{}")
    store.put(names[0], DATA)
    with locator() as made:
        early = await made.locate(AdapterRef(id))
        assert [file.role for file in early.files] == [CONFIG_FILE, INDEX_FILE]
        with pytest.raises(AdapterNotFoundError, match=r"no adapter_model-00002-of-00002\.saf"):
            await made.shards(early, SHARDS)
        store.put(names[1], DATA[:77])
        whole = await made.locate(AdapterRef(id))
        files = await made.shards(whole, SHARDS)
        assert [file.role for file in files] == SHARDS
        assert [file.nbytes for file in files] == [len(DATA), 77]
        assert [brought(file) for file in files] == [DATA, DATA[:77]]
        store.put(names[1], DATA[1:78])
        assert (await made.locate(AdapterRef(id))).version not in {early.version, whole.version}
        with pytest.raises(IntegrityError, match="were replaced"):
            await made.shards(whole, SHARDS)


@pytest.mark.parametrize("there", [[], ["adapter_model.safetensors"], ["adapter_config.json"]])
def test_what_is_not_there(prefix: str, there: list[str]) -> None:
    for name in there:
        bucket().put(f"{prefix}{name}", b"x")
    missing = "neither adapter_model" if "adapter_config.json" in there else "adapter_config.json"
    with pytest.raises(AdapterNotFoundError, match=missing):
        located(f"s3://adapters/{prefix}")
    with pytest.raises(AdapterNotFoundError, match="no such bucket"):
        located("s3://no-such-bucket/prefix/")


def secretless(error: AdapterError) -> str:
    """All that is said of it, with what led to it."""
    text = "".join(traceback.format_exception(error)) + repr(error) + error.problem
    assert SECRET not in text
    assert KEY not in text
    assert "Signature" not in text
    assert error.__context__ is None, "obstore's own texts are longer"
    return text


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials(prefix: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket().put_adapter(prefix)
    monkeypatch.setenv(name, "not-the-right-one")
    with pytest.raises(AccessDeniedError, match="environment's credentials") as caught:
        located(f"s3://adapters/{prefix}")
    assert not caught.value.retryable
    assert "not-the-right-one" not in secretless(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "says", "retryable"),
    [
        ("AWS_ENDPOINT_URL", NOWHERE, "refuses connections", True),
        ("AWS_ALLOW_HTTP", "false", "set AWS_ALLOW_HTTP", False),
    ],
)
def test_a_store_that_cannot_be_asked(
    name: str, value: str, says: str, retryable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(FetchError, match=says) as caught:
        located("s3://adapters/prefix/")
    assert caught.value.retryable is retryable
    secretless(caught.value)


def test_no_credentials_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the machine's are asked for, and there are none."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(FetchError, match="refuses connections|credentials in the environment"):
        located("s3://adapters/prefix/")


async def test_a_signed_url_ends(prefix: str) -> None:
    bucket().put_adapter(prefix)
    with locator(signed_for=1) as made, engine() as fetching:
        weights = (await made.locate(AdapterRef(f"s3://adapters/{prefix}"))).files[1]

        def expired() -> AccessDeniedError | None:
            error = fetching.ask(weights.target, 10, timeout=20).done.exception(30)
            return error if isinstance(error, AccessDeniedError) else None

        until(expired, 30)
        error = expired()
        assert error is not None
        assert prefix not in secretless(error)
        again = (await made.locate(AdapterRef(f"s3://adapters/{prefix}"))).files[1]
        assert again.target.url.target != weights.target.url.target


def test_nothing_tells_a_secret(prefix: str) -> None:
    bucket().put_adapter(prefix)
    found = located(f"s3://adapters/{prefix}")
    for word in (SECRET, KEY, "Signature", "X-Amz"):
        assert word not in f"{found!r} {found}"
    assert "X-Amz-Signature" in found.files[1].target.url.text, "or nothing was looked for"


def test_a_public_bucket_without_credentials(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket("public").put_adapter(prefix)
    signed = located(f"s3://public/{prefix}")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    found = located(f"s3://public/{prefix}")
    assert "?" not in found.files[1].target.url.text
    assert brought(found.files[1]) == DATA
    assert (found.version, found.scope) == (signed.version, "")
    assert signed.scope.startswith("environment-")


async def test_connections_end_with_the_locator(prefix: str) -> None:
    store = bucket()
    store.put_adapter(prefix)
    before = open_sockets()
    with locator() as made:
        await made.locate(AdapterRef(f"s3://adapters/{prefix}"))
        assert open_sockets() > before
    until(lambda: open_sockets() <= before, 30)
