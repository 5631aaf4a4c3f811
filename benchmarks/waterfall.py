"""What the milliseconds of one load are spent on, from its own trace, beside the floor."""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import bench_load_latency as local
import bench_remote as remote
from bench_options import Options, options, print_environment, write_json
from harness import Loop, Measured, Row, Target, measure, print_table, run_on
from lorax_async.tracing import Trace

LOCAL_ROWS = (
    "warm, seen before",
    "warm, first sight, rank 16, header met before",
    "warm, first sight, rank 16",
    "warm, F32 file to bf16",
    "cold cache, first sight",
)
REMOTE_ROWS = (
    "from the disk cache, to RESIDENT",
    "unthrottled, to RESIDENT",
    "20 MB/s per connection, 10 ms, to RESIDENT",
)

PHASES = {"fetch header": "open", "verify header": "header and plan", "queue": "slot"}
"""Names of phases for spans of the row "files"; other spans keep their own."""

WIDTH = 60


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a load, in ms since the call. It begins where the phase before ended."""

    name: str
    start: float
    stop: float

    @property
    def length(self) -> float:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Waterfall:
    """The loads of one row by their phases, each in the order of time, and the floor's times."""

    name: str
    loop: Loop
    target: Target | None
    loads: Sequence[Sequence[Phase]]
    floor: Sequence[float]

    @property
    def shown(self) -> Sequence[Phase]:
        """The load of median length, so that its phases add up."""
        return sorted(self.loads, key=lambda phases: phases[-1].stop)[len(self.loads) // 2]

    @property
    def floor_ms(self) -> float:
        return statistics.median(self.floor)

    def median_of(self, name: str) -> float:
        """Return a phase's median length over all loads, which may differ in their phases."""
        lengths = [sum(each.length for each in load if each.name == name) for load in self.loads]
        return statistics.median(lengths)

    def line(self) -> dict[str, object]:
        """As one JSON line."""
        return {
            "row": self.name,
            "loop": self.loop,
            "floor_ms": self.floor_ms,
            "total_ms": self.shown[-1].stop,
            "phases": [
                {
                    "phase": phase.name,
                    "from_ms": phase.start,
                    "ms": phase.length,
                    "median_ms": self.median_of(phase.name),
                }
                for phase in self.shown
            ],
        }


def phases_of(trace: Trace) -> list[Phase]:
    """Divide the traced load at the ends of its spans: a phase includes the wait before its span.

    The bytes come in "transfer", which ends with the last response, and in "copies", which ends
    with the last copy. "ready" is the rest, until `load` returned.
    """
    events = cast("list[dict[str, Any]]", trace.as_json()["traceEvents"])
    stops = {event["id"]: event["ts"] for event in events if event["ph"] == "e"}
    spans = [
        (event, stops[event["id"]] if event["ph"] == "b" else event["ts"] + event["dur"])
        for event in events
        if event["ph"] in {"X", "b"}
    ]
    ((call, end),) = ((span, stop) for span, stop in spans if span["cat"] == "requests")
    begin, ends = call["ts"], {"ready": end}
    for span, stop in spans:
        name = {"connections": "transfer", "copies": "copies"}.get(span["cat"])
        if span["cat"] == "files" and span["name"] != "fetch":  # which lasts as long as its copies
            name = PHASES.get(span["name"], span["name"])
        if name is not None and begin <= stop <= end:
            ends[name] = max(stop, ends.get(name, stop))
    phases, start = list[Phase](), 0.0
    for name, stop in sorted(ends.items(), key=lambda item: item[1]):
        phases.append(Phase(name, start, (stop - begin) / 1e3))
        start = phases[-1].stop
    return phases


async def measure_row(name: str, loop: Loop, given: Options, work: Path) -> Waterfall:
    """Run the row of `bench_load_latency.py` or `bench_remote.py` without its peers, traced."""
    traces: list[Trace] = []

    async def run(row: Row) -> list[Measured]:
        alone = [each for each in row.contenders if each.role in {"floor", "ours"}]
        return await measure(name, replace(row, contenders=alone), loop, given.rounds)

    if name in LOCAL_ROWS:
        build = local.ROWS[name][1]
        async with build(local.Bench(given, work, traces)) as row:
            target, results = row.target, await run(row)
    else:
        async with remote.Bench(given, work, traces).row(remote.ROWS[name]) as (row, _, _):
            target, results = row.target, await run(row)
    loads = [phases_of(trace) for trace in traces]
    return Waterfall(name, loop, target, loads, results[0].floor)


def print_waterfall(found: Waterfall) -> None:
    total, floor = found.shown[-1].stop, found.floor_ms
    scale = WIDTH / max(total, floor)

    def line(name: str, start: float, stop: float, median: float) -> tuple[str, ...]:
        bar = " " * round(start * scale) + ("█" * round((stop - start) * scale) or "▏")
        share = f"{100 * (stop - start) / total:.0f}"
        return (name, f"{start:.2f}", f"{stop - start:.2f}", share, f"{median:.2f}", bar)

    lines = [
        line(each.name, each.start, each.stop, found.median_of(each.name)) for each in found.shown
    ]
    whole = statistics.median(load[-1].stop for load in found.loads)
    lines += [line("load, in all", 0, total, whole), line("floor", 0, floor, floor)]
    title = f"{found.name} [{found.loop}, {len(found.loads)} loads, traced"
    title += f"; ÷ floor {whole / floor:.2f}, target {found.target}]"
    print_table(title, ("phase", "from ms", "ms", "%", "median", "the median load"), lines)


def main() -> int:
    rows = (*LOCAL_ROWS, *REMOTE_ROWS)
    given = options("waterfall", __doc__ or "", rounds=15, rows=rows, plots=False)
    print_environment(given)
    given.work.mkdir(parents=True, exist_ok=True)
    for name in given.only:
        loop = local.ROWS[name][0] if name in LOCAL_ROWS else remote.LOOP
        with tempfile.TemporaryDirectory(dir=given.work) as work:

            async def run(
                name: str = name, loop: Loop = loop, work: Path = Path(work)
            ) -> Waterfall:
                return await measure_row(name, loop, given, work)

            found = run_on(loop, run)
        print_waterfall(found)
        write_json(given, [found.line()])
    return 0


if __name__ == "__main__":
    sys.exit(main())
