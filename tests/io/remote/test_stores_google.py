"""Adapters in Google Cloud Storage: URLs, signatures and a stand-in. Google itself is not asked."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pytest
from fault_server import Asked, Client, FaultServer
from fetching import DATA
from store_process import set_environment
from stored import CONFIG, brought, located
from user_loads import contents, has, loader, written

from lorax_async import Allow
from lorax_async.adapter import AdapterRef
from lorax_async.errors import AccessDeniedError, AdapterNotFoundError, FetchError

pytestmark = pytest.mark.usefixtures("nothing_left")

ACCOUNT = "tests@project.iam.gserviceaccount.com"
GOOGLE = "storage.googleapis.com"
"""What obstore signs for, wherever the base URL leads."""
FOLDER = "/my-bucket/some/folder/"
WEIGHTS = f"{FOLDER}adapter_model.safetensors"
_SHA256 = bytes.fromhex("3031300d060960864801650304020105000420")
"""What stands before a sha256 in an RSA signature (RFC 8017, section 9.2)."""


@dataclass(frozen=True)
class ServiceAccount:
    """A key made for these tests, and its modulus."""

    key: str = field(repr=False)
    modulus: int

    def signed(self, text: str, signature: str) -> bool:
        """Whether it is this account's RSA PKCS #1 v1.5 signature of the text."""
        length = (self.modulus.bit_length() + 7) // 8
        end = _SHA256 + hashlib.sha256(text.encode()).digest()
        padded = b"\0\1" + b"\xff" * (length - len(end) - 3) + b"\0" + end
        return pow(int(signature, 16), 65_537, self.modulus) == int.from_bytes(padded)


@pytest.fixture(scope="module")
def account() -> ServiceAccount:
    make = ["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]
    made = subprocess.run(make, capture_output=True, check=True, timeout=60)
    tell = ["openssl", "rsa", "-noout", "-modulus"]
    told = subprocess.run(tell, input=made.stdout, capture_output=True, check=True, timeout=60)
    return ServiceAccount(made.stdout.decode(), int(told.stdout.partition(b"=")[2], 16))


@dataclass
class StandIn:
    """Answers as Google's XML API does: to HEAD with a bearer's token, to GET with a signature."""

    account: ServiceAccount
    objects: dict[str, bytes] = field(default_factory=dict)
    generation: int = 1
    public: bool = False

    def __call__(self, asked: Asked, client: Client) -> None:
        method, target, _ = asked.line.split(" ")
        path = unquote(urlsplit(target).path)
        granted = self.public or (
            asked.fields.get("authorization", "").startswith("Bearer ")
            if method == "HEAD"
            else self.opens(asked)
        )
        data = self.objects.get(path)
        if not granted or data is None:
            client.head("403 Forbidden" if not granted else "404 Not Found", "Content-Length: 0")
            return
        etag = f'ETag: "{hashlib.md5(data).hexdigest()}"'
        tell = [etag, f"x-goog-generation: {self.generation}", f"Last-Modified: {formatdate(0)}"]
        if method == "HEAD":
            client.head("200 OK", f"Content-Length: {len(data)}", *tell)
            return
        if asked.span is None:
            client.head("200 OK", f"Content-Length: {len(data)}", *tell)
            client.send(data)
            return
        start, stop = asked.span[0], min(asked.span[1], len(data))
        client.part(start, stop, len(data), *tell)
        client.send(data[start:stop])

    def opens(self, asked: Asked) -> bool:
        """By GOOG4-RSA-SHA256, as Google's documentation has it."""
        parts = urlsplit(asked.target)
        query = dict(parse_qsl(parts.query))
        signature = query.pop("X-Goog-Signature", "0")
        text = "&".join(f"{name}={quote(query[name], safe='')}" for name in sorted(query))
        request = ["GET", parts.path, text, f"host:{GOOGLE}\n", "host", "UNSIGNED-PAYLOAD"]
        digest = hashlib.sha256("\n".join(request).encode()).hexdigest()
        email, _, scope = query.get("X-Goog-Credential", "").partition("/")
        lines = [query.get("X-Goog-Algorithm", ""), query.get("X-Goog-Date", ""), scope, digest]
        return email == ACCOUNT and self.account.signed("\n".join(lines), signature)


@pytest.fixture
def store(account: ServiceAccount, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn(account, {f"{FOLDER}adapter_config.json": CONFIG, WEIGHTS: DATA})
    with FaultServer(b"", stand_in) as server:
        key = {
            "type": "service_account",
            "client_email": ACCOUNT,
            "private_key": account.key,
            "private_key_id": "made for tests",
            "gcs_base_url": f"http://127.0.0.1:{server.port}",
        }
        environment = {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(key), "GOOGLE_ALLOW_HTTP": "true"}
        set_environment(monkeypatch, environment)
        yield stand_in


def test_an_adapter_comes_by_ranges_of_signed_urls(store: StandIn) -> None:
    found = located("gs://my-bucket/some/folder/")
    assert [brought(file) for file in found.files] == [CONFIG, DATA]
    assert found.source == "gs://my-bucket/some/folder/"
    assert found.version.startswith("versions-")
    assert [file.nbytes for file in found.files] == [len(CONFIG), len(DATA)]


async def test_a_load(store: StandIn, tmp_path: Path) -> None:
    """By its id alone. What was pinned is in the cache, whatever becomes of the bucket."""
    adapter = written(tmp_path / "a", layers=4, rank=64)
    for name, data in contents(adapter).items():
        store.objects[f"{FOLDER}{name}"] = data
    id = "gs://my-bucket/some/folder"
    allow = (Allow("gs", "my-bucket"),)
    async with loader(tmp_path, layers=4, allow=allow) as there:
        version = await has(there, id, adapter)
    store.objects.clear()
    async with loader(tmp_path, layers=4, allow=allow) as there:
        assert await has(there, AdapterRef(id, revision=version), adapter) == version
        with pytest.raises(AdapterNotFoundError, match="no adapter_config"):
            await there.load(id)


def test_the_url_is_the_objects_for_as_long_as_was_asked(store: StandIn) -> None:
    parts = urlsplit(located("gs://my-bucket/some/folder/").files[1].target.url.text)
    assert parts.path == WEIGHTS
    query = dict(parse_qsl(parts.query))
    assert query["X-Goog-Algorithm"] == "GOOG4-RSA-SHA256"
    assert query["X-Goog-Expires"] == "600"
    assert query["X-Goog-SignedHeaders"] == "host"


def test_a_generation_is_a_version(store: StandIn) -> None:
    first = located("gs://my-bucket/some/folder/", "1")
    store.generation = 2
    assert located("gs://my-bucket/some/folder/").version != first.version
    with pytest.raises(AdapterNotFoundError, match="any more"):
        located("gs://my-bucket/some/folder/", "1")


def test_what_is_not_there(store: StandIn) -> None:
    with pytest.raises(AdapterNotFoundError, match="no adapter_config"):
        located("gs://my-bucket/another/")


def test_no_secret_is_told(store: StandIn) -> None:
    found = located("gs://my-bucket/some/folder/")
    assert "Signature" not in repr(found)
    assert ACCOUNT not in repr(found)
    assert "X-Goog-Signature" in found.files[1].target.url.text, "or nothing was looked for"


def test_urls_that_are_changed_open_nothing(store: StandIn) -> None:
    """Or the stand-in would look at nothing."""
    url = urlsplit(located("gs://my-bucket/some/folder/").files[1].target.url.text)
    asked = Asked(f"GET {WEIGHTS}?{url.query} HTTP/1.1", {"host": url.netloc}, "")
    assert store.opens(asked)
    for old, new in (("X-Goog-Expires=600", "X-Goog-Expires=601"), ("Signature=", "Signature=1")):
        assert old in asked.line
        assert not store.opens(Asked(asked.line.replace(old, new), asked.fields, ""))


def test_a_public_bucket_without_an_account(
    store: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = located("gs://my-bucket/some/folder/")
    base = str(signed.files[0].target.url.origin)
    set_environment(
        monkeypatch,
        {"GOOGLE_SKIP_SIGNATURE": "true", "GOOGLE_BASE_URL": base, "GOOGLE_ALLOW_HTTP": "true"},
    )
    monkeypatch.setenv("HOME", "/nowhere")  # or an account that is known there would be looked at
    with pytest.raises(AccessDeniedError):
        located("gs://my-bucket/some/folder/")
    store.public = True
    found = located("gs://my-bucket/some/folder/")
    assert "?" not in found.files[1].target.url.text
    assert brought(found.files[1]) == DATA
    assert (found.version, found.scope) == (signed.version, "")
    assert signed.scope != ""


def test_what_is_no_service_account(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, {"GOOGLE_SERVICE_ACCOUNT_KEY": '{"private_key": "secret words"}'})
    with pytest.raises(FetchError, match="credentials in the environment") as caught:
        located("gs://my-bucket/some/folder/")
    assert "secret words" not in repr(caught.value)
    assert caught.value.__context__ is None
