"""How long a remote adapter takes to come, against raw sockets that fetch the same bytes."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

import floors
import remote_peers as peers
from bench_options import Options, options, print_environment, write_json
from harness import (
    Contender,
    Loop,
    Measured,
    Row,
    Target,
    draw,
    measure,
    print_row,
    print_table,
    run_on,
)
from link import Link
from lorax_async.tracing import Trace
from peers import safetensors_load_file
from remote_stage import STALLED_LOADS, Loads, Noted, Stage
from work_files import CONFIG, WEIGHTS, AdapterFolder, write_adapter

OURS = "lorax_async load"
FIRST_LAYER = Target(0.08)
CALLER_MS = 4.0
LOOP: Loop = "uvloop"

Costs = dict[str, dict[str, object]]
"""Contender → column → value."""


@dataclass(frozen=True, slots=True)
class Question:
    """Bytes/s of a connection (0: no throttle), seconds before each response, and our target.

    `published`: until the digest is known and the cache has it. `cached`: the cache has it already.
    `stalling`: beside loads from a server that stalls, against the same load alone.
    """

    rate: float = 0.0
    delay: float = 0.0
    target: Target | None = None
    busy_loop: bool = False
    published: bool = False
    cached: bool = False
    stalling: bool = False


ROWS = {
    "20 MB/s per connection, 10 ms, to RESIDENT": Question(20e6, 0.010, Target(1.08)),
    "20 MB/s per connection, 10 ms, beside a busy loop": Question(20e6, 0.010, busy_loop=True),
    "unthrottled, to RESIDENT": Question(target=Target(1.6)),
    "unthrottled, to published": Question(target=Target(3.0), published=True),
    "from the disk cache, to RESIDENT": Question(target=Target(1.5), cached=True),
    "20 MB/s per connection, 10 ms, beside a server that stalls": Question(
        20e6, 0.010, Target(1.10), stalling=True
    ),
}


class Bench:
    """The adapters, the links and the files of a row.

    Our loads are traced into `traces`, if given.
    """

    def __init__(self, given: Options, work: Path, traces: list[Trace] | None = None) -> None:
        self.options = given
        self._traces = traces
        self._work = work
        self.folder = write_adapter(work / "a", rank=16, dtype=torch.bfloat16, seed=1)
        self._small = write_adapter(work / "small", rank=1, dtype=torch.bfloat16, seed=2)

    @asynccontextmanager
    async def row(self, asked: Question) -> AsyncIterator[tuple[Row, Stage, Loads]]:
        given = self.options
        with ExitStack() as ends:
            files = {**_served(self.folder), **peers.served(self.folder.weights)}
            link = ends.enter_context(Link(files, rate=asked.rate, delay=asked.delay))
            other = ends.enter_context(Link(_served(self._small), rate=0.0, delay=0.0))
            stage = Stage(self.folder, link, io_threads=given.io_threads, busy_loop=asked.busy_loop)
            stalling = self._stalling_link(ends) if asked.stalling else None
            loads = Loads(
                *(stage, other, self._small, self._work / "cache"),
                cached=asked.cached,
                stalling=stalling,
                traces=self._traces,
            )
            build = self._from_the_cache if asked.cached else self._from_afar
            if stalling is not None:
                build = partial(self._alone, other)
            contenders = build(stage, asked, ends)
            run = loads.run_to_published if asked.published else loads.run
            ours = stage.contender(
                OURS, "ours", run, lambda: None, prepare=loads.prepare, settle=loads.settle
            )
            yield Row(asked.target, [contenders[0], ours, *contenders[1:]]), stage, loads

    def _stalling_link(self, ends: ExitStack) -> Link:
        """Of 16 adapters: of each file 1,000 bytes come, and then nothing."""
        files = {
            f"{n}/{name}": path
            for n in range(STALLED_LOADS)
            for name, path in _served(self.folder).items()
        }
        return ends.enter_context(Link(files, rate=0.0, delay=0.0, stall_after=1_000))

    def _alone(self, other: Link, stage: Stage, _: Question, __: ExitStack) -> list[Contender]:
        alone = Loads(stage, other, self._small, self._work / "alone")
        prepare, settle = alone.prepare, alone.settle
        return [
            stage.contender(
                f"{OURS}, alone", "floor", alone.run, lambda: None, prepare=prepare, settle=settle
            )
        ]

    def _from_the_cache(self, stage: Stage, _: Question, ends: ExitStack) -> list[Contender]:
        threads = floors.Threads(self.options.io_threads)
        ends.callback(threads.close)

        async def read() -> None:
            threads.read(stage.folder, stage.arena)

        async def load_file() -> None:
            safetensors_load_file(stage.folder.weights, stage.places)

        return [
            stage.contender("threaded preadv", "floor", read, stage.check_places),
            stage.contender("safetensors load_file + copy", "peer", load_file, stage.check_places),
        ]

    def _from_afar(self, stage: Stage, asked: Question, ends: ExitStack) -> list[Contender]:
        threads = peers.Threads()
        ends.callback(threads.close)
        file = os.open(self._work / "file", os.O_RDWR | os.O_CREAT, 0o600)
        ends.callback(os.close, file)
        floor = peers.floor(stage, threads)
        if asked.published:
            return [floor, peers.into_a_file(stage, threads, file)]
        some = [
            floor,
            peers.http_client(stage, threads),
            peers.aiohttp(stage),
            peers.obstore(stage),
        ]
        if asked.busy_loop:
            return some
        into_a_file = peers.into_a_file(stage, threads, file)
        return [*some, into_a_file, peers.hub(stage), peers.runai(stage)]


def _served(folder: AdapterFolder) -> dict[str, Path]:
    return {WEIGHTS: folder.weights, CONFIG: folder.path / CONFIG}


def costs(name: str, noted: Noted, asked: Question) -> dict[str, object]:
    """What a contender's runs cost, besides their time."""
    counts = {key: _middle([each[key] for each in noted.counts]) for key in noted.counts[0]}
    found: dict[str, object] = {
        "requests": counts["requests"],
        "connections": counts["connections"],
        "in sequence": counts["in_sequence"],
    }
    if asked.busy_loop:
        late = sorted(noted.late)
        tail = late[min(len(late) - 1, int(0.999 * len(late)))]
        return {**found, "tick late by ms": _middle(late), "p99.9": tail, "most": late[-1]}
    spent = _middle(noted.caller)
    found |= {"caller ms": spent, "min": min(noted.caller), "max": max(noted.caller)}
    judged = name == OURS and asked.target is not None and asked.rate and not asked.stalling
    over = spent - CALLER_MS
    reached = "reached" if over <= 0 else f"missed by {over:.1f} ms"
    found["target"] = f"≤ {CALLER_MS:g}: {reached}" if judged else ""
    return found


def first_layer(loads: Loads, asked: Question) -> dict[str, object]:
    """When layer 0 was ready, as a part of the time from the header to RESIDENT."""
    share = _middle(loads.first_layer)
    judged = bool(asked.rate) and not asked.busy_loop and not asked.stalling
    return {
        "layer 0 at": share,
        "earliest": min(loads.first_layer),
        "last": max(loads.first_layer),
        "target": f"{FIRST_LAYER}: {FIRST_LAYER.verdict(share, 0)}" if judged else "",
    }


def _middle(values: Sequence[float]) -> float:
    return float(statistics.median(values))


async def bench(name: str, bench: Bench) -> tuple[list[Measured], Costs, dict[str, object]]:
    asked = ROWS[name]
    async with bench.row(asked) as (row, stage, loads):
        results = await measure(name, row, LOOP, bench.options.rounds)
    more = {
        one.contender: costs(one.contender, stage.noted[one.contender], asked) for one in results
    }
    return results, more, first_layer(loads, asked)


def lines(
    row: Sequence[Measured], more: Costs, first: dict[str, object]
) -> Iterator[dict[str, object]]:
    for one in row:
        layer = first if one.contender == OURS else None
        yield {**one.line(), "costs": more[one.contender], "first_layer": layer}


def print_costs(title: str, rows: Costs) -> None:
    first = next(iter(rows.values()))
    cells = [(who, *map(_cell, found.values())) for who, found in rows.items()]
    print_table(title, ("contender", *first), cells)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> int:
    given = options("bench_remote", __doc__ or "", rounds=15, rows=tuple(ROWS))
    os.environ.update(peers.credentials())
    found = {name: version(name) for name in peers.require_all()}
    given.environment.update(found)
    print_environment(given)
    results: list[Measured] = []
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        stage = Bench(given, Path(work))
        for name in given.only:

            async def run(name: str = name) -> tuple[list[Measured], Costs, dict[str, object]]:
                return await bench(name, stage)

            row, more, first = run_on(LOOP, run)
            print_row(f"{name} [{LOOP}, {given.rounds} rounds]", row)
            print_costs("counted at the server, and the caller's thread", more)
            print_costs("(layer 0 − header) ÷ (resident − header)", {OURS: first})
            write_json(given, lines(row, more, first))
            results += row
    if given.plot is not None:
        draw(given.plot, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
