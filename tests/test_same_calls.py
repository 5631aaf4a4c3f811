"""One script on every device: the same events in the same order, and the same bytes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from common import until
from late_device.world import loaded
from lorax_async import (
    AdapterHandle,
    AdapterKey,
    AdapterLoader,
    Event,
    FetchError,
    LoaderConfig,
    TransferError,
)
from lorax_async.core.layout import ModelLayout
from lorax_async.io.devices.cpu import CpuDevice
from lorax_async.io.devices.cuda import CudaDevice
from lorax_async.io.ports import Device
from lorax_async.testing import FakeSource, SimulatedDevice
from tiny_loaders import ONE
from tiny_sources import WEIGHTS, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")

RANK = 8
"""No device pads it."""
BYTES = 2 * 2 * ONE
"""Room for two adapters of rank 8."""


class Script:
    """What needs a device, one after the other; `rest` stands between."""

    def __init__(self, loader: AdapterLoader, source: FakeSource, base: Path) -> None:
        self.loader = loader
        self.source = source
        self._base = base

    async def play(self) -> None:
        for part in (self.load_and_use, self.stream, self.evict_and_reload, self.fail, self.unload):
            await part()
            await self.rest()

    async def load_and_use(self) -> None:
        async with await self.loader.load("a") as handle:
            self.require_right(handle)
            with handle.use():
                pass

    async def stream(self) -> None:
        async with self.loader.stream("b") as handle:
            for layer in handle.layers:
                await handle.layer_ready(layer)
            assert handle.queue_behind(tiny.LAYERS - 1)
            self.require_right(handle)

    async def evict_and_reload(self) -> None:
        for id in "cab":
            async with await self.loader.load(id) as handle:
                self.require_right(handle)
            await self.rest()

    async def fail(self) -> None:
        """Before the first copy: how far reads are ahead of copies is a device's own affair."""
        at = 8 + int.from_bytes((self._base / "d" / WEIGHTS).read_bytes()[:8], "little")
        self.source.fail("read", FetchError("ordered"), id="d", at=at)
        with pytest.raises((FetchError, TransferError), match="ordered"):
            await self.loader.load("d")
        await self.rest()
        async with await self.loader.load("d") as handle:
            self.require_right(handle)

    async def unload(self) -> None:
        handle = await self.loader.load("c")
        unloading = asyncio.create_task(self.loader.unload("c"))
        await asyncio.sleep(0)
        with handle.use():
            handle.release()
        await unloading

    async def rest(self) -> None:
        """Until nothing is under way: what comes next is the same, however long that took."""
        moving = {"filling", "leaving", "populating", "releasing"}

        def rests() -> bool:
            states = {where.state for where in self.loader.residency().values()}
            return not states & moving and not self.loader.usage().waiting

        await until(rests)

    def require_right(self, handle: AdapterHandle) -> None:
        saved = load_file(self._base / handle.id / WEIGHTS)
        assert len(saved) == 2 * len(handle.modules)
        for name, module in handle.modules.items():
            for part, found in (("A", module.a), ("B", module.b)):
                assert torch.equal(
                    found.cpu(), saved[f"base_model.model.{name}.lora_{part}.weight"]
                )


def _told(event: Event) -> tuple[object, ...]:
    values = ((each.name, getattr(event, each.name)) for each in fields(event))
    return (type(event).__name__, *((n, _word(value)) for n, value in values if n != "time"))


def _word(value: object) -> object:
    """Errors without their stories, keys as where they are."""
    if isinstance(value, AdapterKey):
        return value.location
    if isinstance(value, Exception):
        return type(value).__name__
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def played(make: Callable[[ModelLayout], Device], base: Path) -> list[tuple[object, ...]]:
    """The events."""
    heard: list[tuple[object, ...]] = []

    async def play() -> None:
        source, layout = stocked(base, *"abcd", rank=RANK, holdable=True), tiny.layout()
        config = LoaderConfig(device_bytes=BYTES, staging_bytes=1 << 17, max_slots=2, io_threads=1)
        async with AdapterLoader(layout, config, source=source, device=make(layout)) as loader:
            loader.subscribe(lambda event: heard.append(_told(event)))
            await Script(loader, source, base).play()

    asyncio.run(play())
    return heard


def on_cpu(layout: ModelLayout) -> Device:
    return CpuDevice(layout, dtype="F32", nbytes=BYTES, slots=2)


def simulated(layout: ModelLayout) -> Device:
    return SimulatedDevice(layout, dtype="F32", nbytes=BYTES, slots=2)


def on_late(layout: ModelLayout) -> Device:
    return CudaDevice(layout, dtype="F32", nbytes=BYTES, slots=2, device="late:0")


@pytest.fixture
def late() -> Iterator[None]:
    yield from loaded()


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("make", [simulated, on_late])
def test_every_device_has_the_events_of_the_cpu(
    tmp_path: Path, make: Callable[[ModelLayout], Device]
) -> None:
    """Stays: a b, c a b, d in vain, d, and c: 8."""
    expected = played(on_cpu, tmp_path)
    counts = Counter(event[0] for event in expected)
    assert (counts["SlotGranted"], counts["Resident"], counts["Failed"]) == (8, 7, 1)
    assert played(make, tmp_path) == expected
