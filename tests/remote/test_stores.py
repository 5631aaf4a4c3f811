"""Adapters in object stores: versions, signed URLs and secrets, the same in each kind of store."""

import base64
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import pytest
from fault_server import until
from origins import KINDS, processes
from range_downloads import DATA, engine, fetched
from store_servers import (
    AZURE_KEY,
    CONFIG,
    GOOGLE_ACCOUNT,
    NOWHERE,
    S3_KEY,
    S3_SECRET,
    WEIGHTS,
    Azurite,
    GoogleStandIn,
    Store,
    download_file,
    located,
    locator,
    set_environment,
    stored,
)
from user_loads import secretless

from lorax_async.errors import AccessDeniedError, AdapterNotFoundError, FetchError, IntegrityError
from lorax_async.types import AdapterRef

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("nothing_left")

SECRETS = (S3_KEY, S3_SECRET, AZURE_KEY, GOOGLE_ACCOUNT, "Signature", "X-Amz", "sig=")
SIGNATURES = {"gs": "X-Goog-Signature", "s3": "X-Amz-Signature", "az": "sig="}

ON_S3, ON_AZURE = KINDS["s3"], KINDS["az"]
S3 = pytest.param("s3", marks=ON_S3)
AZURE = pytest.param("az", marks=ON_AZURE)


def on(*kinds: object) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("store", kinds, indirect=True)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    with processes(tmp_path_factory) as begun:
        yield begun


@pytest.fixture
def store(
    request: pytest.FixtureRequest, servers: Callable[[str], Any], monkeypatch: Patch
) -> Iterator[Store]:
    with stored(request.param, f"tests/{request.node.originalname}/", servers) as store:
        set_environment(monkeypatch, store.server.environment)
        yield store


@on("gs", S3, AZURE)
def test_an_adapter_comes_by_ranges_of_signed_urls_which_nothing_tells(store: Store) -> None:
    store.put_adapter()
    found = located(store.id)
    assert [file.name for file in found.files] == ["adapter_config.json", WEIGHTS]
    assert [download_file(file) for file in found.files] == [CONFIG, DATA]
    assert [file.nbytes for file in found.files] == [len(CONFIG), len(DATA)]
    assert found.source == store.id
    assert found.version.startswith("versions-" if store.kind == "gs" else "etags-")
    assert located(store.id.rstrip("/")).version == found.version
    if store.kind != "gs":
        assert found.files[1].etag == store.etag()
    assert SIGNATURES[store.kind] in store.url, "or nothing was looked for"
    assert found.scope == "environment"
    for word in SECRETS:
        assert word not in f"{found!r} {found}"


@on("gs", S3, AZURE)
def test_every_replaced_file_is_another_version(store: Store) -> None:
    """A revision is what a handle told, or the weights' ETag or version; the old one is gone."""
    store.put_adapter()
    first = located(store.id)
    known = {first.version}
    if isinstance(store.server, GoogleStandIn):
        known.add(str(store.server.generation))
    else:
        store.put_adapter()  # the same bytes
        known |= {store.etag(), store.etag().strip('"')}
    for revision in known:
        assert located(store.id, revision).version == first.version
    with locator() as made:
        assert list(filter(made.is_version, known)) == [first.version]
    store.put_adapter(config=CONFIG + b" ")
    second = located(store.id)
    store.put_adapter(weights=DATA[::-1], config=CONFIG + b" ")
    third = located(store.id)
    assert len({first.version, second.version, third.version}) == 3
    assert download_file(third.files[1]) == DATA[::-1]
    for revision in (*known, "main"):
        with pytest.raises(AdapterNotFoundError, match="only that can be fetched") as caught:
            located(store.id, revision)
        assert third.version in str(caught.value)


@on(S3)
def test_a_bucket_that_keeps_versions(store: Store) -> None:
    store.bucket = "versioned"
    store.put("adapter_config.json", CONFIG)
    ids, found = [], []
    for weights in (DATA[:100], DATA, DATA):
        ids.append(store.put(WEIGHTS, weights))
        found.append(located(store.id))
    assert all(each.version.startswith("versions-") for each in found)
    assert len({each.version for each in found}) == 3
    assert located(store.id, ids[2]).version == found[2].version
    with pytest.raises(AdapterNotFoundError, match="no longer"):
        located(store.id, ids[0])
    assert download_file(found[2].files[1]) == DATA


@on(S3, AZURE)
def test_a_file_that_is_replaced_on_the_way(store: Store) -> None:
    store.put_adapter()
    weights = located(store.id).files[1]
    with engine() as fetching:
        known = fetching.probe(weights.target, 5_000, timeout=20).done.result(30)
        store.put(WEIGHTS, DATA[::-1])
        with pytest.raises(IntegrityError, match="changed"):
            fetched(fetching, known)
        late = fetching.probe(weights.target, 5_000, timeout=20).done.result(30)
        with pytest.raises(IntegrityError, match="replaced"):
            weights.require_match(late)


WRONG_KEY = base64.b64encode(b"wrong" * 12).decode()
NO_ACCOUNT = '{"private_key": "secret words"}'
ENVIRONMENTS = [
    pytest.param("s3", "AWS_SECRET_ACCESS_KEY", "wrong", AccessDeniedError, marks=ON_S3),
    pytest.param("s3", "AWS_ACCESS_KEY_ID", "wrong", AccessDeniedError, marks=ON_S3),
    pytest.param("s3", "AWS_ENDPOINT_URL", NOWHERE, FetchError, marks=ON_S3),
    pytest.param("s3", "AWS_ALLOW_HTTP", "false", FetchError, marks=ON_S3),
    pytest.param("s3", "AWS_ACCESS_KEY_ID", None, FetchError, marks=ON_S3),
    pytest.param("az", "AZURE_STORAGE_ACCOUNT_KEY", WRONG_KEY, AccessDeniedError, marks=ON_AZURE),
    ("gs", "GOOGLE_SERVICE_ACCOUNT_KEY", NO_ACCOUNT, FetchError),
]
WORDS = {
    "AWS_ENDPOINT_URL": "refuses connections",
    "AWS_ALLOW_HTTP": "set AWS_ALLOW_HTTP",
    "GOOGLE_SERVICE_ACCOUNT_KEY": "credentials in the environment",
}


@pytest.mark.parametrize(("store", "name", "value", "kind"), ENVIRONMENTS, indirect=["store"])
def test_an_environment_that_opens_nothing_is_named_without_its_secrets(
    store: Store, name: str, value: str | None, kind: type[FetchError], monkeypatch: Patch
) -> None:
    """Without credentials the machine's are asked for, and there are none."""
    store.put_adapter()
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    denied = "environment's credentials|refuses connections|credentials in the environment"
    with pytest.raises(kind, match=WORDS.get(name, denied)) as caught:
        located(store.id)
    assert caught.value.retryable is not (kind is AccessDeniedError or value == "false")
    secretless(caught.value, *SECRETS, WRONG_KEY, "secret words")
    assert caught.value.__context__ is None, "obstore's own texts are longer"


@on("gs", S3)
def test_a_public_bucket_without_credentials(store: Store, monkeypatch: Patch) -> None:
    store.bucket = "public"
    store.put_adapter()
    signed = located(store.id)
    base = str(signed.files[0].target.url.origin)
    if isinstance(store.server, GoogleStandIn):
        google = {"GOOGLE_SKIP_SIGNATURE": "true", "GOOGLE_BASE_URL": base}
        set_environment(monkeypatch, google | {"GOOGLE_ALLOW_HTTP": "true"})
        monkeypatch.setenv("HOME", "/nowhere")  # or an account known there would be looked at
        with pytest.raises(AccessDeniedError):
            located(store.id)
        store.server.public = True
    else:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    found = located(store.id)
    assert "?" not in found.files[1].target.url.text
    assert download_file(found.files[1]) == DATA
    assert (found.version, found.scope) == (signed.version, "")


@on("gs")
def test_googles_url_opens_one_object_for_as_long_as_was_asked(store: Store) -> None:
    store.put_adapter()
    url = urlsplit(store.url)
    assert url.path == f"/adapters/{store.path}{WEIGHTS}"
    query = dict(parse_qsl(url.query))
    assert query["X-Goog-Algorithm"] == "GOOG4-RSA-SHA256"
    assert (query["X-Goog-Expires"], query["X-Goog-SignedHeaders"]) == ("600", "host")


@on(AZURE)
def test_azures_shared_access_signature(store: Store, monkeypatch: Patch) -> None:
    """Such a token can sign nothing; it opens URLs as it is."""
    assert isinstance(store.server, Azurite)
    store.put_adapter()
    signed, token = located(store.id), store.server.token()
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", f"?{token}")
    found = located(store.id)
    assert download_file(found.files[1]) == DATA
    assert (found.version, found.scope) == (signed.version, signed.scope)
    signature = parse_qs(token)["sig"][0]
    assert signature not in repr(found)
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", token.replace("se=2", "se=1"))
    with pytest.raises(AccessDeniedError) as caught:
        located(store.id)
    secretless(caught.value, signature)


@on(S3)
async def test_a_signed_url_ends(store: Store) -> None:
    store.put_adapter()
    with locator(signed_for=1) as made, engine() as fetching:
        weights = (await made.locate(AdapterRef(store.id))).files[1]

        def expired() -> AccessDeniedError | None:
            error = fetching.probe(weights.target, 10, timeout=20).done.exception(30)
            return error if isinstance(error, AccessDeniedError) else None

        until(expired, 30)
        assert store.path not in secretless(expired(), *SECRETS)
        again = (await made.locate(AdapterRef(store.id))).files[1]
        assert again.target.url.target != weights.target.url.target
