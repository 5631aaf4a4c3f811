"""Whether 16 adapters load as fast beside one that stalls, one that fails and one of 1 GB."""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import torch

from bench_options import Options, options, print_environment, write_json
from harness import SEED, WrongBytesError, print_table, run_on
from load_stage import check_handle
from lorax_async.config import LoaderConfig
from lorax_async.devices.base import CopyTicket, StagedPiece
from lorax_async.devices.cpu import CpuDevice
from lorax_async.devices.simulated import SimulatedDevice, SimulatedTicket
from lorax_async.errors import FetchError
from lorax_async.events import Event, SlotGranted
from lorax_async.handle import AdapterHandle
from lorax_async.lifecycle.arena import Extent
from lorax_async.loader import AdapterLoader
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.transfer_plan import TableRow
from lorax_async.sources.local import LocalSource
from scale_files import large_layout, write_sparse
from troubled import TroubledSource
from work_files import AdapterFolder, write_adapter

ADAPTERS = 16
RANK = 16
GIANT_RANK = 192
RATIO = 1.1
LINK_BYTES_PER_SECOND = 25e9

ALONE = f"{ADAPTERS} alone"
BESIDE = "beside a stalled, a failing and a 1 GB adapter"

_SLACK = 64 << 20


class ClockedDevice(SimulatedDevice):
    """Remembers when the last copy into each slot ended, on its clock."""

    def __init__(self, layout: ModelLayout, *, nbytes: int, slots: int) -> None:
        speed = LINK_BYTES_PER_SECOND
        super().__init__(layout, dtype="BF16", nbytes=nbytes, slots=slots, bytes_per_second=speed)
        self.tickets: dict[int, SimulatedTicket] = {}

    def copy(
        self, piece: StagedPiece | None, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        ticket = super().copy(piece, rows, extent, slot)
        assert isinstance(ticket, SimulatedTicket)
        self.tickets[slot] = ticket
        return ticket


@dataclass(frozen=True, slots=True)
class Folders:
    """The adapters that are timed, and those that are in their way."""

    timed: tuple[AdapterFolder, ...]
    stalled: Path
    failing: Path
    giant: Path
    giant_nbytes: int

    @classmethod
    def written(cls, work: Path) -> Folders:
        timed = tuple(
            write_adapter(work / f"{n}", rank=RANK, dtype=torch.bfloat16, seed=n, mark=n)
            for n in range(ADAPTERS)
        )
        return cls(
            timed,
            write_sparse(work / "stalled", rank=RANK, mark="stalled"),
            write_sparse(work / "failing", rank=RANK, mark="failing"),
            write_sparse(work / "giant", rank=GIANT_RANK, mark="giant"),
            timed[0].nbytes * GIANT_RANK // RANK,
        )

    @property
    def nbytes(self) -> int:
        return (len(self.timed) + 2) * self.timed[0].nbytes + self.giant_nbytes


class Course:
    """One loader with room for all; each round loads the same adapters anew."""

    def __init__(
        self, loader: AdapterLoader, folders: Folders, device: CpuDevice | ClockedDevice
    ) -> None:
        self._loader = loader
        self._folders = folders
        self._device = device

    async def alone(self) -> list[float]:
        await self._evict()
        return await self._timed()

    async def beside(self) -> list[float]:
        """The others come first, and the giant moves all the time."""
        await self._evict()
        stalled = asyncio.create_task(self._hold(self._folders.stalled))
        await self._first_slot()
        others = [
            asyncio.create_task(self._hold(path))
            for path in (self._folders.giant, self._folders.failing)
        ]
        await asyncio.sleep(0)
        times = await self._timed()
        await others[0]
        with suppress(FetchError):
            await others[1]
            raise WrongBytesError("the failing adapter was loaded")
        if stalled.done():
            raise WrongBytesError("the stalled adapter did not wait")
        stalled.cancel()
        await asyncio.wait([stalled])
        return times

    async def _first_slot(self) -> None:
        taken = asyncio.Event()

        def hear(event: Event) -> None:
            if isinstance(event, SlotGranted):
                taken.set()

        end = self._loader.subscribe(hear)
        await taken.wait()
        end()

    async def _timed(self) -> list[float]:
        """Of each of the 16, in seconds of the device's clock, or real ones where it has none."""
        start = self._now()
        gc.collect()
        loads = [asyncio.create_task(self._load(folder)) for folder in self._folders.timed]
        done = await asyncio.gather(*loads)
        for (handle, _), folder in zip(done, self._folders.timed, strict=True):
            check_handle(handle, folder.tensors)
            handle.release()
        return [finished - start for _, finished in done]

    async def _load(self, folder: AdapterFolder) -> tuple[AdapterHandle, float]:
        handle = await self._loader.load(folder.path)
        return handle, self._finished(handle)

    def _now(self) -> float:
        return self._device.clock if isinstance(self._device, ClockedDevice) else perf_counter()

    def _finished(self, handle: AdapterHandle) -> float:
        if not isinstance(self._device, ClockedDevice):
            return perf_counter()
        finished = self._device.tickets[handle.slot.index].finished_at
        assert finished is not None
        return finished

    async def _hold(self, path: Path) -> None:
        (await self._loader.load(path)).release()

    async def _evict(self) -> None:
        folders = self._folders
        paths = [folder.path for folder in folders.timed]
        for path in (*paths, folders.stalled, folders.failing, folders.giant):
            await self._loader.unload(path)


Make = Callable[[ModelLayout, int, int], CpuDevice | ClockedDevice]


def on_cpu(layout: ModelLayout, nbytes: int, slots: int) -> CpuDevice:
    return CpuDevice(layout, dtype="BF16", nbytes=nbytes, slots=slots)


def on_simulated(layout: ModelLayout, nbytes: int, slots: int) -> ClockedDevice:
    return ClockedDevice(layout, nbytes=nbytes, slots=slots)


@asynccontextmanager
async def profile(folders: Folders, given: Options, make: Make) -> AsyncIterator[Course]:
    layout, slots, nbytes = large_layout(), ADAPTERS + 3, folders.nbytes + _SLACK
    device = make(layout, nbytes, slots)
    config = LoaderConfig(device_bytes=nbytes, max_slots=slots, io_threads=given.io_threads)
    with ThreadPoolExecutor(2, "source") as threads:
        local = LocalSource(roots=(), limits=config.limits, threads=threads)
        source = TroubledSource(local, stalled=folders.stalled, failing=folders.failing)
        async with AdapterLoader(layout, config, source=source, device=device) as loader:
            yield Course(loader, folders, device)


@dataclass(slots=True)
class Times:
    """Every round's median of the 16, and its last, in ms."""

    medians: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)

    def add(self, seconds: list[float]) -> None:
        self.medians.append(statistics.median(seconds) * 1e3)
        self.last.append(max(seconds) * 1e3)


async def measure(folders: Folders, given: Options, make: Make) -> dict[str, Times]:
    times = {ALONE: Times(), BESIDE: Times()}
    shuffle = random.Random(SEED).shuffle
    async with profile(folders, given, make) as running:
        await running.beside()  # all are seen once
        runs = [(ALONE, running.alone), (BESIDE, running.beside)]
        for _ in range(given.rounds):
            shuffle(runs)
            for name, run in runs:
                times[name].add(await run())
    return times


ROWS: dict[str, Make] = {"simulated": on_simulated, "cpu": on_cpu}


def lines(name: str, times: dict[str, Times]) -> list[dict[str, object]]:
    """The verdict is the clock's; in real time the 1 GB take their share of the memory bus."""
    alone = statistics.median(times[ALONE].medians)
    made: list[dict[str, object]] = []
    for contender, one in times.items():
        ratio = statistics.median(one.medians) / alone
        judged = name == "simulated" and contender == BESIDE
        over = f"missed by {ratio - RATIO:.2f} ×" if ratio > RATIO else "reached"
        made.append(
            {
                "row": f"independence, {name}",
                "contender": contender,
                "clock": "simulated" if name == "simulated" else "real",
                "median_ms": statistics.median(one.medians),
                "last_ms": statistics.median(one.last),
                "ratio": ratio,
                "ratio_of_last": statistics.median(one.last) / statistics.median(times[ALONE].last),
                "verdict": over if judged else None,
            }
        )
    return made


def main() -> int:
    given = options("bench_independence", __doc__ or "", rounds=15, rows=tuple(ROWS), plots=False)
    print_environment(given)
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        folders = Folders.written(Path(work))
        for name in given.only:

            async def run(make: Make = ROWS[name]) -> dict[str, Times]:
                return await measure(folders, given, make)

            results = lines(name, run_on("uvloop", run))
            headings = ("16 adapters", "median ms", "last", "÷ alone", "last ÷ alone", "verdict")
            keys = ("median_ms", "last_ms", "ratio", "ratio_of_last")
            cells = [
                (
                    str(line["contender"]),
                    *(f"{line[key]:.2f}" for key in keys),
                    str(line["verdict"] or ""),
                )
                for line in results
            ]
            clock = results[0]["clock"]
            title = (
                f"independence on {name} [{clock} clock, {given.rounds} rounds; target ≤ {RATIO}]"
            )
            print_table(title, headings, cells)
            write_json(given, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
