"""The parts of one loader that remote adapters need, made when the first is requested."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any, NamedTuple

from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.config import LoaderConfig
from lorax_async.core import runs
from lorax_async.errors import LoaderClosedError
from lorax_async.io.cache.ports import Cache
from lorax_async.io.disk_cache import OwnCache
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.settings import HttpSettings
from lorax_async.io.http.urls import parse_url
from lorax_async.io.ports import AdapterFile, Demand, Hold, Reader, StoredFolder
from lorax_async.io.remote.beginning import Beginning
from lorax_async.io.remote.cached import stored_folder
from lorax_async.io.remote.hub import HubLocator
from lorax_async.io.remote.hub_cache import StandardHubCache, TieredCache, standard_folder
from lorax_async.io.remote.hub_calls import endpoint_in_use
from lorax_async.io.remote.known import Known
from lorax_async.io.remote.opening import Opening
from lorax_async.io.remote.ports import Locator
from lorax_async.io.remote.resolving import Resolving
from lorax_async.io.remote.rules import AllowRules
from lorax_async.io.remote.source import RemoteSource
from lorax_async.io.remote.stores import StoreLocator
from lorax_async.io.remote.web import WebLocator
from lorax_async.io.remote.workers import Workers
from lorax_async.tracing.recorder import Tracer
from lorax_async.verification import Verification

CACHE_THREADS = 4
ASKING_THREADS = 8
"""Each query to a hub or a store takes two; a host that does not answer keeps them for long."""

STORE_THREADS = 32
"""For each kind of store. No bucket has more than `BUCKET_CALLS` of them."""


class BackendRegistry:
    """Locators and caches by kind of source, each made at its first use. All methods block.

    `close` ends what it made, not the loader's own cache, `own`.
    """

    def __init__(self, config: LoaderConfig, engine: RangeEngine, own: OwnCache) -> None:
        self._config = config
        self._engine = engine
        self._own = own
        self._lock = RLock()
        self._made: dict[str, Any] = {}
        self._pools: list[ThreadPoolExecutor] = []
        self._closing: list[Callable[[], None]] = []

    def locator(self, kind: str) -> Locator:
        """Of "hub", "s3", "gs", "az", "https" or "http"."""
        if kind == "hub":
            return self._hub()
        return self._store(kind) if kind in {"s3", "gs", "az"} else self._web()

    def cache(self, kind: str) -> Cache:
        """Return where adapters of that kind are kept."""
        tiered = kind == "hub" and self._config.hub_cache != "off"
        return self._once("tiered cache", self._tiered) if tiered else self._own.get()

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()
        for close in reversed(self._closing):
            close()

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        with self._lock:
            if name not in self._made:
                self._made[name] = make()
            return self._made[name]

    def _threads(self, kind: str, count: int = ASKING_THREADS) -> ThreadPoolExecutor:
        """Make a pool of its own: a hub that does not answer delays no store."""
        made = ThreadPoolExecutor(count, f"lorax-asking-{kind}")
        self._pools.append(made)
        return made

    def _hub(self) -> HubLocator:
        def make() -> HubLocator:
            endpoint = endpoint_in_use(self._config.hub_endpoint)
            rules = AllowRules(self._config.allow, named=(parse_url(endpoint).origin,))
            threads = self._threads("hub")
            return HubLocator(
                endpoint=endpoint, rules=rules, threads=threads, allow=self._config.allow
            )

        found: HubLocator = self._once("hub", make)
        return found

    def _store(self, kind: str) -> StoreLocator:
        def make() -> StoreLocator:
            threads = self._threads(kind, STORE_THREADS)
            made = StoreLocator(threads, AllowRules(self._config.allow))
            self._closing.append(made.close)
            return made

        found: StoreLocator = self._once(kind, make)
        return found

    def _web(self) -> WebLocator:
        def make() -> WebLocator:
            rules = AllowRules(self._config.allow)
            return WebLocator(self._engine, rules, self._config.limits)

        found: WebLocator = self._once("web", make)
        return found

    def _tiered(self) -> TieredCache:
        config = self._config
        hub = StandardHubCache(config.hub_cache_dir or standard_folder(), self._hub().own_scope)
        return TieredCache(hub, self._own.get())


class _Made(NamedTuple):
    """What there is to end."""

    source: RemoteSource
    engine: RangeEngine
    workers: Workers
    backends: BackendRegistry

    def close(self) -> None:
        self.engine.close()
        self.workers.close()
        self.backends.close()


class Elsewhere:
    """The `Source` of adapters that are not local. Who never asks for one pays nothing for it.

    What it makes ends with `close`; the loader's own cache, `own`, is somebody else's to end.
    """

    def __init__(self, config: LoaderConfig, own: OwnCache, tracer: Tracer | None = None) -> None:
        self._config = config
        self._tracer = tracer
        self._own = own
        self._making = Lock()
        self._made: _Made | None = None
        self._closed = False

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        return await (await self._source()).resolve(ref)

    async def open(self, key: AdapterKey, demand: Demand) -> AdapterFile:
        return await (await self._source()).open(key, demand)

    async def beginning(self, key: AdapterKey) -> Beginning:
        """As of `RemoteSource`."""
        return await (await self._source()).beginning(key, Demand())

    def reopen(self, key: AdapterKey) -> Reader:
        return self._make().source.reopen(key)

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[runs.Span]],
        arrived: Callable[[int], None],
        demand: Demand,
    ) -> Verification:
        return await (await self._source()).bring(file, groups, arrived, demand)

    def folder(self, key: AdapterKey, reader: Reader) -> StoredFolder:
        return stored_folder(key, reader)

    async def digest(self, key: AdapterKey) -> str:
        return await (await self._source()).digest(key)

    async def populate(self, key: AdapterKey) -> Hold:
        return await (await self._source()).populate(key)

    def close(self) -> None:
        """Blocks. Idempotent."""
        with self._making:
            made, self._made, self._closed = self._made, None, True
        if made is not None:
            made.close()

    async def _source(self) -> RemoteSource:
        made = self._made
        if made is None:
            # Certificates are read, and threads begin.
            made = await asyncio.get_running_loop().run_in_executor(None, self._make)
        return made.source

    def _make(self) -> _Made:
        with self._making:
            if self._closed:
                raise LoaderClosedError("the loader is closed")
            if self._made is None:
                self._made = _made(self._config, self._own, self._tracer)
            return self._made


@contextmanager
def elsewhere_of(config: LoaderConfig) -> Iterator[Elsewhere]:
    """For who has no loader to share a cache with."""
    own = OwnCache(config)
    elsewhere = Elsewhere(config, own)
    try:
        yield elsewhere
    finally:
        elsewhere.close()
        own.close()


def _made(config: LoaderConfig, own: OwnCache, tracer: Tracer | None) -> _Made:
    engine = RangeEngine(HttpSettings(connections=config.connections), tracer=tracer)
    workers = Workers(CACHE_THREADS)
    backends = BackendRegistry(config, engine, own)
    known = Known(config.revalidate, time.monotonic)
    resolving = Resolving(
        *(backends.locator, backends.cache, known, workers),
        offline=config.offline,
        fresh=config.revalidate,
    )
    limits, verify = config.limits, config.verify
    opening = Opening(
        *(resolving, known, backends.cache, engine, workers), limits=limits, verify=verify
    )
    source = RemoteSource(resolving, opening, workers, limits=limits, verify=verify)
    return _Made(source, engine, workers, backends)
