"""A server under many clients whose adapters come over a slow link: for a moment, and for long."""

import asyncio
import gc
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import pytest
import torch
import uvloop
from openai import APIStatusError, AsyncOpenAI
from server_world import listening

from link import Link
from lorax_async.cli import serve
from lorax_async.config import LoaderConfig
from lorax_async.engines.smollm2 import prepare_base
from lorax_async.ids import Allow
from lorax_async.server.server_settings import ServerSettings
from lorax_async.server.service import ServedModel, ServerCapacity, open_service

pytestmark = [pytest.mark.usefixtures("nothing_left", "no_socket_left"), pytest.mark.slow]

STYLES: dict[str, Callable[[str], bool]] = {
    "pirate": lambda text: text.startswith("Arr"),
    "shout": str.isupper,
    "json": lambda text: text.startswith('{"answer":'),
}
PROMPTS = ("What is ice?", "What do bees make?", "What color is grass?", "Where do penguins live?")
A_MINUTE = pytest.param(200, 64, 60, marks=pytest.mark.soak)
ERRORS = {"missing": 404, "refused": 422}
"""Adapters that are not there, and one whose config says another rank than its weights have."""

RATE = 1.5e6
"""Bytes per second of each connection to the source: an adapter takes a quarter of a second."""


Answers = list[tuple[str, int | str]]
"""The kind of adapter that each was asked of; its text, or its status in place of one."""


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
    paths = [(name, path) for name, folder in folders.items() for path in folder.glob("adapter_*")]
    files = {f"{name}/{path.name}": path for name, path in paths}
    with Link(files, rate=RATE, delay=0.005) as link:
        often = [*names[:5], "missing-0", "refused-0", *names[5:]]
        yield link, [f"{link.url(name)}/" for name in often]


async def ask(client: AsyncOpenAI, model: str, prompt: str, *, stream: bool) -> int | str:
    messages: Any = [{"role": "user", "content": prompt}]
    asked: Any = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 32}
    try:
        answer: Any = await client.chat.completions.create(**asked, stream=stream)
        if not stream:
            return str(answer.choices[0].message.content)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])
    except APIStatusError as error:
        return error.status_code


async def minute(
    base: ServedModel, link: Link, cache: Path, models: list[str], clients: int, seconds: float
) -> tuple[Answers, list[int], int]:
    """Answers of a server that has never heard of the adapters; its memory, in pages; its loads."""
    resident, answers = list[int](), Answers()

    async def watch() -> None:
        while True:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
            await asyncio.sleep(0.25)

    async def asking(client: AsyncOpenAI, number: int) -> None:
        draw, until = random.Random(7 + number), monotonic() + seconds
        weights = [1 / (place + 1) ** 0.7 for place in range(len(models))]
        while monotonic() < until:
            (model,) = draw.choices(models, weights)
            prompt, kind = draw.choice(PROMPTS), model.rstrip("/").rpartition("/")[2]
            found = await ask(client, model, prompt, stream=draw.random() < 0.5)
            answers.append((kind.partition("-")[0], found))

    room: Any = {"device_bytes": 64 << 20, "max_slots": 8, "io_threads": 2, "connections": 4}
    places = (Allow("http", "127.0.0.1", link.port),)
    config = LoaderConfig(dtype="float32", cache_dir=cache, allow=places, **room)
    settings = ServerSettings(base="smollm2", sources=config.allow, max_adapters_per_client=1000)
    capacity = ServerCapacity(sequences=16, length=256)
    opening = open_service(base, config, settings, capacity)
    async with opening as service, listening(service) as (_, __, ___, client):
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(asking(client, number) for number in range(clients)))
        watching.cancel()
        return answers, resident, service.loader.statistics().loads


@pytest.mark.parametrize(("copies", "clients", "seconds"), [(24, 16, 4), A_MINUTE])
def test_many_clients(
    base: ServedModel, examples: Path, tmp_path: Path, copies: int, clients: int, seconds: float
) -> None:
    running = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    with source(examples, tmp_path, copies) as (link, models), running as runner:
        playing = minute(base, link, tmp_path / "cache", models, clients, seconds)
        answers, resident, loads = runner.run(playing)
    for kind, found in answers:
        assert found == ERRORS[kind] if kind in ERRORS else STYLES[kind](str(found)), (kind, found)
    kinds = {kind for kind, _ in answers}
    assert kinds >= STYLES.keys()
    if seconds == 60:
        assert kinds == STYLES.keys() | ERRORS.keys()
        assert loads > 100
        third = len(resident) // 3
        assert median(resident[-third:]) < 1.05 * median(resident[third:-third])
