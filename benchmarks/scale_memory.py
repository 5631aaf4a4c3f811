"""What adapters that nobody uses cost: memory, timers, tasks, CPU time."""

from __future__ import annotations

import asyncio
import gc
import os
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from time import process_time

from bench_options import Options
from harness import print_table, run_on
from lorax_async.config import LoaderConfig
from lorax_async.lifecycle.lifecycle import MAX_WEIGHT
from lorax_async.lifecycle.rules import LifecycleTimes
from lorax_async.loader import AdapterLoader
from scale_files import SmallAdapters, large_layout, small_layout, write_sparse

SLOTS = 8
FEW = 10
SOME = 1_000

TIMES = 6
"""Loads of each of the first thousand, so that all that is kept of an adapter's past is there."""

BYTES_PER_IDLE = 2_048

OWN_PLANS = 120
_SETTLED = 40  # more than the plans that are remembered for others
_IDLE_SECONDS = 1.0

Line = dict[str, object]


@asynccontextmanager
async def opened(files: SmallAdapters, given: Options) -> AsyncIterator[AdapterLoader]:
    config = LoaderConfig(
        max_slots=SLOTS,
        device_bytes=1 << 20,
        host_bytes=0,
        io_threads=given.io_threads,
        local_roots=(files.root,),
    )
    async with AdapterLoader(small_layout(), config) as loader:
        yield loader


async def meet(loader: AdapterLoader, numbers: range, times: int = 1) -> None:
    """Load each so often; it is known from here on, and evicted when its slot is needed.

    Those that are loaded again come by tens, which are more than there are slots.
    """
    for start in range(0, len(numbers), FEW):
        for _ in range(times):
            for number in numbers[start : start + FEW]:
                (await loader.load(SmallAdapters.id(number))).release()
    gc.collect()


def resident_bytes() -> int:
    """Of this process, as the kernel counts them."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def traced_bytes() -> int:
    return tracemalloc.get_traced_memory()[0]


def live_timers() -> int:
    """Of asyncio's loop; those that were cancelled are swept by it."""
    loop: object = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = loop._scheduled  # type: ignore[attr-defined]
    return sum(not timer.cancelled() for timer in timers)


async def idle_cpu_ms() -> float:
    """CPU time that the process takes in a second in which nobody asks for anything."""
    start = process_time()
    await asyncio.sleep(_IDLE_SECONDS)
    return (process_time() - start) * 1e3 / _IDLE_SECONDS


async def growth(
    files: SmallAdapters, given: Options, steps: tuple[int, ...], measure: Callable[[], int]
) -> list[Line]:
    """By how much `measure` grows per adapter in each step, and what else grows."""
    lines: list[Line] = []
    async with opened(files, given) as loader:
        await meet(loader, range(steps[0]))
        before, timers, tasks = measure(), live_timers(), len(asyncio.all_tasks())
        descriptors = len(os.listdir("/proc/self/fd"))
        for start, stop in pairwise(steps):
            await meet(loader, range(start, stop), TIMES if stop <= SOME else 1)
            after = measure()
            lines.append(
                {
                    "row": "memory",
                    "from": start,
                    "to": stop,
                    "remembered": len(loader.placement().adapters),
                    "bytes": (after - before) / (stop - start),
                    "timers": live_timers() - timers,
                    "tasks": len(asyncio.all_tasks()) - tasks,
                    "descriptors": len(os.listdir("/proc/self/fd")) - descriptors,
                }
            )
            lines[-1]["idle_cpu_ms_per_s"] = await idle_cpu_ms()
            before = measure()
    return lines


def memory(files: SmallAdapters, given: Options, count: int) -> list[Line]:
    """Once as the kernel sees it, once as Python's allocator does; on asyncio, to see timers."""
    steps = (FEW, SOME, count)
    resident = run_on("asyncio", lambda: growth(files, given, steps, resident_bytes))
    tracemalloc.start(1)
    traced = run_on("asyncio", lambda: growth(files, given, steps, traced_bytes))
    tracemalloc.stop()
    lines = []
    for line, kernel in zip(traced, resident, strict=True):
        line["resident_bytes"] = kernel["bytes"]
        line["idle_cpu_ms_per_s"] = kernel["idle_cpu_ms_per_s"]
        line["verdict"] = memory_verdict(line)
        lines.append(line)
    print_memory(lines)
    return lines


def memory_verdict(line: Line) -> str:
    over = float(str(line["bytes"])) - BYTES_PER_IDLE
    misses = [f"{over:,.0f} bytes"] if over > 0 else []
    misses += [
        f"{line[what]} {what}" for what in ("timers", "tasks", "descriptors") if line[what] != 0
    ]
    return f"missed by {' and '.join(misses)}" if misses else "reached"


def print_memory(lines: list[Line]) -> None:
    cells = [
        (
            f"{line['from']:,} to {line['to']:,}",
            f"{line['remembered']:,}",
            *(f"{line[key]:,.0f}" for key in ("bytes", "resident_bytes")),
            *(str(line[key]) for key in ("timers", "tasks", "descriptors")),
            f"{line['idle_cpu_ms_per_s']:.2f}",
            str(line["verdict"]),
        )
        for line in lines
    ]
    headings = ("known", "remembered", "bytes each", "resident", "timers", "tasks", "files")
    title = f"what a known adapter costs (target: {BYTES_PER_IDLE:,} bytes, no timer) [asyncio]"
    print_table(title, (*headings, "idle CPU ms/s", "verdict"), cells)


async def own_plan_bytes(folders: list[Path], given: Options) -> float:
    """Bytes per adapter that is checked and lies on disk, where no two have a plan in common."""
    config = LoaderConfig(device_bytes=1 << 20, io_threads=given.io_threads)
    async with AdapterLoader(large_layout(), config) as loader:
        before = 0
        for number, folder in enumerate(folders):
            await loader.prefetch(folder, tier="disk")
            if number == _SETTLED - 1:
                gc.collect()
                before = traced_bytes()
        gc.collect()
        return (traced_bytes() - before) / (len(folders) - _SETTLED)


def own_plans(work: Path, given: Options) -> list[Line]:
    """The worst that the bound on what is remembered allows, computed from a sample."""
    folders = [write_sparse(work / f"own {n}", rank=16, mark=f"{n}") for n in range(OWN_PLANS)]
    rows = len(large_layout().modules)
    tracemalloc.start(1)
    each = run_on("asyncio", lambda: own_plan_bytes(folders, given))
    tracemalloc.stop()
    most = min(LifecycleTimes().max_idle, MAX_WEIGHT // rows)
    line: Line = {
        "row": "own plans",
        "bytes": each,
        "bytes_per_module": each / rows,
        "remembered_at_most": most,
        "bytes_of_those": most * each,
        "bytes_at_most": MAX_WEIGHT * each / rows,
    }
    print_table(
        "an adapter of 448 tensors whose plan nobody shares, by a sample (no target)",
        ("bytes each", "per module", "remembered at most", "MB then", "MB at most, any adapters"),
        [
            (
                *(f"{line[key]:,.0f}" for key in ("bytes", "bytes_per_module")),
                f"{most:,}",
                f"{most * each / 1e6:.1f}",
                f"{MAX_WEIGHT * each / rows / 1e6:.1f}",
            )
        ],
    )
    return [line]
