"""Loads from the hub: round trips, whose token they use, and the cache that other tools share."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fault_server import Asked
from hub_stand_in import HubStandIn, Reply
from huggingface_hub import constants, snapshot_download
from user_loads import RANK, at, contents, has, loader, until, written

import tiny
from lorax_async.errors import (
    AccessDeniedError,
    ConfigError,
    FetchError,
    InvalidAdapterIdError,
    LoaderClosedError,
    LoraxError,
    UsageError,
)
from lorax_async.formats.spans import ByteRange
from lorax_async.ids.allow import Allow
from lorax_async.loader import AdapterLoader
from lorax_async.types import AdapterRef, Merge

pytestmark = pytest.mark.usefixtures("no_socket_left", "nothing_left", "hub_client")

PATIENCE = 40.0


@dataclass
class Rounds:
    """What is asked before layer 0 is there, by round; what is not for layer 0 waits until then."""

    layer_0: ByteRange
    heads: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    begins: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    is_there: threading.Event = field(default_factory=threading.Event)
    rounds: list[str] = field(default_factory=list)

    def __call__(self, asked: Asked) -> None:
        if self.is_there.is_set():
            return
        if asked.method == "HEAD":
            self.heads.wait(PATIENCE)
            self.rounds.append("head")
        elif asked.span is None or asked.span[0] == 0:
            self.begins.wait(PATIENCE)
            self.rounds.append("beginning")
        elif asked.span[0] < self.layer_0[1] and self.layer_0[0] < asked.span[1]:
            self.rounds.append("layer 0")
        else:
            assert self.is_there.wait(PATIENCE)


async def given_up(there: AdapterLoader, id: str, hub: HubStandIn) -> None:
    """A load that ends when it was told which version there is, and has asked for what comes next."""
    asked_for: list[str] = []
    go_on = threading.Event()

    def hold(asked: Asked) -> None:
        if asked.method == "GET":
            asked_for.append(asked.target)
            assert go_on.wait(PATIENCE)

    hub.behave = hold
    loading = asyncio.create_task(there.load(id))
    await until(lambda: len(asked_for) == 2)
    loading.cancel()
    await asyncio.wait([loading])
    go_on.set()


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


def over(
    hub: HubStandIn, folder: Path, *allow: Allow, layers: int = 4, **settings: object
) -> AdapterLoader:
    entries = (*allow, at(hub.store_netloc))
    return loader(folder, layers=layers, allow=entries, hub_endpoint=hub.endpoint, **settings)


def sent(hub: HubStandIn, repo: str = "") -> set[str | None]:
    """What requests about a repository were made with; "" is all requests, also the store's."""
    return {each.fields.get("authorization") for each in hub.asked if repo in each.target}


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("allow", [(), (Allow("hub"),), (Allow("hub", prefix="org/"),)])
async def test_a_plain_id_sends_no_token(
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
async def test_an_entry_lends_the_token(hub: HubStandIn, adapter: Path, tmp_path: Path) -> None:
    allow = (Allow("hub"), Allow("hub", prefix="org/", use_token=True))
    async with over(hub, tmp_path, *allow) as there:
        await has(there, PRIVATE, adapter)
        with pytest.raises(AccessDeniedError):
            await there.load(ELSEWHERE)
        with pytest.raises(LoraxError):
            await there.load(PUBLIC, token="hf_another", revision="no-such-one")
        assert sent(hub, ELSEWHERE) == {None}
        named = AdapterRef(ELSEWHERE, use_token=True)
        await has(there, named, adapter)
        async with await there.load(Merge("linear", [named, PRIVATE], [0.5, 0.5])):
            pass
    assert sent(hub, PRIVATE) == {OWN}
    assert sent(hub, ELSEWHERE) == {None, OWN}, "a ref may ask for the token itself"
    assert sent(hub, PUBLIC) == {"Bearer hf_another"}, "a caller's own token is the one that counts"
    assert sent(hub, "/store/") == {None}, "the place that a redirect leads to is not the hub"


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("large", [False, True], ids=["config in git", "config in the store"])
async def test_an_entry_lends_the_token_to_no_repository_elsewhere_that_the_hub_redirects_to(
    hub: HubStandIn, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, large: bool
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
async def test_an_unnamed_repository_is_lent_no_token(hub: HubStandIn, tmp_path: Path) -> None:
    def behave(asked: Asked) -> Reply | None:
        return Reply(200, {}, b"{}") if asked.target.startswith("/api/") else None

    hub.moved["org/renamed"] = PRIVATE
    hub.behave = behave
    async with over(hub, tmp_path, Allow("hub", prefix="org/", use_token=True)) as there:
        with pytest.raises(AccessDeniedError):
            await there.load("org/renamed")


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("hub_cache", ["off", "read"])
async def test_strangers_to_a_token(
    hub: HubStandIn, adapter: Path, tmp_path: Path, hub_cache: str
) -> None:
    """Neither resident, nor from a cache, nor while the hub is down or is not to be asked."""
    commit = hub.repos[PRIVATE].refs["main"]
    names = (PRIVATE, f"{PRIVATE}@{commit}", f"{PRIVATE}@main")
    settings: dict[str, Any] = {"hub_cache": hub_cache}
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
async def test_strangers_to_the_hub_cache(
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


async def test_without_a_token_all_are_alike(
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


async def test_words_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        AdapterRef(PUBLIC, token=TOKEN, use_token=True)
    with pytest.raises(UsageError, match="use_token must be True or False"):
        AdapterRef(PUBLIC, use_token="yes")  # type: ignore[arg-type]
    async with loader(tmp_path, layers=1, hub_cache="off") as there:
        for id in ("s3://bucket/a/", "./folder", Path("folder")):
            with pytest.raises(InvalidAdapterIdError, match="use_token"):
                await there.load(AdapterRef(id, use_token=True))


async def test_first_loads_at_once_share_one_cache_and_its_connections(
    hub: HubStandIn, tmp_path: Path
) -> None:
    """What all adapters from elsewhere share is made by whichever comes first, and once."""
    adapters = {f"org/{n}": written(tmp_path / str(n), n, layers=4, rank=4) for n in range(8)}
    for id, folder in adapters.items():
        hub.put(id, contents(folder))
    for _ in range(3):
        async with over(hub, tmp_path, max_slots=8) as there:
            await asyncio.gather(*(has(there, *each) for each in adapters.items()))
        with pytest.raises(LoaderClosedError):
            await there.load("org/0")


async def test_a_replaced_cache_folder_must_be_private(
    hub: HubStandIn, adapter: Path, tmp_path: Path
) -> None:
    hub.put("org/two", contents(adapter))
    async with over(hub, tmp_path) as there:
        await has(there, PUBLIC, adapter)
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o777)
        with pytest.raises(ConfigError, match="others may write"):
            await there.load("org/two")


@pytest.mark.parametrize("known", [False, True], ids=["at first sight", "its version was told"])
@pytest.mark.parametrize(("rank", "beyond"), [(RANK, True), (16, False)], ids=["large", "small"])
async def test_which_version_then_where_layers_lie_then_layer_0(
    known: bool, rank: int, beyond: bool, tmp_path: Path
) -> None:
    """One round less where the version was told before; a small adapter's layer 0 comes with its
    header. From the cache nobody is asked."""
    adapter = written(tmp_path / "a", layers=4, rank=rank)
    files = contents(adapter)
    with HubStandIn() as hub:
        id = f"org/name@{hub.put('org/name', files)}"
        async with over(hub, tmp_path) as there:
            if known:
                await given_up(there, id, hub)
            weights = files["adapter_model.safetensors"]
            header = 8 + int.from_bytes(weights[:8], "little")
            entries = json.loads(weights[8:header]).items()
            spans = [entry["data_offsets"] for name, entry in entries if ".layers.0." in name]
            starts, stops = zip(*spans, strict=True)
            hub.behave = rounds = Rounds((header + min(starts), header + max(stops)))
            async with there.stream(id) as handle:
                await handle.layer_ready(0)
                assert not beyond or not handle.is_ready(3)
                rounds.is_there.set()
                await handle.layer_ready(3)
                tiny.assert_equal_to_file(handle, adapter)
        heads, ranges = [] if known else ["head"] * 2, rounds.rounds.count("layer 0")
        assert rounds.rounds == [*heads, *["beginning"] * 2, *["layer 0"] * ranges]
        assert bool(ranges) is beyond
        begun = len(hub.asked)
        async with over(hub, tmp_path) as there:
            await has(there, id, adapter)
        assert len(hub.asked) == begun
