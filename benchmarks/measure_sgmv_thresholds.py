"""What `lorax_kernels.Thresholds` should be on this machine: the ways timed, limits printed."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable
from math import exp, inf, log

import torch

from bench_options import Options, options, print_environment, write_json
from bench_sgmv import time_us
from harness import print_table
from lorax_kernels import Thresholds
from sgmv_methods import Shape, Work, ours

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BATCHES = ("8/8", "32/32", "128/8", "512/8", "256/16 skewed")
HIDDEN, RANKS = (576, 2048, 4096), (8, 16, 64)

ALONE = Thresholds(dense_bfloat16=0, dense_float16=0, dense_float32=0, turned_rank=0)
DENSE = Thresholds(
    dense_bfloat16=inf, dense_float16=inf, dense_float32=inf, kept_bytes=1 << 40, turned_rank=0
)
TURNED = Thresholds(dense_bfloat16=0, turned_rank=1 << 20, turned_features=0)

TOO_MUCH_IN_VAIN = 1e8
"""Multiply-adds per segment less: nobody need be asked."""

Timed = tuple[float, float]
"""µs one way and the other."""


def time_ways(shape: Shape, ways: tuple[Thresholds, Thresholds], rounds: int) -> Timed:
    """Medians, interleaved."""
    work = Work(shape)
    methods = [ours(work, way) for way in ways]
    for _ in range(3):
        for method in methods:
            work.reset()
            method()
    times = [[time_us(method) for method in methods] for _ in range(rounds)]
    one, other = (statistics.median(column) for column in zip(*times, strict=True))
    return one, other


def in_vain(shape: Shape) -> float:
    """Multiply-adds of the one product that a mask throws away, per segment less."""
    rows = sum(shape.rows)
    computed = rows * len(shape.rows) * shape.rank * 2 * shape.hidden
    return (computed - rows * shape.rank * 2 * shape.hidden) / (len(shape.rows) - 1)


def best_limit(measured: Iterable[tuple[float, Timed]]) -> tuple[float, float]:
    """Up to where the second way is taken, and how many times the best time that then takes.

    By the geometric mean. The limit is the middle, in logarithms, of two that were measured.
    """
    points = sorted(measured)

    def mean_of(taken: int) -> float:
        chosen = (log(t[at < taken] / min(t)) for at, (_, t) in enumerate(points))
        return statistics.fmean(chosen)

    taken = min(range(len(points) + 1), key=mean_of)
    if taken == 0:
        return 0.0, exp(mean_of(0))
    below = points[taken - 1][0]
    above = points[taken][0] if taken < len(points) else below
    return (below * above) ** 0.5, exp(mean_of(taken))


def dense_limit(name: str, given: Options) -> dict[str, object]:
    measured = []
    for batch in BATCHES:
        for hidden in HIDDEN:
            for rank in RANKS:
                shape = Shape(DTYPES[name], batch, hidden, rank)
                if in_vain(shape) <= TOO_MUCH_IN_VAIN:
                    times = time_ways(shape, (ALONE, DENSE), given.rounds)
                    measured.append((in_vain(shape), times))
    lines = [
        (f"{vain:.2g}", *(f"{each:.0f}" for each in times)) for vain, times in sorted(measured)
    ]
    headings = ("in vain per segment less", "alone, µs", "dense, µs")
    print_table(f"{name}: segments alone, or one product", headings, lines)
    limit, mean = best_limit(measured)
    print(f"dense_{str(DTYPES[name])[6:]} = {limit:.1e} ({mean:.2f} of the best, geometric mean)")
    return {"row": name, "what": "dense", "limit": limit, "of_the_best": mean}


def turned_limit(given: Options) -> dict[str, object]:
    """Of bfloat16: the rank up to which, and the features from which, it is quicker."""
    cells = {
        (rank, hidden): time_ways(
            Shape(torch.bfloat16, "512/1", hidden, rank), (ALONE, TURNED), given.rounds
        )
        for hidden in (576, 1024, 2048, 4096, 14336)
        for rank in (8, 16, 32, 64)
    }
    lines = [
        (str(rank), str(hidden), *(f"{each:.0f}" for each in times))
        for (rank, hidden), times in cells.items()
    ]
    print_table("bf16: x @ A.T, or A @ x.T", ("rank", "features", "µs", "turned, µs"), lines)

    def mean_of(limits: tuple[int, int]) -> float:
        logs = []
        for (rank, hidden), times in cells.items():
            turned = rank <= limits[0] and hidden >= limits[1]
            logs.append(log(times[turned] / min(times)))
        return statistics.fmean(logs)

    ranks, features = zip(*cells, strict=True)
    best = min(((rank, hidden) for rank in {0, *ranks} for hidden in {*features}), key=mean_of)
    print(f"turned_rank = {best[0]}, turned_features = {best[1]}")
    return {"row": "turned", "what": "turned", "rank": best[0], "features": best[1]}


def main() -> int:
    rows = (*DTYPES, "turned")
    given = options("measure_sgmv", __doc__ or "", rounds=15, rows=rows, plots=False)
    print_environment(given)
    for row in given.only:
        found = turned_limit(given) if row == "turned" else dense_limit(row, given)
        write_json(given, [found])
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
