"""One script on every device: the same calls, events, commands and moves, and the same bytes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tiny
from common import until
from late_device.world import loaded
from lorax_async import AdapterHandle, AdapterLoader, LoaderConfig, TransferError
from lorax_async.core.layout import ModelLayout
from lorax_async.core.life import HostState
from lorax_async.core.transitions import SlotState
from lorax_async.io.devices.cpu import CpuDevice
from lorax_async.io.devices.cuda import CudaDevice
from lorax_async.io.ports import Device
from lorax_async.testing import FakeSource, SimulatedDevice
from recording import Recording, RecordingDevice, recorded
from tiny_loaders import ONE
from tiny_sources import WEIGHTS, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")

RANK = 8
"""No device pads it."""
BYTES = 2 * 2 * ONE
"""Room for two adapters of rank 8."""
IDS = "abcd"


@pytest.fixture
def late() -> Iterator[None]:
    yield from loaded()


def _on_cpu(layout: ModelLayout) -> Device:
    return CpuDevice(layout, dtype="F32", nbytes=BYTES, slots=2)


def _simulated(layout: ModelLayout) -> Device:
    return SimulatedDevice(layout, dtype="F32", nbytes=BYTES, slots=2)


def _on_late(layout: ModelLayout) -> Device:
    return CudaDevice(layout, dtype="F32", nbytes=BYTES, slots=2, device="late:0")


class Script:
    """Everything that a loader can be asked for, one after the other; `rest` stands between."""

    def __init__(self, loader: AdapterLoader, device: RecordingDevice, base: Path) -> None:
        self.loader = loader
        self.device = device
        self._base = base

    async def play(self) -> None:
        for part in (
            self.load_and_use,
            self.stream_behind_copies,
            self.evict_and_reload,
            self.fail_copies,
            self.prefetch,
            self.pin,
            self.unload,
            self.clone,
        ):
            await part()
            await self.rest()

    async def load_and_use(self) -> None:
        handle = await self.loader.load("a")
        self.require_right(handle)
        with handle.use():
            pass
        await until(lambda: handle._lease._uses == 0)
        handle.release()

    async def stream_behind_copies(self) -> None:
        """All copies have been asked for, and none of them was heard of."""
        self.device.gate.clear()
        async with self.loader.stream("b") as handle:
            assert not handle.queue_behind(tiny.LAYERS - 1)
            self.device.gate.set()
            while not handle.queue_behind(tiny.LAYERS - 1):
                time.sleep(0.001)  # noqa: ASYNC251 - the loop must not turn
            for layer in handle.layers:
                await handle.layer_ready(layer)
            self.require_right(handle)

    async def evict_and_reload(self) -> None:
        for id in "cab":
            self.require_right(handle := await self.loader.load(id))
            handle.release()
            await self.rest()

    async def fail_copies(self) -> None:
        """A refusal is heard of at once, a failure in its turn: so the first is refused."""
        copies = self.device.copies
        self.device.refusing[copies] = TransferError("refused")
        self.device.failing[copies + tiny.LAYERS + 2] = TransferError("failed")
        for problem in ("refused", "failed"):
            with pytest.raises(TransferError, match=problem):
                await self.loader.load("d")
            await self.rest()
        self.require_right(handle := await self.loader.load("d"))
        handle.release()

    async def prefetch(self) -> None:
        for tier in ("disk", "host", "device"):
            await self.loader.prefetch("c", tier=tier)
            await self.rest()
        handle = self.loader.try_acquire("c")
        assert handle is not None
        self.require_right(handle)
        handle.release()

    async def pin(self) -> None:
        await self.loader.pin("c")
        for id in "abd":
            (await self.loader.load(id)).release()
        assert self.loader.unpin("c")

    async def unload(self) -> None:
        handle = await self.loader.load("c")
        unloading = asyncio.create_task(self.loader.unload("c"))
        await asyncio.sleep(0)
        with handle.use():
            handle.release()
        await unloading

    async def clone(self) -> None:
        first = await self.loader.load("a")
        second = first.clone()
        first.release()
        self.require_right(second)
        second.release()

    async def rest(self) -> None:
        """Until nothing is under way: what comes next is the same, however long that took."""
        lives = self.loader._machinery.driver.lifecycle.lives.values()
        moving = (HostState.POPULATING, HostState.RELEASING)

        def rests() -> bool:
            return not any(
                life.copying
                or life.fetch_running
                or life.uses
                or life.slot in (SlotState.FILLING, SlotState.DRAINING)
                or life.host in moving
                for life in lives
            )

        await until(rests)

    def require_right(self, handle: AdapterHandle) -> None:
        saved = load_file(self._base / handle.id / WEIGHTS)
        assert len(saved) == 2 * len(handle.modules)
        for name, module in handle.modules.items():
            assert module.a.cpu().equal(saved[f"base_model.model.{name}.lora_A.weight"])
            assert module.b.cpu().equal(saved[f"base_model.model.{name}.lora_B.weight"])


async def _play(make: Callable[[ModelLayout], Device], base: Path) -> Recording:
    source: FakeSource = stocked(base, *IDS, rank=RANK, holdable=True)
    layout = tiny.layout()
    config = LoaderConfig(device_bytes=BYTES, staging_bytes=1 << 17, max_slots=2, io_threads=1)
    with recorded() as recording:
        device = RecordingDevice(make(layout), recording)
        async with AdapterLoader(layout, config, source=source, device=device) as loader:
            loader.subscribe(recording.hear)
            await Script(loader, device, base).play()
    return recording


def _record(make: Callable[[ModelLayout], Device], base: Path) -> Recording:
    return asyncio.run(_play(make, base))


def _compare(one: Recording, other: Recording) -> None:
    assert one.calls == other.calls
    assert one.commands == other.commands
    assert one.events == other.events
    assert one.file_moves == other.file_moves
    assert one.slot_moves == other.slot_moves


def test_the_simulated_device_is_asked_for_what_the_cpu_is(tmp_path: Path) -> None:
    _compare(_record(_on_cpu, tmp_path), _record(_simulated, tmp_path))


@pytest.mark.usefixtures("late")
def test_a_gpu_is_asked_for_what_the_cpu_is(tmp_path: Path) -> None:
    _compare(_record(_on_cpu, tmp_path), _record(_on_late, tmp_path))


def test_the_script_has_what_was_counted_by_hand(tmp_path: Path) -> None:
    """Stays: a b, c a b, d twice in vain, d, c, a b d beside the pinned c, and a: 13, of 4 layers.

    One use in `load_and_use`, one in `unload`. What d left in vain is zeroed, twice.
    """
    recording = _record(_on_cpu, tmp_path)
    counts = Counter(str(call[0]) for call in recording.calls)
    assert counts == {
        "open": 1,
        "staging_memory": 1,
        "copy": 13 * tiny.LAYERS,
        "wait_for": tiny.LAYERS,
        "note_use": 2,
        "wipe": 2,
        "clear_column": 13,
        "close": 1,
    }
    assert all(
        call[4] == [[0, 2 * ONE // tiny.LAYERS]] for call in recording.calls if call[0] == "copy"
    )
