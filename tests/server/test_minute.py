"""A server under many clients whose adapters come over a slow link: for a moment, and for long."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import uvloop

from link import Link
from lorax_async.cli import serve
from lorax_async.config import LoaderConfig
from lorax_async.engines.smollm2 import prepare_base
from lorax_async.ids.allow import Allow
from lorax_async.server.server_settings import ServerSettings
from lorax_async.server.service import ServedModel, ServerCapacity, open_service
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


@dataclass
class Minute:
    """Answers, the server's memory in pages, four times a second, and its loads."""

    answers: list[dict[str, Any]]
    resident: list[int]
    loads: int

    @property
    def kinds(self) -> set[str]:
        return set(map(kind_of, self.answers))

    def require_right(self) -> None:
        """Every answer has its adapter's style, or its adapter's error."""
        for answer in self.answers:
            kind = kind_of(answer)
            if kind in ERRORS:
                assert answer.get("status") == ERRORS[kind]
            else:
                assert STYLES[kind](answer.get("text", "")), answer

    @property
    def growth(self) -> float:
        """The last third of the memory against the one before it."""
        third = len(self.resident) // 3
        return median(self.resident[-third:]) / median(self.resident[third:-third])


@pytest.fixture(scope="module")
def base() -> Iterator[ServedModel]:
    """With what `lorax-async serve` decides for its process."""
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    base = ServedModel.load(prepare_base(), dtype="float32", device="cpu")
    serve.tune_process()
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


async def minute(base: ServedModel, link: Link, cache: Path, what: dict[str, Any]) -> Minute:
    """A server that has never heard of the adapters, and clients that ask for them."""
    resident = list[int]()

    async def watch() -> None:
        while True:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
            await asyncio.sleep(0.25)

    room: Any = {"device_bytes": 64 << 20, "max_slots": 8, "io_threads": 2, "connections": 4}
    places = (Allow("http", "127.0.0.1", link.port),)
    config = LoaderConfig(dtype="float32", cache_dir=cache, allow=places, **room)
    settings = ServerSettings(base="smollm2", sources=config.allow, max_adapters_per_client=1000)
    capacity = ServerCapacity(sequences=16, length=256)
    async with (
        open_service(base, config, settings, capacity) as service,
        listening(service) as (_, __, port, ___),
    ):
        watching = asyncio.create_task(watch())
        command, pipe = Path(__file__).with_name("clients.py"), asyncio.subprocess.PIPE
        start = asyncio.create_subprocess_exec
        process = await start(sys.executable, str(command), stdin=pipe, stdout=pipe)
        url = f"http://127.0.0.1:{port}/v1"
        out, _ = await process.communicate(json.dumps(what | {"url": url}).encode())
        assert process.returncode == 0
        watching.cancel()
        answers = [json.loads(line) for line in out.splitlines()]
        return Minute(answers, resident, service.loader.statistics().loads)


def play(base: ServedModel, link: Link, work: Path, models: list[str], **what: Any) -> Minute:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(minute(base, link, work / "cache", what | {"models": models}))
    found.require_right()
    return found


def test_many_clients_for_a_moment(base: ServedModel, examples: Path, tmp_path: Path) -> None:
    with source(examples, tmp_path, 24) as (link, models):
        found = play(base, link, tmp_path, models, clients=16, seconds=4)
    assert found.kinds >= STYLES.keys()


@pytest.mark.soak
def test_many_clients_for_a_minute(base: ServedModel, examples: Path, tmp_path: Path) -> None:
    with source(examples, tmp_path, 200) as (link, models):
        found = play(base, link, tmp_path, models, clients=64, seconds=60)
    assert found.kinds == STYLES.keys() | ERRORS.keys()
    assert found.loads > 100
    assert found.growth < 1.05
