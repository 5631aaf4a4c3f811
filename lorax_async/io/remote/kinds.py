"""The kinds of sources of one loader: who knows each, and where what it has is kept."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import RLock
from typing import Any

from lorax_async.config import LoaderConfig
from lorax_async.io.cache.ports import Cache
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.urls import parse_url
from lorax_async.io.own_cache import OwnCache
from lorax_async.io.remote.hub import HubLocator
from lorax_async.io.remote.hub_cache import HubCache, standard_folder
from lorax_async.io.remote.hub_calls import endpoint_in_use
from lorax_async.io.remote.hub_first import HubFirst
from lorax_async.io.remote.ports import Locator
from lorax_async.io.remote.rules import AllowRules
from lorax_async.io.remote.stores import StoreLocator
from lorax_async.io.remote.web import WebLocator

ASKING_THREADS = 8
"""Each question to a hub or a store takes two; a host that does not answer keeps them for long."""

STORE_THREADS = 32
"""For each kind of store. No bucket has more than `BUCKET_CALLS` of them."""


class Kinds:
    """Locators and caches, each made when it is first asked for. All methods block.

    What it makes ends with `close`; the loader's own cache, `own`, is somebody else's to end.
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
        """Where what comes from there is kept."""
        hub = kind == "hub" and self._config.hub_cache != "off"
        return self._once("hub first", self._hub_first) if hub else self._own.get()

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
        """Of its own: a hub that does not answer holds up no store, nor one kind another."""
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

    def _hub_first(self) -> HubFirst:
        config = self._config
        folder = config.hub_cache_dir or standard_folder()
        write = config.hub_cache == "write"
        cache = HubCache(
            folder, self._hub().own_scope, write=write, private=config.hub_cache_private
        )
        self._closing.append(cache.close)
        return HubFirst(cache, self._own.get())
