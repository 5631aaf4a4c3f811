"""Real Ray Serve, in the venv and the network namespace of `make ray`, and nginx.

One nginx is the origin of all adapters, another one the caching proxy of docs/fleet.md.
"""

import asyncio
import random
import re
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import tiny
from hub_stand_in import HubStandIn
from user_loads import at, contents
from web_servers import CachingProxy, Nginx, caching_proxy, free_port, nginx

if find_spec("ray") is None:
    collect_ignore_glob = ["test_*.py"]

ADAPTERS = 24
REQUESTS = 400
REVALIDATE = 0.5
MANY = 300
"""Adapters of a fleet without a proxy."""

HERE = Path(__file__).parent
ROUTERS = {
    "ours": "lorax_async.engines.ray.router:AdapterRouter",
    "hash": "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter",
}
APPS = {
    "ours2": ("ours", 2),
    "ours3": ("ours", 3),
    "default": ("", 2),
    "multiplexed": ("", 2),
    "hash": ("hash", 2),
}
"""Each application's router and replicas."""


def until(done: Callable[[], object], seconds: float = 120.0) -> None:
    stop = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < stop, "it did not come to pass"
        time.sleep(0.1)


@dataclass(frozen=True)
class Answer:
    adapter: str
    pid: int
    digest: str
    seconds: float


@dataclass
class World:
    """Applications, and the adapters that their origins have."""

    root: Path
    origin: Nginx
    proxy: CachingProxy
    hub: HubStandIn
    digests: dict[str, str] = field(default_factory=dict)
    handles: dict[str, Any] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    """Of Ray's proxy."""
    lost: int = 0
    """Requests that were sent again, for their replica died."""

    def handle(self, app: str) -> Any:
        """Return the handle of an application, which is deployed first if necessary."""
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        from engines.ray_serve.fleet_replicas import Multiplexed, Replica

        if app not in self.handles:
            router, replicas = APPS[app]
            settings: dict[str, Any] = {"request_routing_stats_period_s": 0.5}
            if router:
                settings["request_router_class"] = ROUTERS[router]
            deployment = serve.deployment(Multiplexed if app == "multiplexed" else Replica).options(
                num_replicas=replicas,
                max_ongoing_requests=16,
                ray_actor_options={"num_cpus": 0},
                request_router_config=RequestRouterConfig(**settings),
            )
            caches = self.root / "caches"
            caches.mkdir(exist_ok=True)
            places = [f"127.0.0.1:{port}" for port in (self.origin.first, self.proxy.web)]
            allow = tuple(map(at, [*places, self.hub.store_netloc]))
            bound = deployment.bind(allow, self.hub.endpoint, caches, REVALIDATE)
            self.handles[app] = serve.run(bound, name=app, route_prefix=None)
        return self.handles[app]

    def ids(self, prefix: str, *, proxied: bool = True) -> list[str]:
        """Return the ids of the adapters below a prefix at the origin, or at the proxy."""
        port = self.proxy.web if proxied else self.origin.first
        names = sorted(each.name for each in (self.origin.files / prefix).iterdir())
        return [f"http://127.0.0.1:{port}/{prefix}/{name}/" for name in names]

    def put(self, prefix: str, name: str, folder: Path) -> str:
        """Put an adapter at the origin; return the digest of its weights."""
        for file in folder.iterdir():
            self.origin.put(f"{prefix}/{name}/{file.name}", file.read_bytes())
        return sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()

    def are_right(self, answers: Sequence[Answer]) -> bool:
        """Return whether all answers came from their adapters' bytes."""
        return all(answer.digest == self.digests[name_of(answer.adapter)] for answer in answers)

    def fetches(self, prefix: str) -> int:
        """Downloads of adapters that are there: responses with the byte in the weights' middle.

        A replica that has an adapter asks for its first 256 KiB at most, also through the proxy.
        """
        lines = [line for line in self.origin.requests() if line.startswith(f'"GET /{prefix}/')]
        ranges = [
            re.search(r'"bytes=(\d+)-(\d+)"', line) for line in lines if "safetensors" in line
        ]
        return sum(found is None or int(found[1]) <= 400_000 <= int(found[2]) for found in ranges)

    async def ask(self, id: str, handle: Any) -> Answer:
        """Send one request; again if its replica dies meanwhile, as any client would."""
        from ray.exceptions import RayActorError

        start = time.monotonic()
        handle = handle.options(multiplexed_model_id=id, session_id=id)
        while True:
            try:
                answer = await handle.remote(id)
                break
            except RayActorError:
                self.lost += 1
        return Answer(id, **answer, seconds=time.monotonic() - start)

    def play(self, app: str, ids: Sequence[str], handle: Any = None) -> list[Answer]:
        """Send requests, six at a time; return the answers as they came."""
        answers: list[Answer] = []
        handle = handle or self.handle(app)

        async def play() -> None:
            turns = asyncio.Semaphore(6)

            async def one(id: str) -> None:
                async with turns:
                    answers.append(await self.ask(id, handle))

            await asyncio.gather(*map(one, ids))

        asyncio.run(play())
        return answers


def name_of(id: str) -> str:
    return id.rstrip("/").rpartition("/")[2]


def zipf(ids: Sequence[str], requests: int = REQUESTS, seed: int = 1) -> list[str]:
    sums = list(accumulate(1 / (n + 1) for n in range(len(ids))))
    return random.Random(seed).choices(ids, cum_weights=sums, k=requests)


def affinity(answers: Sequence[Answer]) -> float:
    """Of the requests for an adapter that was somewhere, the share that went there."""
    homes: dict[str, set[int]] = defaultdict(set)
    found = had = 0
    for answer in answers:
        had += bool(homes[answer.adapter])
        found += answer.pid in homes[answer.adapter]
        homes[answer.adapter].add(answer.pid)
    return found / had


def busiest(answers: Sequence[Answer], replicas: int) -> float:
    """The most requests of one replica, in times the mean."""
    counts: dict[int, int] = defaultdict(int)
    for answer in answers:
        counts[answer.pid] += 1
    return max(counts.values()) * replicas / len(answers)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    interfaces = [name for _, name in socket.if_nameindex()]
    if interfaces != ["lo"]:
        pytest.skip("Ray is run with a loopback interface alone: run `make ray`")
    root = tmp_path_factory.mktemp("ray")
    with (
        pytest.MonkeyPatch.context() as patch,
        nginx(root) as origin,
        caching_proxy(root / "proxy", f"127.0.0.1:{origin.first}") as proxy,
        HubStandIn() as hub,
    ):
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        # A replica that does not answer in time is passed over, and machines are busy.
        patch.setenv("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "10")
        patch.setenv("RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "10")
        # The proxy is killed three times this after its start; a fresh venv has no compiled code.
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
        patch.setenv("OMP_NUM_THREADS", "1")
        paths = f"{HERE.parents[1]}:{HERE.parents[1] / 'worlds'}"
        patch.setenv("PYTHONPATH", paths, prepend=":")
        world = World(root, origin, proxy, hub)
        for number in range(MANY):
            name = f"a{number:03}"
            folder = tiny.write(root / "adapters" / name, number, rank=200)
            few = (*APPS, "unproxied") if number < ADAPTERS else ()
            for prefix in (*few, "many"):
                world.digests[name] = world.put(prefix, name, folder)
            if number < ADAPTERS:
                hub.put(f"org/{name}", contents(folder))
        yield from _with_ray(world)


@pytest.fixture
def client(world: World, request: pytest.FixtureRequest) -> Iterator[Any]:
    """OpenAI's client of the app at `request.param`, which may not be there yet."""
    import openai

    url = f"http://127.0.0.1:{world.port}{request.param}/v1"
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=120) as client:
        yield client


def _with_ray(world: World) -> Iterator[World]:
    import ray
    from ray import serve

    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=2,
        log_to_driver=False,
        object_store_memory=100 << 20,
        _node_ip_address="127.0.0.1",
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": world.port})
        yield world
    finally:
        serve.shutdown()
        ray.shutdown()
