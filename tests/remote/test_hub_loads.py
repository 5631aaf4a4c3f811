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
import tiny
from fault_server import Asked
from hub_stand_in import HubStandIn, Reply
from huggingface_hub import constants, snapshot_download
from tiny_loaders import fails
from user_loads import RANK, at, contents, has, loader, until, written

from lorax_async import AdapterLoader, AdapterRef, Allow, LoaderConfig, errors
from lorax_async.formats.spans import ByteRange

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


async def given_up(there: AdapterLoader, id: str, hub: Hub) -> None:
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


class Hub(HubStandIn):
    """It has one adapter in some repositories; loaders' caches are below `folder`."""

    folder: Path
    adapter: Path

    def loader(self, *allow: Allow, **settings: object) -> AdapterLoader:
        given: dict[str, object] = {"allow": (*allow, at(self.store_netloc)), **settings}
        return loader(self.folder, layers=4, hub_endpoint=self.endpoint, **given)

    def sent(self, repo: str = "") -> set[str | None]:
        """What requests about it were made with; "" is all requests, also the store's."""
        return {each.fields.get("authorization") for each in self.asked if repo in each.target}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub() as hub:
        hub.folder, hub.adapter = tmp_path, written(tmp_path / "adapter", layers=4, rank=4)
        files = contents(hub.adapter)
        hub.put(PUBLIC, files)
        for repo in (PRIVATE, ELSEWHERE):
            hub.put(repo, files, private_token=TOKEN)
        yield hub


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The operator's credentials, in each place where a client might look for them."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "token").write_text(TOKEN)
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login operator password {TOKEN}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("allow", [(), (Allow("hub"),), (Allow("hub", prefix="org/"),)])
async def test_a_plain_id_sends_no_token(hub: Hub, allow: tuple[Allow, ...]) -> None:
    async with hub.loader(*allow) as there:
        await has(there, PUBLIC, hub.adapter)
        await has(there, AdapterRef(PUBLIC, revision="main"), hub.adapter)
        await fails(there.load(PRIVATE), errors.AccessDeniedError, "use_token=True")
    assert hub.sent(PRIVATE) == {None}
    assert hub.sent() == {None}


@pytest.mark.usefixtures("logged_in")
async def test_an_entry_lends_the_token(hub: Hub) -> None:
    allow = (Allow("hub"), Allow("hub", prefix="org/", use_token=True))
    async with hub.loader(*allow) as there:
        await has(there, PRIVATE, hub.adapter)
        await fails(there.load(ELSEWHERE), errors.AccessDeniedError)
        with pytest.raises(errors.LoraxError):
            await there.load(PUBLIC, token="hf_another", revision="no-such-one")
        assert hub.sent(ELSEWHERE) == {None}
        named = AdapterRef(ELSEWHERE, use_token=True)
        await has(there, named, hub.adapter)
    assert hub.sent(PRIVATE) == {OWN}
    assert hub.sent(ELSEWHERE) == {None, OWN}, "a ref may ask for the token itself"
    assert hub.sent(PUBLIC) == {"Bearer hf_another"}, "a caller's own token is the one that counts"
    assert hub.sent("/store/") == {None}, "the place that a redirect leads to is not the hub"


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("large", [False, True], ids=["config in git", "config in the store"])
async def test_an_entry_lends_the_token_to_no_repository_elsewhere_that_the_hub_redirects_to(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, *, large: bool
) -> None:
    monkeypatch.setattr("hub_stand_in.is_large", lambda _: large)
    allow = (Allow("hub"), Allow("hub", prefix="org/", use_token=True))
    hub.moved |= {"org/moved": ELSEWHERE, "org/renamed": PRIVATE}
    commit = hub.repos[ELSEWHERE].refs["main"]
    async with hub.loader(*allow) as there:
        for id in ("org/moved", f"org/moved@{commit}"):
            error = await fails(there.load(id), errors.AccessDeniedError)
            assert ELSEWHERE not in str(error)
        await has(there, "org/renamed", hub.adapter)
        await has(there, AdapterRef("org/moved", use_token=True), hub.adapter)


@pytest.mark.usefixtures("logged_in")
async def test_an_unnamed_repository_is_lent_no_token(hub: Hub) -> None:
    def behave(asked: Asked) -> Reply | None:
        return Reply(200, {}, b"{}") if asked.target.startswith("/api/") else None

    hub.moved["org/renamed"] = PRIVATE
    hub.behave = behave
    async with hub.loader(Allow("hub", prefix="org/", use_token=True)) as there:
        await fails(there.load("org/renamed"), errors.AccessDeniedError)


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize("hub_cache", ["off", "read"])
async def test_strangers_to_a_token(hub: Hub, hub_cache: str) -> None:
    """Neither resident, nor from a cache, nor while the hub is down or is not to be asked."""
    commit = hub.repos[PRIVATE].refs["main"]
    names = (PRIVATE, f"{PRIVATE}@{commit}", f"{PRIVATE}@main")
    settings: dict[str, Any] = {"hub_cache": hub_cache}
    named = AdapterRef(PRIVATE, use_token=True)

    async def refuse(there: AdapterLoader, kind: type[errors.LoraxError]) -> None:
        for name in names:
            assert there.try_acquire(name) is None
            for stale in (False, True):
                await fails(there.load(name, allow_stale=stale), kind)

    async with hub.loader(**settings) as there:
        await has(there, named, hub.adapter)
        async with await there.load(named):
            await refuse(there, errors.AccessDeniedError)
    async with hub.loader(**settings) as there:
        await refuse(there, errors.AccessDeniedError)
    async with hub.loader(offline=True, **settings) as there:
        await refuse(there, errors.FetchError)
        await has(there, named, hub.adapter)
    assert hub.sent(PRIVATE) == {None, OWN}


@pytest.mark.usefixtures("logged_in")
async def test_strangers_to_the_hub_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.repos[PRIVATE].refs["main"]
    snapshot_download(PRIVATE, token=TOKEN, cache_dir=hub.folder / "hub", endpoint=hub.endpoint)
    begun = len(hub.asked)

    async def refuse() -> None:
        async with hub.loader(offline=True) as there:
            texts = set()
            for name in (PRIVATE, f"{PRIVATE}@{commit}", "org/not-there"):
                error = await fails(there.load(name), errors.FetchError, "use_token=True")
                texts.add(error.problem)
            assert len(texts) == 1, "it is not told whether it is there"

    await refuse()
    async with hub.loader(offline=True) as there:
        for revision in (None, commit):
            ref = AdapterRef(PRIVATE, revision=revision, use_token=True)
            await has(there, ref, hub.adapter)
    async with hub.loader(Allow("hub", prefix="org/", use_token=True), offline=True) as there:
        await has(there, PRIVATE, hub.adapter)
    assert len(hub.asked) == begun
    async with hub.loader() as there:
        await fails(there.load(f"{PRIVATE}@{commit}"), errors.AccessDeniedError)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    await refuse()


async def test_without_a_token_all_are_alike(hub: Hub) -> None:
    """What other tools stored on such a machine anybody could have had."""
    snapshot_download(PUBLIC, cache_dir=hub.folder / "hub", endpoint=hub.endpoint)
    async with hub.loader(offline=True) as there:
        await has(there, PUBLIC, hub.adapter)
        await has(there, AdapterRef(PUBLIC, use_token=True), hub.adapter)
    async with hub.loader() as there:
        for name in (PRIVATE, AdapterRef(PRIVATE, use_token=True)):
            await fails(there.load(name), errors.AccessDeniedError)
    assert hub.sent() == {None}


BASE = {"model_type": "llama", "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 4}
BASE |= {"num_attention_heads": 4, "head_dim": 16, "intermediate_size": 64, "dtype": "float32"}


async def test_a_loader_for_a_base_of_the_hub_or_in_a_folder(hub: Hub, tmp_path: Path) -> None:
    """The base's config is asked for once, and stays in huggingface_hub's cache."""
    folder, files = tiny.write(tmp_path / "adapter"), {"config.json": json.dumps(BASE).encode()}
    other = tiny.write(tmp_path / "other", layers=6, base_model_name_or_path="org/other")
    hub.put("org/base", files, private_token=TOKEN)
    (tmp_path / "config.json").write_bytes(files["config.json"])
    on_hub, offline = (
        LoaderConfig(hub_endpoint=hub.endpoint, device_bytes="1MiB", offline=offline)
        for offline in (False, True)
    )
    opening = AdapterLoader.from_pretrained
    await fails(opening("org/base", on_hub), errors.ConfigError, "no 'org/base' without a token")
    await fails(opening("org/base", offline), errors.ConfigError, "not in the standard hub cache")
    await fails(opening("org/base", on_hub, token=""), errors.UsageError, "token is empty")
    for call in (
        opening("org/base", on_hub, token=TOKEN),
        opening("org/base@main", offline),
        opening(tmp_path, on_hub),
    ):
        async with call as there, there.load(folder) as handle:
            tiny.assert_equal_to_file(handle, folder)
            module = there.layout.index("model.layers.1.mlp.up_proj")
            assert there.tables.rank[module, handle.slot.index] == 4
            bases = (
                r"for 'org/other' \(it has layers up to 5, width 32\); this loader serves '.+'"
                r" \(layers up to 3, width 32\)"
            )
            error = await fails(there.load(other), errors.IncompatibleAdapterError, bases)
            assert f"serves '{there.layout.base}'" in str(error)
    assert len(hub.asked_for("GET", "config.json")) == 1
    there = await opening(str(tmp_path))
    await there.close()
    for wrong, words in (
        ("org/none", "no 'org/none' without a token"),
        ("org/base@v2", "no 'org/base' without a token"),
        ("a b", "neither a folder nor a hub id"),
        ("./base", f"there is no folder '{Path.cwd()}/base'"),
        (tmp_path / "adapter", "is an adapter's; pass the folder of a base"),
        (tmp_path / "adapter" / "adapter_config.json", "is a file; pass the folder of a base"),
        ("", "a base model is a folder or a hub id, not ''"),
        (5, "a base model is a folder or a hub id, not 5"),
    ):
        await fails(opening(wrong, on_hub), errors.ConfigError, words)  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigError, match=r"ModelLayout, not '/base'.*from_pretrained"):
        AdapterLoader("/base")  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigError, match=r"config must be LoaderConfig"):
        AdapterLoader(tiny.layout(), {"max_slots": 4})  # type: ignore[arg-type]
    await fails(opening("/base", "float16"), errors.ConfigError, "not 'float16'")  # type: ignore[arg-type]


async def test_words_that_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="exclude each other"):
        AdapterRef(PUBLIC, token=TOKEN, use_token=True)
    with pytest.raises(errors.UsageError, match="use_token must be True or False"):
        AdapterRef(PUBLIC, use_token="yes")  # type: ignore[arg-type]
    async with loader(tmp_path, layers=1, hub_cache="off") as there:
        for id in ("s3://bucket/a/", "./folder", Path("folder")):
            with pytest.raises(errors.InvalidAdapterIdError, match="use_token"):
                await there.load(AdapterRef(id, use_token=True))
        call = there.load(AdapterRef(PUBLIC), allow_stale=True)
        await fails(call, errors.UsageError, "allow_stale itself")


async def test_first_loads_at_once_share_one_cache_and_its_connections(hub: Hub) -> None:
    """What all adapters from elsewhere share is made by whichever comes first, and once."""
    adapters = {f"org/{n}": written(hub.folder / str(n), n, layers=4, rank=4) for n in range(8)}
    for id, folder in adapters.items():
        hub.put(id, contents(folder))
    for _ in range(3):
        async with hub.loader(max_slots=8) as there:
            await asyncio.gather(*(has(there, *each) for each in adapters.items()))
        await fails(there.load("org/0"), errors.LoaderClosedError)


async def test_a_replaced_cache_folder_must_be_private(hub: Hub) -> None:
    hub.put("org/two", contents(hub.adapter))
    async with hub.loader() as there:
        await has(there, PUBLIC, hub.adapter)
        shutil.rmtree(hub.folder / "cache")
        (hub.folder / "cache").mkdir()
        (hub.folder / "cache").chmod(0o777)
        await fails(there.load("org/two"), errors.ConfigError, "others may write")


@pytest.mark.parametrize("known", [False, True], ids=["at first sight", "its version was told"])
@pytest.mark.parametrize(("rank", "beyond"), [(RANK, True), (16, False)], ids=["large", "small"])
async def test_which_version_then_where_layers_lie_then_layer_0(
    hub: Hub, known: bool, rank: int, beyond: bool
) -> None:
    """One round less where the version was told before; a small adapter's layer 0 comes with its
    header. From the cache nobody is asked."""
    adapter = written(hub.folder / "a", layers=4, rank=rank)
    files = contents(adapter)
    id = f"org/name@{hub.put('org/name', files)}"
    async with hub.loader() as there:
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
    async with hub.loader() as there:
        await has(there, id, adapter)
    assert len(hub.asked) == begun
