"""Replicas that take adapters from each other's mirrors before they ask the origin."""

import asyncio
import base64
import itertools
import json
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from hashlib import sha256
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import disk_cache_world
import pytest
from fault_server import Asked, Behaviour, Client, FaultServer, answer
from hub_stand_in import HubStandIn, Reply
from huggingface_hub import snapshot_download
from remote_world import Steps
from user_loads import at, contents, layout, written
from web_folder import WEIGHTS, Folder, hold, name_of, refuse

import split_files
import tiny
from common import until
from lorax_async import AdapterLoader, AdapterRef, AdapterStore, LoaderConfig, StoreConfig, errors
from lorax_async import mirror as mirror_module
from lorax_async.cache.base import CacheKey, scope_name
from lorax_async.formats.split_weights import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.mirror import AdapterMirror, Peers
from lorax_async.remote.peer_client import PROOF_FIELD
from sweeping import our_tasks
from tiny_loaders import fails

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left", "hub_client")

TOKEN, SECRET = "fleet-secret", "hf_tenant"
ID = "org/name"


class Origin(HubStandIn):
    """A hub that counts downloads; everybody's caches are in its folder."""

    folder: Path

    def add(self, id: str = ID, *, rank: int = 16, seed: int = 0, token: str | None = None) -> Path:
        adapter = written(self.folder / f"adapters/{id}", seed, layers=4, rank=rank)
        self.put(id, contents(adapter), private_token=token)
        return adapter

    @property
    def downloads(self) -> int:
        """Files of weights of which the first byte was asked for."""
        spans = (asked.span for asked in self.asked_for("GET", "/store/"))
        return sum(span is None or span[0] == 0 for span in spans)

    def settings(self, name: str, peers: Peers, **settings: Any) -> dict[str, Any]:
        given = {"cache_dir": self.folder / name, "hub_cache": "off", "timeout": 60, "peers": peers}
        allow = (at(self.store_netloc),)
        return given | {"hub_endpoint": self.endpoint, "allow": allow} | settings


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Origin]:
    with Origin() as origin:
        origin.folder = tmp_path
        yield origin


class Replica:
    """A store, and its mirror unless it only asks."""

    def __init__(self, origin: Origin, name: str, *, token: str = TOKEN, **settings: Any) -> None:
        self.folder = origin.folder / name
        trust, patience = settings.pop("trust", False), settings.pop("patience", 30.0)
        self.peers = Peers(token, trust=trust, patience=patience)
        self._rate, self._asks = settings.pop("rate", None), settings.pop("asks", False)
        self.store = AdapterStore(StoreConfig(**origin.settings(name, self.peers, **settings)))

    async def __aenter__(self) -> "Replica":
        async with AsyncExitStack() as open:
            await open.enter_async_context(self.store)
            self.mirror = AdapterMirror(self.store, bytes_per_second=self._rate)
            if not self._asks:
                await open.enter_async_context(self.mirror)
            self._open = open.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    async def has(self, adapter: Path, id: str = ID, token: str | None = None) -> None:
        """Check out the adapter, with just the bytes that its author saved."""
        async with self.store.checkout(id, token=token) as folder:
            assert contents(adapter).items() <= contents(folder.path).items()
            assert folder.verification.vouched

    @property
    def left(self) -> list[Path]:
        return list(self.folder.glob("partials/*"))


def asking(origin: Origin, *homes: Replica, name: str = "asking", **settings: Any) -> Replica:
    replica = Replica(origin, name, asks=True, **settings)
    replica.peers.members = [home.mirror.url for home in homes]
    return replica


@asynccontextmanager
async def fleet(origin: Origin, count: int, **settings: Any) -> AsyncIterator[list[Replica]]:
    async with AsyncExitStack() as open:
        replicas = [
            await open.enter_async_context(Replica(origin, f"replica{n}", **settings))
            for n in range(count)
        ]
        for replica in replicas:
            replica.peers.members = [each.mirror.url for each in replicas]
        yield replicas


@pytest.mark.each_loop
async def test_replicas_that_start_together_ask_the_origin_once(origin: Origin) -> None:
    adapters = {f"org/a{n}": origin.add(f"org/a{n}", rank=64, seed=n) for n in range(4)}
    several = split_files.deal(adapters["org/a0"], origin.folder / "several")
    origin.put("org/several", contents(several))
    async with fleet(origin, 3) as replicas:
        async with asyncio.TaskGroup() as group:
            for id, adapter in {**adapters, "org/several": several}.items():
                for replica in replicas:
                    group.create_task(replica.has(adapter, id))
        assert origin.downloads == 4 + 3
        assert sum(replica.peers.taken for replica in replicas) == 2 * 5
        assert not any(replica.peers.problems for replica in replicas)
        names = [{path.name for path in each.folder.glob("entries/*")} for each in replicas]
        assert names[0] == names[1] == names[2]
        settings = origin.settings("loader", Peers(TOKEN), device_bytes=16 << 20)
        settings["peers"].members = replicas[0].peers.members
        async with AdapterLoader(layout(4), LoaderConfig(**settings)) as loader:
            for id, adapter in adapters.items():
                async with await loader.load(id) as handle:
                    tiny.assert_equal_to_file(handle, adapter)
                    assert (await handle.verified()).kind == "sha256"
        assert origin.downloads == 4 + 3


async def test_a_dead_member_costs_no_second_download(origin: Origin) -> None:
    """Its next one is the home of what it was the home of, for all alike."""
    async with fleet(origin, 3) as (dead, *replicas), asking(origin, dead, *replicas) as other:
        adapters, homes = dict[str, Path](), set[str | None]()
        for id in map("org/a{}".format, range(50)):
            adapters[id] = origin.add(id, rank=1)
            homes.add(other.peers.choose(id, []))
            if len(adapters) > 3 and dead.mirror.url in homes:
                break
        await dead.mirror.__aexit__()
        for id, adapter in adapters.items():
            await asyncio.gather(*(replica.has(adapter, id) for replica in (*replicas, other)))
        assert origin.downloads == len(adapters)
        assert all(each.peers.problems for each in (*replicas, other))


@pytest.mark.slow
async def test_who_is_asked_in_the_homes_place_asks_the_origin(origin: Origin) -> None:
    with FaultServer(b"", lambda _, client: hold(client)) as silent:
        async with fleet(origin, 1, patience=1.0) as (next,), asking(origin, patience=1.0) as other:
            url = f"http://{silent.netloc}"
            other.peers.members = next.peers.members = [url, next.mirror.url]
            for id in map("org/a{}".format, range(50)):
                adapter = origin.add(id, rank=1)
                if next.peers.choose(id, []) == url:
                    break
            await other.has(adapter, id)
            assert (list(other.peers.problems)[:1], next.peers.problems) == ([url], {})


async def test_a_home_may_die_while_it_serves(origin: Origin) -> None:
    adapter = origin.add(rank=128)
    async with fleet(origin, 1, rate=400_000) as (home,), asking(origin, home) as replica:
        await home.has(adapter)
        load = asyncio.create_task(replica.has(adapter))
        await until(lambda: home.mirror.served_bytes > 300_000)
        await home.mirror.__aexit__()
        await load
        assert (origin.downloads, replica.peers.taken) == (2, 0)
        assert list(replica.peers.problems) == [replica.peers.members[0]]
        assert not replica.left


async def test_members_may_come_and_go_while_a_download_runs(origin: Origin) -> None:
    adapter, asked = origin.add(), asyncio.Event()
    loop, go_on = asyncio.get_running_loop(), asyncio.Event()

    def slow(request: Asked) -> Reply | None:
        if request.method == "GET":
            loop.call_soon_threadsafe(asked.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(20)
        return None

    origin.behave = slow
    async with fleet(origin, 1) as (home,), asking(origin, home) as replica:
        load = asyncio.create_task(replica.has(adapter))
        await asked.wait()
        home.peers.members = replica.peers.members = []
        go_on.set()
        await load
        assert (origin.downloads, replica.peers.taken) == (1, 1)
        asked.clear()
        go_on.clear()
        replica.peers.members = [home.mirror.url]
        other = origin.add("org/other", seed=1)
        load = asyncio.create_task(replica.has(other, "org/other"))
        await asked.wait()
        await home.mirror.__aexit__()  # in the middle of its own download
        go_on.set()
        await load
        assert replica.peers.taken == 1
        assert not home.left + replica.left


async def test_replicas_never_wait_for_each_other(origin: Origin) -> None:
    adapters = {f"org/a{n}": origin.add(f"org/a{n}", seed=n) for n in range(4)}
    async with fleet(origin, 2) as (one, other):
        one.peers.members, other.peers.members = [other.mirror.url], [one.mirror.url]
        for id, adapter in adapters.items():
            await asyncio.gather(*(each.has(adapter, id) for each in (one, other)))
        assert origin.downloads == len(adapters)


async def test_what_the_origin_had_begun_to_send_is_resumed_there(origin: Origin) -> None:
    """A peer that fails would cost what is here."""
    adapter, held = origin.add(rank=128), asyncio.Event()
    loop, go_on = asyncio.get_running_loop(), threading.Event()

    def slow(request: Asked) -> None:
        if request.span and request.span[0]:
            loop.call_soon_threadsafe(held.set)
            go_on.wait(20)

    origin.behave = slow
    async with fleet(origin, 1) as (home,), asking(origin) as replica:
        load = asyncio.create_task(replica.has(adapter))
        await held.wait()
        load.cancel()
        await asyncio.wait([load])
        go_on.set()
        await home.has(adapter)
        replica.peers.members = [home.mirror.url]
        assert replica.left
        await replica.has(adapter)
        assert (replica.peers.taken, replica.peers.problems) == (0, {})


# -- peers that do wrong ---------------------------------------------------------------------------


class FalsePeer:
    """A member that has everything, but for what `instead` does to a file ("" is the state)."""

    def __init__(self, files: dict[str, bytes], instead: dict[str, Behaviour]) -> None:
        self._files, self._instead = files, instead

    def __call__(self, asked: Asked, client: Client) -> None:
        name = name_of(Asked(asked.line.split("?")[0] + " ", {}, ""))
        ready = {"": b'{"state": "ready", "progress": 0}', **self._files}
        self._instead.get(name, sends(ready[name]))(asked, client)


def sends(data: bytes, *fields: str) -> Behaviour:
    return lambda asked, client: answer(asked, client, data, *fields)


def elsewhere(asked: Asked, client: Client) -> None:
    client.head("302 Found", "Location: /else", "Content-Length: 0")


def falsified(files: dict[str, bytes], name: str) -> bytes:
    return files[name][:-1] + bytes([files[name][-1] ^ 1])


def broken_off(asked: Asked, client: Client) -> None:
    client.head("200 OK", "Content-Length: 1000000")
    client.send(b"half")
    client.hang_up()


def stalled(asked: Asked, client: Client) -> None:
    client.head("206 Partial Content", "Content-Length: 9", "Content-Range: bytes 0-8/999999")
    hold(client)


def without_end(asked: Asked, client: Client) -> None:
    state = {"state": "fetching", "progress": time.monotonic_ns()}
    sends(json.dumps(state).encode())(asked, client)


def half_false(data: bytes) -> Behaviour:
    """The first bytes are whole and false, the rest breaks off."""

    def behave(asked: Asked, client: Client) -> None:
        if asked.span and asked.span[0]:
            client.hang_up()
        sends(data[:200_000] + bytes(1_000) + data[201_000:])(asked, client)

    return behave


CONFIG = "adapter_config.json"
WRONG: dict[str, Callable[[dict[str, bytes]], dict[str, Behaviour]]] = {
    "false weights": lambda files: {WEIGHTS: sends(falsified(files, WEIGHTS))},
    "false config": lambda files: {CONFIG: sends(falsified(files, CONFIG))},
    "shorter": lambda files: {WEIGHTS: sends(files[WEIGHTS][:-9])},
    "no state": lambda _: {"": sends(b"[]")},
    "silent": lambda _: {"": lambda _, client: hold(client)},
    "no progress": lambda _: {"": sends(b'{"state": "fetching", "progress": 7}')},
    "no end": lambda _: {"": without_end},
    "busy": lambda _: {"": sends(b'{"state": "elsewhere", "progress": 7}')},
    "stalled": lambda _: {WEIGHTS: stalled},
    "half false": lambda files: {WEIGHTS: half_false(files[WEIGHTS])},
    "breaks off": lambda _: {WEIGHTS: broken_off},
    "redirects": lambda _: {"": elsewhere},
    "redirects files": lambda _: {WEIGHTS: elsewhere},
    "fails": lambda _: {WEIGHTS: refuse("500 No")},
    "has not": lambda _: {WEIGHTS: refuse("404 No")},
}


SLOW = pytest.mark.slow  # By seconds of patience that have to pass
PATIENT = {"no end", "no progress", "silent"}
CASES = [pytest.param(it, marks=SLOW) if it in PATIENT else it for it in WRONG]


@pytest.mark.parametrize("wrong", CASES)
async def test_a_false_peer_costs_time_and_nothing_else(origin: Origin, wrong: str) -> None:
    adapter = origin.add(rank=64)
    files = contents(adapter)
    with FaultServer(b"", FalsePeer(files, WRONG[wrong](files))) as false:
        timeout = 8 if wrong == "no end" else 60
        async with asking(origin, patience=0.5, timeout=timeout) as replica:
            replica.peers.members = [f"http://{false.netloc}"]
            await replica.has(adapter)
            assert (replica.peers.taken, origin.downloads) == (0, 1)
            assert bool(replica.peers.problems) is (wrong != "busy")
            assert not replica.left
            asked = len(false.asked)
            await replica.has(origin.add("org/next"), "org/next")
            assert wrong == "busy" or len(false.asked) == asked, "it rests"
        assert not any(asked.target == "/else" for asked in false.asked)
    assert {asked.fields["authorization"] for asked in false.asked} == {f"Bearer {TOKEN}"}
    assert not any(TOKEN in asked.raw for asked in origin.asked)


async def test_a_process_killed_in_a_peers_download_leaves_no_byte_of_it(origin: Origin) -> None:
    """The next download would take them for its source's own."""
    adapter, held = origin.add(rank=256), asyncio.Event()
    files, loop = contents(adapter), asyncio.get_running_loop()

    def half(asked: Asked, client: Client) -> None:
        if asked.span and asked.span[0] > len(files[WEIGHTS]) // 2:
            loop.call_soon_threadsafe(held.set)
            hold(client)
        sends(files[WEIGHTS][:300_000] + bytes(1_000) + files[WEIGHTS][301_000:])(asked, client)

    with FaultServer(b"", FalsePeer(files, {WEIGHTS: half})) as false:
        async with asking(origin) as replica:
            replica.peers.members = [f"http://{false.netloc}"]
            load = asyncio.create_task(replica.has(adapter))
            await held.wait()
            await asyncio.sleep(0.3)
            killed = [shutil.copytree(replica.folder, origin.folder / f"killed{n}") for n in (1, 2)]
            load.cancel()
            await asyncio.wait([load])
    for folder, verify in zip(killed, ("none", "stream"), strict=True):
        settings = origin.settings(folder.name, Peers(TOKEN), verify=verify)
        async with AdapterStore(StoreConfig(**settings)) as store, store.checkout(ID) as found:
            assert files.items() <= contents(found.path).items()


async def test_no_byte_of_a_peer_is_on_the_device_before_it_is_checked(origin: Origin) -> None:
    adapter = origin.add(rank=64)
    files = contents(adapter)
    false = FalsePeer(files, WRONG["false weights"](files))
    peers = Peers(TOKEN)
    settings = origin.settings("loader", peers, device_bytes=16 << 20)
    with FaultServer(b"", false) as server:
        peers.members = [f"http://{server.netloc}"]
        loader = AdapterLoader(layout(4), LoaderConfig(**settings))
        async with loader, loader.stream(ID) as handle:
            for layer in range(4):
                await handle.layer_ready(layer)
            tiny.assert_equal_to_file(handle, adapter)
    assert peers.problems


# -- who may have what -----------------------------------------------------------------------------


def fetch(replica: Replica, path: str, **fields: str) -> tuple[int, bytes]:
    """Ask a mirror by hand. Blocks."""
    connection = HTTPConnection("127.0.0.1", int(replica.mirror.url.rpartition(":")[2]), timeout=10)
    try:
        connection.request("GET", path, headers=fields)
        answered = connection.getresponse()
        return answered.status, answered.read()
    finally:
        connection.close()


async def test_strangers_get_nothing(origin: Origin) -> None:
    adapter = origin.add()
    async with fleet(origin, 2) as homes, asking(origin, *homes, token="wrong") as replica:
        await replica.has(adapter)
        assert (origin.downloads, [home.mirror.served_bytes for home in homes]) == (1, [0, 0])
        (problem,) = replica.peers.problems.values()  # the next one is not asked
        assert "401" in problem


async def test_a_private_adapter_needs_the_credentials_it_came_with(origin: Origin) -> None:
    """Another token that may have it, too, asks the origin: it could be any text."""
    adapter = origin.add(token=SECRET)

    def accept(asked: Asked) -> None:
        if asked.fields.get("authorization") == "Bearer B":
            asked.fields["authorization"] = f"Bearer {SECRET}"

    origin.behave = accept
    async with fleet(origin, 1) as (home,), asking(origin, home, name="same") as same:
        await same.has(adapter, token=SECRET)
        assert origin.downloads == 1, "the home has no credentials"
        assert "403" in same.peers.problems[home.mirror.url]
        await home.has(adapter, token=SECRET)
        again, other = (asking(origin, home, name=name) for name in ("again", "other"))
        async with again, other:
            await again.has(adapter, token=SECRET)
            assert (origin.downloads, again.peers.taken) == (2, 1)
            served = home.mirror.served_bytes
            await other.has(adapter, token="B")
            assert (origin.downloads, other.peers.taken) == (3, 0)
            await fails(other.store.checkout(ID), errors.AccessDeniedError)
            await fails(other.store.checkout(ID, token="C"), errors.AdapterError)
            assert SECRET not in repr((again.store.placement(), again.peers.problems))
        (entry,) = home.folder.glob("entries/*")
        (scope,) = entry.glob("scope.*")
        query = f"?source={ID}&version={next(iter(origin.repos[ID].commits))}"
        member = {"Authorization": f"Bearer {TOKEN}"}
        forged = Peers("another").proof(home.mirror.url, entry.name, scope.name)
        proofs: tuple[dict[str, str], ...] = (
            {},
            {"X-Lorax-Proof": ""},
            {"X-Lorax-Proof": scope.name},
            {"X-Lorax-Proof": forged},
        )
        for proof in proofs:
            for name in (WEIGHTS, CONFIG, scope.name, "record.json", "../record.json"):
                path = f"/v1/{entry.name}/{name}{query}"
                status, body = await asyncio.to_thread(fetch, home, path, **member, **proof)
                assert (status, body) == (404, b"")
        assert home.mirror.served_bytes == served


async def test_a_member_cannot_use_the_proof_that_it_was_shown(origin: Origin) -> None:
    adapter = origin.add(token=SECRET)
    with FaultServer(b"", FalsePeer(contents(adapter), {"": refuse("403 No")})) as false:
        async with fleet(origin, 1) as (home,), asking(origin, home) as replica:
            await home.has(adapter, token=SECRET)
            replica.peers.members = [f"http://{false.netloc}"]
            await replica.has(adapter, token=SECRET)
            (asked,) = false.asked
            shown = {name: asked.fields[name] for name in ("authorization", "x-lorax-proof")}
            path = asked.target.replace("?", f"{WEIGHTS}?")
            assert await asyncio.to_thread(fetch, home, path, **shown) == (404, b"")


@pytest.mark.parametrize("hub_cache", ["off", "read"])
async def test_a_machines_own_token_serves_those_who_have_it(
    origin: Origin, monkeypatch: pytest.MonkeyPatch, hub_cache: str
) -> None:
    """Also what other tools brought with it into the standard cache of the home."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    adapter, ref = origin.add(token=SECRET), AdapterRef(ID, use_token=True)
    if hub_cache == "read":
        snapshot_download(ID, endpoint=origin.endpoint, cache_dir=origin.folder / "hub")
    begun = origin.downloads
    settings: Any = {"hub_cache": hub_cache, "hub_cache_dir": origin.folder / "hub"}
    async with fleet(origin, 1, **settings) as (home,):
        same, other = (asking(origin, home, name=name) for name in ("same", "other"))
        async with same, other:
            async with same.store.checkout(ref) as folder:
                assert contents(adapter).items() <= contents(folder.path).items()
            assert (origin.downloads - begun, same.peers.taken) == (hub_cache == "off", 1)
            await fails(other.store.checkout(ID), errors.AccessDeniedError)
            assert other.peers.taken == 0


async def test_what_other_tools_stored_is_public_only_if_the_source_says_so(origin: Origin) -> None:
    """They may have had a token that this machine has not."""
    origin.add(token=SECRET)
    snapshot_download(ID, token=SECRET, endpoint=origin.endpoint, cache_dir=origin.folder / "hub")
    settings: Any = {"hub_cache": "read", "hub_cache_dir": origin.folder / "hub"}
    async with fleet(origin, 1, **settings) as (home,):
        key = CacheKey(ID, next(iter(origin.repos[ID].commits)))
        path = f"/v1/{key.name}/{{}}?source={ID}&version={key.version}"
        member = {"Authorization": f"Bearer {TOKEN}"}
        status, _ = await asyncio.to_thread(fetch, home, path.format(WEIGHTS), **member)
        assert status == 404


async def test_the_name_of_a_machines_identity_is_no_proof(origin: Origin) -> None:
    """Those of object stores are no secrets."""
    key, scope = CacheKey("s3://bucket/adapter/", "etags-1"), "environment"
    member = {"Authorization": f"Bearer {TOKEN}"}
    for trust in (False, True):
        name = f"trust-{trust}"
        with disk_cache_world.opened(origin.folder / name) as world:
            download = disk_cache_world.begun(world.cache, key, scope)
            for role in (CONFIG_FILE, WEIGHTS_FILE):
                download.file(role, 4).write(0, memoryview(b"data"))
            download.publish().close()
        async with Replica(origin, name, trust=trust) as home:
            proof = home.peers.proof(home.mirror.url, key.name, scope_name(scope))
            path = f"/v1/{key.name}/{WEIGHTS}?source={key.source}&version={key.version}"
            fields = {**member, PROOF_FIELD: proof}
            status, _ = await asyncio.to_thread(fetch, home, path, **fields)
            assert status == (200 if trust else 404)


@pytest.mark.parametrize("trust", [False, True])
async def test_without_a_digest_it_is_a_matter_of_trust(origin: Origin, trust: bool) -> None:
    """A web server names no digest; and what its caller's digest refuses is not the peer's."""
    adapter = origin.add(rank=128)
    files = contents(adapter)
    web = Folder(files)
    with FaultServer(b"", web) as server:
        url = server.url("/adapter/")
        settings: Any = {"allow": (at(server.netloc),), "trust": trust}
        async with (
            fleet(origin, 1, **settings) as (home,),
            asking(origin, home, **settings) as replica,
        ):
            (await home.store.checkout(url)).release()
            seen = len(web.asked)
            async with replica.store.checkout(url) as folder:
                assert files.items() <= contents(folder.path).items()
                assert folder.verification.kind == "transport"
            assert replica.peers.taken == int(trust)
            last = max(asked.span[1] for asked in web.asked[seen:] if asked.span)
            assert (last < len(files[WEIGHTS])) == trust


async def test_trusted_peers_vouch_for_nothing(origin: Origin) -> None:
    adapter = origin.add(rank=128)
    files = contents(adapter)
    told = base64.b64encode(sha256(files[WEIGHTS]).digest()).decode()
    instead = {WEIGHTS: sends(files[WEIGHTS], f"Repr-Digest: sha-256=:{told}:")}
    with FaultServer(b"", Folder(files)) as server, FaultServer(b"", None) as false:
        url, allow = server.url("/adapter/"), (at(server.netloc),)
        false.behave = FalsePeer(files, instead)
        for n, (digest, kind) in enumerate(
            ((None, "transport"), (sha256(files[WEIGHTS]).hexdigest(), "sha256"))
        ):
            async with asking(origin, name=f"asking{n}", allow=allow, trust=True) as replica:
                replica.peers.members = [f"http://{false.netloc}"]
                async with replica.store.checkout(url, digest=digest) as folder:
                    assert folder.verification.kind == kind
                assert replica.peers.taken == (digest is None)
        instead[WEIGHTS] = sends(files[WEIGHTS].replace(b"lora_A", b"lora_X"))
        peers = Peers(TOKEN, trust=True)
        peers.members = [f"http://{false.netloc}"]
        settings = origin.settings("loader", peers, device_bytes=16 << 20) | {"allow": allow}
        loader = AdapterLoader(layout(4), LoaderConfig(**settings))
        async with loader, loader.stream(url) as handle:
            await handle.layer_ready(3)
            tiny.assert_equal_to_file(handle, adapter)
        assert peers.taken == 1


# -- the rest --------------------------------------------------------------------------------------


async def test_settings_that_lead_nowhere_are_refused(origin: Origin) -> None:
    for wrong in ("", "a b", "\u00fc", None):
        with pytest.raises(errors.ConfigError, match="token"):
            Peers(wrong)  # type: ignore[arg-type]
    for url in ("", "host:1", "ftp://host", "http://host/path", "http://user@host"):
        with pytest.raises(errors.ConfigError, match="member"):
            Peers(TOKEN).members = [url]
    store = AdapterStore(StoreConfig(**origin.settings("store", Peers(TOKEN))))
    for host in ("localhost", "0.0.0.0", "::", ""):
        with pytest.raises(errors.ConfigError, match="address"):
            AdapterMirror(store, host)
    with pytest.raises(errors.ConfigError, match="no peers"):
        AdapterMirror(AdapterStore())


async def test_certificates_that_cannot_be_read_are_not_hidden(
    origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(origin.folder / "none.pem"))
    origin.add(rank=64)
    async with asking(origin) as replica:
        replica.peers.members = [f"https://{origin.store_netloc}"]
        with pytest.raises(errors.ConfigError, match="certificates"):
            async with replica.store.checkout(ID):
                pass
    assert not origin.downloads


@pytest.mark.each_loop
async def test_a_load_that_is_cancelled_anywhere_leaves_nothing(origin: Origin) -> None:
    adapter = origin.add()
    async with fleet(origin, 1) as (home,):
        await home.has(adapter)
        for step in itertools.count(1):
            async with asking(origin, home, name=f"asking{step}") as replica:
                steps = Steps(replica.store.parts.source)
                load = asyncio.create_task(replica.has(adapter))
                steps.expect(step, load.cancel)
                await asyncio.wait([load])
                assert load.cancelled() == steps.met
                await until(lambda: not our_tasks())
                assert not (steps.met and replica.left)
                assert not replica.peers.problems
                await replica.has(adapter)
            if not steps.met:
                break
        assert (origin.downloads, step > 12) == (1, True)


@pytest.mark.slow
async def test_a_mirror_sends_no_more_bytes_a_second_than_it_may(origin: Origin) -> None:
    weights, rate = contents(origin.add())[WEIGHTS], 400_000
    async with fleet(origin, 1, rate=rate) as (home,):
        async with home.store.checkout(ID) as folder:
            path = f"/v1/{folder.path.name}/{WEIGHTS}?source={ID}&version={folder.version}"
        member = {"Authorization": f"Bearer {TOKEN}"}
        begun = time.monotonic()
        answers = [asyncio.to_thread(fetch, home, path, **member) for _ in range(3)]
        assert await asyncio.gather(*answers) == [(200, weights)] * 3
        assert time.monotonic() - begun >= (3 * len(weights) - 65_536) / rate
        path, port = path.replace(WEIGHTS, ""), int(home.mirror.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)):  # who asks nothing
            status, state = await asyncio.to_thread(fetch, home, path, **member)
            assert (status, json.loads(state)["state"]) == (200, "ready")
            async with asyncio.timeout(8):
                await home.mirror.__aexit__()


@pytest.mark.slow
async def test_strangers_hold_a_mirror_for_ten_seconds_and_64_kib(
    origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "MEMBER_SECONDS", 1.0)
    async with fleet(origin, 1) as (home,):
        address = ("127.0.0.1", int(home.mirror.url.rpartition(":")[2]))

        def ask(*parts: bytes) -> bytes:
            with socket.create_connection(address, timeout=5) as member, suppress(ConnectionError):
                for part in parts:
                    member.sendall(part)
                    time.sleep(0.02)
                return member.recv(99)
            return b""

        for parts in (
            [b"GET / HTTP/1.1\r\n", *[b"A"] * 150],
            [b"GET / HTTP/1.1\r\n", *[b"A: " + b"b" * 60_000 + b"\r\n"] * 9, b"\r\n"],
        ):
            assert await asyncio.to_thread(ask, *parts) == b""
        assert (await asyncio.to_thread(ask, b"GET / HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 401")
