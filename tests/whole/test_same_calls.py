"""One script on every device: a caller sees the same events in the same order, and right bytes."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
from event_loops import until
from tiny_loaders import ONE, fails
from tiny_sources import is_resident, make_source

from lorax_async import (
    AdapterHandle,
    AdapterLoader,
    BytesMoved,
    Event,
    LoaderConfig,
    ModelLayout,
    errors,
)
from lorax_async.devices.base import Device
from lorax_async.devices.cpu import CpuDevice
from lorax_async.devices.cuda import CudaDevice
from lorax_async.devices.simulated import SimulatedDevice

pytestmark = pytest.mark.usefixtures("nothing_left")

RANK = 8  # No device pads it
BYTES = 2 * 2 * ONE  # Room for two adapters of rank 8
SIZES: dict[str, Any] = {"dtype": "F32", "nbytes": BYTES, "slots": 2}
CPU = partial(CpuDevice, **SIZES)
SIMULATED = partial(SimulatedDevice, **SIZES)
LATE = partial(CudaDevice, **SIZES, device="late:0")


async def _script(loader: AdapterLoader, base: Path) -> None:
    """Everything that a loader can be asked for, one after the other."""

    def require_right(handle: AdapterHandle) -> None:
        tiny.assert_equal_to_file(handle, base / handle.id)

    async with await loader.load("a") as handle:
        with handle.use():
            require_right(handle)
    async with loader.stream("b") as handle:
        for layer in handle.layers:
            await handle.layer_ready(layer)
        require_right(handle)
    for id in "cab":  # each in the place of another
        async with await loader.load(id) as handle:
            require_right(handle)
    await fails(loader.load("broken"), errors.TransferError)
    await loader.prefetch("c", tier="device")
    await until(lambda: is_resident(loader, "c"))
    await loader.pin("c")
    for id in "abd":
        (await loader.load(id)).release()
    assert loader.unpin("c")
    handle = await loader.load("c")
    unloading = asyncio.create_task(loader.unload("c"))
    await asyncio.sleep(0)
    with handle.use():
        handle.release()
    await unloading
    first = await loader.load("a")
    second = first.clone()
    first.release()
    require_right(second)
    second.release()


async def _play(make: Callable[[ModelLayout], Device], base: Path) -> list[tuple[object, ...]]:
    source = make_source(base, *"abcd", "broken", rank=RANK, holdable=True)
    source.fail("read", errors.TransferError("as told"), id="broken", at=4096)
    layout, heard = tiny.layout(), list[tuple[object, ...]]()
    config = LoaderConfig(device_bytes=BYTES, staging_bytes=1 << 17, max_slots=2, io_threads=1)

    def hear(event: Event) -> None:
        layer = getattr(event, "layer", None)
        if isinstance(event, BytesMoved):
            return  # of one copy or of several, as they end
        heard.append((type(event).__name__, event.key.location, event.slot, layer))

    async with AdapterLoader(layout, config, source=source, device=make(layout)) as loader:
        loader.subscribe(hear)
        await _script(loader, base)
    return heard


async def test_a_simulated_device_is_as_the_cpu(tmp_path: Path) -> None:
    assert await _play(SIMULATED, tmp_path) == await _play(CPU, tmp_path)


@pytest.mark.usefixtures("late")
async def test_a_gpu_is_as_the_cpu(tmp_path: Path) -> None:
    assert await _play(LATE, tmp_path) == await _play(CPU, tmp_path)
