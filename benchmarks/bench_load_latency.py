"""How long from a path to an adapter that can be used, against a floor and against others."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import torch

import peers
from bench_options import Options, options, print_environment, write_json
from floors import COLD_PIECE, Arena, Threads
from harness import Contender, Loop, Measured, Row, Target, draw, measure, print_row, run_on
from load_stage import Ours, Stage, require_equal
from lorax_async import layouts
from lorax_async.config import LoaderConfig
from lorax_async.loader import AdapterLoader
from lorax_async.tracing import Trace
from work_files import write_adapter

SEEN_BEFORE = Target(1.15)
HEADER_MET = Target(1.25)
FIRST_SIGHT = {8: Target(1.9), 16: Target(1.4, over_ms=4.0), 64: Target(1.2)}
"""Target by rank: what precedes the copies costs the same for all ranks."""

CAST = Target(1.2)
COLD = Target(1.1)
TRACED = Target(1.02)

PEFT_EVERY = 3
"""PEFT takes some hundred ms a load: it takes part in every third round."""

_SLACK = 1 << 20


class Bench:
    """Builds the stage of a row and clears it away.

    Our loads are traced into `traces`, if given.
    """

    def __init__(self, given: Options, work: Path, traces: list[Trace] | None = None) -> None:
        self.options = given
        self._work = work
        self._traces = traces

    @asynccontextmanager
    async def stage(
        self,
        *,
        rank: int = 16,
        file: torch.dtype = torch.bfloat16,
        dtype: torch.dtype = torch.bfloat16,
        cold: bool = False,
    ) -> AsyncIterator[tuple[Stage, Ours]]:
        folder = Path(tempfile.mkdtemp(dir=self._work))
        threads = Threads(self.options.io_threads)
        try:
            current, other = (
                write_adapter(folder / name, rank=rank, dtype=file, seed=seed)
                for seed, name in enumerate(("current", "other"))
            )
            arena = Arena(current.file_size + _SLACK)
            stage = Stage(current, other, arena, threads, dtype, cold)
            config = LoaderConfig(
                dtype=dtype,
                device_bytes=current.nbytes * dtype.itemsize // file.itemsize + _SLACK,
                max_slots=1,
                io_threads=self.options.io_threads,
            )
            layout = layouts.from_adapter(other.path)
            async with AdapterLoader(layout, config) as loader:
                yield stage, Ours(loader, stage, self._traces)
        finally:
            threads.close()
            shutil.rmtree(folder)


def fresh_copies(stage: Stage, *, same_header: bool = False) -> Callable[[int], None]:
    """A new folder with new inodes for every round: nobody has seen it, the page cache has it.

    Its header is new as well, unless `same_header`: adapters that were trained alike have the same.
    """
    first = stage.current

    def new_round(number: int) -> None:
        if stage.current is not first:
            shutil.rmtree(stage.current.path)
        path = first.path.with_name(f"round {number}")
        stage.current = first.copied_to(path, None if same_header else number + 1)

    return new_round


def plain_peers(stage: Stage) -> list[Contender]:
    return [
        stage.contender("safetensors load_file + copy", peers.safetensors_load_file),
        stage.contender("safetensors safe_open loop", peers.safetensors_safe_open),
        stage.contender("Run:ai model streamer", peers.runai_streamer),
        stage.contender("fastsafetensors", peers.fastsafetensors),
    ]


def peft(stage: Stage) -> Contender:
    base = peers.PeftBase(stage.other)

    async def run() -> None:
        base.load(stage.current)

    def check() -> None:
        require_equal(base.tensors(), stage.expected)
        base.unload()

    return Contender("PEFT load_adapter", "peer", run, check, stage.fill_with_other, PEFT_EVERY)


def warm_floor(stage: Stage) -> Contender:
    return stage.floor(
        "threaded preadv", lambda: stage.threads.read(stage.current, stage.arena), stage.check_arena
    )


@asynccontextmanager
async def seen_before(bench: Bench) -> AsyncIterator[Row]:
    async with bench.stage() as (stage, ours):
        others = [*plain_peers(stage), peft(stage)]
        await ours.run()
        ours.check()
        yield Row(SEEN_BEFORE, [warm_floor(stage), ours.contender(), *others])


@asynccontextmanager
async def seen_before_alone(bench: Bench) -> AsyncIterator[Row]:
    async with bench.stage() as (stage, ours):
        await ours.run()
        ours.check()
        yield Row(SEEN_BEFORE, [warm_floor(stage), ours.contender()])


@asynccontextmanager
async def traced(bench: Bench) -> AsyncIterator[Row]:
    async with bench.stage() as (_, ours):
        await ours.run()
        ours.check()
        yield Row(TRACED, [ours.untraced(), ours.traced([])])


Build = Callable[[Bench], AbstractAsyncContextManager[Row]]


def first_sight(rank: int) -> Build:
    @asynccontextmanager
    async def build(bench: Bench) -> AsyncIterator[Row]:
        async with bench.stage(rank=rank) as (stage, ours):
            all = [warm_floor(stage), ours.contender(), *plain_peers(stage)]
            yield Row(FIRST_SIGHT[rank], all, fresh_copies(stage))

    return build


@asynccontextmanager
async def known_header(bench: Bench) -> AsyncIterator[Row]:
    async with bench.stage() as (stage, ours):
        rounds = fresh_copies(stage, same_header=True)
        yield Row(HEADER_MET, [warm_floor(stage), ours.contender()], rounds)


@asynccontextmanager
async def cast(bench: Bench) -> AsyncIterator[Row]:
    async with bench.stage(file=torch.float32) as (stage, ours):
        floor = stage.floor(
            "threaded preadv + copy_",
            lambda: stage.threads.read_and_cast(stage.current, stage.arena, stage.dtype),
            stage.check_arena,
        )
        peer = stage.contender("safetensors load_file + to", peers.safetensors_load_file)
        await ours.run()
        ours.check()
        yield Row(CAST, [floor, ours.contender(), peer])


@asynccontextmanager
async def cold(bench: Bench) -> AsyncIterator[Row]:
    async with bench.stage(cold=True) as (stage, ours):
        floor = stage.floor(
            "threaded preadv, buffered",
            lambda: stage.threads.read(stage.current, stage.arena, COLD_PIECE),
            stage.check_arena,
        )
        direct = stage.reference(
            "O_DIRECT reads",
            lambda: stage.threads.read_direct(stage.current, stage.arena),
            stage.check_whole_file,
        )
        all = [floor, direct, ours.contender(), *plain_peers(stage)]
        yield Row(COLD, all, fresh_copies(stage))


ROWS: dict[str, tuple[Loop, Build]] = {
    "warm, seen before": ("uvloop", seen_before),
    "warm, seen before, on asyncio": ("asyncio", seen_before_alone),
    "warm, first sight, rank 8": ("uvloop", first_sight(8)),
    "warm, first sight, rank 16": ("uvloop", first_sight(16)),
    "warm, first sight, rank 64": ("uvloop", first_sight(64)),
    "warm, first sight, rank 16, header met before": ("uvloop", known_header),
    "warm, F32 file to bf16": ("uvloop", cast),
    "cold cache, first sight": ("uvloop", cold),
    "warm, seen before, traced": ("uvloop", traced),
}


def row_of(
    bench: Bench, name: str
) -> tuple[Loop, Callable[[], Coroutine[None, None, list[Measured]]]]:
    loop, build = ROWS[name]

    async def run() -> list[Measured]:
        async with build(bench) as row:
            return await measure(name, row, loop, bench.options.rounds)

    return loop, run


def main() -> int:
    given = options("bench_load_latency", __doc__ or "", rounds=15, rows=tuple(ROWS))
    given.environment.update(peers.require_all())
    print_environment(given)
    results: list[Measured] = []
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        bench = Bench(given, Path(work))
        for name in given.only:
            loop, run = row_of(bench, name)
            row = run_on(loop, run)
            print_row(f"{name} [{loop}, {given.rounds} rounds]", row)
            write_json(given, (result.line() for result in row))
            results += row
    if given.plot is not None:
        draw(given.plot, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
