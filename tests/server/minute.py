"""A server, a slow link behind it, and many clients before it, for as long as told."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

from link import Link
from lorax_async import Allow, LoaderConfig
from lorax_async.server.assembly import Base, Capacity, assembled
from lorax_async.server.calls.service import Service
from lorax_async.server.serving import Serving, listen
from lorax_async.server.settings import ServerSettings

CLIENTS = Path(__file__).with_name("clients.py")
STYLES: dict[str, Callable[[str], bool]] = {
    "pirate": lambda text: text.startswith("Arr"),
    "shout": str.isupper,
    "json": lambda text: text.startswith('{"answer":'),
}
MISSING, REFUSED = "missing", "refused"
ERRORS = {MISSING: 404, REFUSED: 422}
"""Adapters that are not there, and one whose config says another rank than its weights have."""

SLOTS = 8
SEQUENCES = 16
RATE = 1.5e6
"""Bytes per second of each connection to the source: an adapter takes a quarter of a second."""

TICK, LOOK = 0.001, 0.25
"""Seconds between two looks at the loop, and at the memory."""


@dataclass
class Minute:
    """What came of it: answers by kind of adapter, and what the server felt."""

    answers: list[dict[str, Any]]
    lags: list[float]
    resident: list[int]
    loads: int

    def kinds(self) -> Counter[str]:
        return Counter(kind_of(answer["model"]) for answer in self.answers)

    def wrong(self) -> list[dict[str, Any]]:
        return [answer for answer in self.answers if not is_right(answer)]

    def lag(self, part: float) -> float:
        """Seconds: the largest but for the last of so many."""
        found = sorted(self.lags)
        return found[min(len(found) - 1, int(part * len(found)))]

    @property
    def growth(self) -> float:
        """Of the server's memory: the last third against the one before it."""
        third = len(self.resident) // 3
        return median(self.resident[-third:]) / median(self.resident[third:-third])


def kind_of(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].partition("-")[0]


def is_right(answer: dict[str, Any]) -> bool:
    kind = kind_of(answer["model"])
    if kind in ERRORS:
        return answer.get("status") == ERRORS[kind]
    return "text" in answer and bool(STYLES[kind](answer["text"]))


@contextmanager
def source(adapters: Path, work: Path, copies: int) -> Iterator[tuple[Link, list[str]]]:
    """`copies` adapters under names of their own, and some that cannot be loaded; their URLs."""
    names = [f"{kind}-{number}" for number in range(copies) for kind in STYLES][:copies]
    folders = {name: adapters / name.partition("-")[0] for name in names}
    folders[f"{REFUSED}-0"] = refused(adapters / "shout", work)
    files = {
        f"{name}/{path.name}": path
        for name, folder in folders.items()
        for path in folder.glob("adapter_*")
    }
    with Link(files, rate=RATE, delay=0.005) as link:
        every = [*names[:5], f"{MISSING}-0", f"{REFUSED}-0", *names[5:]]  # often asked for
        yield link, [f"{link.url(name)}/" for name in every]


def refused(adapter: Path, work: Path) -> Path:
    folder = shutil.copytree(adapter, work / "refused")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 5}))
    return Path(folder)


@asynccontextmanager
async def served(base: Base, link: Link, cache: Path) -> AsyncIterator[tuple[Service, str]]:
    config = LoaderConfig(
        dtype="float32",
        device_bytes=64 << 20,
        max_slots=SLOTS,
        io_threads=2,
        connections=4,
        cache_dir=cache,
        allow=(Allow("http", "127.0.0.1", link.port),),
    )
    settings = ServerSettings(base="smollm2", sources=config.allow, max_adapters_per_client=1000)
    capacity = Capacity(sequences=SEQUENCES, length=256)
    async with assembled(base, config, settings, capacity) as service:
        ready = asyncio.Event()
        server, listener = Serving(service, ready.set), listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        ended = asyncio.create_task(server.serve([listener]))
        await ready.wait()
        try:
            yield service, f"http://127.0.0.1:{port}"
        finally:
            server.stop()
            await ended


async def minute(
    base: Base, link: Link, models: Sequence[str], cache: Path, *, clients: int, seconds: float
) -> Minute:
    """A server that has never heard of the adapters, and `clients` that ask for them."""
    lags, resident = list[float](), list[int]()
    async with served(base, link, cache) as (service, url):
        watching = asyncio.create_task(watch(lags, resident))
        asked = {
            "url": url,
            "models": list(models),
            "exponent": 0.7,
            "seed": 7,
            "clients": clients,
            "seconds": seconds,
        }
        answers = await answers_of(asked)
        watching.cancel()
        loads = service.loader.statistics().loads
    return Minute(answers, lags, resident, loads)


async def answers_of(asked: dict[str, Any]) -> list[dict[str, Any]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(CLIENTS), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate(json.dumps(asked).encode())
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines()]


async def watch(lags: list[float], resident: list[int]) -> None:
    looked = 0.0
    while True:
        due = monotonic() + TICK
        await asyncio.sleep(TICK)
        lags.append(monotonic() - due)
        if monotonic() > looked + LOOK:
            looked = monotonic()
            resident.append(resident_bytes())


def resident_bytes() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
