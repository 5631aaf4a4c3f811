"""What the contenders of `bench_remote.py` share, what is noted of each, and the loader."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns

import torch

from floors import Arena
from harness import Contender, Role, WrongBytesError, nothing
from link import Link
from load_stage import check_handle, require_equal
from lorax_async import layouts
from lorax_async.config import LoaderConfig
from lorax_async.errors import AdapterTimeoutError
from lorax_async.events import Event, LayerReady, SlotGranted
from lorax_async.handle import AdapterHandle
from lorax_async.ids import Allow
from lorax_async.loader import AdapterLoader
from lorax_async.tracing import Trace
from lorax_async.types import RemoteKey
from work_files import AdapterFolder

CONNECTIONS = 16
"""Of every contender that lets itself be told how many."""

STALLED_LOADS = 16
STALLED_SECONDS = 2.0
"""The timeout of each load from a server that stalls."""

_HANGING_SECONDS = 0.5
"""How long they have hung when a healthy load begins beside them."""

_SLACK = 1 << 20
_BUSY_MS = 1.0


@dataclass(slots=True)
class Noted:
    """Of one contender, per round: the server's counts, ms of the caller's thread, late ticks."""

    counts: list[dict[str, int]] = field(default_factory=list)
    caller: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)


async def busy(late: list[float]) -> None:
    """A loop that has other work: a tick of 1 ms, then as long in pure Python, and so on.

    How late each tick came is noted, in ms.
    """
    while True:
        start = perf_counter_ns()
        await asyncio.sleep(_BUSY_MS / 1e3)
        woken = perf_counter_ns()
        late.append((woken - start) / 1e6 - _BUSY_MS)
        while perf_counter_ns() - woken < _BUSY_MS * 1e6:
            pass


class Stage:
    """One adapter behind a link, an arena that it goes into, and what is noted meanwhile."""

    def __init__(
        self, folder: AdapterFolder, link: Link, *, io_threads: int, busy_loop: bool
    ) -> None:
        self.folder = folder
        self.link = link
        self.io_threads = io_threads
        self.nbytes = folder.file_size
        self.arena = Arena(self.nbytes)
        self.file = self.arena.bytes[: self.nbytes]
        """Where a contender that only downloads puts the whole file."""

        self.places = self.arena.places(folder)
        self.noted: dict[str, Noted] = {}
        self._busy_loop = busy_loop

    async def empty(self) -> None:
        self.arena.tensor.zero_()

    def check_file(self) -> None:
        if self.file != self.folder.weights.read_bytes():
            raise WrongBytesError("the arena does not hold the file that was served")

    def check_places(self) -> None:
        require_equal(self.places, self.folder.tensors)

    def contender(
        self,
        name: str,
        role: Role,
        run: Callable[[], Awaitable[None]],
        check: Callable[[], None],
        *,
        prepare: Callable[[], Awaitable[None]] | None = None,
        settle: Callable[[], Awaitable[None]] = nothing,
        every: int = 1,
    ) -> Contender:
        """One whose requests, CPU time and effect on the loop are noted."""
        noted = self.noted[name] = Noted()

        async def prepared() -> None:
            await (prepare or self.empty)()
            self.link.counts(reset=True)

        async def observed() -> None:
            ticker = asyncio.create_task(busy(noted.late)) if self._busy_loop else None
            cpu = time.thread_time()
            await run()
            noted.caller.append((time.thread_time() - cpu) * 1e3)
            if ticker is not None:
                ticker.cancel()

        def checked() -> None:
            noted.counts.append(self.link.counts())
            check()

        return Contender(name, role, observed, checked, prepared, every, settle)


class Loads:
    """`await loader.load(url)`, by a loader that is new for every run, as is its disk cache.

    It has loaded a small adapter from another server just before: threads and certificates are
    there, but no connection, nor anything that was measured of the link. Where the cache is what is
    loaded from, it is kept, and the version is named, so that nobody need be asked. Beside a server
    that stalls, 16 loads from that one have hung for half a second when the timed one begins.
    Each run is traced into `traces`, if given.
    """

    def __init__(
        self,
        stage: Stage,
        other: Link,
        small: AdapterFolder,
        cache: Path,
        *,
        cached: bool = False,
        stalling: Link | None = None,
        traces: list[Trace] | None = None,
    ) -> None:
        self._stage = stage
        self._other = other
        self._cache = cache
        self._cached = cached
        self._layout = layouts.from_adapter(stage.folder.path)
        self._config = LoaderConfig(
            dtype=torch.bfloat16,
            device_bytes=stage.folder.nbytes + small.nbytes + 2 * _SLACK,
            max_slots=2,
            io_threads=stage.io_threads,
            connections=CONNECTIONS,
            cache_dir=cache,
            allow=tuple(
                Allow("http", "127.0.0.1", link.port)
                for link in (stage.link, other, stalling)
                if link is not None
            ),
        )
        self._stalling = stalling
        self._traces = traces
        self._stalled: list[asyncio.Task[None]] = []
        self._loader: AdapterLoader | None = None
        self._handle: AdapterHandle | None = None
        self._revision: str | None = None
        self._times: dict[str, float] = {}
        self._unsubscribe: Callable[[], None] = lambda: None
        self.first_layer: list[float] = []

    async def prepare(self) -> None:
        if self._revision is None:
            shutil.rmtree(self._cache, ignore_errors=True)
        self._loader = AdapterLoader(self._layout, self._config)
        await self._loader.__aenter__()
        small = await self._loader.load(self._other.url(""))
        await small.verified()  # and so nothing of it runs on
        small.release()
        if self._cached and self._revision is None:
            await self._fill_cache(self._loader)
            return
        await self._begin_stalled(self._loader)
        self._times.clear()
        self._unsubscribe = self._loader.subscribe(self._note)
        if self._traces is not None:
            self._traces.append(self._loader.trace().start())

    async def _begin_stalled(self, loader: AdapterLoader) -> None:
        if self._stalling is None:
            return

        async def stalled(url: str) -> None:
            with suppress(AdapterTimeoutError):
                await loader.load(url, timeout=STALLED_SECONDS)
                raise WrongBytesError("an adapter came from the server that stalls")

        urls = [self._stalling.url(f"{n}/") for n in range(STALLED_LOADS)]
        self._stalled = [asyncio.create_task(stalled(url)) for url in urls]
        await asyncio.sleep(_HANGING_SECONDS)

    async def _fill_cache(self, loader: AdapterLoader) -> None:
        handle = await loader.load(self._stage.link.url(""))
        await handle.verified()
        assert isinstance(handle.key, RemoteKey)
        self._revision = handle.key.version
        handle.release()
        await loader.__aexit__(None, None, None)
        await self.prepare()

    async def run(self) -> None:
        """To RESIDENT."""
        assert self._loader is not None
        self._handle = await self._loader.load(self._stage.link.url(""), revision=self._revision)
        self._times["resident"] = time.monotonic()

    async def run_to_published(self) -> None:
        await self.run()
        assert self._handle is not None
        await self._handle.verified()

    async def settle(self) -> None:
        """Look at what was loaded, and wait until nothing of it runs on."""
        assert self._loader is not None
        assert self._handle is not None
        if self._traces is not None:
            self._traces[-1].stop()
        check_handle(self._handle, self._stage.folder.tensors)
        await self._handle.verified()
        for task in self._stalled:
            await task
        header = self._times["header"]
        done = self._times["resident"] - header
        self.first_layer.append((self._times["layer 0"] - header) / done)
        self._handle.release()
        await self._loader.__aexit__(None, None, None)

    def _note(self, event: Event) -> None:
        """Until layer 0 is ready: a load costs less while nobody listens."""
        if isinstance(event, SlotGranted):
            self._times["header"] = event.time
        elif isinstance(event, LayerReady):
            self._times["layer 0"] = event.time
            self._unsubscribe()
