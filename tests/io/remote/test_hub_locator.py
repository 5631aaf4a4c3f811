"""Which commit an adapter's name means on the hub, and what is known of its files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from answering_server import Asked, Reply
from fetching import engine
from hub_stand_in import HubStandIn, git_sha1, sha256
from hub_world import ADAPTER, CONFIG, REPO, TOKEN, WEIGHTS, locating, tells_no_secret

from common import Run
from lorax_async.adapter import AdapterRef
from lorax_async.core.cache_names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, FileRole
from lorax_async.core.file_digest import Digest
from lorax_async.errors import AdapterNotFoundError, ConfigError, InternalError, UsageError
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


async def test_the_bytes_come_from_where_it_said(hub: HubStandIn) -> None:
    """The store, which refuses whoever brings a token, is asked without it, and at once."""
    hub.put(REPO, ADAPTER, private_token=TOKEN)
    with locating(hub) as locator, engine() as fetching:
        located = await locator.locate(AdapterRef(REPO, token=TOKEN))
        seen = len(hub.asked)
        contents = [
            fetching.ask(file.target, 100_000, timeout=20).done.result(25).start
            for file in located.files
        ]
    assert contents == [CONFIG, WEIGHTS]
    gets = hub.asked[seen:]
    assert [(asked.method, asked.at_store) for asked in gets] == [("GET", False), ("GET", True)]
    assert gets[0].fields["authorization"] == f"Bearer {TOKEN}"
    assert "authorization" not in gets[1].fields


async def test_a_signature_that_ended_is_fetched_again(hub: HubStandIn) -> None:
    """The file's own URL leads to a new place, at the same commit."""
    commit = hub.put(REPO, ADAPTER)
    with locating(hub) as locator, engine() as fetching:
        weights = (await locator.locate(AdapterRef(REPO))).files[1]
        hub.put(REPO, {**ADAPTER, "adapter_model.safetensors": b"another"})
        answer = fetching.ask(replace(weights.target, found=None), 100_000, timeout=20)
        assert answer.done.result(25).start == WEIGHTS
    assert f"/resolve/{commit}/" in hub.asked_for("GET")[0].target


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/1", "feature/x"])
async def test_whatever_git_names_is_a_revision(hub: HubStandIn, revision: str) -> None:
    hub.put(REPO, {"adapter_config.json": b"other"})
    commit = hub.put(REPO, ADAPTER, revision)
    with locating(hub) as locator:
        for name in (revision, commit):
            located = await locator.locate(AdapterRef(REPO, revision=name))
            assert located.version == commit
            assert located.files[1].nbytes == len(WEIGHTS)


async def test_a_repository_that_was_renamed(hub: HubStandIn) -> None:
    """It is asked for by the name that was given, whose commit stands fast."""
    commit = hub.put("org/new", ADAPTER)
    hub.moved[REPO] = "org/new"
    with locating(hub) as locator, engine() as fetching:
        located = await locator.locate(AdapterRef(REPO))
        assert (located.source, located.version) == (REPO, commit)
        config, weights = located.files
        assert config.target.found is None, "its name is no commit"
        assert (
            config.target.url.text
            == f"{hub.endpoint}/{REPO}/resolve/{commit}/{config.role.file_name}"
        )
        asked = [fetching.ask(each.target, 100_000, timeout=20) for each in (config, weights)]
        assert [each.done.result(25).start for each in asked] == [CONFIG, WEIGHTS]
        pinned = await locator.locate(AdapterRef(REPO, revision=commit))
        found = pinned.files[0].target.found
        assert found is not None
        assert f"/org/new/resolve/{commit}/" in found.text


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
            reply = hub._answered(asked)
            told.set()
        return reply

    hub.behave = note
    with locating(hub) as locator:
        located = await locator.locate(AdapterRef(REPO))
    assert located.version == commit
    assert located.files[1].expected == Digest("sha256", sha256(WEIGHTS))
    assert [asked.target.split("/")[4] for asked in hub.asked].count(commit) == 1


def sharded(hub: HubStandIn, run: Run, **more: bytes) -> tuple[Located, str]:
    commit = hub.put(REPO, {"adapter_config.json": CONFIG, INDEX: b"{}", **SHARDS, **more})
    with locating(hub) as locator:
        return run(locator.locate(AdapterRef(REPO))), commit


def test_weights_in_several_files(hub: HubStandIn, run: Run) -> None:
    located, commit = sharded(hub, run)
    assert [file.role for file in located.files] == [CONFIG_FILE, INDEX_FILE]
    hub.put(REPO, ADAPTER)  # a later commit is nobody's business
    roles = [FileRole("weights", k) for k in (1, 2, 3)]
    with locating(hub) as locator:
        files = run(locator.shards(located, roles))
        for wrong in (roles[:2][::-1], [WEIGHTS_FILE], roles[1:]):
            with pytest.raises(InternalError, match="all at once"):
                run(locator.shards(located, wrong))
        with pytest.raises(AdapterNotFoundError, match=r"00001-of-00002.*index names"):
            run(locator.shards(located, roles[:2]))
    assert [file.role for file in files] == roles
    for file, (name, content) in zip(files, SHARDS.items(), strict=True):
        assert file.target.url.text == f"{hub.endpoint}/{REPO}/resolve/{commit}/{name}"
        assert file.expected == Digest("sha256", sha256(content))
        assert file.nbytes == len(content)


async def test_shards_of_a_private_repository(hub: HubStandIn) -> None:
    hub.put(REPO, {"adapter_config.json": CONFIG, INDEX: b"{}", **SHARDS}, private_token=TOKEN)
    with locating(hub) as locator:
        located = await locator.locate(AdapterRef(REPO, token=TOKEN))
        files = await locator.shards(located, [FileRole("weights", k) for k in (1, 2, 3)])
    assert {file.target.headers["Authorization"] for file in files} == {f"Bearer {TOKEN}"}
    tells_no_secret(located, files)


def test_shards_are_asked_for_on_the_same_authority(
    hub: HubStandIn, run: Run, tmp_path: Path
) -> None:
    """Whoever logs in on this machine meanwhile lends nobody his token."""
    located, _ = sharded(hub, run)
    (tmp_path / "token").write_text(TOKEN)
    with locating(hub) as locator:
        files = run(locator.shards(located, [FileRole("weights", k) for k in (1, 2, 3)]))
    assert all(not file.target.headers for file in files)
    assert all("authorization" not in asked.fields for asked in hub.asked)


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


def test_on_whose_authority(hub: HubStandIn, run: Run, tmp_path: Path) -> None:
    """A token given, this machine's own, or none; each has its own scope, which does not tell it."""
    hub.put(REPO, ADAPTER)
    with locating(hub) as locator:

        def scope_of(ref: AdapterRef) -> str:
            located = run(locator.locate(ref))
            tells_no_secret(located)
            sent = {asked.fields.get("authorization") for asked in hub.asked[-2:]}
            headers = {file.target.headers.get("Authorization") for file in located.files}
            assert sent == headers
            asked_with.append(sent.pop())
            return str(located.scope)

        asked_with: list[str | None] = []
        none = scope_of(AdapterRef(REPO))
        given = scope_of(AdapterRef(REPO, token=TOKEN))
        (tmp_path / "token").write_text("hf_machine\n")
        own = scope_of(AdapterRef(REPO, use_token=True))
        again = scope_of(AdapterRef(REPO, token=TOKEN))
        assert scope_of(AdapterRef(REPO)) == ""
        assert asked_with == [
            *(None, f"Bearer {TOKEN}", "Bearer hf_machine", f"Bearer {TOKEN}", None)
        ]
    assert none == ""
    assert given == again
    assert len({none, given, own}) == 3
    assert "hf_machine" not in own
    with HubStandIn() as other, locating(other) as elsewhere:
        other.put(REPO, ADAPTER)
        located = run(elsewhere.locate(AdapterRef(REPO, token=TOKEN)))
        assert located.scope not in {"", given}, "a token says nothing at another hub"


async def test_what_a_commit_says_by_itself(hub: HubStandIn, tmp_path: Path) -> None:
    commit = hub.put(REPO, ADAPTER, private_token=TOKEN)
    with locating(hub) as locator:
        for ref in (AdapterRef(REPO, revision=commit), AdapterRef(REPO)):
            assert locator.recalled(ref) is None, "nobody looked yet"
        located = await locator.locate(AdapterRef(REPO, token=TOKEN))
        pinned = AdapterRef(REPO, revision=commit, token=TOKEN)
        assert locator.recalled(pinned) == (REPO, commit, located.scope)
        lent = AdapterRef(REPO, revision=commit, use_token=True)
        assert locator.recalled(lent) is None, "whose is it?"
        assert locator.recalled(AdapterRef(REPO, revision=commit)) == (REPO, commit, "")
        assert await locator.scope(lent) == locator.own_scope() == ""
        assert locator.recalled(lent) == (REPO, commit, "")
        (tmp_path / "token").write_text(TOKEN)
        assert await locator.scope(lent) == locator.own_scope() == located.scope
        assert locator.recalled(lent) == (REPO, commit, located.scope)
        assert locator.recalled(AdapterRef(REPO, revision=commit)) == (REPO, commit, "")
        for name in (None, "main", commit[:39], commit.upper(), f"{commit}0"):
            assert locator.recalled(AdapterRef(REPO, revision=name)) is None


async def test_on_whose_authority_is_told_though_the_hub_is_down(hub: HubStandIn) -> None:
    commit = hub.put(REPO, ADAPTER)
    with locating(hub) as locator:
        hub.behave = lambda asked: Reply(500)
        given = await locator.scope(AdapterRef(REPO, token=TOKEN))
        assert locator.recalled(AdapterRef(REPO, revision=commit, token=TOKEN)) == (
            *(REPO, commit),
            given,
        )
        assert await locator.scope(AdapterRef(REPO)) == ""
    assert not hub.asked


@pytest.mark.parametrize("token", ["", " ", "hf_a b", "hf_a\r\nX: y", "hf_ü"])
def test_what_is_no_token(hub: HubStandIn, run: Run, token: str) -> None:
    ref = AdapterRef(REPO, revision="a" * 40, token=token)
    with locating(hub) as locator:
        for ask in (lambda: run(locator.locate(ref)), lambda: locator.recalled(ref)):
            with pytest.raises(UsageError, match=r"leave it out \(None\)"):
                ask()
    assert not hub.asked


@pytest.mark.parametrize("endpoint", ["hub", "ftp://hub/", "https://me:pw@hub", "https://h/?a=b"])
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint") as caught, locating(endpoint):
        pass
    assert "me:pw" not in str(caught.value)
