"""One script on every device: the same calls of the device, the same events, the same bytes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from common import until
from late_device.world import loaded
from lorax_async import AdapterHandle, AdapterKey, AdapterLoader, LoaderConfig, TransferError
from lorax_async.core.arena import Extent
from lorax_async.core.layout import ModelLayout
from lorax_async.core.moves import Row
from lorax_async.events import Event
from lorax_async.io.devices.cpu import CpuDevice
from lorax_async.io.devices.cuda import CudaDevice
from lorax_async.io.ports import CopyTicket, Device, FilePieces, StagedPiece
from lorax_async.testing import SimulatedDevice
from tiny_loaders import ONE
from tiny_sources import WEIGHTS, stocked
from wrapped_device import WrappedDevice

pytestmark = pytest.mark.usefixtures("nothing_left")

RANK = 8
"""No device pads it."""
BYTES = 2 * 2 * ONE
"""Room for two adapters of rank 8."""
IDS = "abcd"

# -- recording ------------------------------------------------------------------------------------

Told = tuple[object, ...]


@dataclass(slots=True)
class Recording:
    """Calls of the device and events, each in its order."""

    calls: list[Told] = field(default_factory=list)
    events: list[Told] = field(default_factory=list)

    def hear(self, event: Event) -> None:
        values = ((each.name, getattr(event, each.name)) for each in fields(event))
        told = [(name, _word(value)) for name, value in values if name != "time"]
        self.events.append((type(event).__name__, *told))


def _word(value: object) -> object:
    """Errors without their stories, keys as where they are."""
    if isinstance(value, AdapterKey):
        return value.location
    if isinstance(value, Exception):
        return type(value).__name__
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


class RecordingDevice(WrappedDevice):
    """Records each call. Copies wait for `gate`; those whose numbers are told so fail.

    `refusing` raise when they are asked for, `failing` in their tickets, once the bytes are there.
    """

    def __init__(self, inner: Device, recording: Recording) -> None:
        super().__init__(inner)
        self.gate = threading.Event()
        self.gate.set()
        self.refusing: dict[int, Exception] = {}
        self.failing: dict[int, Exception] = {}
        self.copies = 0
        self._calls = recording.calls
        self._tickets: list[CopyTicket] = []
        self._copies: dict[CopyTicket, tuple[int, CopyTicket]] = {}

    @property
    def rests(self) -> bool:
        """Everything that it was asked for is done."""
        return all(ticket.done() for ticket in self._tickets)

    def open(self) -> None:
        self._calls.append(("open",))
        super().open()

    def staging_memory(self, nbytes: int) -> torch.Tensor:
        self._calls.append(("staging_memory", nbytes))
        return super().staging_memory(nbytes)

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[Row], extent: Extent, slot: int
    ) -> CopyTicket:
        self.gate.wait(30)
        number, self.copies = self.copies, self.copies + 1
        self._calls.append(("copy", number, slot, extent, tuple(rows)))
        if number in self.refusing:
            raise self.refusing[number]
        begun = super().copy(pieces, rows, extent, slot)
        ticket: CopyTicket = Future()
        self._copies[ticket] = number, begun
        self._tickets.append(ticket)
        begun.add_done_callback(lambda done: _pass_on(done, ticket, self.failing.get(number)))
        return ticket

    def wait_for(self, ticket: CopyTicket, stream: object | None = None) -> None:
        number, begun = self._copies[ticket]
        self._calls.append(("wait_for", number))
        super().wait_for(begun, stream)

    def note_use(self, stream: object | None = None) -> CopyTicket:
        self._calls.append(("note_use",))
        self._tickets.append(super().note_use(stream))
        return self._tickets[-1]

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        self._calls.append(("wipe", *extents))
        self._tickets.append(super().wipe(extents))
        return self._tickets[-1]

    def clear_column(self, slot: int) -> None:
        self._calls.append(("clear_column", slot))
        super().clear_column(slot)

    def close(self) -> None:
        self._calls.append(("close",))
        super().close()


def _pass_on(done: CopyTicket, ticket: CopyTicket, failure: Exception | None) -> None:
    problem = failure or done.exception()
    if problem is None:
        ticket.set_result(None)
    else:
        ticket.set_exception(problem)


# -- the script -----------------------------------------------------------------------------------


class Script:
    """What needs a device, one after the other; `rest` stands between."""

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
            self.unload,
        ):
            await part()
            await self.rest()

    async def load_and_use(self) -> None:
        async with await self.loader.load("a") as handle:
            self.require_right(handle)
            with handle.use():
                pass
            await self.rest()

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
            async with await self.loader.load(id) as handle:
                self.require_right(handle)
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
            return self.device.rests and not states & moving and not self.loader.usage().waiting

        await until(rests)
        for _ in range(5):  # what threads have told the loop
            await asyncio.sleep(0.001)

    def require_right(self, handle: AdapterHandle) -> None:
        saved = load_file(self._base / handle.id / WEIGHTS)
        assert len(saved) == 2 * len(handle.modules)
        for name, module in handle.modules.items():
            assert module.a.cpu().equal(saved[f"base_model.model.{name}.lora_A.weight"])
            assert module.b.cpu().equal(saved[f"base_model.model.{name}.lora_B.weight"])


def _on_cpu(layout: ModelLayout) -> Device:
    return CpuDevice(layout, dtype="F32", nbytes=BYTES, slots=2)


def _simulated(layout: ModelLayout) -> Device:
    return SimulatedDevice(layout, dtype="F32", nbytes=BYTES, slots=2)


def _on_late(layout: ModelLayout) -> Device:
    return CudaDevice(layout, dtype="F32", nbytes=BYTES, slots=2, device="late:0")


@pytest.fixture
def late() -> Iterator[None]:
    yield from loaded()


def record(make: Callable[[ModelLayout], Device], base: Path) -> Recording:
    recording, layout = Recording(), tiny.layout()

    async def play() -> None:
        source = stocked(base, *IDS, rank=RANK, holdable=True)
        config = LoaderConfig(device_bytes=BYTES, staging_bytes=1 << 17, max_slots=2, io_threads=1)
        device = RecordingDevice(make(layout), recording)
        async with AdapterLoader(layout, config, source=source, device=device) as loader:
            loader.subscribe(recording.hear)
            await Script(loader, device, base).play()

    asyncio.run(play())
    return recording


COUNTS = {
    "open": 1,
    "staging_memory": 1,
    "copy": 9 * tiny.LAYERS,
    "wait_for": tiny.LAYERS,
    "note_use": 2,
    "wipe": 2,
    "clear_column": 9,
    "close": 1,
}
"""By hand. Stays: a b, c a b, d twice in vain, d, and c: 9. What d left in vain is zeroed, twice."""


def assert_as_on_cpu(make: Callable[[ModelLayout], Device], base: Path) -> None:
    expected, found = record(_on_cpu, base), record(make, base)
    assert Counter(str(call[0]) for call in expected.calls) == COUNTS
    assert found.calls == expected.calls
    assert found.events == expected.events


def test_the_simulated_device_is_asked_for_what_the_cpu_is(tmp_path: Path) -> None:
    assert_as_on_cpu(_simulated, tmp_path)


@pytest.mark.usefixtures("late")
def test_a_gpu_is_asked_for_what_the_cpu_is(tmp_path: Path) -> None:
    assert_as_on_cpu(_on_late, tmp_path)
