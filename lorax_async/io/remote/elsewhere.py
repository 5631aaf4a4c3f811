"""All that adapters from elsewhere need of one loader, made when the first is asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple

from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.config import LoaderConfig
from lorax_async.core import runs
from lorax_async.errors import LoaderClosedError
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.settings import HttpSettings
from lorax_async.io.own_cache import OwnCache
from lorax_async.io.ports import AdapterFile, Demand, Hold, Reader
from lorax_async.io.remote.beginning import Beginning
from lorax_async.io.remote.kinds import Kinds
from lorax_async.io.remote.known import Known
from lorax_async.io.remote.opening import Opening
from lorax_async.io.remote.resolving import Resolving
from lorax_async.io.remote.source import RemoteSource
from lorax_async.io.remote.workers import Workers
from lorax_async.tracing.recorder import Tracer
from lorax_async.verification import Verification

CACHE_THREADS = 4


class _Made(NamedTuple):
    """What there is to end."""

    source: RemoteSource
    engine: RangeEngine
    workers: Workers
    kinds: Kinds

    def close(self) -> None:
        self.engine.close()
        self.workers.close()
        self.kinds.close()


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
    kinds = Kinds(config, engine, own)
    known = Known(config.revalidate, time.monotonic)
    resolving = Resolving(
        *(kinds.locator, kinds.cache, known, workers),
        offline=config.offline,
        fresh=config.revalidate,
    )
    limits, verify = config.limits, config.verify
    opening = Opening(
        *(resolving, known, kinds.cache, engine, workers), limits=limits, verify=verify
    )
    source = RemoteSource(resolving, opening, workers, limits=limits, verify=verify)
    return _Made(source, engine, workers, kinds)
