"""Object stores that answer wrongly, late or not at all; and what needs no server to be refused."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from ipaddress import ip_address
from pathlib import Path
from threading import Event

import pytest
from event_loops import until as later
from fault_server import Asked, Behaviour, Client, FaultServer, until
from store_servers import located, locator, set_environment
from tls_servers import certificate, tls_server
from user_loads import secretless

from lorax_async import AdapterRef, errors
from lorax_async.http.target import ProbeResult, Validators
from lorax_async.remote.object_stores import version_of
from lorax_async.urls import parse_url

__all__ = ["certificate"]

pytestmark = pytest.mark.usefixtures("nothing_left")

ID = "s3://bucket/prefix/"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    """It has every file, of 10 bytes, until it is told to behave otherwise."""
    with FaultServer(b"", of_names({})) as server:
        given = {"ENDPOINT_URL": server.url(""), "ALLOW_HTTP": "true", "TIMEOUT": "500ms"}
        given |= {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "the-secret"}
        set_environment(monkeypatch, {f"AWS_{name}": value for name, value in given.items()})
        yield server


async def test_a_silent_bucket_holds_up_no_other(
    store: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More questions than there are threads; whoever asks for another bucket is answered."""
    hanging, go_on, answers = [], Event(), store.behave
    assert answers is not None

    def behave(asked: Asked, client: Client) -> None:
        if asked.target.startswith("/stalls/"):
            hanging.append(asked)
            go_on.wait(30)
            client.hang_up()
        answers(asked, client)

    store.behave = behave
    monkeypatch.setenv("AWS_TIMEOUT", "15s")
    with locator(12) as made:
        refs = [AdapterRef(f"s3://stalls/{n}/") for n in range(20)]
        loads = [asyncio.create_task(made.locate(ref)) for ref in refs]
        try:
            await later(lambda: hanging)
            async with asyncio.timeout(10):
                found = await made.locate(AdapterRef("s3://answers/folder/"))
            assert [file.nbytes for file in found.files] == [10, 10]
            for load in loads:
                load.cancel()
            await asyncio.wait(loads)
        finally:
            go_on.set()


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


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("obstore", "obstore.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(errors.ConfigError, match=r"pip install '\.\[objects\]'"):
        located(ID)


def test_the_origin_of_a_signed_url_is_allowed_and_no_other(store: FaultServer) -> None:
    target, loopback = located(ID).files[1].target, ip_address("127.0.0.1")
    rules, own = target.rules, target.url
    assert own.origin == parse_url(store.url("")).origin
    assert rules.allows(own, 0)
    assert rules.allows_address(own, loopback)
    other_port = f"127.0.0.1:{store.port - 1}"
    for other in (f"http://{other_port}/", f"https://127.0.0.1:{store.port}/", "http://localhost/"):
        assert not rules.allows_address(parse_url(other), loopback)
    assert not rules.allows(parse_url(f"http://{other_port}/"), 1)
    assert rules.allows(parse_url("https://example.com/"), 1), "as a redirect"


@pytest.mark.parametrize(
    ("known", "right"),
    [
        *((Validators(10, '"v1"'), True), (Validators(None, '"v1"'), True)),
        *((Validators(10, '"v2"'), False), (Validators(11, '"v1"'), False)),
        (Validators(10, None), False),
    ],
)
def test_another_file_answers(store: FaultServer, known: Validators, right: bool) -> None:
    file = located(ID).files[1]
    answer = ProbeResult(
        file.target, file.target.location, known, {}, b"", ranges=True, rest=Future()
    )
    if right:
        file.require_match(answer)
        return
    with pytest.raises(errors.IntegrityError, match="replaced"):
        file.require_match(answer)


def test_other_words_are_another_version() -> None:
    several = [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["ab", "c", ""]]
    assert len({version_of("etags", words) for words in several}) == len(several)


HIDDEN = "words of the server"


def says(line: str, *fields: str) -> Behaviour:
    def behave(asked: Asked, client: Client) -> None:
        body = b"" if asked.line.startswith("HEAD") else HIDDEN.encode()
        client.head(line, f"Content-Length: {len(body)}", *fields)
        client.send(body)

    return behave


def head(*fields: str) -> Behaviour:
    return lambda asked, client: client.head("200 OK", *fields)


NO_HELP: dict[str, tuple[Behaviour, type[errors.FetchError], str, bool]] = {
    "500": (says("500 Internal Server Error"), errors.FetchError, "status 500", True),
    "503": (says("503 Slow Down"), errors.FetchError, "status 503", True),
    "429": (says("429 Too Many Requests"), errors.FetchError, "status 429", True),
    "400": (says("400 Bad Request"), errors.FetchError, "status 400", False),
    "401": (says("401 Unauthorized"), errors.AccessDeniedError, "environment's credentials", False),
    "301": (says("301 Moved Permanently"), errors.FetchError, "set AWS_REGION", False),
    "no ETag": (head(*GOOD[:2]), errors.FetchError, "strong ETag", False),
    "a weak ETag": (head(*GOOD[:2], 'ETag: W/"weak"'), errors.FetchError, "strong ETag", False),
    "silence": (lambda _, client: client.stall(), errors.FetchTimeoutError, "in time", True),
}


@pytest.mark.parametrize(("behave", "kind", "words", "retryable"), NO_HELP.values(), ids=NO_HELP)
def test_answers_that_are_no_help_are_errors_without_the_servers_words(
    store: FaultServer,
    behave: Behaviour,
    kind: type[errors.FetchError],
    words: str,
    retryable: bool,
) -> None:
    store.behave = behave
    with pytest.raises(kind, match=words) as caught:
        located(ID)
    assert len(store.asked) <= 9, "each question is put three times at most"
    assert caught.value.retryable is retryable
    secretless(caught.value, HIDDEN, "the-secret", "AWS4", "Debug source")


@pytest.mark.parametrize("bucket", ["Bucket", "a", "a..b", "10.0.0.1", "$web", "x" * 100])
def test_which_names_a_bucket_may_have_is_the_stores_answer(
    store: FaultServer, bucket: str
) -> None:
    store.behave = says("400 Bad Request")
    with pytest.raises(errors.FetchError, match="status 400") as caught:
        located(f"s3://{bucket}/prefix/")
    assert not caught.value.retryable
    assert {asked.target.rpartition("/")[0] for asked in store.asked} == {f"/{bucket}/prefix"}


@pytest.mark.parametrize(
    ("found", "error"),
    [
        ("index.json", errors.UnsupportedAdapterError),
        ("adapter_model.bin", errors.AdapterNotFoundError),
        ("", errors.AccessDeniedError),
    ],
)
def test_a_missing_file_without_right_to_list(
    store: FaultServer, found: str, error: type[errors.LoraxError]
) -> None:
    """S3 answers 403 for 404 then, so what is in its place is looked for all the same."""
    behaviours = {"adapter_model.safetensors": status("403 Forbidden")}
    missing = {"index.json", "adapter_model.bin"} - {found}
    store.behave = of_names(behaviours | dict.fromkeys(missing, status("404 Not Found")))
    with pytest.raises(error):
        located(ID)


def test_a_pickle_is_located_for_an_operator_who_converts(store: FaultServer) -> None:
    missing = dict.fromkeys(("adapter_model.safetensors", "index.json"), status("404 Not Found"))
    store.behave = of_names(missing)
    assert [file.name for file in located(ID, convert_bin=True).files] == [
        "adapter_config.json",
        "adapter_model.bin",
    ]


def test_an_untrusted_certificate(
    store: FaultServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tls_server(certificate) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://localhost:{server.port}")
        with pytest.raises(errors.FetchError, match="not trusted") as caught:
            located(ID)
    assert not caught.value.retryable


async def test_a_token_is_refused() -> None:
    with locator() as made:
        for call in (made.locate, made.scope):
            with pytest.raises(errors.UsageError) as caught:
                await call(AdapterRef(ID, token="the-token"))
            assert "the-token" not in str(caught.value)


def test_connections_of_sixteen_buckets_are_kept(store: FaultServer) -> None:
    clients: dict[str, list[Client]] = {}
    answers = store.behave
    assert answers is not None

    def behave(asked: Asked, client: Client) -> None:
        clients.setdefault(asked.target.split("/")[1], []).append(client)
        answers(asked, client)

    def connected() -> int:
        return sum(any(client.socket.fileno() >= 0 for client in of) for of in clients.values())

    async def locate_all() -> None:
        for n in range(20):
            await made.locate(AdapterRef(f"s3://bucket-{n}/folder/"))

    store.behave = behave
    with locator() as made:
        asyncio.run(locate_all())
        until(lambda: connected() == 16, 30)
    until(lambda: store.connected() == 0, 30)
