"""Adapters onto a GPU: against a pinned memcpy, beside a running forward pass, layer by layer.

`--device late` runs the same code on host memory that stands for a GPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns

import torch

from bench_options import Options, options, print_environment, write_json
from gpu_machine import Forward, Machine, Memcpy, NoSuchDeviceError, machine
from harness import Contender, Row, WrongBytesError, measure, print_row, print_table, run_on
from load_stage import require_equal
from lorax_async.config import LoaderConfig
from lorax_async.devices.cuda import CudaDevice
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from work_files import LAYERS, PEFT_PREFIX, AdapterFolder, write_adapter

ROWS = ("load", "stream", "overlap")
LOADS_BESIDE = 8
"""Loads, one after the other, beside a forward pass that takes about as long."""

_SLACK = 1 << 20
_STALE = 0xFB

Line = dict[str, object]


class Ours:
    """A loader with one slot: loading the other adapter evicts, and every load moves all bytes."""

    def __init__(self, name: str, loader: AdapterLoader, pair: Pair) -> None:
        self.name = name
        self._loader = loader
        self._pair = pair
        self._handle: AdapterHandle | None = None

    async def load_other(self) -> None:
        (await self._loader.load(self._pair.other.path)).release()

    async def run(self) -> None:
        self._handle = await self._loader.load(self._pair.current.path)

    def check(self) -> None:
        assert self._handle is not None
        check_on_device(self._handle, self._pair.current)
        self._handle.release()

    def contender(self) -> Contender:
        name = f"lorax_async load, {self.name}"
        return Contender(name, "ours", self.run, self.check, self.load_other)

    async def several(self) -> None:
        for number in range(LOADS_BESIDE):
            folder = self._pair.current if number % 2 else self._pair.other
            (await self._loader.load(folder.path)).release()

    async def stream(self) -> tuple[float, float, float]:
        """ms to the slot, to the first layer, to the last."""
        await self.load_other()
        start = perf_counter_ns()
        async with self._loader.stream(self._pair.current.path) as handle:
            marks = [perf_counter_ns()]
            for layer in (0, LAYERS - 1):
                await handle.layer_ready(layer)
                marks.append(perf_counter_ns())
            check_on_device(handle, self._pair.current)
        slot, first, last = ((mark - start) / 1e6 for mark in marks)
        return slot, first, last


@dataclass(frozen=True, slots=True)
class Pair:
    """The adapter that is loaded, and the one that takes its place between two loads."""

    current: AdapterFolder
    other: AdapterFolder

    @property
    def groups(self) -> list[int]:
        """Bytes of each layer."""
        return [self.current.nbytes // LAYERS] * LAYERS


def check_on_device(handle: AdapterHandle, folder: AdapterFolder) -> None:
    loaded = {
        f"{PEFT_PREFIX}{path}.lora_{part}.weight": weight.cpu()
        for path, module in handle.modules.items()
        for part, weight in (("A", module.a), ("B", module.b))
    }
    require_equal(loaded, folder.tensors)


class Bench:
    """Both loaders, with what they are measured against, on one machine."""

    def __init__(self, where: Machine, given: Options, pair: Pair) -> None:
        self._machine = where
        self._given = given
        self._pair = pair
        self._memcpy = Memcpy(where, pair.groups)
        self._forward = Forward(where)
        self._closing = AsyncExitStack()
        self._ours: list[Ours] = []

    async def run(self) -> list[Line]:
        async with self._closing:
            nbytes = 2 * (self._pair.current.nbytes + _SLACK)
            for name, pinned in (("pinned images", nbytes), ("page cache", 0)):
                self._ours.append(Ours(name, await self._open(pinned), self._pair))
                await self._ours[-1].several()  # seen before, and imaged where there is room
            rows = {"load": self.load, "stream": self.stream, "overlap": self.overlap}
            return [line for row in self._given.only for line in await rows[row]()]

    async def _open(self, pinned_bytes: int) -> AdapterLoader:
        layout, nbytes = self._machine.size.layout(), self._pair.current.nbytes + _SLACK
        name = str(self._machine.device)
        device = CudaDevice(layout, dtype="BF16", nbytes=nbytes, slots=1, device=name)
        config = LoaderConfig(
            device="cuda",
            device_bytes=nbytes,
            max_slots=1,
            pinned_bytes=pinned_bytes,
            io_threads=self._given.io_threads,
        )
        return await self._closing.enter_async_context(AdapterLoader(layout, config, device=device))

    async def load(self) -> list[Line]:
        """From `await load` to a handle, and from the first memcpy to the last byte."""

        async def run() -> None:
            self._memcpy.run()

        async def spoil() -> None:
            self._memcpy.spoil(_STALE)
            self._memcpy.run()
            self._memcpy.spoil(_STALE + 1)

        def check() -> None:
            if not self._memcpy.holds(_STALE + 1):
                raise WrongBytesError("the memcpy did not arrive")

        floor = Contender("pinned memcpy per layer", "floor", run, check, spoil)
        row = Row(None, [floor, *(ours.contender() for ours in self._ours)])
        results = await measure("H2D, to resident", row, "uvloop", self._given.rounds)
        events = [self._event_ms() for _ in range(self._given.rounds)]
        print_row(f"H2D of {self._pair.current.nbytes:,} bytes, no target", results)
        speed = self._pair.current.nbytes / statistics.median(events) / 1e6
        print(f"the memcpy by its events: {statistics.median(events):.3f} ms, {speed:.2f} GB/s")
        by_events: Line = {"row": "H2D, memcpy by events", "samples_ms": events, "GB/s": speed}
        return [*(result.line() for result in results), by_events]

    def _event_ms(self) -> float:
        return self._machine.timed(self._memcpy.stream, self._memcpy.put)

    async def stream(self) -> list[Line]:
        lines: list[Line] = []
        for ours in self._ours:
            times = [await ours.stream() for _ in range(self._given.rounds)]
            slot, first, last = (statistics.median(each) for each in zip(*times, strict=True))
            lines.append(
                {
                    "row": "stream",
                    "contender": ours.name,
                    "slot_ms": slot,
                    "first_layer_ms": first,
                    "resident_ms": last,
                    "first_share": first / last,
                }
            )
        headings = ("from", "slot ms", "first layer", "resident", "first ÷ resident")
        keys = ("slot_ms", "first_layer_ms", "resident_ms", "first_share")
        cells = [(str(line["contender"]), *(f"{line[key]:.3f}" for key in keys)) for line in lines]
        print_table("streamed, medians, no target", headings, cells)
        return lines

    async def overlap(self) -> list[Line]:
        async def memcpy() -> None:
            for _ in range(LOADS_BESIDE):
                await asyncio.to_thread(self._memcpy.run)

        movers: dict[str, Callable[[], Awaitable[None]]] = {"pinned memcpy": memcpy}
        movers |= {f"lorax_async, {ours.name}": ours.several for ours in self._ours}
        lines = [await self._beside(name, mover) for name, mover in movers.items()]
        keys = ("copies_ms", "forward_ms", "both_ms", "forward_beside_ms", "slowdown", "hidden")
        headings = (
            "copies",
            "alone ms",
            "forward ms",
            "both",
            "forward then",
            "slower ×",
            "hidden",
        )
        cells = [(str(line["contender"]), *(f"{line[key]:.3f}" for key in keys)) for line in lines]
        title = f"{LOADS_BESIDE} loads beside a forward pass as long as they, medians, no target"
        print_table(title, headings, cells)
        return lines

    async def _beside(self, name: str, move: Callable[[], Awaitable[None]]) -> Line:
        """`hidden` is the share of the shorter of both that the other one covers."""
        passes = await self._passes(await _wall_ms(move))
        seen: dict[str, list[float]] = {key: [] for key in ("copies", "forward", "both", "then")}
        for _ in range(self._given.rounds):
            seen["copies"].append(await _wall_ms(move))
            seen["forward"].append(await asyncio.to_thread(self._forward.timed, passes))

            async def both() -> None:
                beside = asyncio.create_task(asyncio.to_thread(self._forward.timed, passes))
                await move()
                seen["then"].append(await beside)

            seen["both"].append(await _wall_ms(both))
        copies, forward, together, then = map(statistics.median, seen.values())
        return {
            "row": "overlap",
            "contender": name,
            "passes": passes,
            "copies_ms": copies,
            "forward_ms": forward,
            "both_ms": together,
            "forward_beside_ms": then,
            "slowdown": then / forward,
            "hidden": (copies + forward - together) / min(copies, forward),
        }

    async def _passes(self, wanted_ms: float) -> int:
        """Forward passes that take about so long; the first ones warm the device up."""
        await asyncio.to_thread(self._forward.timed, 2)
        one = await asyncio.to_thread(self._forward.timed, 1)
        return max(1, round(wanted_ms / one))


async def _wall_ms(work: Callable[[], Awaitable[None]]) -> float:
    start = perf_counter_ns()
    await work()
    return (perf_counter_ns() - start) / 1e6


def main() -> int:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--device", default="cuda")
    mine, rest = own.parse_known_args()
    try:
        where = machine(mine.device)
    except NoSuchDeviceError as missing:
        print(missing)
        return 0
    given = options(
        "bench_gpu_load",
        __doc__ or "",
        rounds=where.size.rounds,
        rows=ROWS,
        arguments=rest,
        plots=False,
    )
    given.environment.update(device=str(where.device), hardware=where.hardware)
    print_environment(given)
    if not where.is_hardware:
        print("NOT HARDWARE: these times show that the code runs, and nothing else")
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        folders = [
            write_adapter(
                Path(work) / f"{seed}",
                rank=where.size.rank,
                dtype=torch.bfloat16,
                seed=seed,
                divisor=where.size.divisor,
            )
            for seed in range(2)
        ]
        lines = run_on("uvloop", Bench(where, given, Pair(*folders)).run)
    write_json(given, ({"on_hardware": where.is_hardware, **line} for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
