"""How long a remote adapter takes to come, against raw sockets that fetch the same bytes."""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench_options import Options, options, print_environment, write_json
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
    print_table,
    run_on,
)
from link import Link
from lorax_async.core.spans import Span
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.file_sink import FileSink
from lorax_async.io.http.settings import Address, HttpSettings
from lorax_async.io.http.target import Target as RemoteFile
from lorax_async.io.http.urls import Url, parse_url
from work_files import LAYERS, AdapterFolder, write_adapter

CONNECTIONS = 16
HEAD_BYTES = 1 << 20
"""The first request brings so much, and with it the header: of the floor, too."""

CHUNK = 256 << 10
FIRST_LAYER = Target(0.10)

ROWS: dict[str, tuple[float, float, Target]] = {
    "20 MB/s per connection, 10 ms, to a file": (20e6, 0.010, Target(1.10)),
    "unthrottled, to a file": (0.0, 0.0, Target(1.5)),
}
"""Rate per connection, delay before each response, and what the design asks of our row."""


class LoopbackToo:
    """Rules for a server on this machine."""

    def allows(self, url: Url, hop: int) -> bool:  # noqa: ARG002 - there is one
        return True

    def allows_address(self, url: Url, address: Address) -> bool:  # noqa: ARG002
        return address.is_loopback


class Destination:
    """A file of the right size, whose bytes are gone before each run."""

    def __init__(self, path: Path, wanted: AdapterFolder) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.wanted = wanted.weights.read_bytes()

    async def empty(self) -> None:
        os.ftruncate(self.fd, 0)
        os.posix_fallocate(self.fd, 0, len(self.wanted))

    def check(self) -> None:
        if os.pread(self.fd, len(self.wanted), 0) != self.wanted:
            raise WrongBytesError("the file is not the one that was served")

    def close(self) -> None:
        os.close(self.fd)


class Sockets:
    """The floor: the head, then one balanced range on each of 16 fresh connections."""

    def __init__(self, link: Link, name: str, place: Destination) -> None:
        self._address = ("127.0.0.1", link.port)
        self._name = name
        self._place = place
        self._threads = ThreadPoolExecutor(CONNECTIONS)
        list(self._threads.map(time.sleep, [0.01] * CONNECTIONS))

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._threads, self._range, 0, HEAD_BYTES)
        rest = len(self._place.wanted) - HEAD_BYTES
        cuts = [HEAD_BYTES + rest * n // CONNECTIONS for n in range(CONNECTIONS + 1)]
        ranges = pairwise(cuts)
        await asyncio.gather(
            *(loop.run_in_executor(self._threads, self._range, *each) for each in ranges)
        )

    def _range(self, start: int, stop: int) -> None:
        with socket.create_connection(self._address) as connected:
            asked = (
                f"GET /{self._name} HTTP/1.1\r\nHost: x\r\nRange: bytes={start}-{stop - 1}\r\n\r\n"
            )
            connected.sendall(asked.encode())
            head = b""
            while b"\r\n\r\n" not in head:
                head += connected.recv(CHUNK)
            body = head.partition(b"\r\n\r\n")[2]
            at = start + os.pwrite(self._place.fd, body, start)
            buffer = memoryview(bytearray(CHUNK))
            while at < stop:
                part = buffer[: min(CHUNK, stop - at)]
                got = connected.recv_into(part, 0, socket.MSG_WAITALL)
                at += os.pwrite(self._place.fd, part[:got], at)

    def close(self) -> None:
        self._threads.shutdown()


class Engine:
    """Ours: a new engine for every run, so that its connections are as fresh as the floor's."""

    def __init__(self, link: Link, name: str, place: Destination, groups: list[list[Span]]) -> None:
        self._file = RemoteFile(parse_url(link.url(name)), name, rules=LoopbackToo())
        self._place = place
        self._groups = groups
        self._engine: RangeEngine | None = None
        self.first_layer: list[float] = []
        self.caller: list[float] = []

    async def prepare(self) -> None:
        await self._place.empty()
        self.close()
        self._engine = RangeEngine(HttpSettings(connections=CONNECTIONS, proxies={}))

    async def run(self) -> None:
        assert self._engine is not None
        cpu = time.thread_time()
        answer = await _result(self._engine.ask(self._file, HEAD_BYTES))
        header = time.perf_counter()
        os.pwrite(self._place.fd, answer.start, 0)
        arrived: dict[int, float] = {}

        def note(group: int) -> None:
            arrived[group] = time.perf_counter()

        sink, have = FileSink(self._place.fd), [(0, HEAD_BYTES)]
        job = self._engine.download(answer, self._groups, sink, note, first=2, have=have)
        await _result(job)
        ended = time.perf_counter()
        self.first_layer.append((arrived[1] - header) / (ended - header))
        self.caller.append((time.thread_time() - cpu) * 1e3)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


async def _result(job: Any) -> Any:
    return await asyncio.wrap_future(job.done)


def layer_groups(folder: AdapterFolder) -> list[list[Span]]:
    """Groups −1 … 32 of the file: nothing before the layers, one span each, nothing after."""
    groups: list[list[Span]] = [[] for _ in range(LAYERS + 2)]
    at = folder.data_start
    for name, tensor in folder.tensors.items():
        layer = groups[1 + int(name.split(".layers.")[1].split(".")[0])]
        start = layer.pop()[0] if layer else at
        at += tensor.nbytes
        layer.append((start, at))
    return groups


async def bench(
    name: str, given: Options, folder: AdapterFolder, work: Path
) -> tuple[list[Measured], Sequence[str]]:
    rate, delay, target = ROWS[name]
    place = Destination(work / "destination", folder)
    with Link({"weights": folder.weights}, rate=rate, delay=delay) as link:
        floor = Sockets(link, "weights", place)
        ours = Engine(link, "weights", place, layer_groups(folder))
        label = f"{CONNECTIONS} balanced raw sockets"
        contenders = [
            Contender(label, "floor", floor.run, place.check, place.empty),
            Contender("range engine", "ours", ours.run, place.check, ours.prepare),
        ]
        link.counts(reset=True)
        results = await measure(name, Row(target, contenders), "uvloop", given.rounds)
        counts = link.counts()
        ours.close()
        floor.close()
    place.close()
    share = statistics.median(ours.first_layer)
    verdict = FIRST_LAYER.verdict(share, 0.0) if rate else "no target"
    requests = counts["requests"] / given.rounds - CONNECTIONS - 1
    extra = (
        *(f"{share:.3f}", f"{min(ours.first_layer):.3f}", f"{max(ours.first_layer):.3f}"),
        *(str(FIRST_LAYER) if rate else "", verdict, f"{requests:.1f}"),
        f"{statistics.median(ours.caller):.2f}",
    )
    return results, extra


HEADINGS = ("layer 0 at", "min", "max", "target", "verdict", "requests", "caller CPU ms")
LOOP: Loop = "uvloop"


def main() -> int:
    given = options("bench_remote", __doc__ or "", rounds=15, rows=tuple(ROWS))
    print_environment(given)
    results: list[Measured] = []
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.work) as work:
        folder = write_adapter(Path(work) / "a", rank=16, dtype=torch.bfloat16, seed=1)
        for name in given.only:

            async def run(name: str = name) -> tuple[list[Measured], Sequence[str]]:
                return await bench(name, given, folder, Path(work))

            row, extra = run_on(LOOP, run)
            print_row(f"{name} [{LOOP}, {given.rounds} rounds]", row)
            print_table("range engine: (layer 0 − header) ÷ (all − header)", HEADINGS, [extra])
            more = {"range engine": dict(zip(HEADINGS, extra, strict=True))}
            write_json(given, ({**r.line(), **more.get(r.contender, {})} for r in row))
            results += row
    if given.plot is not None:
        draw(given.plot, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
