"""What an arriving adapter costs the others in vLLM's server, without and with the plug-in.

Another request streams while a 78 MB adapter comes from a hub at 8 MB/s per connection: the
longest gap between two tokens, against a calm run just before; and the time on the engine's loop.
SmolLM2 in bf16 on vLLM's CPU build, one thread. The engine and its workers have a core; the API
server, the origin and the client another.

    python benchmarks/bench_vllm.py --vllm .venv-vllm/bin/python --plot gaps.png
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_options import RESULTS
from link import Link, hub_files
from lorax_async.engines.smollm2 import prepare_base
from vllm_stage import Arrival, VllmServer, require_vllm, watch_arrival, write_adapter

CORES = sorted(os.sched_getaffinity(0))
COMMIT = "c" * 40
RATE, DELAY = 8e6, 0.01
OWN, PLUGIN = "vLLM", "with lorax_async"
TARGET_GAP, TARGET_LOOP = 1.5, 1.2


@dataclass(frozen=True, slots=True)
class Row:
    """One server's arrivals, and its loop's seconds in each."""

    name: str
    arrivals: list[Arrival]
    loops: list[dict[str, float]]

    @property
    def gap_ratio(self) -> float:
        return statistics.median(a.busy_gap / a.calm_gap for a in self.arrivals)

    def loop(self, *names: str) -> float:
        return statistics.median(sum(loop.get(n, 0.0) for n in names) for loop in self.loops)

    def line(self) -> dict[str, object]:
        on_loop, activate = self.loop("load", "calls"), self.loop("activate")
        return {
            "server": self.name,
            "rounds": len(self.arrivals),
            "arrival_s": round(statistics.median(a.seconds for a in self.arrivals), 3),
            "calm_gap_ms": round(1e3 * statistics.median(a.calm_gap for a in self.arrivals), 1),
            "longest_gap_ms": round(1e3 * statistics.median(a.busy_gap for a in self.arrivals), 1),
            "gap_ratio": round(self.gap_ratio, 2),
            "loop_ms": round(1e3 * on_loop, 2),
            "activate_ms": round(1e3 * activate, 2),
            "loop_ratio": round(on_loop / activate, 3),
        }


def measure(vllm: Path, name: str, work: Path, repos: Mapping[str, Mapping[str, Path]]) -> Row:
    """Start a server, and let the adapter arrive from each repository once."""
    plugin = name == PLUGIN
    arrivals, loops = [], []
    files = {name: path for named in repos.values() for name, path in named.items()}
    with Link(files, rate=RATE, delay=DELAY, commit=COMMIT) as hub:
        environment = {
            "HF_ENDPOINT": hub.url("")[:-1],
            "HF_HOME": str(work / f"hub-{plugin}"),
            "VLLM_SERVER_DEV_MODE": "1",  # for collective_rpc
            "LORAX_ASYNC_SOURCES": "hub",
            "LORAX_ASYNC_CACHE_DIR": str(work / "cache"),
        }
        server = VllmServer(
            vllm,
            prepare_base(),
            work / f"{plugin}.log",
            plugin=plugin,
            environment=environment,
            extension="vllm_timing.TimedExtension" if plugin else "vllm_timing.LoopTimes",
        )
        with server:
            pin(server, hub)
            _loop_times(server)
            for repo in repos:
                body = {"lora_name": repo, "lora_path": repo}
                calls: list[Any] = []

                def load(body: dict[str, str] = body, calls: list[Any] = calls) -> None:
                    calls.append(server.post("/v1/load_lora_adapter", **body))

                # Long enough for the other request to outlast the download.
                arrivals.append(watch_arrival(server, load, tokens=120 if plugin else 160))
                loops.append(_loop_times(server))
                assert calls[0].status == 200, calls[0].body
    os.sched_setaffinity(0, CORES)  # for the next server
    return Row(name, arrivals, loops)


def _loop_times(server: VllmServer) -> dict[str, float]:
    times: dict[str, float] = server.post("/collective_rpc", method="loop_times").json["results"][0]
    return times


def pin(server: VllmServer, hub: Link) -> None:
    """Give the engine a core, and everything else another, if there are two."""
    engine, others = CORES[0], CORES[-1]
    server.pin([engine], [others])
    for pid in (os.getpid(), hub.pid):
        os.sched_setaffinity(pid, {others})


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the gaps of the first arrival over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5))
    axes = figure.subplots(len(rows), 1, sharex=True, sharey=True)
    for axis, row in zip(axes, rows, strict=True):
        arrival = row.arrivals[0]
        times = arrival.busy.times
        seconds = [time - arrival.began for time in times[1:]]
        gaps = [1e3 * (after - before) for before, after in pairwise(times)]
        axis.vlines(seconds, 1, gaps, color="tab:blue", linewidth=1.5)
        axis.axvspan(0, arrival.seconds, color="tab:orange", alpha=0.2)
        axis.set_yscale("log")
        axis.set_ylim(10, 20_000)
        axis.set_xlim(-1, 1.3 * max(row.arrivals[0].seconds for row in rows))
        axis.set_title(f"{row.name}: longest gap {1e3 * arrival.busy_gap:,.0f} ms", loc="left")
        axis.set_ylabel("ms since\nthe token before")
    axes[-1].set_xlabel("seconds; in the shaded time a 78 MB adapter arrives (8 MB/s a connection)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser("bench_vllm", description=__doc__)
    parser.add_argument("--vllm", type=Path, default=Path(".venv-vllm/bin/python"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "vllm.jsonl")
    parser.add_argument("--plot", type=Path, default=None, help="draw a picture into this file")
    options = parser.parse_args()
    options.vllm = options.vllm.absolute()
    require_vllm(options.vllm)
    with tempfile.TemporaryDirectory(prefix="bench-vllm-") as folder:
        work = Path(folder)
        adapter = write_adapter(work / "huge", rank=128, seed=7)
        names = [f"org/huge-{number}" for number in range(options.rounds)]
        repos = {name: hub_files(name, COMMIT, adapter, work) for name in names}
        rows = [measure(options.vllm, name, work, repos) for name in (OWN, PLUGIN)]
    options.json.parent.mkdir(parents=True, exist_ok=True)
    with options.json.open("a") as file:
        for row in rows:
            line = {**row.line(), "load_average": os.getloadavg()[0]}
            print(json.dumps(line))
            print(json.dumps(line), file=file)
    plugin = rows[-1].line()
    print(f"longest gap ÷ calm: {plugin['gap_ratio']} (target {TARGET_GAP})")
    print(f"time on the loop ÷ activation: {plugin['loop_ratio']} (target {TARGET_LOOP})")
    if options.plot is not None:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()
