"""Replicas behind nginx as a caching proxy, by the configuration of docs/fleet.md."""

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any

import pytest
import tiny
from event_loops import until
from hub_stand_in import HubStandIn
from origins import SlowProxy
from tiny_loaders import fails
from user_loads import at, contents, layout, written
from web_servers import CachingProxy, Nginx, caching_proxy, nginx

from lorax_async import AdapterLoader, AdapterRef, AdapterStore, LoaderConfig, StoreConfig, errors

pytestmark = [
    pytest.mark.needs("nginx"),
    pytest.mark.usefixtures("nothing_left", "no_socket_left", "hub_client"),
]

WEIGHTS = "adapter_model.safetensors"
FIRST_BYTES = 256 << 10
TOKEN = "the-token"
TAIL = 1_500_000
"""A byte of the weights that is in no version's first bytes, nor in its first slice."""


@dataclass
class Fleet:
    """Replicas with disk caches of their own behind one proxy."""

    folder: Path
    origin: Nginx
    link: SlowProxy
    proxy: CachingProxy
    adapters: dict[str, Path] = field(default_factory=dict)

    def id(self, name: str) -> str:
        return f"http://127.0.0.1:{self.proxy.web}/{name}/"

    def put(self, name: str, seed: int) -> Path:
        """Put an adapter of 3.5 MB at the origin."""
        folder = written(self.folder / f"adapters/{name}-{seed}", seed, layers=6)
        for file, data in contents(folder).items():
            self.origin.put(f"{name}/{file}", data)
        self.adapters[name] = folder
        return folder

    def settings(self, replica: str) -> dict[str, Any]:
        allow = (at(f"127.0.0.1:{self.proxy.web}"),)
        cache = {"cache_dir": self.folder / replica, "hub_cache": "off"}
        return {"allow": allow, "revalidate": 0, "timeout": 60, **cache}

    def store(self, replica: str, **settings: Any) -> AdapterStore:
        return AdapterStore(StoreConfig(**self.settings(replica) | settings))

    def sent(self, name: str) -> list[tuple[int, int, int]]:
        """Return the responses with weights: the first byte and the last, and the bytes sent."""
        lines = [line for line in self.origin.requests() if f"/{name}/{WEIGHTS} " in line]
        parts = [re.search(r' 206 .*"bytes=(\d+)-(\d+)".* (\d+)$', line) for line in lines]
        return [(int(part[1]), int(part[2]), int(part[3])) for part in parts if part]

    def fetches(self, name: str) -> int:
        return sum(first <= TAIL <= last for first, last, _ in self.sent(name))

    def nbytes(self, name: str) -> int:
        return sum(nbytes for _, _, nbytes in self.sent(name))


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    (tmp_path / "origin").mkdir()
    with (
        nginx(tmp_path / "origin") as origin,
        SlowProxy(origin.first) as link,
        caching_proxy(tmp_path / "proxy", f"127.0.0.1:{link.port}") as proxy,
    ):
        yield Fleet(tmp_path, origin, link, proxy)


async def checked_out(store: AdapterStore, id: str | AdapterRef) -> dict[str, bytes]:
    async with store.checkout(id) as folder:
        return contents(folder.path)


async def has(store: AdapterStore, id: str | AdapterRef, adapter: Path) -> None:
    """Check out the adapter, with just the bytes that its author saved."""
    assert contents(adapter).items() <= (await checked_out(store, id)).items()


def request(port: int, target: str, method: str = "GET", **fields: str) -> HTTPResponse:
    """Send one request to a port of the proxy; the body is read."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        named = {name.replace("_", "-"): text for name, text in fields.items()}
        connection.request(method, target, headers=named)
        response = connection.getresponse()
        response.body = response.read()  # type: ignore[attr-defined]
        return response
    finally:
        connection.close()


async def test_replicas_that_start_together_ask_the_origin_once(fleet: Fleet) -> None:
    names = ["a", "b"]
    for seed, name in enumerate(names):
        fleet.put(name, seed)
    async with fleet.store("one") as one, fleet.store("two") as two:
        pairs = [(store, name) for store in (one, two) for name in names]
        await asyncio.gather(
            *(has(store, fleet.id(name), fleet.adapters[name]) for store, name in pairs)
        )
    settings = fleet.settings("three") | {"device_bytes": 32 << 20}
    async with AdapterLoader(layout(6), LoaderConfig(**settings)) as loader:
        for name in names:
            async with await loader.load(fleet.id(name)) as handle:
                tiny.assert_equal_to_file(handle, fleet.adapters[name])
    for name in names:
        size = (fleet.adapters[name] / WEIGHTS).stat().st_size
        assert fleet.fetches(name) == 1
        assert size <= fleet.nbytes(name) <= size + 3 * (FIRST_BYTES + 1)  # and each is confirmed


async def test_a_changed_adapter_is_noticed_at_once_and_whole(fleet: Fleet) -> None:
    old = fleet.put("a", 0)
    async with fleet.store("one") as one, fleet.store("two") as two:
        await has(one, fleet.id("a"), old)
        new = fleet.put("a", 1)
        await asyncio.gather(*(has(store, fleet.id("a"), new) for store in (one, two)))
        assert fleet.fetches("a") == 2
        async with fleet.store("three") as three:
            await has(three, fleet.id("a"), new)
        assert fleet.fetches("a") == 2


async def test_an_adapter_that_changes_while_it_is_fetched_is_the_new_one(fleet: Fleet) -> None:
    fleet.put("a", 0)
    # One connection: when the link stops, the last slices have not been requested.
    async with fleet.store("one", connections=1) as one, fleet.store("two") as two:
        fleet.link.stop_after(1_500_000)
        fetch = asyncio.create_task(checked_out(one, fleet.id("a")))
        await until(lambda: fleet.link.stopped)
        new = fleet.put("a", 1)
        fleet.link.go_on()
        assert contents(new).items() <= (await fetch).items()
        for store in (one, two):
            await has(store, fleet.id("a"), new)


async def test_a_few_bytes_before_a_slice_that_was_replaced_come(fleet: Fleet) -> None:
    """The client asks for what follows, and learns that it was; a 502 would tell it nothing."""
    port, target, whole = fleet.proxy.web, f"/a/{WEIGHTS}", 1 << 20
    fleet.put("a", 0)
    version = str(request(port, target, Range="bytes=0-0").getheader("ETag"))
    request(port, target, Range=f"bytes=0-{whole - 1}", If_Range=version)
    fleet.put("a", 1)
    with pytest.raises(IncompleteRead) as cut:
        request(port, target, Range=f"bytes={whole - 100}-{2 * whole}", If_Range=version)
    assert len(cut.value.partial) == 100
    rest = request(port, target, Range=f"bytes={whole}-{2 * whole}", If_Range=version)
    assert rest.status == 412


async def test_what_came_for_a_token_goes_to_that_token_only(fleet: Fleet) -> None:
    adapter = fleet.put("a", 0)
    private = AdapterRef(fleet.id("private/a"), token=TOKEN)
    async with fleet.store("one") as one, fleet.store("two") as two:
        await has(one, private, adapter)
        await has(two, private, adapter)
        assert fleet.fetches("private/a") == 1
        for token in (None, "another"):
            ref = AdapterRef(fleet.id("private/a"), token=token)
            await fails(two.checkout(ref), errors.AccessDeniedError)
    target = f"/private/a/{WEIGHTS}"
    known = request(fleet.proxy.web, target, Authorization=f"Bearer {TOKEN}").headers["ETag"]
    for fields in ({}, {"Authorization": "Bearer another"}):
        given = {"Range": f"bytes={TAIL}-{TAIL + 9}", "If_Range": known, **fields}
        assert request(fleet.proxy.web, target, **given).status == 401


async def test_other_requests_are_answered_by_the_origin(fleet: Fleet) -> None:
    target = f"/a/{WEIGHTS}"
    assert request(fleet.proxy.web, target).status == 404
    data = (fleet.put("a", 0) / WEIGHTS).read_bytes()
    for _ in range(2):
        head = request(fleet.proxy.web, target, "HEAD")
        assert (head.status, head.headers["Content-Length"]) == (200, str(len(data)))
    span = {"Range": f"bytes={TAIL}-{TAIL + 9}"}
    whole = request(fleet.proxy.web, target, If_Range="Sat, 01 Jan 2000 00:00:00 GMT", **span)
    assert (whole.status, whole.body) == (200, data)  # type: ignore[attr-defined]
    assert request(fleet.proxy.web, target, If_Range='"another"', **span).status == 412
    part = request(fleet.proxy.web, target, If_Range=head.headers["ETag"], **span)
    assert (part.status, part.body) == (206, data[TAIL : TAIL + 10])  # type: ignore[attr-defined]
    moved = request(fleet.proxy.web, f"/moved/a/{WEIGHTS}")
    assert moved.headers["Location"] == f"http://127.0.0.1:{fleet.origin.second}{target}"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[HubStandIn, CachingProxy]]:
    with HubStandIn() as hub:
        nowhere = "127.0.0.1:9"
        with caching_proxy(tmp_path / "proxy", nowhere, hub.netloc, hub.store_netloc) as proxy:
            yield hub, proxy


async def test_the_hubs_public_files_are_sent_once_and_private_ones_not_kept(
    hub: tuple[HubStandIn, CachingProxy], tmp_path: Path
) -> None:
    stand_in, proxy = hub
    adapters = {name: written(tmp_path / name, n, layers=6) for n, name in enumerate("ab")}
    stand_in.put("org/public", contents(adapters["a"]))
    stand_in.put("org/private", contents(adapters["b"]), private_token="hf_tenant")

    def store(replica: str) -> AdapterStore:
        allow = (at(f"127.0.0.1:{proxy.store}"), at(stand_in.store_netloc))
        endpoint = f"http://127.0.0.1:{proxy.hub}"
        cache: dict[str, Any] = {"cache_dir": tmp_path / replica, "hub_cache": "off"}
        return AdapterStore(StoreConfig(hub_endpoint=endpoint, allow=allow, timeout=60, **cache))

    def fetches() -> int:
        spans = [asked.span for asked in stand_in.asked_for("GET", "/store/")]
        return sum(span is not None and span[0] <= TAIL < span[1] for span in spans)

    private = AdapterRef("org/private", token="hf_tenant")
    async with store("one") as one, store("two") as two:
        both = (has(each, "org/public", adapters["a"]) for each in (one, two))
        await asyncio.gather(*both)
        assert fetches() == 1
        await has(one, private, adapters["b"])
        await has(two, private, adapters["b"])
        assert fetches() == 3
        await fails(two.checkout("org/private"), errors.AccessDeniedError)
    tokens = [asked for asked in stand_in.asked if "authorization" in asked.fields]
    assert tokens
    assert not any(stand_in.is_at_store(asked) for asked in tokens)
    paths = {asked.target.partition("?")[0] for asked in stand_in.asked_for("GET", "/store/")}
    statuses = [request(proxy.store, path, Range=f"bytes={TAIL}-{TAIL}").status for path in paths]
    assert sorted(statuses) == [206, 403]  # the one is public
