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
    LoraxError,
)
from lorax_async.io.devices.gated import GatedDevice
from lorax_async.server.engine import Engine
from lorax_async.server.generation import Sampling
from lorax_async.testing import FakeDecoder
from server.generating import all_of, alone, asked
from test_resaved import CLIENTS, SAVES, Save, resaving

pytestmark = pytest.mark.usefixtures("nothing_left")

WEIGHTS = "adapter_model.safetensors"


@asynccontextmanager
async def engine_of(slots: int = 2) -> AsyncIterator[tuple[Engine, GatedDevice, FakeDecoder]]:
    """An engine with four places over local files; then its decoder keeps nothing."""
    device = GatedDevice(tiny.layout(), dtype="F32", nbytes=1 << 20, slots=slots)
    config = LoaderConfig(device_bytes=1 << 20, max_slots=slots, io_threads=2, timeout=20)
    decoder = FakeDecoder(max_sequences=4, loop=asyncio.get_running_loop())
    async with (
        AdapterLoader(tiny.layout(), config, device=device) as loader,
        AdapterScheduler(loader, max_begun=4) as scheduler,
        Engine(scheduler, decoder, max_sequences=4) as engine,
    ):
        yield engine, device, decoder
    assert decoder.kept == {}


async def copying(device: GatedDevice) -> None:
    before = device.copies
    await until(lambda: device.copies > before)


async def test_requests_without_a_token_get_the_new_version(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    seeded = Sampling(temperature=0.8, seed=3)
    async with engine_of() as (engine, device, _):
        expected = await all_of(engine.submit(asked([9], 5, folder, sampling=seeded)))
    async with engine_of() as (engine, device, _):
        device.gate.clear()
        answers = [engine.submit(asked([n], 5, folder)) for n in range(6)]
        drawn = engine.submit(asked([9], 5, folder, sampling=seeded))
        await copying(device)
        tiny.write(folder, 2)
        device.gate.set()
        for number, answer in enumerate(answers):
            assert await all_of(answer) == alone([number], 5, str(folder))
        assert await all_of(drawn) == expected


async def test_a_version_in_pieces_is_told(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    async with engine_of() as (engine, device, _):
        device.gate.clear()
        answers = [engine.submit(asked([n], 5, folder)) for n in range(6)]
        await copying(device)
        with (folder / WEIGHTS).open("r+b") as file:
            file.truncate(1000)
        device.gate.set()
        for answer in answers:
            with pytest.raises(AdapterFormatError):
                await all_of(answer)


async def test_a_second_change_is_told(tmp_path: Path) -> None:
    """And whoever asks then gets what is there."""
    folder = tiny.write(tmp_path / "a", 1)
    async with engine_of() as (engine, device, _):
        device.gate.clear()
        answer = engine.submit(asked([1], 5, folder))
        for seed in (2, 3):
            await copying(device)
            tiny.write(folder, seed)
            device.gate.set()
            await asyncio.sleep(0.01)
            device.gate.clear()
        device.gate.set()
        with pytest.raises(IntegrityError):
            await all_of(answer)
        assert await all_of(engine.submit(asked([1], 5, folder))) == alone([1], 5, str(folder))


async def test_it_can_be_cancelled_meanwhile(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    async with engine_of() as (engine, device, _):
        device.gate.clear()
        answer = engine.submit(asked([1], 5, folder))
        await copying(device)
        tiny.write(folder, 2)
        device.gate.set()
        await asyncio.sleep(0.01)
        answer.cancel()
        assert await all_of(answer) == []


@pytest.mark.parametrize("save", SAVES)
async def test_clients_of_an_adapter_that_is_saved_all_the_time(tmp_path: Path, save: Save) -> None:
    folder, other = tiny.write(tmp_path / "a", 1), tiny.write(tmp_path / "b", 1)

    async def client(engine: Engine, number: int) -> None:
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            # One slot, so that it is loaded again and again.
            adapter = folder if number % 2 else other
            got = await all_of(engine.submit(asked([number], 3, adapter)))
            assert got == alone([number], 3, str(adapter))

    async with engine_of(slots=1) as (engine, _, __):
        with resaving(folder, save):
            async with asyncio.TaskGroup() as group:
                for number in range(CLIENTS):
                    group.create_task(client(engine, number))


async def test_what_is_false_without_a_change_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    async with engine_of() as (engine, _, __):

        def fail(*_: object, **__: object) -> None:
            raise IntegrityError("the disk gave other bytes")

        monkeypatch.setattr("lorax_async.io.devices.cpu.CpuDevice.copy", fail)
        answer = engine.submit(asked([1], 5, folder))
        with pytest.raises(LoraxError, match="other bytes"):
            await all_of(answer)
