"""`lorax_kernels.apply` on the CPU against the best fixed way to multiply each shape."""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter_ns

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

SECONDS = 0.9
"""For the rounds of one shape, at least as many as are asked for at the least."""

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
        ours, best = (statistics.median(self.times[name][::2]) for name in (OURS, self.best))
        return ours / best

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


def time_us(method: Method) -> float:
    start = perf_counter_ns()
    method()
    return (perf_counter_ns() - start) / 1e3


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
    rounds = SECONDS * 1e6 / sum(first[name] for name in methods)
    shuffled, order = random.Random(SEED), list(methods)
    cell.times = {name: [] for name in order}
    for _ in range(max(LEAST_ROUNDS, min(int(rounds), given.rounds))):
        work.reset()
        shuffled.shuffle(order)
        for name in order:
            cell.times[name].append(time_us(methods[name]))
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
