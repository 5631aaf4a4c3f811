"""What an adapter's name means on the hub, what the hub refuses, and what goes wrong on the way."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from event_loops import until
from fault_server import Asked, Client, FaultServer
from hub_stand_in import (
    ADAPTER,
    CONFIG,
    REPO,
    SIGNATURE,
    WEIGHTS,
    HubStandIn,
    Reply,
    git_sha1,
    sha256,
)
from huggingface_hub import constants, utils
from huggingface_hub.errors import OIDCError
from tiny_loaders import fails
from user_loads import at, contents, written
from web_folder import INDEX, Folder, Locator

from lorax_async import AdapterRef, AdapterStore, StoreConfig, errors
from lorax_async.formats.digests import Digest
from lorax_async.formats.peft_names import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.http.failures import RetryPolicy
from lorax_async.remote.base import LocatedAdapter
from lorax_async.remote.hub import HubBackend, parse_endpoint

Patch = pytest.MonkeyPatch

pytestmark = pytest.mark.usefixtures("hub_client", "nothing_left")

TOKEN = "hf_q5ecre7Token"
QUICK = RetryPolicy(attempts=3, base=0.01, most=0.02, obeyed=1.0)
ID = AdapterRef(REPO)


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


@contextmanager
def locating(hub: HubStandIn | str, **settings: Any) -> Iterator[Locator]:
    endpoint = hub if isinstance(hub, str) else hub.endpoint
    given = {"endpoint": parse_endpoint(endpoint), "timeout": 20.0, "retries": QUICK, **settings}
    with ThreadPoolExecutor(8, "lorax-test") as threads:
        yield Locator(HubBackend(threads=threads, **given))


async def located(hub: HubStandIn, ref: AdapterRef = ID) -> LocatedAdapter:
    with locating(hub) as locator:
        found = await locator.locate(ref)
    tells_no_secret(found)
    return found


def tells_no_secret(*things: object) -> None:
    """Neither a token, nor a signature, nor the path of a signed place."""
    for thing in things:
        for text in (str(thing), repr(thing), repr(getattr(thing, "__cause__", None))):
            for secret in (TOKEN, TOKEN[3:], SIGNATURE.partition("=")[2], "/store/"):
                assert secret not in text, text


async def refused(hub: HubStandIn | str, ref: AdapterRef = ID) -> errors.LoraxError:
    with locating(hub) as locator, pytest.raises(errors.LoraxError) as caught:
        await locator.locate(ref)
    error = caught.value
    tells_no_secret(error, *error.args)
    assert (error.stage, error.__cause__) == ("resolve", None)
    return error


async def test_an_adapter_and_where_its_files_lie(hub: HubStandIn) -> None:
    commit = hub.put(REPO, ADAPTER)
    found = await located(hub)
    assert (found.source, found.version, found.scope) == (REPO, commit, "")
    config, weights = found.files
    assert (config.name, weights.name) == (CONFIG_FILE, WEIGHTS_FILE)
    assert (config.nbytes, weights.nbytes) == (len(CONFIG), len(WEIGHTS))
    assert config.expected == Digest("git-sha1", git_sha1(CONFIG))
    assert weights.expected == Digest("sha256", sha256(WEIGHTS))
    for file, name in zip(found.files, ADAPTER, strict=True):
        assert file.target.url.text == f"{hub.endpoint}/{REPO}/resolve/{commit}/{name}"
        assert (file.target.name, file.target.headers) == (f"{REPO}/{name}", {})
    assert config.target.redirected_to is None
    assert weights.target.redirected_to is not None
    assert weights.target.redirected_to.text.startswith(f"http://{hub.store_netloc}/store/")
    assert [asked.method for asked in hub.asked] == ["HEAD", "HEAD"]


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1", "feature/x"])
async def test_whatever_git_names_is_a_revision(hub: HubStandIn, revision: str) -> None:
    hub.put(REPO, {"adapter_config.json": b"other"})
    commit = hub.put(REPO, ADAPTER, revision)
    for name in (revision, commit):
        found = await located(hub, AdapterRef(REPO, revision=name))
        assert (found.version, found.files[1].nbytes) == (commit, len(WEIGHTS))


@pytest.mark.parametrize("later", [{"adapter_model.safetensors": b"new"}, {"README.md": b"none"}])
async def test_a_branch_that_moves_meanwhile(hub: HubStandIn, later: dict[str, bytes]) -> None:
    """Both files are of the commit of the first; also where the new one has no weights."""
    commit, told = hub.put(REPO, ADAPTER), threading.Event()

    def behave(asked: Asked) -> Reply | None:
        if "/main/adapter_model" in asked.target:
            assert told.wait(20)
            hub.put(REPO, {"adapter_config.json": b"new", **later})
        reply = None
        if "adapter_config" in asked.target:
            reply = hub.answered(asked)
            told.set()
        return reply

    hub.behave = behave
    found = await located(hub)
    assert found.version == commit
    assert found.files[1].expected == Digest("sha256", sha256(WEIGHTS))
    assert [asked.target.split("/")[4] for asked in hub.asked].count(commit) == 1


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["README.md"], "no adapter_config.json"),
        (["adapter_config.json"], "no adapter_model.safetensors"),
        (
            ["adapter_config.json", "adapters.safetensors"],
            "adapters.safetensors: the format is MLX",
        ),
        (["pytorch_lora_weights.safetensors"], "the format is diffusers"),
        (
            ["adapter_config.json", "adapter_model.bin"],
            "adapter_model.bin only, a pickle.*never.*safetensors.*lorax-async convert",
        ),
    ],
)
async def test_what_a_repository_lacks(hub: HubStandIn, names: list[str], said: str) -> None:
    hub.put(REPO, dict.fromkeys(names, b"{}"))
    is_foreign = "format is" in said
    kind = errors.UnsupportedAdapterError if is_foreign else errors.AdapterNotFoundError
    with pytest.raises(kind, match=said):
        raise await refused(hub)
    assert not hub.asked_for("GET")


async def test_an_index_in_place_of_the_weights_is_refused(hub: HubStandIn) -> None:
    hub.put(REPO, {"adapter_config.json": CONFIG, INDEX: b"{}", "adapter_model.bin": b"pickle"})
    error = await refused(hub)
    assert isinstance(error, errors.UnsupportedAdapterError)
    assert INDEX in error.problem
    hub.put(REPO, {**ADAPTER, INDEX: b"{}"})
    hub.asked.clear()
    assert [file.name for file in (await located(hub)).files] == list(ADAPTER)
    assert len(hub.asked) == 2, "where the weights are, nothing more is asked"


@pytest.mark.parametrize(
    "etag", [None, "../../etc/passwd", 'W/"1-2"', "e" * 63, "E" * 64, "x" * 40]
)
@pytest.mark.parametrize("size", ["-1", "nine", ""])
async def test_malformed_digests_and_sizes(hub: HubStandIn, etag: str | None, size: str) -> None:
    """They are as good as none: nothing is named by them, nothing checked."""
    fields = {"X-Repo-Commit": "e" * 40, "X-Linked-Size": size, "Location": "http://127.0.0.1:9/x"}
    fields |= {} if etag is None else {"X-Linked-Etag": etag}
    hub.behave = lambda asked: Reply(302, fields)
    files = (await located(hub)).files
    assert [(file.nbytes, file.expected) for file in files] == [(None, None)] * 2


@pytest.mark.parametrize("place", ["ftp://127.0.0.1/x", "//[bad", "http://a b/", "http:///x"])
async def test_a_place_that_is_no_url(hub: HubStandIn, place: str) -> None:
    """The engine will be led there by the file's own URL, and refuses it."""
    hub.behave = lambda asked: Reply(302, {"X-Repo-Commit": "e" * 40, "Location": place})
    try:
        found = await located(hub)
    except errors.FetchError as error:
        assert not error.retryable
        assert "bad" not in error.problem
    else:
        assert [file.target.redirected_to for file in found.files] == [None, None]


async def test_each_authority_has_an_opaque_scope(hub: HubStandIn, tmp_path: Path) -> None:
    """A token given, this machine's own, or none; it is known though the hub is down."""
    commit = hub.put(REPO, ADAPTER)
    (tmp_path / "token").write_text("hf_machine\n")
    refs = {
        None: ID,
        f"Bearer {TOKEN}": AdapterRef(REPO, token=TOKEN),
        "Bearer hf_machine": AdapterRef(REPO, use_token=True),
    }
    with locating(hub) as locator:
        scopes = []
        for sent, ref in refs.items():
            found = await locator.locate(ref)
            tells_no_secret(found)
            assert {asked.fields.get("authorization") for asked in hub.asked[-2:]} == {sent}
            assert {file.target.headers.get("Authorization") for file in found.files} == {sent}
            scopes.append(found.scope)
        hub.behave = lambda asked: Reply(500)
        assert [await locator.scope(ref) for ref in refs.values()] == scopes
        assert locator.is_version(commit)
    assert scopes[0] == ""
    assert len(set(scopes)) == 3
    assert "hf_machine" not in scopes[2]
    with HubStandIn() as other:
        other.put(REPO, ADAPTER)
        scope = (await located(other, AdapterRef(REPO, token=TOKEN))).scope
    assert scope not in scopes, "a token says nothing at another hub"


async def test_no_own_token(hub: HubStandIn, tmp_path: Path, monkeypatch: Patch) -> None:
    """It is no reason to ask without one; who brings his own is not concerned."""
    commit, lent = hub.put(REPO, ADAPTER), AdapterRef(REPO, use_token=True)
    (tmp_path / "token").write_bytes(b"hf_\xff\xfe")
    error = await refused(hub, lent)
    assert type(error) is errors.AccessDeniedError
    assert "log in again" in error.problem

    def fail(**_: object) -> dict[str, str]:
        raise OIDCError(f"no id token but {TOKEN}")

    with monkeypatch.context() as patched:
        patched.setattr(utils, "build_hf_headers", fail)
        assert "OIDCError" in (await refused(hub, lent)).problem
        with locating(hub) as locator:
            assert locator.backend.own_scope() is None
    assert not hub.asked
    for ref in (AdapterRef(REPO, token=TOKEN), ID):
        assert (await located(hub, ref)).version == commit


@pytest.mark.parametrize("token", ["", " ", "hf_a b", "hf_a\r\nX: y", "hf_ü"])
async def test_what_is_no_token_is_not_sent(hub: HubStandIn, token: str) -> None:
    ref = AdapterRef(REPO, revision="a" * 40, token=token)
    with locating(hub) as locator:
        await fails(locator.locate(ref), errors.UsageError, r"leave it out \(None\)")
        await fails(locator.scope(ref), errors.UsageError, r"leave it out \(None\)")
    assert not hub.asked


@pytest.mark.parametrize("endpoint", ["hub", "ftp://hub/", "https://me:pw@hub", "https://h/?a=b"])
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(errors.ConfigError, match="endpoint") as caught, locating(endpoint):
        pass
    assert "me:pw" not in str(caught.value)


async def test_an_endpoint_of_the_environment_that_is_none(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """It is refused to ids of the hub; others do not need it."""
    monkeypatch.setattr(constants, "ENDPOINT", "hub")
    origin = Folder(contents(written(tmp_path / "one", layers=2)))
    with FaultServer(b"", origin) as server:
        url = server.url("/one/")
        config = StoreConfig(cache_dir=tmp_path / "cache", allow=(at(url.split("/")[2]),))
        async with AdapterStore(config) as store:
            await fails(store.checkout(ID), errors.ConfigError, "endpoint is not a URL")
            async with store.checkout(url) as folder:
                assert contents(Path(folder.path)).items() >= origin.files.items()


GATED = "gated: accept its conditions there, and give a token"


@pytest.mark.parametrize(
    ("name", "token", "kind", "words"),
    [
        (f"org/{name}", token, *said)
        for name in ("private", "nobody")
        for token, said in {
            None: (errors.AccessDeniedError, "give a token"),
            "hf_another": (errors.AdapterNotFoundError, "that the token may"),
        }.items()
    ]
    + [("org/gated", token, errors.AccessDeniedError, GATED) for token in (None, "hf_another")],
)
async def test_a_private_repository_looks_like_one_that_is_not_there_and_a_gated_one_says_so(
    hub: HubStandIn, name: str, token: str | None, kind: type[errors.LoraxError], words: str
) -> None:
    hub.put("org/private", ADAPTER, private_token=TOKEN)
    hub.put("org/gated", ADAPTER)
    hub.gate("org/gated", TOKEN)
    error = await refused(hub, AdapterRef(name, token=token))
    assert (type(error), error.retryable) == (kind, False)
    assert name in error.problem
    assert words in error.problem
    for there in ("org/private", "org/gated"):
        assert (await located(hub, AdapterRef(there, token=TOKEN))).files


REFUSED: list[tuple[AdapterRef, Reply | None, type[errors.LoraxError], str]] = [
    *(
        (
            AdapterRef(REPO, revision=name),
            None,
            errors.AdapterNotFoundError,
            f"no revision {name!r}",
        )
        for name in ("nix", "f" * 40, "refs/pr/7")
    ),
    *(
        (AdapterRef(REPO, token=token), reply, errors.AccessDeniedError, words)
        for token in (None, TOKEN)
        for reply, words in (
            (Reply(401, {"X-Error-Message": "Invalid credentials in Authorization header"}), "401"),
            (Reply(403, {"X-Error-Message": f"no {TOKEN}, {SIGNATURE}"}), "403"),
            (Reply(403, {"X-Error-Message": "Access to this resource is disabled."}), "403"),
            (Reply(451), "451"),
        )
    ),
    *((ID, Reply(status), errors.FetchError, str(status)) for status in (400, 416, 418, 501)),
    *(
        (
            ID,
            Reply(200, ({} if said is None else {"X-Repo-Commit": said}) | {"ETag": '"x"'}, b"{}"),
            errors.FetchError,
            "not a hub; check the endpoint",
        )
        for said in (None, "", "main", "A" * 40, "../" * 14, "f" * 64)
    ),
    (
        AdapterRef(REPO, revision="f" * 40),
        Reply(200, {"X-Repo-Commit": "e" * 40, "ETag": '"x"'}, b"{}"),
        errors.IntegrityError,
        "another commit",
    ),
]


@pytest.mark.parametrize(("ref", "reply", "kind", "words"), REFUSED)
async def test_what_the_hub_refuses_is_one_typed_error_and_is_not_asked_again(
    hub: HubStandIn, ref: AdapterRef, reply: Reply | None, kind: type[errors.LoraxError], words: str
) -> None:
    hub.put(REPO, ADAPTER)
    if reply is not None:
        hub.behave = lambda asked: reply
    error = await refused(hub, ref)
    assert (type(error), error.retryable) == (kind, kind is errors.IntegrityError)
    assert words in error.problem
    if kind is errors.AccessDeniedError and words == "401":
        assert "token" in error.problem
    assert len(hub.asked) <= 2


async def test_redirects_without_end(hub: HubStandIn) -> None:
    hub.behave = lambda asked: Reply(307, {"Location": asked.target})
    error = await refused(hub)
    assert (type(error), error.retryable) == (errors.FetchError, False)
    assert len(hub.asked) <= 2 * 20


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_what_passes_is_asked_again(hub: HubStandIn, status: int) -> None:
    """Only the file whose answer is missing, as often as is set, and then it is told."""
    commit, left = hub.put(REPO, ADAPTER), [status, status]

    def busy(asked: Asked) -> Reply | None:
        return Reply(left.pop()) if "adapter_model" in asked.target and left else None

    hub.behave = busy
    assert (await located(hub)).version == commit
    assert len(hub.asked_for("HEAD", "adapter_config")) == 1
    assert len(hub.asked_for("HEAD", "adapter_model")) == 3
    left[:] = [status] * 3
    error = await refused(hub)
    assert (type(error), error.retryable) == (errors.FetchError, True)
    assert f"status {status}" in error.problem


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"Retry-After": "86400"}, 86400.0),
        ({"RateLimit": '"resolvers";r=0;t=250'}, 250.0),
        ({"RateLimit": '"resolvers";r=9;t=250'}, None),
        ({}, None),
    ],
)
async def test_retry_after(hub: HubStandIn, fields: dict[str, str], seconds: float | None) -> None:
    """What is longer than a caller would wait is told at once, and nobody waits."""
    hub.behave = lambda asked: Reply(429, fields)
    assert (await refused(hub)).retry_after == seconds
    assert len(hub.asked) == (2 if seconds else 6)


async def test_a_silent_hub_holds_up_only_its_callers() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with locating(endpoint, timeout=0.4) as locator:
            asking = asyncio.ensure_future(locator.locate(AdapterRef(REPO, token=TOKEN)))
            ticks = 0
            while not asking.done():
                await asyncio.sleep(0.01)
                ticks += 1
            error = await fails(asking, errors.FetchTimeoutError, "did not answer in time")
            tells_no_secret(error)
            assert ticks >= 6, "held, it would have ticked between attempts only"


class HangsUp(FaultServer):
    def _serve(self, client: Client) -> None:
        client.socket.close()


@pytest.mark.parametrize("way", ["nobody listens", "it hangs up"])
async def test_a_hub_that_cannot_be_reached_is_worth_another_attempt(way: str) -> None:
    with HangsUp(b"") as server:
        endpoint = server.url("").rstrip("/")
        if way == "nobody listens":
            with socket.create_server(("127.0.0.1", 0)) as taken:
                endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        error = await refused(endpoint, AdapterRef(REPO, token=TOKEN))
    assert (type(error), error.retryable) == (errors.FetchError, True)
    if way == "nobody listens":
        assert f"{endpoint.removeprefix('http://')} failed (ECONNREFUSED)" in error.problem


async def test_a_forbidden_hub(hub: HubStandIn, monkeypatch: Patch) -> None:
    hub.put(REPO, ADAPTER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with (
        locating(hub) as locator,
        pytest.raises(errors.FetchError, match="HF_HUB_OFFLINE") as caught,
    ):
        await locator.locate(AdapterRef(REPO, token=TOKEN))
    assert not caught.value.retryable
    assert not hub.asked


@pytest.mark.parametrize("between", [False, True], ids=["while it is asked", "between attempts"])
async def test_a_cancelled_question_asks_nothing_more(hub: HubStandIn, between: bool) -> None:
    hub.put(REPO, ADAPTER)
    go_on = threading.Event()

    def wait(asked: Asked) -> Reply | None:
        if between:
            return Reply(503, {"Retry-After": "30"})
        assert go_on.wait(30)
        return None

    hub.behave = wait
    with locating(hub, retries=replace(QUICK, obeyed=60)) as locator:
        asking = asyncio.create_task(locator.locate(ID))
        await until(lambda: len(hub.asked) == 2)
        asking.cancel()
        await fails(asking, asyncio.CancelledError)
        go_on.set()
    assert len(hub.asked) == 2
