"""Object stores that answer wrongly, late or not at all, and what needs no server to be refused."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import pytest
from fault_server import Asked, Behaviour, Client, FaultServer, Hangup, until
from obstore.exceptions import PermissionDeniedError, UnauthenticatedError
from store_process import set_environment
from stored import located, locator

from common import open_sockets
from common import until as later
from lorax_async.adapter import AdapterRef
from lorax_async.errors import (
    AccessDeniedError,
    AdapterError,
    ConfigError,
    FetchError,
    FetchTimeoutError,
    IntegrityError,
    UsageError,
)
from lorax_async.io.http.settings import PublicOnly
from lorax_async.io.http.target import Answer, Known
from lorax_async.io.http.urls import parse_url
from lorax_async.io.remote.buckets import Buckets
from lorax_async.io.remote.store_errors import mapped
from lorax_async.io.remote.store_ids import Folder
from lorax_async.io.remote.stores import OriginAllowed, StoreLocator

pytestmark = pytest.mark.usefixtures("nothing_left")

ID = "s3://bucket/prefix/"
HIDDEN = "words of the server"


def environment(patch: pytest.MonkeyPatch, server: FaultServer) -> None:
    set_environment(
        patch,
        {
            "AWS_ENDPOINT_URL": server.url("").rstrip("/"),
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "the-secret",
            "AWS_TIMEOUT": "500ms",
        },
    )


async def test_a_bucket_that_does_not_answer_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More questions than there are threads; whoever asks for another bucket is answered."""
    hanging = []

    def behave(asked: Asked, client: Client) -> None:
        if asked.target.startswith("/stalls/"):
            hanging.append(asked)
            client.ending.wait(30)
            raise Hangup
        client.head("200 OK", *GOOD)

    with FaultServer(b"", behave) as server, ThreadPoolExecutor(12, "lorax-test") as threads:
        environment(monkeypatch, server)
        monkeypatch.setenv("AWS_TIMEOUT", "15s")
        made = StoreLocator(threads, PublicOnly())
        try:
            loads = [
                asyncio.create_task(made.locate(AdapterRef(f"s3://stalls/{n}/"))) for n in range(20)
            ]
            await later(lambda: hanging)
            async with asyncio.timeout(10):
                found = await made.locate(AdapterRef("s3://answers/folder/"))
            assert [file.nbytes for file in found.files] == [10, 10]
            for load in loads:
                load.cancel()
            await asyncio.wait(loads)
        finally:
            made.close()
            server._ending.set()


def says(status: str, *fields: str) -> Behaviour:
    def behave(asked: Asked, client: Client) -> None:
        body = b"" if asked.line.startswith("HEAD") else HIDDEN.encode()
        client.head(status, f"Content-Length: {len(body)}", *fields)
        client.send(body)

    return behave


GOOD = ("Last-Modified: Thu, 01 Jan 1970 00:00:00 GMT", "Content-Length: 10", 'ETag: "v1"')


def of_names(behaviours: dict[str, Callable[[Client], None]]) -> Behaviour:
    """By the end of the name; what is not among them is a good answer to HEAD."""

    def behave(asked: Asked, client: Client) -> None:
        path = asked.target.partition("?")[0].replace("%2E", ".").replace("%5F", "_")
        for end, answer in behaviours.items():
            if path.endswith(end):
                answer(client)
                return
        client.head("200 OK", *GOOD)

    return behave


def status(line: str) -> Callable[[Client], None]:
    return lambda client: client.head(line, "Content-Length: 0")


@pytest.mark.parametrize(
    ("line", "kind", "text", "retryable"),
    [
        ("500 Internal Server Error", FetchError, "status 500", True),
        ("503 Slow Down", FetchError, "status 503", True),
        ("429 Too Many Requests", FetchError, "status 429", True),
        ("400 Bad Request", FetchError, "status 400", False),
        ("401 Unauthorized", AccessDeniedError, "environment's credentials", False),
        ("301 Moved Permanently", FetchError, "set AWS_REGION", False),
    ],
)
def test_answers_that_are_no_help(
    line: str, kind: type[FetchError], text: str, retryable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultServer(b"", says(line)) as server:
        environment(monkeypatch, server)
        with pytest.raises(kind, match=text) as caught:
            located(ID)
        assert len(server.asked) <= 6, "two files, each asked for three times at most"
    assert caught.value.retryable is retryable
    check_silent(caught.value)


def check_silent(error: AdapterError) -> None:
    text = "".join(traceback.format_exception(error)) + repr(error)
    for word in (HIDDEN, "the-secret", "AWS4", "Debug source"):
        assert word not in text


def test_a_listing_that_fails_tells_nothing_of_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    behaviours = {
        "adapter_model.safetensors": status("404 Not Found"),
        "/bucket": lambda client: says("500 No")(Asked("GET", {}, ""), client),
    }
    with FaultServer(b"", of_names(behaviours)) as server:
        environment(monkeypatch, server)
        with pytest.raises(FetchError, match="status 500") as caught:
            located(ID)
        assert any("list-type=2" in asked.target for asked in server.asked)
    check_silent(caught.value)


@pytest.mark.parametrize("index", [True, False])
def test_who_may_not_list_is_denied_what_is_not_there(
    index: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 answers 403 for 404 then, so the index is looked for all the same."""
    listing = (
        b'<?xml version="1.0"?><ListBucketResult><Name>bucket</Name><Prefix>prefix/</Prefix>'
        b"<KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
    )

    def listed(client: Client) -> None:
        client.head("200 OK", f"Content-Length: {len(listing)}")
        client.send(listing)

    behaviours = {"adapter_model.safetensors": status("403 Forbidden"), "/bucket": listed}
    if not index:
        behaviours["index.json"] = status("404 Not Found")
    with FaultServer(b"", of_names(behaviours)) as server:
        environment(monkeypatch, server)
        if index:
            assert located(ID).files[1].role.kind == "index"
            return
        with pytest.raises(AccessDeniedError):
            located(ID)


@pytest.mark.parametrize("etag", ["", 'ETag: W/"weak"'])
def test_a_store_without_strong_etags(etag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [*GOOD[:2], *([etag] if etag else [])]
    with FaultServer(b"", lambda _, client: client.head("200 OK", *fields)) as server:
        environment(monkeypatch, server)
        with pytest.raises(FetchError, match="strong ETag") as caught:
            located(ID)
    assert not caught.value.retryable


def test_a_silent_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer(b"", lambda _, client: client.stall()) as server:
        environment(monkeypatch, server)
        with pytest.raises(FetchTimeoutError, match="in time") as caught:
            located(ID)
    assert caught.value.retryable
    check_silent(caught.value)


async def test_who_gives_up_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads end by obstore's own deadline, and what they bring is nobody's."""
    before = open_sockets()
    with FaultServer(b"", lambda _, client: client.stall()) as server:
        environment(monkeypatch, server)
        with locator() as made:
            asking = asyncio.create_task(made.locate(AdapterRef(ID)))
            await later(lambda: server.asked)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
    until(lambda: open_sockets() <= before, 30)


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("obstore", "obstore.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'lorax-async\[objects\]'"):
        located(ID)


async def test_a_token_and_ids_of_others_are_refused() -> None:
    with locator() as made:
        for ref in (AdapterRef(ID, token="a"), AdapterRef("org/name")):
            with pytest.raises(UsageError):
                await made.locate(ref)
            with pytest.raises(UsageError):
                made.recalled(ref)


@pytest.mark.parametrize("kind", [PermissionDeniedError, UnauthenticatedError])
def test_obstores_own_words_for_denied(kind: type[Exception]) -> None:
    assert isinstance(mapped(kind("secret"), "s3://bucket/"), AccessDeniedError)


class TlsServer(FaultServer):
    """Its certificate is its own word only, and so no handshake succeeds."""

    context: ssl.SSLContext

    def _serve(self, client: Client) -> None:
        with suppress(OSError), self.context.wrap_socket(client.socket, server_side=True):
            raise AssertionError("it was trusted")
        client.socket.close()


def test_a_certificate_that_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make, *files], check=True, capture_output=True, timeout=60)
    server = TlsServer(b"")
    server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.context.load_cert_chain(certificate, key)
    with server:
        environment(monkeypatch, server)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://localhost:{server.port}")
        with pytest.raises(FetchError, match="not trusted") as caught:
            located(ID)
    assert not caught.value.retryable
    check_silent(caught.value)


def test_the_origin_of_a_signed_url_is_allowed_and_no_other() -> None:
    own = parse_url("http://10.0.0.1:9000/bucket/key?sig")
    rules = OriginAllowed(own.origin, PublicOnly())
    private = ip_address("10.0.0.1")
    assert rules.allows(own, 0)
    assert rules.allows_address(own, private)
    for other in ("http://10.0.0.1:9001/", "https://10.0.0.1:9000/", "http://10.0.0.2:9000/"):
        assert not rules.allows_address(parse_url(other), private)
    assert not rules.allows(parse_url("http://10.0.0.1/"), 1)
    assert rules.allows(parse_url("https://example.com/"), 1), "as the inner rules have it"


def test_connections_of_sixteen_buckets_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer(b"", of_names({})) as server:
        environment(monkeypatch, server)
        buckets = Buckets()
        for n in range(20):
            assert buckets.head(Folder("s3", f"bucket-{n}", ""), "name") is not None
        until(lambda: server.connected() == 16, 30)
        buckets.close()
        until(lambda: server.connected() == 0, 30)


@pytest.mark.parametrize(
    ("known", "right"),
    [
        (Known(10, '"v1"'), True),
        (Known(None, '"v1"'), True),
        (Known(10, '"v2"'), False),
        (Known(11, '"v1"'), False),
        (Known(10, None), False),
    ],
)
def test_the_first_answer_is_about_the_file_that_was_told(
    known: Known, right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultServer(b"", of_names({})) as server:
        environment(monkeypatch, server)
        file = located(ID).files[1]
    answer = Answer(file.target, file.target.place, known, {}, b"", ranges=True)
    if right:
        assert file.checked(answer) is answer
        return
    with pytest.raises(IntegrityError, match="replaced"):
        file.checked(answer)
