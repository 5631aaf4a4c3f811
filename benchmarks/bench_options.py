"""What every bench takes on its command line, and the JSON lines it leaves."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    rounds: int
    quick: bool
    io_threads: int
    torch_threads: int
    work: Path
    json: Path
    plot: Path | None
    only: tuple[str, ...]
    environment: dict[str, object] = field(default_factory=dict)


def options(
    name: str,
    about: str,
    *,
    rounds: int,
    rows: Sequence[str],
    arguments: Sequence[str] | None = None,
    plots: bool = True,
) -> Options:
    """Parse `arguments`, or the command line, and pin this process's threads."""
    parser = argparse.ArgumentParser(name, description=about)
    cores = len(os.sched_getaffinity(0))
    add = parser.add_argument
    add("--rounds", type=int, default=0, help=f"rounds per row (default {rounds}; quick 5)")
    add("--quick", action="store_true", help="few rounds, to see that everything runs")
    add("--io-threads", type=int, default=min(4, cores), help="of the loader and of the floors")
    add("--realtime", action="store_true", help="real-time priority (SCHED_RR), where permitted")
    add("--torch-threads", type=int, default=1, help="torch.set_num_threads of this process")
    add("--work", type=Path, default=RESULTS, help="folder on a local disk for the work files")
    add("--json", type=Path, default=RESULTS / f"{name}.jsonl", help="JSON lines (appended)")
    if plots:
        add("--plot", type=Path, default=None, help="draw a picture into this file")
    add("--row", action="append", choices=rows, default=[], help="only this row (repeatable)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.torch_threads)
    priority = raise_priority() if given.realtime else "normal"
    return Options(
        rounds=given.rounds or (5 if given.quick else rounds),
        quick=given.quick,
        io_threads=given.io_threads,
        torch_threads=given.torch_threads,
        work=given.work,
        json=given.json,
        plot=getattr(given, "plot", None),
        only=tuple(given.row) or tuple(rows),
        environment={
            "bench": name,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "cores": cores,
            "priority": priority,
            "io_threads": given.io_threads,
            "torch_threads": torch.get_num_threads(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "uvloop": version("uvloop"),
            "load_average": os.getloadavg()[0],
        },
    )


def raise_priority() -> str:
    """Give this process and its later children real-time priority; return the priority.

    If that is refused, say so and keep the normal priority.
    """
    rr = os.sched_param(os.sched_get_priority_min(os.SCHED_RR))
    try:
        for thread in os.listdir("/proc/self/task"):  # later ones inherit it
            with suppress(ProcessLookupError):
                os.sched_setscheduler(int(thread), os.SCHED_RR, rr)
    except OSError as error:
        print(
            f"--realtime: real-time priority was refused ({error.strerror}); measuring at normal"
            " priority. It takes CAP_SYS_NICE, or `ulimit -r` of 1 or more.",
            file=sys.stderr,
        )
        return "normal (real-time was refused)"
    return f"real-time (SCHED_RR {rr.sched_priority})"


def print_environment(options: Options) -> None:
    print(", ".join(f"{name} {value}" for name, value in options.environment.items()))


def write_json(options: Options, lines: Iterable[dict[str, object]]) -> None:
    """Append one JSON line per result, each with the environment it was measured in."""
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with options.json.open("a") as file:
        for line in lines:
            print(json.dumps({**line, "environment": options.environment}), file=file)
