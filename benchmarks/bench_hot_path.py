"""What a request costs whose adapter is on the device already, with few and with many known."""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from time import perf_counter_ns

from bench_options import Options, options, print_environment, write_json
from harness import Loop, print_table, run_on
from lorax_async.handle import AdapterHandle
from scale_files import SmallAdapters
from scale_memory import FEW, Line, meet, opened

MANY = 10_000
QUICK = 3_000
CALLS = 200
"""Calls per round, each timed alone; the loop runs between them, as between requests."""

TARGETS_US = {"load(path)": 40, "load(key)": 15, "try_acquire(key)": 10, "release": None}

Call = Callable[[], Awaitable[AdapterHandle] | AdapterHandle | None]


async def time_calls(files: SmallAdapters, given: Options, known: int) -> dict[str, list[float]]:
    """Return µs by call; the adapters are in use by nobody else, and one of them is called."""
    async with opened(files, given) as loader:
        await meet(loader, range(known))
        path = files.root / SmallAdapters.id(known - 1)
        async with await loader.load(path) as handle:
            SmallAdapters.check(handle, known - 1)
            key = handle.key
        calls: dict[str, Call] = {
            "load(path)": lambda: loader.load(path),
            "load(key)": lambda: loader.load(key),
            "try_acquire(key)": lambda: loader.try_acquire(key),
        }
        times: dict[str, list[float]] = {name: [] for name in TARGETS_US}
        gc.freeze()
        for _ in range(given.rounds):
            gc.collect()
            for _ in range(CALLS):
                for name, call in calls.items():
                    await _time(name, call, times)
        gc.unfreeze()
        return times


async def _time(name: str, call: Call, times: dict[str, list[float]]) -> None:
    start = perf_counter_ns()
    pending = call()
    handle = await pending if isinstance(pending, Awaitable) else pending
    stop = perf_counter_ns()
    assert handle is not None
    released = perf_counter_ns()
    handle.release()
    times["release"].append((perf_counter_ns() - released) / 1e3)
    times[name].append((stop - start) / 1e3)


def hits(files: SmallAdapters, given: Options, count: int) -> list[Line]:
    lines: list[Line] = []
    loops: tuple[Loop, ...] = ("uvloop", "asyncio")
    for loop in loops:
        for known in (FEW, count):
            for name, samples in run_on(loop, partial(time_calls, files, given, known)).items():
                median, target = statistics.median(samples), TARGETS_US[name]
                lines.append(
                    {
                        "loop": loop,
                        "known": known,
                        "call": name,
                        "median_us": median,
                        "p99_us": statistics.quantiles(samples, n=100)[-1],
                        "min_us": min(samples),
                        "target_us": target,
                        "verdict": _verdict(median, target),
                    }
                )
    return lines


def _verdict(median: float, target: int | None) -> str:
    if target is None:
        return ""
    return "reached" if median <= target else f"missed by {median - target:.0f} µs"


def print_hits(lines: list[Line]) -> None:
    headings = ("loop", "known", "call", "median µs", "p99", "min", "target", "verdict")
    cells = [
        (
            str(line["loop"]),
            f"{line['known']:,}",
            str(line["call"]),
            *(f"{line[key]:.1f}" for key in ("median_us", "p99_us", "min_us")),
            str(line["target_us"] or ""),
            str(line["verdict"]),
        )
        for line in lines
    ]
    print_table("an adapter that is resident", headings, cells)


def main() -> int:
    given = options("bench_hot_path", __doc__ or "", rounds=15, rows=("hits",), plots=False)
    print_environment(given)
    count = QUICK if given.quick else MANY
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        lines = hits(SmallAdapters(Path(work), count), given, count)
    print_hits(lines)
    write_json(given, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
