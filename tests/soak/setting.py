"""A loader over a remote source, put together as loaders do it, but for its short patience."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from urllib.request import urlopen

from lorax_async import AdapterLoader, Allow, LoaderConfig
from lorax_async.adapter import AdapterRef
from lorax_async.config import Limits
from lorax_async.core.layout import ModelLayout, Module, Parallel
from lorax_async.core.policies import policy
from lorax_async.core.retries import Retries
from lorax_async.io.disk_cache import DiskCache
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.settings import HttpSettings, Timeouts
from lorax_async.io.remote.known import Known
from lorax_async.io.remote.opening import Opening
from lorax_async.io.remote.ports import Locator
from lorax_async.io.remote.resolving import Resolving
from lorax_async.io.remote.rules import AllowRules
from lorax_async.io.remote.source import RemoteSource
from lorax_async.io.remote.web import WebLocator
from lorax_async.io.remote.workers import Workers
from soak.library import HIDDEN, LARGEST, LAYERS, MODULES, Stored

SLOTS = 4
DEVICE_BYTES = LARGEST * 7 // 2
PINNED_BYTES = LARGEST
HOST_BYTES = LARGEST + (64 << 10)
"""Files are held with their headers."""
CONNECTIONS = 16
REVALIDATE = 1.0

TIMEOUTS = Timeouts(connect=5, read=1.0, slowest=20_000, over=1.0, idle=2.0)
"""Shorter than some of the source's stalls, and faster than it drips."""
RETRIES = Retries(attempts=5, base=0.05, most=0.5, obeyed=5.0)

LAYOUT = ModelLayout(
    tuple(
        Module(name, HIDDEN, HIDDEN, number * LAYERS // len(MODULES), Parallel.COLUMN)
        for number, name in enumerate(MODULES)
    ),
    LAYERS,
    "BF16",
    "model.",
)


@dataclass(frozen=True)
class FaultyProcess:
    """The source's own process."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def told(self, what: str) -> dict[str, object]:
        """Blocks."""
        with urlopen(f"{self.url}/{what}", timeout=60) as answer:
            said: dict[str, object] = json.loads(answer.read())
        return said


@contextmanager
def faulty_process(seed: int) -> Iterator[FaultyProcess]:
    process = subprocess.Popen(
        [sys.executable, "-m", "soak.faulty_source", str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    )
    with process:  # whose end closes its stdin, which ends it
        assert process.stdout is not None
        yield FaultyProcess(int(process.stdout.readline()))


@dataclass(frozen=True)
class Setting:
    """What a soak is about."""

    library: tuple[Stored, ...]
    process: FaultyProcess
    cache: DiskCache
    folder: Path
    cache_bytes: int
    loader: AdapterLoader

    def ref(self, stored: Stored) -> AdapterRef:
        return AdapterRef(f"{self.process.url}/{stored.name}/", source="http")

    def stored(self, location: str) -> Stored:
        """Which of the library's a key or a record is about."""
        name = location.removesuffix("/").rpartition("/")[2]
        return next(stored for stored in self.library if stored.name == name)


@asynccontextmanager
async def setting(
    library: tuple[Stored, ...], process: FaultyProcess, folder: Path, device: str
) -> AsyncIterator[Setting]:
    """Entered with the loader open; afterwards all has ended."""
    cache_bytes = sum(len(stored.config) + stored.nbytes for stored in library) // 4
    rules = AllowRules((Allow("http", "127.0.0.1", process.port),))
    engine = RangeEngine(
        HttpSettings(connections=CONNECTIONS, timeouts=TIMEOUTS, retries=RETRIES, proxies={})
    )
    workers, limits = Workers(4), Limits()
    cache = DiskCache(folder, cache_bytes, policy("lru"))
    locators: dict[str, Locator] = {"http": WebLocator(engine, rules, limits)}
    known = Known(REVALIDATE, monotonic)
    resolving = Resolving(
        *(locators.__getitem__, lambda _: cache, known, workers), offline=False, fresh=REVALIDATE
    )
    opening = Opening(
        *(resolving, known, lambda _: cache, engine, workers), limits=limits, verify="stream"
    )
    source = RemoteSource(resolving, opening, workers, limits=limits, verify="stream")
    config = LoaderConfig(
        device=device,
        device_bytes=DEVICE_BYTES,
        host_bytes=HOST_BYTES,
        pinned_bytes=PINNED_BYTES,
        staging_bytes=8 << 20,
        max_slots=SLOTS,
        io_threads=2,
        timeout=60,
        starvation_age=1.0,
    )
    try:
        async with AdapterLoader(LAYOUT, config, source=source) as loader:
            yield Setting(library, process, cache, folder, cache_bytes, loader)
    finally:
        for end in (engine.close, workers.close, cache.close):
            await asyncio.to_thread(end)
