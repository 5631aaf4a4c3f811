"""What an adapter's name means on the hub, what the hub refuses, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from answering_server import Asked, Reply
from fault_server import Client, FaultServer
from hub_stand_in import SIGNATURE, HubStandIn, git_sha1, sha256
from hub_world import (
    ADAPTER,
    CONFIG,
    QUICK,
    REPO,
    TOKEN,
    WEIGHTS,
    locating,
    refused,
    tells_no_secret,
)
from huggingface_hub import constants, utils
from huggingface_hub.errors import OIDCError

from common import until
from lorax_async.adapter import AdapterRef
from lorax_async.core.cache_names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, FileRole
from lorax_async.core.file_digest import Digest
from lorax_async.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    ConfigError,
    FetchError,
    FetchTimeoutError,
    IntegrityError,
    InvalidAdapterIdError,
    LoraxError,
    UsageError,
)
from lorax_async.io.http.settings import PublicOnly
from lorax_async.io.remote.ports import Located, Locator

pytestmark = pytest.mark.usefixtures("hub_client", "nothing_left")

INDEX = "adapter_model.safetensors.index.json"

SHARDS = {f"adapter_model-{k:05d}-of-00003.safetensors": bytes([k]) * k * 100 for k in (1, 2, 3)}


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


async def test_an_adapter_and_where_its_files_lie(hub: HubStandIn) -> None:
    commit = hub.put(REPO, ADAPTER)
    with locating(hub) as locator:
        port: Locator = locator
        located = await port.locate(AdapterRef(REPO))
    assert (located.source, located.version, located.scope) == (REPO, commit, "")
    config, weights = located.files
    assert (config.role, weights.role) == (CONFIG_FILE, WEIGHTS_FILE)
    assert (config.nbytes, weights.nbytes) == (len(CONFIG), len(WEIGHTS))
    assert config.expected == Digest("git-sha1", git_sha1(CONFIG))
    assert weights.expected == Digest("sha256", sha256(WEIGHTS))
    at = f"{hub.endpoint}/{REPO}/resolve/{commit}"
    assert config.target.url.text == f"{at}/adapter_config.json"
    assert weights.target.url.text == f"{at}/adapter_model.safetensors"
    assert config.target.found is None
    assert weights.target.found is not None
    assert weights.target.found.text.startswith(f"http://{hub.store_netloc}/store/")
    assert weights.target.name == "org/name/adapter_model.safetensors"
    assert config.target.headers == weights.target.headers == {}
    assert [asked.method for asked in hub.asked] == ["HEAD", "HEAD"]
    tells_no_secret(located)


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1", "feature/x"])
async def test_whatever_git_names_is_a_revision(hub: HubStandIn, revision: str) -> None:
    hub.put(REPO, {"adapter_config.json": b"other"})
    commit = hub.put(REPO, ADAPTER, revision)
    with locating(hub) as locator:
        for name in (revision, commit):
            located = await locator.locate(AdapterRef(REPO, revision=name))
            assert located.version == commit
            assert located.files[1].nbytes == len(WEIGHTS)


@pytest.mark.parametrize("later", [{"adapter_model.safetensors": b"new"}, {"README.md": b"none"}])
async def test_a_branch_that_moves_between_two_answers(
    hub: HubStandIn, later: dict[str, bytes]
) -> None:
    """Both files are of the commit of the first; also where the new one has no weights."""
    commit = hub.put(REPO, ADAPTER)
    told = threading.Event()

    def behave(asked: Asked) -> Reply | None:
        if "/main/adapter_model" in asked.target:
            assert told.wait(20)
            hub.put(REPO, {"adapter_config.json": b"new", **later})
        return None

    def note(asked: Asked) -> Reply | None:
        reply = behave(asked)
        if "adapter_config" in asked.target:
            reply = hub.answered(asked)
            told.set()
        return reply

    hub.behave = note
    with locating(hub) as locator:
        located = await locator.locate(AdapterRef(REPO))
    assert located.version == commit
    assert located.files[1].expected == Digest("sha256", sha256(WEIGHTS))
    assert [asked.target.split("/")[4] for asked in hub.asked].count(commit) == 1


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"README.md": b""}, "no adapter_config.json"),
        ({"adapter_config.json": b"{}"}, r"neither adapter_model\.safetensors nor .*index"),
        (
            {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"},
            "adapter_model.bin only, a pickle.*never.*safetensors",
        ),
    ],
)
async def test_what_a_repository_lacks(hub: HubStandIn, files: dict[str, bytes], said: str) -> None:
    hub.put(REPO, files)
    with locating(hub) as locator, pytest.raises(AdapterNotFoundError, match=said) as caught:
        await locator.locate(AdapterRef(REPO))
    assert caught.value.stage == "resolve"
    assert not hub.asked_for("GET")


@pytest.mark.parametrize("endpoint", ["hub", "ftp://hub/", "https://me:pw@hub", "https://h/?a=b"])
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint") as caught, locating(endpoint):
        pass
    assert "me:pw" not in str(caught.value)


@pytest.mark.parametrize("token", [None, "hf_another"])
async def test_a_gated_repository(hub: HubStandIn, token: str | None) -> None:
    hub.put(REPO, ADAPTER)
    hub.gate(REPO, TOKEN)
    error = await refused(hub, AdapterRef(REPO, token=token))
    assert type(error) is AccessDeniedError
    assert "gated: accept its conditions there, and give a token" in error.problem
    with locating(hub) as locator:
        assert (await locator.locate(AdapterRef(REPO, token=TOKEN))).files


REFUSALS = [
    (Reply(401, {"X-Error-Message": "Invalid credentials in Authorization header"}), "401.*token"),
    (Reply(403, {"X-Error-Message": f"no {TOKEN}, {SIGNATURE}"}), "403.*token"),
    (Reply(403, {"X-Error-Message": "Access to this resource is disabled."}), "403"),
    (Reply(451), "451"),
]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_what_passes_is_asked_again(hub: HubStandIn, status: int) -> None:
    """Only the file whose answer is missing, as often as is set, and then it is told."""
    commit = hub.put(REPO, ADAPTER)
    left = [status, status]

    def busy(asked: Asked) -> Reply | None:
        return Reply(left.pop()) if "adapter_model" in asked.target and left else None

    hub.behave = busy
    with locating(hub) as locator:
        assert (await locator.locate(AdapterRef(REPO))).version == commit
    assert len(hub.asked_for("HEAD", "adapter_config")) == 1
    assert len(hub.asked_for("HEAD", "adapter_model")) == 3
    left[:] = [status] * 3
    error = await refused(hub, AdapterRef(REPO))
    assert type(error) is FetchError
    assert error.retryable
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
async def test_how_long_the_hub_wants_to_be_left_alone(
    hub: HubStandIn, fields: dict[str, str], seconds: float | None
) -> None:
    """What is longer than a caller would wait is told at once, and nobody waits."""
    hub.behave = lambda asked: Reply(429, fields)
    error = await refused(hub, AdapterRef(REPO))
    assert error.retry_after == seconds
    assert len(hub.asked) == (2 if seconds else 6)


@pytest.mark.parametrize(
    "etag", [None, "../../etc/passwd", 'W/"1-2"', "e" * 63, "E" * 64, "x" * 40]
)
@pytest.mark.parametrize("size", ["-1", "nine", ""])
async def test_digests_and_sizes_that_are_none(
    hub: HubStandIn, etag: str | None, size: str
) -> None:
    """They are as good as none: nothing is named by them, nothing checked."""
    fields = {"X-Repo-Commit": "e" * 40, "X-Linked-Size": size}
    if etag is not None:
        fields["X-Linked-Etag"] = etag
    hub.behave = lambda asked: Reply(302, {**fields, "Location": "http://127.0.0.1:9/x"})
    with locating(hub) as locator:
        located = await locator.locate(AdapterRef(REPO))
    assert [(file.nbytes, file.expected) for file in located.files] == [(None, None)] * 2


@pytest.mark.parametrize("place", ["ftp://127.0.0.1/x", "//[bad", "http://a b/", "http:///x"])
async def test_a_place_that_is_no_url(hub: HubStandIn, place: str) -> None:
    """The engine will be led there by the file's own URL, and refuses it."""
    fields = {"X-Repo-Commit": "e" * 40, "Location": place}
    hub.behave = lambda asked: Reply(302, fields)
    with locating(hub) as locator:
        try:
            located = await locator.locate(AdapterRef(REPO))
        except FetchError as error:
            assert not error.retryable
            assert "bad" not in error.problem
        else:
            assert [file.target.found for file in located.files] == [None, None]


async def test_a_silent_hub_holds_up_only_its_callers() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with locating(endpoint, timeout=0.4) as locator:
            asking = asyncio.ensure_future(locator.locate(AdapterRef(REPO, token=TOKEN)))
            ticks = 0
            while not asking.done():
                await asyncio.sleep(0.01)
                ticks += 1
            with pytest.raises(FetchTimeoutError, match="did not answer in time") as caught:
                await asking
            tells_no_secret(caught.value)
            assert ticks >= 6, "held, it would have ticked between attempts only"


async def test_a_machine_whose_own_token_cannot_be_had(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no reason to ask without one; who brings his own is not concerned."""
    commit = hub.put(REPO, ADAPTER)
    lent = AdapterRef(REPO, use_token=True)
    (tmp_path / "token").write_bytes(b"hf_\xff\xfe")
    error = await refused(hub, lent)
    assert type(error) is AccessDeniedError
    assert "log in anew" in error.problem

    def fail(**_: object) -> dict[str, str]:
        raise OIDCError(f"no id token but {TOKEN}")

    with monkeypatch.context() as patched:
        patched.setattr(utils, "build_hf_headers", fail)
        assert "OIDCError" in (await refused(hub, lent)).problem
        with locating(hub) as locator:
            assert locator.own_scope() is None
    assert not hub.asked
    with locating(hub) as locator:
        for ref in (AdapterRef(REPO, token=TOKEN), AdapterRef(REPO)):
            assert (await locator.locate(ref)).version == commit


async def sharded(hub: HubStandIn, token: str | None = None) -> tuple[Located, str]:
    files = {"adapter_config.json": CONFIG, INDEX: b"{}", **SHARDS}
    commit = hub.put(REPO, files, private_token=token)
    with locating(hub) as locator:
        return await locator.locate(AdapterRef(REPO, token=token)), commit


async def test_weights_in_several_files(hub: HubStandIn) -> None:
    located, commit = await sharded(hub)
    assert [file.role for file in located.files] == [CONFIG_FILE, INDEX_FILE]
    hub.put(REPO, ADAPTER)  # a later commit is nobody's business
    roles = [FileRole("weights", k, 3) for k in (1, 2, 3)]
    with locating(hub) as locator:
        files = await locator.shards(located, roles)
        with pytest.raises(AdapterNotFoundError, match=r"00001-of-00002.*index names"):
            await locator.shards(located, [FileRole("weights", k, 2) for k in (1, 2)])
    assert [file.role for file in files] == roles
    for file, (name, content) in zip(files, SHARDS.items(), strict=True):
        assert file.target.url.text == f"{hub.endpoint}/{REPO}/resolve/{commit}/{name}"
        assert file.expected == Digest("sha256", sha256(content))
        assert file.nbytes == len(content)


async def test_each_authority_has_a_scope_that_does_not_tell_it(
    hub: HubStandIn, tmp_path: Path
) -> None:
    """A token given, this machine's own, or none; it is known though the hub is down."""
    commit = hub.put(REPO, ADAPTER)
    (tmp_path / "token").write_text("hf_machine\n")
    refs = {
        None: AdapterRef(REPO),
        f"Bearer {TOKEN}": AdapterRef(REPO, token=TOKEN),
        "Bearer hf_machine": AdapterRef(REPO, use_token=True),
    }
    with locating(hub) as locator:
        scopes = []
        for sent, ref in refs.items():
            located = await locator.locate(ref)
            tells_no_secret(located)
            assert {asked.fields.get("authorization") for asked in hub.asked[-2:]} == {sent}
            assert {file.target.headers.get("Authorization") for file in located.files} == {sent}
            scopes.append(located.scope)
        hub.behave = lambda asked: Reply(500)
        assert [await locator.scope(ref) for ref in refs.values()] == scopes
        pinned = replace(refs[f"Bearer {TOKEN}"], revision=commit)
        assert locator.recalled(pinned) == (REPO, commit, scopes[1])
    assert scopes[0] == ""
    assert len(set(scopes)) == 3
    assert "hf_machine" not in scopes[2]
    with HubStandIn() as other, locating(other) as elsewhere:
        other.put(REPO, ADAPTER)
        located = await elsewhere.locate(AdapterRef(REPO, token=TOKEN))
        assert located.scope not in scopes, "a token says nothing at another hub"


@pytest.mark.parametrize("token", ["", " ", "hf_a b", "hf_a\r\nX: y", "hf_ü"])
async def test_what_is_no_token_is_not_sent(hub: HubStandIn, token: str) -> None:
    ref = AdapterRef(REPO, revision="a" * 40, token=token)
    with locating(hub) as locator:
        with pytest.raises(UsageError, match=r"leave it out \(None\)"):
            await locator.locate(ref)
        with pytest.raises(UsageError, match=r"leave it out \(None\)"):
            locator.recalled(ref)
    assert not hub.asked


# -- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [None, "hf_another"])
async def test_a_private_repository_looks_like_one_that_is_not_there(
    hub: HubStandIn, token: str | None
) -> None:
    hub.put("org/private", ADAPTER, private_token=TOKEN)
    for name in ("org/private", "org/nobody"):
        error = await refused(hub, AdapterRef(name, token=token))
        assert type(error) is (AccessDeniedError if token is None else AdapterNotFoundError)
        assert not error.retryable
        assert name in error.problem
        said = "give a token" if token is None else "that the token may"
        assert said in error.problem


ID = AdapterRef(REPO)
AT_COMMIT = AdapterRef(REPO, revision="f" * 40)
NAMES_NO_COMMIT = (None, "", "main", "A" * 40, "../" * 14, "f" * 64)
REFUSED: list[tuple[AdapterRef, Reply | None, type[LoraxError], str]] = [
    *(
        (AdapterRef(REPO, revision=name), None, AdapterNotFoundError, f"no revision {name!r}")
        for name in ("nix", "f" * 40, "refs/pr/7", "a b/../c")
    ),
    *(
        (AdapterRef(name), None, InvalidAdapterIdError, "")
        for name in ("a--b/c", "org/name/more", "org name/x", "../../etc")
    ),
    *(
        (AdapterRef(REPO, token=token), reply, AccessDeniedError, words)
        for token in (None, TOKEN)
        for reply, words in (
            (Reply(401, {"X-Error-Message": "Invalid credentials in Authorization header"}), "401"),
            (Reply(403, {"X-Error-Message": f"no {TOKEN}, {SIGNATURE}"}), "403"),
            (Reply(403, {"X-Error-Message": "Access to this resource is disabled."}), "403"),
            (Reply(451), "451"),
        )
    ),
    *((ID, Reply(status), FetchError, str(status)) for status in (400, 416, 418, 501)),
    *(
        (
            ID,
            Reply(200, ({} if said is None else {"X-Repo-Commit": said}) | {"ETag": '"x"'}, b"{}"),
            FetchError,
            "no hub; check the endpoint",
        )
        for said in NAMES_NO_COMMIT
    ),
    (
        AT_COMMIT,
        Reply(200, {"X-Repo-Commit": "e" * 40, "ETag": '"x"'}, b"{}"),
        IntegrityError,
        "another commit",
    ),
]


@pytest.mark.parametrize(("ref", "reply", "kind", "words"), REFUSED)
async def test_what_the_hub_refuses_is_one_typed_error_and_is_not_asked_again(
    hub: HubStandIn, ref: AdapterRef, reply: Reply | None, kind: type[LoraxError], words: str
) -> None:
    hub.put(REPO, ADAPTER)
    if reply is not None:
        hub.behave = lambda asked: reply
    error = await refused(hub, ref)
    assert type(error) is kind
    assert error.retryable is (kind is IntegrityError)
    assert words in error.problem
    if kind is AccessDeniedError and words != "451":
        assert "token" in error.problem or words == "403"
    assert len(hub.asked) <= 2
    assert not hub.asked or kind is not InvalidAdapterIdError


async def test_redirects_without_end(hub: HubStandIn) -> None:
    hub.behave = lambda asked: Reply(307, {"Location": asked.target})
    error = await refused(hub, ID)
    assert (type(error), error.retryable) == (FetchError, False)
    assert len(hub.asked) <= 2 * 20


# -- what goes wrong on the way -------------------------------------------------------------------


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    return f"http://127.0.0.1:{port}"


class HangsUp(FaultServer):
    def _serve(self, client: Client) -> None:
        client.socket.close()


@pytest.mark.parametrize("way", ["nobody listens", "it hangs up"])
async def test_a_hub_that_cannot_be_reached_is_worth_another_attempt(way: str) -> None:
    with HangsUp(b"") as server:
        endpoint = closed_port() if way == "nobody listens" else server.url("")
        error = await refused(endpoint.rstrip("/"), AdapterRef(REPO, token=TOKEN))
    assert (type(error), error.retryable) == (FetchError, True)
    if way == "nobody listens":
        assert f"{endpoint.removeprefix('http://')} failed (ECONNREFUSED)" in error.problem


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "endpoint not allowed"])
async def test_a_hub_that_may_not_be_asked_is_not(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    hub.put(REPO, ADAPTER)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    kind, words = (
        (FetchError, "HF_HUB_OFFLINE")
        if offline
        else (AccessDeniedError, "not allowed; allow it explicitly")
    )
    said = pytest.raises(kind, match=words)
    with locating(hub, rules=None if offline else PublicOnly()) as locator, said as caught:
        await locator.locate(AdapterRef(REPO, token=TOKEN))
    assert not caught.value.retryable
    assert not hub.asked


@pytest.mark.parametrize("between", [False, True], ids=["while it is asked", "between attempts"])
async def test_a_cancelled_question_asks_nothing_more(hub: HubStandIn, between: bool) -> None:
    """It leaves a thread, which ends with its answer, and nothing else."""
    hub.put(REPO, ADAPTER)
    go_on = threading.Event()

    def wait(asked: Asked) -> Reply | None:
        if between:
            return Reply(503, {"Retry-After": "30"})
        assert go_on.wait(30)
        return None

    hub.behave = wait
    with locating(hub, retries=replace(QUICK, obeyed=60)) as locator:
        asking = asyncio.create_task(locator.locate(AdapterRef(REPO)))
        await until(lambda: len(hub.asked) == 2)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        go_on.set()
    assert len(hub.asked) == 2
