"""How late a 1 ms ticker comes while 16 adapters load, against an idle loop in the same run."""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns

import torch
from safetensors.torch import load_file

import peers
from bench_options import Options, options, print_environment, write_json
from floors import Arena, Threads
from harness import SEED, Loop, print_table, run_on
from load_stage import check_handle, require_equal
from lorax_async import layouts
from lorax_async.config import LoaderConfig
from lorax_async.loader import AdapterLoader
from work_files import AdapterFolder, write_adapter

ADAPTERS = 16
TICK_MS = 1.0
P999_MS = 2.0
MAX_MS = 20.0

IDLE = "idle loop"
OURS = "lorax_async load"

_IDLE_SECONDS = 0.25
_SETTLE_SECONDS = 0.05
_SLACK = 1 << 20


@dataclass(slots=True)
class Lateness:
    """How late a contender's ticks came, over all rounds, and how long its work took; ms."""

    ticks: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """The smallest tick that is not below `share` of all."""
        ordered = sorted(self.ticks)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def tick(lateness: list[float]) -> None:
    while True:
        start = perf_counter_ns()
        await asyncio.sleep(TICK_MS / 1e3)
        lateness.append((perf_counter_ns() - start) / 1e6 - TICK_MS)


async def observe(seen: Lateness, work: Callable[[], Awaitable[None]]) -> None:
    """Run the ticker beside `work`: its ticks count from the start of the work to its end."""
    gc.collect()
    ticks: list[float] = []
    ticker = asyncio.create_task(tick(ticks))
    await asyncio.sleep(_SETTLE_SECONDS)
    before, start = len(ticks), perf_counter_ns()
    await work()
    seen.work.append((perf_counter_ns() - start) / 1e6)
    await asyncio.sleep(2 * TICK_MS / 1e3)  # the tick that the work's end delayed counts too
    ticker.cancel()
    seen.ticks += ticks[before:]


class Loads:
    """The same adapters by every contender, each checked after the ticker has ended."""

    def __init__(self, folders: Sequence[AdapterFolder], given: Options) -> None:
        self.folders = folders
        self._threads = given.io_threads
        self._reader = Threads(given.io_threads)
        self._pool = ThreadPoolExecutor(given.io_threads)
        self._arena = Arena(folders[0].file_size)
        self._layout = layouts.from_adapter(folders[0].path)
        self.idle_seconds = _IDLE_SECONDS

    async def idle(self, seen: Lateness) -> None:
        await observe(seen, lambda: asyncio.sleep(self.idle_seconds))

    async def floor(self, seen: Lateness) -> None:
        """The reads alone, in as many threads: what any loader costs a machine with few cores."""
        places = self._arena.places(self.folders[-1])

        def read() -> None:
            for folder in self.folders:
                self._reader.read(folder, self._arena)

        await observe(seen, lambda: asyncio.to_thread(read))
        require_equal(places, self.folders[-1].tensors)

    async def ours(self, seen: Lateness) -> None:
        """A new loader, opened before the ticker starts: every header is parsed again."""
        config = LoaderConfig(
            device_bytes=len(self.folders) * (self.folders[0].nbytes + _SLACK),
            max_slots=len(self.folders),
            io_threads=self._threads,
        )
        async with AdapterLoader(self._layout, config) as loader:
            await self._load_all(loader, seen)

    async def _load_all(self, loader: AdapterLoader, seen: Lateness) -> None:
        handles = {}

        async def load(folder: AdapterFolder) -> None:
            handles[folder.path] = await loader.load(folder.path)

        async def work() -> None:
            await asyncio.gather(*map(load, self.folders))

        await observe(seen, work)
        self.idle_seconds = seen.work[-1] / 1e3
        for folder in self.folders:
            check_handle(handles[folder.path], folder.tensors)
            handles[folder.path].release()

    async def load_file(self, seen: Lateness) -> None:
        loop = asyncio.get_running_loop()
        loaded: dict[Path, dict[str, torch.Tensor]] = {}

        async def load(folder: AdapterFolder) -> None:
            loaded[folder.path] = await loop.run_in_executor(self._pool, load_file, folder.weights)

        async def work() -> None:
            await asyncio.gather(*map(load, self.folders))

        await observe(seen, work)
        for folder in self.folders:
            require_equal(loaded[folder.path], folder.tensors)

    def close(self) -> None:
        self._reader.close()
        self._pool.shutdown()


async def measure(loads: Loads, rounds: int) -> dict[str, Lateness]:
    contenders = {
        IDLE: loads.idle,
        "threaded preadv alone": loads.floor,
        OURS: loads.ours,
        "safetensors load_file in threads": loads.load_file,
    }
    seen = {name: Lateness() for name in contenders}
    shuffle = random.Random(SEED).shuffle
    order = list(contenders)
    gc.freeze()  # what the bench itself holds is no garbage of a contender's
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            await contenders[name](seen[name])
    gc.unfreeze()
    return seen


def verdict(ours: Lateness, idle: Lateness) -> str:
    """The design's row: our stall minus the idle loop's."""
    misses = []
    over = ours.quantile(0.999) - idle.quantile(0.999)
    if over > P999_MS:
        misses.append(f"p99.9 by {over - P999_MS:.1f} ms")
    over = max(ours.ticks) - max(idle.ticks)
    if over > MAX_MS:
        misses.append(f"max by {over - MAX_MS:.1f} ms")
    return f"missed: {', '.join(misses)}" if misses else "reached"


def lines(loop: Loop, seen: dict[str, Lateness]) -> list[dict[str, object]]:
    idle = seen[IDLE]
    return [
        {
            "row": f"loop stall, {ADAPTERS} adapters",
            "loop": loop,
            "contender": name,
            "ticks": len(one.ticks),
            "work_median_ms": statistics.median(one.work),
            "p50_ms": one.quantile(0.5),
            "p99_9_ms": one.quantile(0.999),
            "max_ms": max(one.ticks),
            "p99_9_over_idle_ms": one.quantile(0.999) - idle.quantile(0.999),
            "max_over_idle_ms": max(one.ticks) - max(idle.ticks),
            "verdict": verdict(one, idle) if name == OURS else None,
        }
        for name, one in seen.items()
    ]


COLUMNS = {
    "ticks": "ticks",
    "work_median_ms": "work ms",
    "p50_ms": "late p50",
    "p99_9_ms": "p99.9",
    "max_ms": "max",
    "p99_9_over_idle_ms": "p99.9 − idle",
    "max_over_idle_ms": "max − idle",
}


def print_stalls(loop: Loop, rounds: int, lines: Sequence[dict[str, object]]) -> None:
    target = f"p99.9 ≤ {P999_MS:g}, max ≤ {MAX_MS:g} ms over idle"
    cells = [
        (
            str(line["contender"]),
            *(f"{line[key]:.2f}" if key != "ticks" else f"{line[key]}" for key in COLUMNS),
            str(line["verdict"] or ""),
        )
        for line in lines
    ]
    title = f"loop stall while {ADAPTERS} adapters load [{loop}, {rounds} rounds; target: {target}]"
    print_table(title, ("contender", *COLUMNS.values(), "verdict"), cells)


def draw(path: Path, stalls: dict[Loop, dict[str, Lateness]]) -> None:
    """Share of ticks that came later than x."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 * len(stalls)), layout="constrained")
    panels = figure.subplots(len(stalls), 1, squeeze=False)[:, 0]
    for panel, (loop, seen) in zip(panels, stalls.items(), strict=True):
        for name, one in seen.items():
            panel.ecdf(one.ticks, complementary=True, label=name)
        panel.set(yscale="log", xlabel="late by, ms", ylabel="share of ticks", title=loop)
        panel.legend()
    figure.savefig(path)


LOOPS: tuple[Loop, ...] = ("uvloop", "asyncio")


def main() -> int:
    given = options("bench_loop_stall", __doc__ or "", rounds=15, rows=LOOPS)
    given.environment.update(peers.require_all())
    print_environment(given)
    stalls: dict[Loop, dict[str, Lateness]] = {}
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        folders = [
            write_adapter(Path(work) / f"{n}", rank=16, dtype=torch.bfloat16, seed=n, mark=n)
            for n in range(ADAPTERS)
        ]
        loads = Loads(folders, given)
        for loop in (loop for loop in LOOPS if loop in given.only):
            stalls[loop] = run_on(loop, lambda: measure(loads, given.rounds))
            results = lines(loop, stalls[loop])
            print_stalls(loop, given.rounds, results)
            write_json(given, results)
        loads.close()
    if given.plot is not None:
        draw(given.plot, stalls)
    return 0


if __name__ == "__main__":
    sys.exit(main())
