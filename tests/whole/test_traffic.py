"""Requests that overlap with everything that can happen to their adapters, at once.

Each adapter's weights name its version, so that what is in a slot says whose it is and how old.
"""

import asyncio
import itertools
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import tiny
import torch
from fault_server import Asked, Client, FaultServer, answer
from hub_stand_in import HubStandIn
from safetensors.torch import save, save_file

from lorax_async import (
    AdapterHandle,
    AdapterLoader,
    AdapterRef,
    AdapterScheduler,
    Allow,
    LoaderConfig,
    Request,
    Ticket,
    errors,
)
from lorax_async.types import Ref

pytestmark = pytest.mark.usefixtures("nothing_left", "hub_client")

WINDOW = 0.3
"""Seconds for which an answer, or a look at files, counts."""
MARKED = ["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
MARKED += [f"base_model.model.model.layers.{tiny.LAYERS - 1}.mlp.up_proj.lora_B.weight"]


class TrafficError(AssertionError):
    """A request was computed with weights that were not for it."""


ALPHA = 8
SLOW = 2 * WINDOW
"""Seconds, at most, that a web server holds back an answer that it has chosen."""


@dataclass(eq=False)
class Version:
    owner: "Owner"
    digest: str
    alpha: int = ALPHA
    """Names the version too, where the config is exchanged with the weights."""
    replaced: float | None = None


@dataclass(eq=False)
class Owner:
    """An adapter: what requests name, and since when they may not have it."""

    ref: AdapterRef
    denied: float | None = None
    version: Version | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    """Of a web folder, by their names."""
    token: str | None = None
    """The token that its web server takes."""


class Traffic:
    def __init__(self, folder: Path, hub: HubStandIn, seed: int) -> None:
        self.folder, self.hub, self.chance = folder, hub, random.Random(seed)
        self.web = FaultServer(b"", self.answer)
        self.versions: list[Version] = []
        self.tally: Counter[str] = Counter()
        self.numbers = itertools.count()
        self.folders = [Owner(AdapterRef(folder / f"f{n}")) for n in range(3)]
        self.repos = [
            Owner(AdapterRef(f"org/{name}", token=f"hf_{name}")) for name in ("one", "two", "three")
        ]
        self.pages: list[Owner] = []
        self.given = [Owner(AdapterRef("live"))]
        self.begun: dict[Ticket, tuple[Owner, float]] = {}
        self.seen: dict[Ticket, Version] = {}

    def __enter__(self) -> "Traffic":
        for owner in self.folders:
            self.rename(owner)
        for owner in self.repos:
            self.commit(owner)
        self.web.__enter__()
        for name in ("0", "1"):
            owner = Owner(AdapterRef(self.web.url(f"/{name}/"), token=f"web_{name}"))
            self.pages.append(owner)
            self.exchange(owner)
        return self

    def __exit__(self, *_: object) -> None:
        self.web.__exit__()

    # -- versions ----------------------------------------------------------------------------------

    def new(self, owner: Owner) -> tuple[Version, dict[str, torch.Tensor]]:
        tensors = tiny.tensors(seed=len(self.versions))
        for name in MARKED:
            tensors[name][0, 0] = len(self.versions)
        version = Version(owner, sha256(save(tensors)).hexdigest())
        self.versions.append(version)
        return version, tensors

    def put(self, owner: Owner, version: Version, *, since: float | None = None) -> None:
        """From now on the owner's id means this version."""
        if owner.version is not None and owner.version.replaced is None:
            owner.version.replaced = since or monotonic()
        owner.version, owner.denied = version, None

    def rename(self, owner: Owner) -> None:
        """A new folder in place of the old one."""
        version, tensors = self.new(owner)
        path = _path(owner)
        fresh = tiny.write(path.with_name(f"{path.name}-{next(self.numbers)}"))
        save_file(tensors, fresh / "adapter_model.safetensors")
        if path.exists():
            path.rename(fresh.with_name(f"{fresh.name}-old"))
            shutil.rmtree(fresh.with_name(f"{fresh.name}-old"))
        fresh.rename(path)
        self.put(owner, version)

    def save_again(self, owner: Owner) -> None:
        """The same file with other bytes."""
        if not _path(owner).exists():
            return
        version, tensors = self.new(owner)
        (_path(owner) / "adapter_model.safetensors").write_bytes(save(tensors))
        self.put(owner, version)

    def delete(self, owner: Owner) -> None:
        shutil.rmtree(_path(owner), ignore_errors=True)
        owner.denied = owner.denied or monotonic()

    def commit(self, owner: Owner) -> None:
        version, tensors = self.new(owner)
        ref = owner.ref
        folder = tiny.write(self.folder / "commit")
        files = {"adapter_config.json": (folder / "adapter_config.json").read_bytes()}
        files["adapter_model.safetensors"] = save(tensors)
        self.hub.put(ref.text, files, private_token=ref.token)
        self.put(owner, version)

    def exchange(self, owner: Owner) -> None:
        """Another folder in place of a web folder, config and weights at once."""
        version, tensors = self.new(owner)
        version.alpha = len(self.versions)
        config = json.dumps(tiny.config(lora_alpha=version.alpha)).encode()
        owner.files = {"adapter_config.json": config, "adapter_model.safetensors": save(tensors)}
        owner.token = owner.ref.token
        self.put(owner, version)

    def close_page(self, owner: Owner) -> None:
        owner.token = "another"
        owner.denied = owner.denied or monotonic()

    def answer(self, asked: Asked, client: Client) -> None:
        """Answer a request to the web server, at times late. In its threads."""
        _, number, name = asked.target.split("/")
        owner = self.pages[int(number)]
        files, token, late = owner.files, owner.token, random.random() < 0.2
        if late:
            time.sleep(random.random() * SLOW)
        if asked.fields.get("authorization") != f"Bearer {token}":
            client.head("403 Forbidden", "Content-Length: 0")
            return
        answer(asked, client, files[name], f'ETag: "{sha256(files[name]).hexdigest()}"')

    def revoke(self, owner: Owner) -> None:
        self.hub.repos[owner.ref.text].token = "another"
        owner.denied = owner.denied or monotonic()

    # -- what happens ------------------------------------------------------------------------------

    async def disturb(self, loader: AdapterLoader) -> None:
        """Do one thing."""
        happens: list[tuple[Callable[[Owner], Any], list[Owner]]] = [
            (self.rename, self.folders),
            (self.rename, self.folders),
            (self.save_again, self.folders),
            (self.delete, self.folders),
            (self.commit, self.repos),
            (self.commit, self.repos),
            (self.revoke, self.repos),
            (self.exchange, self.pages),
            (self.exchange, self.pages),
            (self.close_page, self.pages),
        ]
        calls: list[Callable[[Owner], Awaitable[object]]] = [
            lambda owner: loader.unload(owner.ref, timeout=0.2),
            lambda owner: loader.pin(owner.ref, timeout=0.5),
            lambda owner: _later(loader.unpin, owner.ref),
            lambda owner: _later(loader.prefetch, owner.ref),
            lambda owner: self.replace(loader),
        ]
        if self.chance.random() < 0.5:
            work, owners = self.chance.choice(happens)
            work(self.chance.choice(owners))
            self.tally[work.__name__] += 1
        else:
            with suppress(errors.LoraxError):
                await self.chance.choice(calls)(self.chance.choice(self.all))
            self.tally["calls"] += 1

    async def replace(self, loader: AdapterLoader) -> None:
        owner = self.given[0]
        version, tensors = self.new(owner)
        (await loader.replace(owner.ref, tensors, tiny.config(), timeout=2)).release()
        self.put(owner, version)

    @property
    def all(self) -> list[Owner]:
        return self.folders + self.repos + self.pages + self.given

    # -- requests ----------------------------------------------------------------------------------

    def choose(self) -> tuple[Owner, AdapterRef]:
        """Return an adapter and how a request names it: at times with a digest, or as a stranger."""
        owner = self.chance.choice(self.all)
        ref, number = owner.ref, self.chance.random()
        if owner in self.given or number > 0.2:
            return owner, ref
        if owner in self.pages and number < 0.1:
            return owner, replace(ref, token="stranger")
        own = [version for version in self.versions if version.owner is owner]
        return owner, replace(ref, digest=self.chance.choice(own[-2:]).digest)

    def submit(self, scheduler: AdapterScheduler) -> Ticket:
        owner, ref = self.choose()
        begins = monotonic()
        ticket = scheduler.submit(Request(ref, 3, self.chance.randint(1, 8), deadline=5))
        self.begun[ticket] = owner, begins
        return ticket

    async def load(self, loader: AdapterLoader) -> None:
        """Acquire an adapter beside the scheduler, by one of the loader's calls."""
        owner, ref = self.choose()
        begins = monotonic()
        handle = None
        try:
            if self.chance.random() < 0.5:
                handle = loader.try_acquire(ref)
            else:
                handle = await loader.load(ref, timeout=5)
        except errors.InternalError:
            raise
        except errors.LoraxError as error:
            self.tally[type(error).__name__] += 1
        if handle is not None:
            with handle:
                self.check_weights(owner, ref, begins, handle)
                self.tally["loads"] += 1

    def check(self, ticket: Ticket, handle: AdapterHandle) -> None:
        """Raise `TrafficError` if the slot's weights are not for this request."""
        owner, begins = self.begun[ticket]
        ref = ticket.ref
        assert isinstance(ref, AdapterRef)
        version = self.check_weights(owner, ref, begins, handle)
        if self.seen.setdefault(ticket, version) is not version:
            raise TrafficError(f"{owner.ref.text}: two versions in one request")

    def check_weights(
        self, owner: Owner, ref: AdapterRef, begins: float, handle: AdapterHandle
    ) -> Version:
        """Raise `TrafficError` if they are not for a request that began then; say whose they are."""
        names = [name.removeprefix("base_model.model.").rpartition(".lora")[0] for name in MARKED]
        first, last = handle.modules[names[0]].a[0, 0], handle.modules[names[1]].b[0, 0]
        if first != last:
            raise TrafficError(f"{owner.ref.text}: parts of versions {first} and {last}")
        version = self.versions[int(first)]
        if version.owner is not owner:
            raise TrafficError(f"{owner.ref.text} got {version.owner.ref.text}")
        if version.replaced is not None and begins > version.replaced + WINDOW:
            late = begins - version.replaced
            raise TrafficError(f"{owner.ref.text}: a version replaced {late:.3f} s before")
        if owner.denied is not None and begins > owner.denied + WINDOW:
            raise TrafficError(f"{owner.ref.text}: refused {begins - owner.denied:.3f} s before")
        if ref.digest not in {None, version.digest} or ref.token != owner.ref.token:
            raise TrafficError(f"{owner.ref.text}: given for another digest or token")
        if {module.scale for module in handle.modules.values()} != {version.alpha / 4}:
            raise TrafficError(f"{owner.ref.text}: its config is of another version")
        return version

    async def compute(self, scheduler: AdapterScheduler) -> None:
        async for batch in scheduler.batches(64, 16):
            late = []
            for row in batch.rows:
                assert row.handle is not None
                if not row.handle.is_ready(tiny.LAYERS - 1):
                    late.append(row.ticket)
                    continue
                if row.start == 0:
                    self.seen.pop(row.ticket, None)  # it begins, or begins again
                self.check(row.ticket, row.handle)
                self.tally["rows"] += 1
            await asyncio.sleep(self.chance.random() * 0.004)
            scheduler.complete(batch, again=late)

    async def request(self, scheduler: AdapterScheduler) -> None:
        ticket = self.submit(scheduler)
        if self.chance.random() < 0.1:
            await asyncio.sleep(self.chance.random() * 0.02)
            ticket.cancel()
        try:
            await ticket
        except errors.InternalError:
            raise
        except errors.LoraxError as error:
            self.tally[type(error).__name__] += 1
        except asyncio.CancelledError:
            self.tally["cancelled"] += 1
        finally:
            del self.begun[ticket]
            self.seen.pop(ticket, None)


def _path(owner: Owner) -> Path:
    return Path(owner.ref.id)


async def _later(call: Callable[[Any], object], ref: Ref) -> None:
    call(ref)


async def run_traffic(traffic: Traffic, loader: AdapterLoader, seconds: float) -> None:
    async def ask(scheduler: AdapterScheduler) -> None:
        while monotonic() < end:
            await traffic.request(scheduler)

    async def load() -> None:
        while monotonic() < end:
            await traffic.load(loader)
            await asyncio.sleep(traffic.chance.random() * 0.02)

    async def disturb() -> None:
        while monotonic() < end:
            await traffic.disturb(loader)
            await asyncio.sleep(traffic.chance.random() * 0.08)

    end = monotonic() + seconds
    async with AdapterScheduler(loader, max_begun=12) as scheduler:
        computing = asyncio.create_task(traffic.compute(scheduler))
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(20):
                    tasks.create_task(ask(scheduler))
                for _ in range(4):
                    tasks.create_task(load())
                tasks.create_task(disturb())
                tasks.create_task(disturb())
                watched = tasks.create_task(_until(end, computing))
            watched.result()
        finally:
            computing.cancel()
            await asyncio.wait([computing])


async def _until(end: float, computing: asyncio.Task[None]) -> None:
    """Raise what ends the computation before its time."""
    await asyncio.wait([computing], timeout=max(0.0, end - monotonic()) + 1)
    if computing.done():
        computing.result()


@pytest.mark.parametrize(
    "long", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["5 s", "soak"]
)
async def test_no_request_gets_what_is_not_for_it(
    tmp_path: Path, request: pytest.FixtureRequest, long: bool
) -> None:
    """Replaced, saved again, deleted, moved, revoked, unloaded, pinned and evicted, all at once."""
    seconds = request.config.getoption("--soak-seconds") if long else 5.0
    seed = request.config.getoption("--soak-seed")
    print(f"seed {seed}")  # noqa: T201
    with HubStandIn() as hub, Traffic(tmp_path, hub, seed) as traffic:
        config = LoaderConfig(
            device_bytes=1 << 20,
            max_slots=3,
            io_threads=2,
            memory_bytes=1 << 20,
            revalidate=WINDOW,
            revalidate_files=WINDOW,
            hub_endpoint=hub.endpoint,
            cache_dir=tmp_path / "cache",
            hub_cache="off",
            allow=(Allow("http", "127.0.0.1", traffic.web.port),),
            starvation_age=0.5,
        )
        async with AdapterLoader(tiny.layout(), config) as loader:
            version, tensors = traffic.new(traffic.given[0])
            (await loader.load_tensors("live", tensors, tiny.config())).release()
            traffic.put(traffic.given[0], version)
            await run_traffic(traffic, loader, seconds)
        print(dict(traffic.tally))  # noqa: T201
        assert traffic.tally["rows"] > 50 * seconds
        assert {"rename", "save_again", "delete", "commit", "revoke"} <= set(traffic.tally)
        assert {"exchange", "loads"} <= set(traffic.tally)
