"""A stalled, a failing and a large load beside 16 others, by the simulated device's own clock."""

import asyncio
from collections.abc import Sequence
from random import Random
from statistics import median
from typing import Any

import pytest
import tiny
from event_loops import Run, until
from tiny_loaders import fails

from lorax_async import AdapterLoader, Event, LoaderConfig, SlotGranted, errors
from lorax_async.devices.base import CopyTicket, StagedPiece
from lorax_async.devices.simulated import SimulatedDevice, SimulatedTicket
from lorax_async.lifecycle import rules
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.transfer_plan import TableRow
from lorax_async.testing import FakeSource

pytestmark = pytest.mark.usefixtures("nothing_left")

LAYERS, RANK = 32, 8
LAYOUT = tiny.layout(layers=LAYERS)
GROUP_BYTES = 2 * RANK * (tiny.HIDDEN + 2 * tiny.HIDDEN) * 4
"""Of a small adapter: two modules, A [8, 32] and B [64, 8] in F32, neither cast nor padded."""
TIMES_LARGER = 12
"""1 GB to 84 MB, as everything here is scaled down alike: 84 MB of 32 layers have groups of 2.6."""
IN_FLIGHT_BYTES = rules.IN_FLIGHT_BYTES * GROUP_BYTES * LAYERS // 84_000_000

SMALL = tuple(f"small {n}" for n in range(16))
BESIDE = ("stalled", "unfetched", "unread", "uncopied", "large")
"""Bytes of the first never come; those of the next three fail to be fetched, read and copied."""
WITHIN = 1.1
SEEDS = 2
SLOTS = len(SMALL) + len(BESIDE)
DEVICE_BYTES = (SLOTS + TIMES_LARGER) * LAYERS * GROUP_BYTES


class TimedDevice(SimulatedDevice):
    """A link that moves a small adapter's group in a second, and remembers each slot's copies."""

    def __init__(self) -> None:
        super().__init__(
            LAYOUT,
            dtype="F32",
            nbytes=DEVICE_BYTES,
            slots=SLOTS,
            bytes_per_second=GROUP_BYTES,
            seconds_per_copy=0.01,
        )
        self.doomed: int | None = None
        self._tickets: dict[int, list[SimulatedTicket]] = {}

    def copy(
        self, piece: StagedPiece | None, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        if slot == self.doomed and len(self._tickets.get(slot, ())) >= 3:
            raise errors.TransferError("ordered")
        ticket = super().copy(piece, rows, extent, slot)
        assert isinstance(ticket, SimulatedTicket)
        self._tickets.setdefault(slot, []).append(ticket)
        return ticket

    def finished(self, slot: int) -> float:
        assert len(self._tickets[slot]) == LAYERS
        return max(ticket.finished_at or 0.0 for ticket in self._tickets[slot])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, bytes]]:
    base, made = tmp_path_factory.mktemp("adapters"), {}
    for seed, name in enumerate((*SMALL, *BESIDE)):
        rank = RANK * TIMES_LARGER if name == "large" else RANK
        made[name] = tiny.files(tiny.write(base / name, seed, rank, layers=LAYERS))
    return made


@pytest.fixture(autouse=True)
def scaled_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "IN_FLIGHT_BYTES", IN_FLIGHT_BYTES)


def make_source(folders: dict[str, tuple[bytes, bytes]]) -> FakeSource:
    source = FakeSource()
    for name, files in folders.items():
        source.put(name, *files)
    source.hold("stalled")
    source.allow("stalled", 0, 1)
    source.fail("fetch_groups", errors.FetchError("ordered"), id="unfetched", at=3)
    middle = len(folders["unread"][1]) // 2
    source.fail("read", errors.FetchError("ordered"), id="unread", at=middle)
    return source


async def times(
    source: FakeSource, beside: Sequence[str], *, io_threads: int, seed: int
) -> list[float]:
    """When each of the 16 was on the device. No copy runs before all have begun.

    The large one arrives, too; the stalled one is still waiting; the others have failed.
    """
    device, names = TimedDevice(), list(SMALL)
    Random(seed).shuffle(names)
    sizes: dict[str, Any] = {
        "device_bytes": DEVICE_BYTES,
        "max_slots": SLOTS,
        "io_threads": io_threads,
    }
    config = LoaderConfig(**sizes, timeout=60)
    granted: list[str] = []

    def hear(event: Event) -> None:
        if isinstance(event, SlotGranted):
            granted.append(event.key.location.removeprefix("memory:"))
            if granted[-1] == "uncopied":
                device.doomed = event.slot.index if event.slot else None

    async with AdapterLoader(LAYOUT, config, source=source, device=device) as loader:
        loader.subscribe(hear)
        device.gate.clear()
        others = {name: asyncio.create_task(loader.load(name)) for name in beside}
        await until(lambda: set(granted) >= set(beside))
        loads = [asyncio.create_task(loader.load(name)) for name in names]
        await until(lambda: set(granted) >= set(SMALL))
        device.gate.set()
        handles = [await load for load in loads]
        found = [device.finished(handle.slot.index) for handle in handles]
        for handle in handles:
            handle.release()
        for name, task in others.items():
            if name == "large":
                (await task).release()
            elif name == "stalled":
                assert not task.done()
                task.cancel()
                await asyncio.wait([task])
            else:
                await fails(task, errors.TransferError if name == "uncopied" else errors.FetchError)
    return found


CASES = [
    *((io_threads, (name,)) for io_threads in (1, 2, 4) for name in BESIDE),
    *((2, ("stalled", failing, "large")) for failing in ("unfetched", "unread", "uncopied")),
]


@pytest.mark.parametrize(("io_threads", "beside"), CASES)
def test_the_others_hardly_wait(
    run: Run, folders: dict[str, tuple[bytes, bytes]], beside: tuple[str, ...], io_threads: int
) -> None:
    for seed in range(SEEDS):
        alone = run(times(make_source(folders), (), io_threads=io_threads, seed=seed))
        among = run(times(make_source(folders), beside, io_threads=io_threads, seed=seed))
        assert median(among) <= WITHIN * median(alone)
