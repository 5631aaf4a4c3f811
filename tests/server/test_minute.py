"""A server under many clients whose adapters come over a slow link: for a moment, and for long."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import pytest
import torch
import uvloop

from link import Link
from lorax_async import Allow, LoaderConfig
from lorax_async.commands import serve
from lorax_async.engines.smollm2 import prepare_base
from lorax_async.server.service import Base, Capacity, open_service
from lorax_async.server.settings import ServerSettings
from server.world import listening

pytestmark = [pytest.mark.usefixtures("nothing_left", "no_socket_left"), pytest.mark.slow]

STYLES: dict[str, Callable[[str], bool]] = {
    "pirate": lambda text: text.startswith("Arr"),
    "shout": str.isupper,
    "json": lambda text: text.startswith('{"answer":'),
}
ERRORS = {"missing": 404, "refused": 422}
"""Adapters that are not there, and one whose config says another rank than its weights have."""

RATE = 1.5e6
"""Bytes per second of each connection to the source: an adapter takes a quarter of a second."""


def kind_of(answer: dict[str, Any]) -> str:
    return str(answer["model"]).rstrip("/").rpartition("/")[2].partition("-")[0]


def is_right(answer: dict[str, Any]) -> bool:
    kind = kind_of(answer)
    if kind in ERRORS:
        return answer.get("status") == ERRORS[kind]
    return "text" in answer and STYLES[kind](answer["text"])


@dataclass
class Minute:
    """Answers, the loop's lags in seconds, the process's bytes four times a second, and loads."""

    answers: list[dict[str, Any]]
    lags: list[float]
    resident: list[int]
    loads: int

    def kinds(self) -> Counter[str]:
        return Counter(map(kind_of, self.answers))

    def wrong(self) -> list[dict[str, Any]]:
        return [answer for answer in self.answers if not is_right(answer)]

    def lag(self, part: float) -> float:
        """Milliseconds: the largest but for the last of so many."""
        return sorted(self.lags)[min(len(self.lags) - 1, int(part * len(self.lags)))] * 1e3

    @property
    def growth(self) -> float:
        """Of the server's memory: the last third against the one before it."""
        third = len(self.resident) // 3
        return median(self.resident[-third:]) / median(self.resident[third:-third])


@pytest.fixture(scope="module")
def base() -> Iterator[Base]:
    """With what `lorax-async serve` decides for its process."""
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    base = Base.load(prepare_base(), dtype="float32", device="cpu")
    serve.as_application()
    yield base
    gc.unfreeze()
    sys.setswitchinterval(before)
    torch.set_num_threads(threads)


@contextmanager
def source(adapters: Path, work: Path, copies: int) -> Iterator[tuple[Link, list[str]]]:
    """`copies` adapters under names of their own, and some that cannot be loaded; their URLs."""
    refused = Path(shutil.copytree(adapters / "shout", work / "refused"))
    config = refused / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 5}))
    names = [f"{kind}-{number}" for number in range(copies) for kind in STYLES][:copies]
    folders = {name: adapters / name.partition("-")[0] for name in names} | {"refused-0": refused}
    files = {
        f"{name}/{path.name}": path
        for name, folder in folders.items()
        for path in folder.glob("adapter_*")
    }
    with Link(files, rate=RATE, delay=0.005) as link:
        often = [*names[:5], "missing-0", "refused-0", *names[5:]]
        yield link, [f"{link.url(name)}/" for name in often]


async def minute(base: Base, link: Link, cache: Path, what: dict[str, Any]) -> Minute:
    """A server that has never heard of the adapters, and clients that ask for them."""
    lags, resident = list[float](), list[int]()

    async def watch() -> None:
        looked = 0.0
        while True:
            due = monotonic() + 0.001
            await asyncio.sleep(0.001)
            lags.append(monotonic() - due)
            if monotonic() > looked + 0.25:
                looked = monotonic()
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                resident.append(pages * os.sysconf("SC_PAGE_SIZE"))

    config = LoaderConfig(
        dtype="float32",
        device_bytes=64 << 20,
        max_slots=8,
        io_threads=2,
        connections=4,
        cache_dir=cache,
        allow=(Allow("http", "127.0.0.1", link.port),),
    )
    settings = ServerSettings(base="smollm2", sources=config.allow, max_adapters_per_client=1000)
    capacity = Capacity(sequences=16, length=256)
    async with (
        open_service(base, config, settings, capacity) as service,
        listening(service) as (_, __, port, ___),
    ):
        watching = asyncio.create_task(watch())
        clients = Path(__file__).with_name("clients.py")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(clients), stdin=pipe, stdout=pipe
        )
        url = f"http://127.0.0.1:{port}/v1"
        out, _ = await process.communicate(json.dumps(what | {"url": url}).encode())
        assert process.returncode == 0
        watching.cancel()
        answers = [json.loads(line) for line in out.splitlines()]
        return Minute(answers, lags, resident, service.loader.statistics().loads)


def played(base: Base, link: Link, work: Path, models: list[str], **what: Any) -> Minute:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found: Minute = runner.run(minute(base, link, work / "cache", what | {"models": models}))
    return found


def test_many_clients_for_a_moment(base: Base, examples: Path, tmp_path: Path) -> None:
    with source(examples, tmp_path, 24) as (link, models):
        found = played(base, link, tmp_path, models, clients=16, seconds=4)
    assert found.wrong() == []
    assert found.kinds().keys() >= STYLES.keys()


@pytest.mark.soak
def test_many_clients_for_a_minute(
    base: Base, examples: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the control: as many answers of one adapter that is always there."""
    with source(examples, tmp_path, 200) as (link, models):
        cold, control = (
            played(base, link, tmp_path, some, clients=64, seconds=60)
            for some in (models, models[:1])
        )
    lags = "; ".join(
        f"{part} {cold.lag(part):.1f} ms, control {control.lag(part):.1f}"
        for part in (0.5, 0.99, 0.999)
    )
    with capfd.disabled():
        sys.stdout.write(
            f"{len(cold.answers)} answers ({dict(cold.kinds())}) by {cold.loads} loads, control"
            f" {len(control.answers)}; loop lag {lags}; memory × {cold.growth:.3f}\n"
        )
    assert cold.wrong() == control.wrong() == []
    assert cold.kinds().keys() == STYLES.keys() | ERRORS.keys()
    assert cold.loads > 100
    assert cold.growth < 1.05
