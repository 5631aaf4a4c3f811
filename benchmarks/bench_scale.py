"""What 10,000 known adapters cost on 8 slots: memory, timers, and the time of a load."""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter_ns

from bench_options import Options, options, print_environment, write_json
from harness import SEED, Loop, print_table, run_on
from lorax_async.loader import AdapterLoader
from scale_files import SmallAdapters
from scale_memory import FEW, SLOTS, Line, meet, memory, opened, own_plans

MANY = 10_000
QUICK = 3_000

LOAD_RATIO = 1.1
"""A load with many known may take this many times as long as one with few: it is noise by then."""

LOADS_PER_ROUND = 40


async def timed_load(loader: AdapterLoader, number: int) -> float:
    """ms. The bytes are checked outside of the timer."""
    await asyncio.sleep(0)
    start = perf_counter_ns()
    handle = await loader.load(SmallAdapters.id(number))
    elapsed = perf_counter_ns() - start
    SmallAdapters.check(handle, number)
    handle.release()
    return elapsed / 1e6


async def time_loads(files: SmallAdapters, given: Options, count: int) -> dict[str, list[float]]:
    """Interleaved in one process: of those that few share, and of those that many do."""
    async with opened(files, given) as few, opened(files, given) as many:
        await meet(few, range(FEW))
        await meet(many, range(count))
        shuffled = random.Random(SEED)
        kinds: dict[str, tuple[AdapterLoader, Iterator[int]]] = {
            f"{FEW} known": (few, _around(range(FEW))),
            f"{count:,} known, one of the last {FEW} met": (
                many,
                _around(range(count - FEW, count)),
            ),
            f"{count:,} known, any of them": (many, iter(lambda: shuffled.randrange(count), -1)),
        }
        times: dict[str, list[float]] = {name: [] for name in kinds}
        gc.freeze()  # what is known is no garbage, and a collection would walk over it
        for _ in range(given.rounds):
            gc.collect()
            for _ in range(LOADS_PER_ROUND):
                for name, (loader, numbers) in kinds.items():
                    times[name].append(await timed_load(loader, next(numbers)))
        gc.unfreeze()
    return times


def _around(numbers: range) -> Iterator[int]:
    """More of them than slots: with the least recently used leaving, none is resident."""
    assert len(numbers) > SLOTS
    while True:
        yield from numbers


def load(files: SmallAdapters, given: Options, count: int) -> list[Line]:
    lines: list[Line] = []
    loops: tuple[Loop, ...] = ("uvloop", "asyncio")
    for loop in loops:
        times = run_on(loop, lambda: time_loads(files, given, count))
        first = statistics.median(next(iter(times.values())))
        for name, samples in times.items():
            median = statistics.median(samples)
            over = median / first - LOAD_RATIO
            lines.append(
                {
                    "row": "load",
                    "loop": loop,
                    "contender": name,
                    "loads": len(samples),
                    "median_ms": median,
                    "p90_ms": statistics.quantiles(samples, n=10)[-1],
                    "min_ms": min(samples),
                    "ratio": median / first,
                    "verdict": f"missed by {over:.2f} ×" if over > 0 else "reached",
                }
            )
    headings = ("loop", "contender", "loads", "median ms", "p90", "min", "÷ 10 known", "verdict")
    cells = [
        (
            str(line["loop"]),
            str(line["contender"]),
            str(line["loads"]),
            *(f"{line[key]:.2f}" for key in ("median_ms", "p90_ms", "min_ms", "ratio")),
            str(line["verdict"]),
        )
        for line in lines
    ]
    print_table(f"a load, seen before and evicted (target: {LOAD_RATIO} ×)", headings, cells)
    return lines


ROWS = ("memory", "load", "own plans")


def main() -> int:
    given = options("bench_scale", __doc__ or "", rounds=15, rows=ROWS, plots=False)
    print_environment(given)
    count = QUICK if given.quick else MANY
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        small = Path(work) / "small"
        small.mkdir()
        files = SmallAdapters(small, count)
        if "memory" in given.only:
            write_json(given, memory(files, given, count))
        if "load" in given.only:
            write_json(given, load(files, given, count))
        if "own plans" in given.only:
            write_json(given, own_plans(Path(work), given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
