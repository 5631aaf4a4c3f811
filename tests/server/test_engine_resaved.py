"""An adapter is saved again in place while the requests of an engine wait for its layers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import tiny
from common import until
from lorax_async import (
    AdapterFormatError,
    AdapterLoader,
    AdapterScheduler,
    IntegrityError,
    LoaderConfig,
)
from lorax_async.io.devices.gated import GatedDevice
from lorax_async.server.engine import Engine
from lorax_async.server.generation import Sampling
from lorax_async.testing import FakeDecoder
from server.generating import GREEDY, all_of, alone, asked
from test_resaved import CLIENTS, SAVES, Save, resaving

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "a", 1)


@asynccontextmanager
async def engine_of(slots: int = 2) -> AsyncIterator[tuple[Engine, GatedDevice]]:
    """An engine with four places over local files; then its decoder keeps nothing."""
    device = GatedDevice(tiny.layout(), dtype="F32", nbytes=1 << 20, slots=slots)
    config = LoaderConfig(device_bytes=1 << 20, max_slots=slots, io_threads=2, timeout=20)
    decoder = FakeDecoder(max_sequences=4, loop=asyncio.get_running_loop())
    async with (
        AdapterLoader(tiny.layout(), config, device=device) as loader,
        AdapterScheduler(loader, max_begun=4) as scheduler,
        Engine(scheduler, decoder, max_sequences=4) as engine,
    ):
        yield engine, device
    assert decoder.kept == {}


async def copying(device: GatedDevice) -> None:
    before = device.copies
    await until(lambda: device.copies > before)


async def test_requests_without_a_token_get_the_new_version(folder: Path) -> None:
    samplings = [GREEDY] * 6 + [Sampling(temperature=0.8, seed=3)]
    async with engine_of() as (engine, device):
        device.gate.clear()
        answers = [
            engine.submit(asked([n], 5, folder, sampling=sampling))
            for n, sampling in enumerate(samplings)
        ]
        await copying(device)
        tiny.write(folder, 2)
        device.gate.set()
        for n, (answer, sampling) in enumerate(zip(answers, samplings, strict=True)):
            assert await all_of(answer) == alone([n], 5, str(folder), sampling)


async def test_a_version_in_pieces_is_told(folder: Path) -> None:
    async with engine_of() as (engine, device):
        device.gate.clear()
        answers = [engine.submit(asked([n], 5, folder)) for n in range(6)]
        await copying(device)
        with (folder / "adapter_model.safetensors").open("r+b") as file:
            file.truncate(1000)
        device.gate.set()
        for answer in answers:
            assert await all_of(answer, AdapterFormatError) == []


async def test_a_second_change_is_told_and_a_later_request_gets_what_is_there(
    folder: Path,
) -> None:
    async with engine_of() as (engine, device):
        device.gate.clear()
        answer = engine.submit(asked([1], 5, folder))
        for seed in (2, 3):
            await copying(device)
            tiny.write(folder, seed)
            device.gate.set()
            await asyncio.sleep(0.01)
            device.gate.clear()
        device.gate.set()
        await all_of(answer, IntegrityError)
        assert await all_of(engine.submit(asked([1], 5, folder))) == alone([1], 5, str(folder))


@pytest.mark.parametrize("save", SAVES)
async def test_clients_of_an_adapter_that_is_saved_all_the_time(folder: Path, save: Save) -> None:
    other = tiny.write(folder.with_name("b"), 1)

    async def client(engine: Engine, number: int) -> None:
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            # One slot, so that it is loaded again and again.
            adapter = folder if number % 2 else other
            got = await all_of(engine.submit(asked([number], 3, adapter)))
            assert got == alone([number], 3, str(adapter))

    async with engine_of(slots=1) as (engine, _):
        with resaving(folder, save):
            async with asyncio.TaskGroup() as group:
                for number in range(CLIENTS):
                    group.create_task(client(engine, number))
