"""Interleaved measurement against a floor: rounds, medians, verdicts, a picture.

A timing never fails a run; a wrong byte does.
"""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import Literal, TypeVar

import uvloop

T = TypeVar("T")
Role = Literal["floor", "reference", "ours", "peer"]
"""A "reference" is bare work of another kind than the floor's, and may take less time."""

Loop = Literal["uvloop", "asyncio"]

FAULT_BELOW = 0.97
"""Nobody beats the floor: a lower ratio says that the floor or the timer is wrong."""

SEED = 11


class WrongBytesError(AssertionError):
    """What a contender loaded is not what the file says: its time means nothing."""


async def nothing() -> None:
    """The preparation, or the settling, of a contender that needs none."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to do the row's work. Only `run` is timed.

    `prepare` brings it into the state that the row asks for; `settle` waits for what it left
    running; `check` raises `WrongBytesError` and clears up. It takes part in every `every`-th
    round.
    """

    name: str
    role: Role
    run: Callable[[], Awaitable[None]]
    check: Callable[[], None]
    prepare: Callable[[], Awaitable[None]] = nothing
    every: int = 1
    settle: Callable[[], Awaitable[None]] = nothing


@dataclass(frozen=True, slots=True)
class Target:
    """What the design asks of our row: at most `ratio` × the floor, and `over_ms` above it."""

    ratio: float
    over_ms: float | None = None

    def __str__(self) -> str:
        over = "" if self.over_ms is None else f", floor + {self.over_ms:g} ms"
        return f"≤ {self.ratio:g}{over}"

    def verdict(self, ratio: float, over_ms: float) -> str:
        misses = []
        if ratio > self.ratio:
            misses.append(f"{ratio - self.ratio:.2f} × the floor")
        if self.over_ms is not None and over_ms > self.over_ms:
            misses.append(f"{over_ms - self.over_ms:.1f} ms")
        return f"missed by {' and '.join(misses)}" if misses else "reached"


@dataclass(frozen=True, slots=True)
class Row:
    """One question: the contenders, of which exactly one is the floor, and the design's answer.

    Without a target there is no verdict.
    """

    target: Target | None
    contenders: Sequence[Contender]
    new_round: Callable[[int], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Measured:
    """The times of one contender in one row, in ms, beside the floor's."""

    row: str
    loop: Loop
    contender: str
    role: Role
    samples: tuple[float, ...]
    floor: tuple[float, ...]
    target: Target | None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def ratio(self) -> float:
        return self.median / statistics.median(self.floor)

    @property
    def ratio_of_minima(self) -> float:
        return min(self.samples) / min(self.floor)

    @property
    def over_ms(self) -> float:
        return self.median - statistics.median(self.floor)

    @property
    def verdict(self) -> str:
        if self.role in {"ours", "peer"} and self.ratio < FAULT_BELOW:
            return f"FAULT OF THE BENCH: below {FAULT_BELOW} of the floor"
        ours = self.target if self.role == "ours" else None
        return ours.verdict(self.ratio, self.over_ms) if ours else ""

    def line(self) -> dict[str, object]:
        """As one JSON line."""
        return {
            "row": self.row,
            "loop": self.loop,
            "contender": self.contender,
            "role": self.role,
            "median_ms": self.median,
            "min_ms": min(self.samples),
            "max_ms": max(self.samples),
            "ratio": self.ratio,
            "ratio_of_minima": self.ratio_of_minima,
            "over_floor_ms": self.over_ms,
            "target": str(self.target or "") if self.role == "ours" else None,
            "verdict": self.verdict or None,
            "samples_ms": list(self.samples),
        }


async def measure(name: str, row: Row, loop: Loop, rounds: int) -> list[Measured]:
    """Run the row's contenders in rounds, in an order shuffled anew each time."""
    order = list(row.contenders)
    shuffle = random.Random(SEED).shuffle
    times: dict[str, list[float]] = {contender.name: [] for contender in order}
    for number in range(rounds):
        row.new_round(number)
        shuffle(order)
        for contender in order:
            if number % contender.every == 0:
                times[contender.name].append(await _time(contender))
    (floor,) = (tuple(times[c.name]) for c in row.contenders if c.role == "floor")
    return [
        Measured(name, loop, c.name, c.role, tuple(times[c.name]), floor, row.target)
        for c in row.contenders
    ]


async def _time(contender: Contender) -> float:
    await contender.prepare()
    gc.collect()
    await asyncio.sleep(0.002)  # what was deferred to the loop happens outside of the timer
    start = perf_counter_ns()
    await contender.run()
    elapsed = perf_counter_ns() - start
    await contender.settle()
    contender.check()
    return elapsed / 1e6


def run_on(loop: Loop, main: Callable[[], Coroutine[None, None, T]]) -> T:
    """Run to the end on a new loop of that kind."""
    factory = uvloop.new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main())


HEADINGS = ("contender", "median ms", "min", "max", "÷ floor", "of minima", "target", "verdict")


def print_row(title: str, results: Iterable[Measured]) -> None:
    lines = [
        (
            f"{result.contender} ({result.role})",
            *(f"{t:.2f}" for t in (result.median, min(result.samples), max(result.samples))),
            f"{result.ratio:.2f}",
            f"{result.ratio_of_minima:.2f}",
            str(result.target or "") if result.role == "ours" else "",
            result.verdict,
        )
        for result in results
    ]
    print_table(title, HEADINGS, lines)


def print_table(title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *lines, strict=True)]
    print(f"\n{title}")
    for line in (headings, ["-" * width for width in widths], *lines):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    sys.stdout.flush()


def draw(path: Path, results: Sequence[Measured]) -> None:
    """One panel per row: medians with min and max, the floor times the target as a line."""
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(result.row for result in results))
    figure = Figure(figsize=(9, 2.4 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    colours = {"floor": "0.6", "reference": "0.8", "ours": "tab:green", "peer": "tab:blue"}
    for panel, row in zip(panels, rows, strict=True):
        shown = [result for result in reversed(results) if result.row == row]
        medians = [result.median for result in shown]
        below = [result.median - min(result.samples) for result in shown]
        above = [max(result.samples) - result.median for result in shown]
        panel.barh(
            [result.contender for result in shown],
            medians,
            xerr=[below, above],
            color=[colours[result.role] for result in shown],
        )
        if shown[0].target is not None:
            wanted = statistics.median(shown[0].floor) * shown[0].target.ratio
            panel.axvline(wanted, color="tab:red")
        panel.set_title(f"{row}: ms, lower is better; red: the target", fontsize="medium")
    figure.savefig(path)
