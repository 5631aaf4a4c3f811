"""Whose ids the hub is asked about with this machine's own token, and what that token brought."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from answering_server import Asked, Reply
from hub_stand_in import HubStandIn
from huggingface_hub import constants, snapshot_download
from user_loads import at, contents, has, loader, written

from lorax_async import (
    AccessDeniedError,
    AdapterLoader,
    AdapterRef,
    Allow,
    FetchError,
    InvalidAdapterIdError,
    LoraxError,
    Merge,
    UsageError,
    parse_adapter_id,
)

pytestmark = pytest.mark.usefixtures("no_socket_left", "nothing_left", "hub_client")

TOKEN = "hf_0perat0rsToken"
OWN = f"Bearer {TOKEN}"
PRIVATE, PUBLIC, ELSEWHERE = "org/private", "org/public", "other/private"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return written(tmp_path / "adapter", layers=4, rank=4)


@pytest.fixture
def hub(adapter: Path) -> Iterator[HubStandIn]:
    with HubStandIn() as found:
        files = contents(adapter)
        found.put(PUBLIC, files)
        for repo in (PRIVATE, ELSEWHERE):
            found.put(repo, files, private_token=TOKEN)
        yield found


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The operator's credentials, in each place where a client might look for them."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "token").write_text(TOKEN)
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login operator password {TOKEN}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))


def over(hub: HubStandIn, folder: Path, *allow: Allow, **settings: object) -> AdapterLoader:
    entries = (*allow, at(hub.store_netloc))
    return loader(folder, layers=4, allow=entries, hub_endpoint=hub.endpoint, **settings)


def sent(hub: HubStandIn, repo: str = "") -> set[str | None]:
    """What requests about a repository were made with; "" is all requests, also the store's."""
    return {each.fields.get("authorization") for each in hub.asked if repo in each.target}


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("allow", [(), (Allow("hub"),), (Allow("hub", prefix="org/"),)])
async def test_a_plain_id_is_asked_for_without_the_machines_token(
    hub: HubStandIn, adapter: Path, tmp_path: Path, allow: tuple[Allow, ...]
) -> None:
    async with over(hub, tmp_path, *allow) as there:
        await has(there, PUBLIC, adapter)
        await has(there, AdapterRef(PUBLIC, revision="main"), adapter)
        with pytest.raises(AccessDeniedError, match="use_token=True"):
            await there.load(PRIVATE)
        parts = Merge("linear", [PUBLIC, PRIVATE], [0.5, 0.5])
        with pytest.raises(AccessDeniedError, match="part 2"):
            await there.load(parts)
    assert sent(hub, PRIVATE) == {None}
    assert sent(hub) == {None}


@pytest.mark.usefixtures("logged_in")
async def test_an_entry_lends_the_token_to_what_it_covers_only(
    hub: HubStandIn, adapter: Path, tmp_path: Path
) -> None:
    allow = (Allow("hub"), Allow("hub", prefix="org/", use_token=True))
    async with over(hub, tmp_path, *allow) as there:
        await has(there, PRIVATE, adapter)
        with pytest.raises(AccessDeniedError):
            await there.load(ELSEWHERE)
        with pytest.raises(LoraxError):
            await there.load(PUBLIC, token="hf_another", revision="no-such-one")
    assert sent(hub, PRIVATE) == {OWN}
    assert sent(hub, ELSEWHERE) == {None}
    assert sent(hub, PUBLIC) == {"Bearer hf_another"}, "a caller's own token is the one that counts"
    assert sent(hub, "/store/") == {None}, "the place that a redirect leads to is not the hub"


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("large", [False, True], ids=["config in git", "config in the store"])
async def test_an_entry_lends_the_token_to_no_repository_elsewhere_that_the_hub_redirects_to(
    hub: HubStandIn,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    large: bool,
) -> None:
    monkeypatch.setattr("hub_stand_in.is_large", lambda _: large)
    allow = (Allow("hub"), Allow("hub", prefix="org/", use_token=True))
    hub.moved |= {"org/moved": ELSEWHERE, "org/renamed": PRIVATE}
    commit = hub.repos[ELSEWHERE].refs["main"]
    async with over(hub, tmp_path, *allow) as there:
        for id in ("org/moved", f"org/moved@{commit}"):
            with pytest.raises(AccessDeniedError) as caught:
                await there.load(id)
            assert ELSEWHERE not in str(caught.value)
        await has(there, "org/renamed", adapter)
        await has(there, AdapterRef("org/moved", use_token=True), adapter)


@pytest.mark.usefixtures("logged_in")
async def test_a_hub_that_does_not_say_which_repository_answers_lends_nothing(
    hub: HubStandIn, tmp_path: Path
) -> None:
    def behave(asked: Asked) -> Reply | None:
        return Reply(200, {}, b"{}") if asked.target.startswith("/api/") else None

    hub.moved["org/renamed"] = PRIVATE
    hub.behave = behave
    async with over(hub, tmp_path, Allow("hub", prefix="org/", use_token=True)) as there:
        with pytest.raises(AccessDeniedError):
            await there.load("org/renamed")


@pytest.mark.usefixtures("logged_in")
async def test_a_ref_may_ask_for_the_token_itself(
    hub: HubStandIn, adapter: Path, tmp_path: Path
) -> None:
    async with over(hub, tmp_path) as there:
        named = AdapterRef(ELSEWHERE, use_token=True)
        await has(there, named, adapter)
        async with await there.load(Merge("linear", [named, PUBLIC], [0.5, 0.5])):
            pass
    assert sent(hub, ELSEWHERE) == {OWN}
    assert sent(hub, PUBLIC) == {None}


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("hub_cache", ["off", "read", "write"])
async def test_what_the_token_brought_is_for_no_stranger(
    hub: HubStandIn, adapter: Path, tmp_path: Path, hub_cache: str
) -> None:
    """Neither resident, nor from a cache, nor while the hub is down or is not to be asked."""
    commit = hub.repos[PRIVATE].refs["main"]
    names = (PRIVATE, f"{PRIVATE}@{commit}", f"{PRIVATE}@main")
    settings = {"hub_cache": hub_cache, "hub_cache_private": hub_cache == "write"}
    named = AdapterRef(PRIVATE, use_token=True)

    async def refuse(there: AdapterLoader, kind: type[LoraxError]) -> None:
        for name in names:
            assert there.try_acquire(name) is None
            for stale in (False, True):
                with pytest.raises(kind):
                    await there.load(name, allow_stale=stale)

    async with over(hub, tmp_path, **settings) as there:
        await has(there, named, adapter)
        async with await there.load(named):
            await refuse(there, AccessDeniedError)
    async with over(hub, tmp_path, **settings) as there:
        await refuse(there, AccessDeniedError)
    async with over(hub, tmp_path, offline=True, **settings) as there:
        await refuse(there, FetchError)
        await has(there, named, adapter)
    assert sent(hub, PRIVATE) == {None, OWN}


@pytest.mark.usefixtures("logged_in")
async def test_what_other_tools_stored_with_the_token_is_for_no_stranger(
    hub: HubStandIn, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.repos[PRIVATE].refs["main"]
    snapshot_download(PRIVATE, token=TOKEN, cache_dir=tmp_path / "hub", endpoint=hub.endpoint)
    begun = len(hub.asked)

    async def refuse() -> None:
        async with over(hub, tmp_path, offline=True) as there:
            texts = set()
            for name in (PRIVATE, f"{PRIVATE}@{commit}", "org/not-there"):
                with pytest.raises(FetchError, match="use_token=True") as caught:
                    await there.load(name)
                texts.add(caught.value.problem)
            assert len(texts) == 1, "it is not told whether it is there"

    await refuse()
    async with over(hub, tmp_path, offline=True) as there:
        for revision in (None, commit):
            ref = AdapterRef(PRIVATE, revision=revision, use_token=True)
            await has(there, ref, adapter)
    async with over(
        hub, tmp_path, Allow("hub", prefix="org/", use_token=True), offline=True
    ) as there:
        await has(there, PRIVATE, adapter)
    assert len(hub.asked) == begun
    async with over(hub, tmp_path) as there:
        with pytest.raises(AccessDeniedError):
            await there.load(f"{PRIVATE}@{commit}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    await refuse()


async def test_without_a_token_all_ask_alike(
    hub: HubStandIn, adapter: Path, tmp_path: Path
) -> None:
    """What other tools stored on such a machine anybody could have had."""
    snapshot_download(PUBLIC, cache_dir=tmp_path / "hub", endpoint=hub.endpoint)
    async with over(hub, tmp_path, offline=True) as there:
        await has(there, PUBLIC, adapter)
        await has(there, AdapterRef(PUBLIC, use_token=True), adapter)
    async with over(hub, tmp_path) as there:
        for name in (PRIVATE, AdapterRef(PRIVATE, use_token=True)):
            with pytest.raises(AccessDeniedError):
                await there.load(name)
    assert sent(hub) == {None}


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("kind", ["s3", "gs", "az", "https", "http"])
def test_a_plain_id_reaches_nothing_else(kind: str) -> None:
    """So no credentials of the environment are used before an entry names bucket or host."""
    with pytest.raises(AccessDeniedError):
        parse_adapter_id(f"{kind}://container/folder/", (Allow("hub", use_token=True),))


async def test_words_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contradict"):
        AdapterRef(PUBLIC, token=TOKEN, use_token=True)
    with pytest.raises(UsageError, match="use_token must be True or False"):
        AdapterRef(PUBLIC, use_token="yes")  # type: ignore[arg-type]
    async with loader(tmp_path, layers=1, hub_cache="off") as there:
        for id in ("s3://bucket/a/", "./folder", Path("folder")):
            with pytest.raises(InvalidAdapterIdError, match="use_token"):
                await there.load(AdapterRef(id, use_token=True))
