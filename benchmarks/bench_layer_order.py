"""When each layer of a remote adapter is on the device, on links of many kinds.

In a network namespace that this script makes itself (`unshare`, `tc tbf` on its loopback), the
kernel's shaper is one of them, with real TCP; where that is not permitted, it says so.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from shutil import rmtree, which
from time import perf_counter

import torch

from bench_options import Options, options, print_environment, write_json
from harness import print_table
from link import Link
from lorax_async import AdapterLoader, Allow, LoaderConfig, layouts
from lorax_async.config import MiB
from lorax_async.events import Event, LayerReady
from work_files import CONFIG, LAYERS, WEIGHTS, write_adapter

FIXED = (1, 4, 16)
"""Connections of the plain requests beside it, each of an equal part of the file."""

PARTS = (0.25, 0.5, 0.75)
LATE, TOTAL = 0.10, 1.05
INSIDE = "LORAX_BENCH_NAMESPACE"


@dataclass(frozen=True, slots=True)
class Row:
    """A link, and the adapter that it carries, of 84 MB · `rank` ÷ 16 ÷ `divisor`.

    `rate` is bytes per second of each connection, or if `shared` of all. `shaper` is Mbit/s of the
    kernel's token bucket filter instead, with a burst of 256 KB, and a `queue` of so many KB: 40 MB
    drop nothing.
    """

    rate: float = 0.0
    delay: float = 0.0
    divisor: int = 8
    shared: bool = False
    shaper: int = 0
    queue: int = 40_000
    rank: int = 16


ROWS = {
    "shared, 0.75 s": Row(14e6, shared=True),
    "shared, 0.75 s, 10 ms": Row(14e6, 0.01, shared=True),
    "shared, 3 s": Row(3.5e6, shared=True),
    "own 20 MB/s, 10 ms": Row(20e6, 0.01, 1),
    "own 50 MB/s, 2 ms": Row(50e6, 0.002, 1),
    "not limited": Row(divisor=1),
    "tbf 40 Mbit/s, 1 ms": Row(delay=0.001, shaper=40),
    "tbf 120 Mbit/s, 1 ms": Row(delay=0.001, shaper=120),
    "tbf 400 Mbit/s, 1 ms": Row(delay=0.001, shaper=400),
    "tbf 400 Mbit/s, 10 ms": Row(delay=0.01, shaper=400),
    "tbf 1 Gbit/s, 10 ms": Row(delay=0.01, divisor=1, shaper=1000),
    "tbf 1 Gbit/s, 10 ms, 336 MB": Row(delay=0.01, divisor=1, shaper=1000, rank=64),
    "tbf 4 Gbit/s, 1 ms": Row(delay=0.001, divisor=1, shaper=4000),
    "tbf 120 Mbit/s, 50 ms": Row(delay=0.05, shaper=120),
    "tbf 120 Mbit/s, 1 ms, 3 MB": Row(delay=0.001, shaper=120, rank=4),
    "tbf 120 Mbit/s, 1 ms, short queue": Row(delay=0.001, shaper=120, queue=512),
}


@contextmanager
def shaped(mbit: int, queue: int) -> Iterator[None]:
    """Limit this namespace's loopback."""
    if mbit:
        limits = f"rate {mbit}mbit burst 256kb limit {queue}kb"
        subprocess.run(f"tc qdisc replace dev lo root tbf {limits}".split(), check=True)
    try:
        yield
    finally:
        if mbit:
            subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True)


def layer_spans(weights: Path) -> list[list[tuple[int, int]]]:
    """Return where each layer's tensors are in the file."""
    content = weights.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    spans: list[list[tuple[int, int]]] = [[] for _ in range(LAYERS)]
    for name, tensor in json.loads(content[8:begin]).items():
        if name != "__metadata__":
            start, stop = tensor["data_offsets"]
            layer = int(name.partition(".layers.")[2].partition(".")[0])
            spans[layer].append((begin + start, begin + stop))
    return spans


def request_parts(port: int, weights: Path, connections: int) -> tuple[float, list[float]]:
    """Request the weights in so many equal parts at once.

    Return the seconds, and the share of them after which each layer was there.
    """
    nbytes = weights.stat().st_size
    came: list[list[tuple[int, float]]] = [[] for _ in range(connections)]

    def request(number: int) -> None:
        first, stop = (nbytes * n // connections for n in (number, number + 1))
        head = f"GET /a/{WEIGHTS} HTTP/1.1\r\nHost: x\r\nRange: bytes={first}-{stop - 1}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as server:
            server.sendall(head.encode())
            with server.makefile("rb") as answer:
                while answer.readline().strip():
                    pass
                while first < stop and (got := len(answer.read1(min(MiB, stop - first)))):
                    first += got
                    came[number].append((first, perf_counter() - start))

    start = perf_counter()
    with ThreadPoolExecutor(connections) as threads:
        list(threads.map(request, range(connections)))
    total = perf_counter() - start

    def arrival(start: int, stop: int) -> float:
        parts = range(start * connections // nbytes, (stop * connections - 1) // nbytes + 1)
        return max(
            next(at for until, at in came[n] if until >= min(stop, came[n][-1][0])) for n in parts
        )

    layers = [max(arrival(*span) for span in spans) / total for spans in layer_spans(weights)]
    return total, layers


async def load(link: Link, folder: Path, cache: Path, given: Options) -> tuple[float, list[float]]:
    """Return the seconds of a load by a new loader, and when each layer was there."""
    config = LoaderConfig(
        device_bytes=352 * MiB,
        max_slots=1,
        host_bytes=0,
        cache_dir=cache,
        io_threads=given.io_threads,
        allow=(Allow("http", "127.0.0.1", link.port),),
    )
    at: dict[int, float] = {}

    def note(event: Event) -> None:
        if isinstance(event, LayerReady):
            at.setdefault(event.layer, perf_counter())

    async with AdapterLoader(layouts.from_adapter(folder), config) as loader:
        loader.subscribe(note)
        start = perf_counter()
        async with loader.stream(link.url("a/")) as handle:
            await handle.layer_ready(LAYERS - 1)
        total = perf_counter() - start
    rmtree(cache)
    return total, [at[layer] - start for layer in range(LAYERS)]


def measure(name: str, row: Row, work: Path, given: Options) -> dict[str, object]:
    dtype = torch.bfloat16
    folder = write_adapter(
        work / name, rank=row.rank, dtype=dtype, seed=1, divisor=row.divisor
    ).path
    weights = folder / WEIGHTS
    files = {f"a/{file}": folder / file for file in (CONFIG, WEIGHTS)}
    fixed: dict[int, list[float]] = {connections: [] for connections in FIXED}
    fixed_layers: dict[int, list[list[float]]] = {connections: [] for connections in FIXED}
    totals, layers, requests = [], [], []
    with shaped(row.shaper, row.queue):
        for _ in range(given.rounds):
            with Link(files, rate=row.rate, delay=row.delay, shared=row.shared) as link:
                for connections in FIXED:
                    total, at = request_parts(link.port, weights, connections)
                    fixed[connections].append(total)
                    fixed_layers[connections].append(at)
                link.counts(reset=True)
                total, at = asyncio.run(load(link, folder, work / "cache", given))
                requests.append(link.counts()["requests"])
            totals.append(total)
            layers.append([seconds / total for seconds in at])
    nbytes = weights.stat().st_size
    rmtree(folder)
    best = min(map(statistics.median, fixed.values()))
    arrivals = medians(layers)
    return {
        "row": name,
        "bytes": nbytes,
        "rounds": given.rounds,
        "total_s": totals,
        "fixed_s": fixed,
        "of_best": statistics.median(totals) / best,
        "arrivals": arrivals,
        "fixed_arrivals": {number: medians(seen) for number, seen in fixed_layers.items()},
        "late": max(arrivals[round(part * LAYERS) - 1] - part for part in PARTS),
        "requests": statistics.median(requests),
    }


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def draw(path: Path, lines: Sequence[dict[str, object]]) -> None:
    """How many of the first layers are there, beside 1 and 16 plain requests of equal parts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(lines), 3.4), layout="constrained")
    panels = figure.subplots(1, len(lines), squeeze=False, sharey=True)[0]
    for panel, line in zip(panels, lines, strict=True):
        fixed = line["fixed_arrivals"]
        assert isinstance(fixed, dict)
        ours = line["arrivals"]
        assert isinstance(ours, list)
        shown = {"lorax_async": ours, "one plain request": fixed[1], "16 at once": fixed[16]}
        for (name, arrivals), style in zip(shown.items(), ("-", "--", ":"), strict=True):
            in_order = [0.0, *accumulate(arrivals, max)]
            panel.step(in_order, range(LAYERS + 1), style, where="post", label=name)
        panel.set(xlim=(0, 1.02), xlabel="share of the load", title=line["row"])
        panel.legend()
    panels[0].set_ylabel("first layers that are there")
    figure.savefig(path)


def print_rows(lines: Sequence[dict[str, object]]) -> None:
    headings = ("link", "total s", "÷ best fixed", "layer 1", *map(str, PARTS), "late", "requests")
    cells = []
    for line in lines:
        arrivals, totals = line["arrivals"], line["total_s"]
        assert isinstance(arrivals, list)
        assert isinstance(totals, list)
        shown = [arrivals[0], *(arrivals[round(part * LAYERS) - 1] for part in PARTS)]
        cells.append(
            [
                str(line["row"]),
                f"{statistics.median(totals):.2f}",
                f"{line['of_best']:.2f}",
                *(f"{part:.2f}" for part in shown),
                f"{line['late']:+.2f}",
                f"{line['requests']:.0f}",
            ]
        )
    title = f"share of a load after which layer k of {LAYERS} is there (late: ≤ {LATE:.2f} is the"
    print_table(f"{title} target; total: ≤ {TOTAL} of the best of 1, 4, 16)", headings, cells)


def enter_namespace() -> None:
    """Run this script in a network namespace of its own, if the machine permits that."""
    if INSIDE in os.environ:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return
    inside = ["unshare", "--user", "--map-root-user", "--net"]
    probe = "ip link set lo up && tc qdisc replace dev lo root tbf rate 1gbit burst 256kb limit 1mb"
    if all(map(which, ("unshare", "ip", "tc"))):
        tried = subprocess.run([*inside, "sh", "-c", probe], check=False, capture_output=True)
        if tried.returncode == 0:
            environment = os.environ | {INSIDE: "1"}
            os.execvpe(inside[0], [*inside, sys.executable, *sys.argv], environment)
    print("no namespace with a shaped loopback can be made here: the rows of tbf are left out")


def main() -> int:
    about = __doc__ or ""
    given = options("bench_layer_order", about, rounds=5, rows=tuple(ROWS))
    if any(ROWS[name].shaper for name in given.only):
        enter_namespace()
    print_environment(given)
    given.work.mkdir(parents=True, exist_ok=True)
    names = [name for name in given.only if not ROWS[name].shaper or INSIDE in os.environ]
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        lines = [measure(name, ROWS[name], Path(work), given) for name in names]
    print_rows(lines)
    write_json(given, lines)
    if given.plot is not None:
        draw(given.plot, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
