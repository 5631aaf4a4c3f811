"""What it takes to decide on a batch: its plan, how that grows, the step; and overload."""

from __future__ import annotations

import gc
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from time import perf_counter_ns

from bench_options import Options, options, print_environment, write_json
from harness import SEED, Loop, print_table, run_on
from lorax_async.config import LoaderConfig
from lorax_async.loader import AdapterLoader
from lorax_async.planning.batch_plan import BASE_ONLY, BatchPlan, SlotOccupant, SlotRef, plan_batch
from lorax_async.scheduler.admission import share
from lorax_async.scheduler.requests import Request
from lorax_async.scheduler.scheduler import AdapterScheduler
from overload import EQUAL, PASS, Mix, least_loads, patient, play, returning
from scale_files import SmallAdapters, small_layout

SIZES = ((256, 64), (512, 128), (1_024, 256), (2_048, 512), (4_096, 1_024))
"""Sequences and adapters of a batch; the first is the one with a target in time."""

MICROSECONDS = 60
LINEAR = 1.1
"""The largest exponent that is taken for linear: a logarithm and some cache misses are in it."""

PLANS_PER_ROUND = 20
RANKS = (8, 16, 32, 64)

Line = dict[str, object]


@dataclass(frozen=True, slots=True)
class Work:
    """One batch to be decided on: tokens wanted by each adapter's sequences, places, tenants."""

    wants: list[list[int]]
    places: list[SlotRef]
    occupants: dict[int, SlotOccupant]
    max_tokens: int
    max_sequences: int

    def decide(self) -> BatchPlan:
        """As the scheduler does: who gets what, and in which order."""
        given = share(self.wants, self.max_tokens, self.max_sequences)
        places = list(chain.from_iterable(map(repeat, self.places, map(len, given))))
        return plan_batch(places, list(chain.from_iterable(given)), self.occupants)


def work(sequences: int, adapters: int, *, crowded: bool) -> Work:
    """Nine of ten sequences decode, the others have a prompt; crowded, half of them fit."""
    draw = random.Random(SEED)
    wants: list[list[int]] = [[] for _ in range(adapters)]
    for number in range(sequences):
        tokens = 1 if draw.random() < 0.9 else draw.randrange(2, 64)
        wants[number % adapters].append(tokens)
    occupants = {slot: SlotOccupant(1, draw.choice(RANKS)) for slot in range(adapters)}
    places = [SlotRef(slot, 1) for slot in occupants]
    total = sum(map(sum, wants))
    half = 2 if crowded else 1
    return Work(wants, places, occupants, total // half, sequences // half)


def check(plan: BatchPlan, given: Work) -> None:
    """Outside of the timer: every row is in the segment of its adapter."""
    bounds, slots = plan.segments.bounds, plan.segments.slots
    if sorted(plan.order) != list(range(len(plan.order))):
        raise AssertionError("a sequence is missing")
    if len(set(slots)) != len(slots) or not set(slots) <= {*given.occupants, BASE_ONLY}:
        raise AssertionError("a slot has two segments, or none has it")
    if not 0 < bounds[-1] <= given.max_tokens or len(plan.order) > given.max_sequences:
        raise AssertionError("the batch is larger than it may be")


def time_each(calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
    """µs of each call, some of one and then some of the next."""
    times: list[list[float]] = [[] for _ in calls]
    gc.collect()
    gc.freeze()  # what is imported is no garbage, and a collection would walk over it
    for _ in range(rounds):
        for call, samples in zip(calls, times, strict=True):
            for _ in range(PLANS_PER_ROUND):
                start = perf_counter_ns()
                call()
                samples.append((perf_counter_ns() - start) / 1e3)
    gc.unfreeze()
    return times


def slope(sizes: list[int], times: list[float]) -> float:
    """The exponent of growth: of the line through the logarithms."""
    return statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(time) for time in times]
    ).slope


def plan(given: Options) -> list[Line]:
    lines: list[Line] = []
    for crowded in (False, True):
        works = [work(*size, crowded=crowded) for size in SIZES]
        for each in works:
            check(each.decide(), each)
        times = time_each([each.decide for each in works], given.rounds)
        medians = [statistics.median(samples) for samples in times]
        kind = "half of it fits" if crowded else "all of it fits"
        for (sequences, adapters), samples, median in zip(SIZES, times, medians, strict=True):
            aimed = not crowded and (sequences, adapters) == SIZES[0]
            over = median - MICROSECONDS
            lines.append(
                {
                    "row": "plan",
                    "batch": kind,
                    "sequences": sequences,
                    "adapters": adapters,
                    "median_us": median,
                    "p90_us": statistics.quantiles(samples, n=10)[-1],
                    "min_us": min(samples),
                    "target": f"≤ {MICROSECONDS} µs" if aimed else "",
                    "verdict": _verdict(over, "µs") if aimed else "",
                }
            )
        exponent = slope([sequences for sequences, _ in SIZES], medians)
        lines.append(
            {
                "row": "growth",
                "batch": kind,
                "exponent": exponent,
                "target": f"linear (≤ {LINEAR})",
                "verdict": _verdict(exponent - LINEAR, ""),
            }
        )
    _print_plan(lines)
    return lines


def _verdict(over: float, unit: str) -> str:
    return f"missed by {over:.2f} {unit}".rstrip() if over > 0 else "reached"


def _print_plan(lines: list[Line]) -> None:
    plans = [line for line in lines if line["row"] == "plan"]
    headings = ("batch", "sequences", "adapters", "median µs", "p90", "min", "target", "verdict")
    cells = [
        (
            str(line["batch"]),
            f"{line['sequences']:,}",
            f"{line['adapters']:,}",
            *(f"{line[key]:.1f}" for key in ("median_us", "p90_us", "min_us")),
            str(line["target"]),
            str(line["verdict"]),
        )
        for line in plans
    ]
    print_table("the plan of a batch: shares, order, segments, tiles, rank groups", headings, cells)
    growth = [line for line in lines if line["row"] == "growth"]
    print_table(
        "how that grows from 256 sequences and 64 adapters to 4,096 and 1,024",
        ("batch", "exponent", "target", "verdict"),
        [
            (
                *(str(line[k]) for k in ("batch",)),
                f"{line['exponent']:.2f}",
                str(line["target"]),
                str(line["verdict"]),
            )
            for line in growth
        ],
    )


async def time_steps(root: Path, given: Options, sequences: int, adapters: int) -> list[float]:
    """µs of `next_batch` and `complete`, of sequences that all decode, on resident adapters."""
    files = SmallAdapters(root, adapters)
    config = LoaderConfig(
        max_slots=adapters,
        device_bytes=adapters << 14,
        host_bytes=0,
        io_threads=given.io_threads,
        local_roots=(files.root,),
    )
    times: list[float] = []
    async with AdapterLoader(small_layout(), config) as loader:
        for number in range(adapters):
            (await loader.load(SmallAdapters.id(number))).release()
        async with AdapterScheduler(loader) as scheduler:
            for number in range(sequences):
                scheduler.submit(Request(SmallAdapters.id(number % adapters), 1, 1 << 20))
            gc.collect()
            gc.freeze()
            for _ in range(given.rounds * PLANS_PER_ROUND):
                start = perf_counter_ns()
                batch = await scheduler.next_batch(sequences, sequences)
                scheduler.complete(batch)
                times.append((perf_counter_ns() - start) / 1e3)
                if len(batch.rows) != sequences:
                    raise AssertionError(f"{len(batch.rows)} rows instead of {sequences}")
            gc.unfreeze()
    return times


def steps(work_folder: Path, given: Options) -> list[Line]:
    lines: list[Line] = []
    sequences, adapters = SIZES[0]
    loops: tuple[Loop, ...] = ("uvloop", "asyncio")
    for loop in loops:
        root = work_folder / loop
        root.mkdir()
        times = run_on(loop, lambda root=root: time_steps(root, given, sequences, adapters))  # type: ignore[misc]
        lines.append(
            {
                "row": "step",
                "loop": loop,
                "sequences": sequences,
                "adapters": adapters,
                "median_us": statistics.median(times),
                "p90_us": statistics.quantiles(times, n=10)[-1],
                "min_us": min(times),
            }
        )
    headings = ("loop", "sequences", "adapters", "median µs", "p90", "min")
    cells = [
        (
            *(str(line[key]) for key in ("loop", "sequences", "adapters")),
            *(f"{line[key]:.1f}" for key in ("median_us", "p90_us", "min_us")),
        )
        for line in lines
    ]
    print_table("next_batch and complete, every row decoding (no target)", headings, cells)
    return lines


def overload(given: Options) -> list[Line]:
    """60 adapters on 8 slots in virtual time: the same numbers on every machine."""
    lines: list[Line] = []
    for load, tokens in ((0.05, 50), (0.5, 50), (0.2, 100)):
        users = returning(120, EQUAL, [tokens])
        mix = Mix(users, 200 if given.quick else 600, load=load)
        ours, reference = play(mix), patient(mix)
        loads = ours.loads_per_request / reference.loads_per_request
        throughput = ours.throughput / reference.throughput
        misses = [f"{loads - 1.2:.2f} of loads"] if loads > 1.2 else []
        misses += [f"{0.9 - throughput:.2f} of throughput"] if throughput < 0.9 else []
        misses += [f"{ours.longest - 2:.2f} fair times"] if ours.longest > 2 else []
        lines.append(
            {
                "row": "overload",
                "load_seconds": load,
                "request_seconds": tokens * PASS,
                "loads_per_request": ours.loads_per_request,
                "patient_loads_per_request": reference.loads_per_request,
                "least_loads_per_request": least_loads(ours) / ours.ended,
                "throughput_ratio": throughput,
                "longest_wait": ours.longest,
                "target": "≤ 1.2, ≥ 0.9, ≤ 2",
                "verdict": f"missed by {' and '.join(misses)}" if misses else "reached",
            }
        )
    _print_overload(lines)
    return lines


def _print_overload(lines: list[Line]) -> None:
    headings = (
        *("load, request", "loads per request", "a patient loader's", "bound"),
        *("throughput ÷ its", "longest wait in fair times", "target", "verdict"),
    )
    numbers = ("loads_per_request", "patient_loads_per_request", "least_loads_per_request")
    cells = [
        (
            f"{line['load_seconds']}, {line['request_seconds']} s",
            *(f"{line[key]:.2f}" for key in (*numbers, "throughput_ratio", "longest_wait")),
            str(line["target"]),
            str(line["verdict"]),
        )
        for line in lines
    ]
    print_table("60 adapters on 8 slots, 120 requests on 32 places", headings, cells)


ROWS = ("plan", "step", "overload")


def main() -> int:
    given = options("bench_scheduler", __doc__ or "", rounds=50, rows=ROWS, plots=False)
    print_environment(given)
    given.work.mkdir(parents=True, exist_ok=True)
    if "plan" in given.only:
        write_json(given, plan(given))
    if "step" in given.only:
        with tempfile.TemporaryDirectory(dir=given.work) as folder:
            write_json(given, steps(Path(folder), given))
    if "overload" in given.only:
        write_json(given, overload(given))
    return 0


if __name__ == "__main__":
    sys.exit(main())
