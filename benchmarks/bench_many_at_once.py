"""How long until 16 adapters that were asked for at once can be used, against the reads alone."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench_options import Options, options, print_environment, write_json
from floors import Arena, Threads
from harness import (
    Contender,
    Loop,
    Measured,
    Row,
    Target,
    WrongBytesError,
    draw,
    measure,
    print_row,
    run_on,
)
from load_stage import check_handle
from lorax_async import layouts
from lorax_async.config import LoaderConfig
from lorax_async.handle import AdapterHandle
from lorax_async.lifecycle.arena import Extent
from lorax_async.loader import AdapterLoader
from work_files import AdapterFolder, write_adapter

ADAPTERS = 16
PER_BYTE = Target(1.15)
STALE = 0xFB
"""Fills every destination before a timed run: bytes of an earlier one cannot pass for loaded."""


class ManyOurs:
    """`asyncio.gather` of loads, on a loader with room for all; they were seen before."""

    def __init__(self, loader: AdapterLoader, folders: Sequence[AdapterFolder]) -> None:
        self._loader = loader
        self._folders = folders
        self._handles: list[AdapterHandle] = []

    async def empty_arena(self) -> None:
        for folder in self._folders:
            await self._loader.unload(folder.path)
        whole = Extent(0, self._loader.config.device_bytes)
        self._loader.device.host_view(whole).fill_(STALE)

    async def run(self) -> None:
        loads = (self._loader.load(folder.path) for folder in self._folders)
        self._handles = await asyncio.gather(*loads)

    def check(self) -> None:
        for handle, folder in zip(self._handles, self._folders, strict=True):
            check_handle(handle, folder.tensors)
            handle.release()

    def contender(self) -> Contender:
        return Contender("lorax_async load × 16", "ours", self.run, self.check, self.empty_arena)


class ManyPlain:
    """The floor and a peer, into one arena, adapter after adapter."""

    def __init__(self, folders: Sequence[AdapterFolder], io_threads: int) -> None:
        self.folders = folders
        self._threads = Threads(io_threads)
        self._pool = ThreadPoolExecutor(io_threads)
        self._arena = Arena(sum(folder.nbytes for folder in folders))
        self._starts = [n * folders[0].nbytes for n in range(len(folders))]

    async def fill(self) -> None:
        self._arena.tensor.fill_(STALE)

    def check(self) -> None:
        for start, folder in zip(self._starts, self.folders, strict=True):
            if not torch.equal(self._arena.tensor[start : start + folder.nbytes], folder.data):
                raise WrongBytesError(f"{folder.path.name} is not what the file says")

    async def read(self) -> None:
        self._threads.read_many(self.folders, self._arena)

    async def load_file(self) -> None:
        loop = asyncio.get_running_loop()
        numbers = range(len(self.folders))
        await asyncio.gather(*(loop.run_in_executor(self._pool, self._load, n) for n in numbers))

    def _load(self, number: int) -> None:
        folder, at = self.folders[number], self._starts[number]
        loaded = load_file(folder.weights)
        for name, tensor in folder.tensors.items():
            stop = at + tensor.nbytes
            self._arena.tensor[at:stop].view(tensor.dtype).copy_(loaded[name].view(-1))
            at = stop

    def contenders(self) -> list[Contender]:
        peer = "safetensors load_file + copy in threads"
        return [
            Contender("threaded preadv", "floor", self.read, self.check, self.fill),
            Contender(peer, "peer", self.load_file, self.check, self.fill),
        ]

    def close(self) -> None:
        self._threads.close()
        self._pool.shutdown()


@asynccontextmanager
async def many(given: Options, plain: ManyPlain) -> AsyncIterator[Row]:
    folders = plain.folders
    config = LoaderConfig(
        device_bytes=sum(folder.nbytes for folder in folders),
        max_slots=len(folders),
        io_threads=given.io_threads,
    )
    async with AdapterLoader(layouts.from_adapter(folders[0].path), config) as loader:
        ours = ManyOurs(loader, folders)
        await ours.run()
        ours.check()
        yield Row(PER_BYTE, [*plain.contenders(), ours.contender()])


ROWS: dict[str, Loop] = {
    f"{ADAPTERS} at once, warm, seen before": "uvloop",
    f"{ADAPTERS} at once, warm, seen before, on asyncio": "asyncio",
}


def main() -> int:
    given = options("bench_many_at_once", __doc__ or "", rounds=15, rows=tuple(ROWS))
    print_environment(given)
    results: list[Measured] = []
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        folders = [
            write_adapter(Path(work) / f"{n}", rank=16, dtype=torch.bfloat16, seed=n, mark=n)
            for n in range(ADAPTERS)
        ]
        plain = ManyPlain(folders, given.io_threads)
        for name in given.only:

            async def run(name: str = name) -> list[Measured]:
                async with many(given, plain) as row:
                    return await measure(name, row, ROWS[name], given.rounds)

            row = run_on(ROWS[name], run)
            print_row(f"{name} [{ROWS[name]}, {given.rounds} rounds]", row)
            write_json(given, (result.line() for result in row))
            results += row
        plain.close()
    if given.plot is not None:
        draw(given.plot, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
