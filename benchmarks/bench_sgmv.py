"""`lorax_kernels.apply` on the CPU against the best fixed way to multiply each shape."""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter_ns, thread_time_ns

import torch

from bench_options import Options, options, print_environment, write_json
from harness import SEED, print_table
from lorax_kernels import Thresholds
from sgmv_methods import BATCHES, FIXED, Method, NotTriedError, Shape, Work, ours

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HIDDEN = (576, 2048, 4096, 14336)
RANKS = (8, 16, 64)

GEOMETRIC_MEAN, PERCENTILE_95 = 1.1, 1.4
"""At most so many times the best fixed method's time, over all shapes."""

SECONDS, SAMPLE_US = 0.7, 100.0
"""For all rounds of one shape, about; and for a sample, which is of as many calls as that takes."""

LEAST_ROUNDS, SITS_OUT = 6, 4.0
"""Who takes so many times as long as the fastest, in the first call, is not the best: no rounds."""

OURS = "lorax_kernels"


@dataclass(slots=True)
class Cell:
    """The times of one shape, in µs: by method, in the order of the rounds."""

    shape: Shape
    times: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The fixed method that was fastest in the odd rounds; the even ones judge it."""
        fixed = {name: times[1::2] for name, times in self.times.items() if name != OURS}
        return min(fixed, key=lambda name: statistics.median(fixed[name]))

    @property
    def ratio(self) -> float:
        """Of the same round: what else the machine does meets both."""
        rounds = zip(self.times[OURS][::2], self.times[self.best][::2], strict=True)
        return statistics.median(ours / best for ours, best in rounds)

    def lines(self) -> Iterator[dict[str, object]]:
        shape = self.shape
        where = {
            "row": "bf16" if shape.dtype == torch.bfloat16 else "fp32",
            "batch": shape.batch,
            "hidden": shape.hidden,
            "rank": shape.rank,
        }
        for name, times in self.times.items():
            yield {
                **where,
                "contender": name,
                "rounds": len(times),
                "median_us": statistics.median(times),
                "min_us": min(times),
                "max_us": max(times),
                "best_fixed": name == self.best,
                "ratio": self.ratio if name == OURS else None,
            }
        for name, why in self.left_out.items():
            yield {**where, "contender": name, "left_out": why}


def time_us(method: Method, calls: int = 1) -> float:
    """Of one of several calls: CPU time of this thread, which is all there is with one thread."""
    clock = thread_time_ns if torch.get_num_threads() == 1 else perf_counter_ns
    start = clock()
    for _ in range(calls):
        method()
    return (clock() - start) / calls / 1e3


def measure(shape: Shape, given: Options, thresholds: Thresholds) -> Cell:
    """Interleaved rounds, in an order shuffled anew each time; numbers are checked before."""
    work, cell = Work(shape), Cell(shape)
    expected = work.delta()
    methods: dict[str, Method] = {OURS: ours(work, thresholds)}
    for name, make in FIXED.items():
        try:
            methods[name] = make(work)
        except NotTriedError as error:
            cell.left_out[name] = str(error)
    first: dict[str, float] = {}
    for name, method in methods.items():
        for _ in range(3):  # at its third call a plan has put weights together
            work.reset()
            first[name] = time_us(method)
            work.check(name, expected)
    fastest = min(first.values())
    for name, took in first.items():
        if took > SITS_OUT * fastest and name != OURS:
            cell.left_out[name] = f"{took / fastest:.0f} × the fastest"
            del methods[name]
    calls = {name: max(1, round(SAMPLE_US / first[name])) for name in methods}
    rounds = SECONDS * 1e6 / sum(first[name] * calls[name] for name in methods)
    shuffled, order = random.Random(SEED), list(methods)
    cell.times = {name: [] for name in order}
    for _ in range(max(LEAST_ROUNDS, min(int(rounds), given.rounds))):
        work.reset()
        shuffled.shuffle(order)
        for name in order:
            cell.times[name].append(time_us(methods[name], calls[name]))
    return cell


def shapes(given: Options) -> Iterator[Shape]:
    for name in given.only:
        for batch in BATCHES:
            for hidden in HIDDEN[::2] if given.quick else HIDDEN:
                for rank in RANKS[1:2] if given.quick else RANKS:
                    yield Shape(DTYPES[name], batch, hidden, rank)


def print_cells(cells: list[Cell]) -> None:
    names = [OURS, *FIXED]
    lines = []
    for cell in cells:
        times = [
            f"{statistics.median(each):.0f} ({min(each):.0f}-{max(each):.0f})" if each else "-"
            for each in (cell.times.get(name, []) for name in names)
        ]
        lines.append((str(cell.shape), *times, cell.best, f"{cell.ratio:.2f}"))
    headings = ("shape", *names, "best fixed", "÷ best")
    print_table("median µs (min-max); best: by odd rounds, ÷: by even ones", headings, lines)


def judge(cells: list[Cell], what: str) -> dict[str, object]:
    ratios = sorted(cell.ratio for cell in cells)
    mean = statistics.geometric_mean(ratios)
    tail = statistics.quantiles(ratios, n=20, method="inclusive")[-1]
    misses = [
        f"{name} {value:.2f} > {target}"
        for name, value, target in (
            ("geometric mean", mean, GEOMETRIC_MEAN),
            ("95th percentile", tail, PERCENTILE_95),
        )
        if value > target
    ]
    return {
        "row": what,
        "shapes": len(cells),
        "geometric_mean": mean,
        "percentile_95": tail,
        "largest": ratios[-1],
        "verdict": f"missed: {', '.join(misses)}" if misses else "reached",
    }


def main() -> int:
    given = options("bench_sgmv", __doc__ or "", rounds=40, rows=tuple(DTYPES), plots=False)
    print_environment(given)
    cells = [measure(shape, given, Thresholds()) for shape in shapes(given)]
    print_cells(cells)
    for what in ("all", *given.only):
        some = [c for c in cells if what == "all" or c.shape.dtype == DTYPES[what]]
        line = judge(some, what)
        write_json(given, [line])
        print(
            f"\n{what}, {line['shapes']} shapes: geometric mean {line['geometric_mean']:.3f}"
            f" (target {GEOMETRIC_MEAN}), 95th percentile {line['percentile_95']:.2f}"
            f" (target {PERCENTILE_95}), largest {line['largest']:.2f}: {line['verdict']}"
        )
    write_json(given, (line for cell in cells for line in cell.lines()))
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
