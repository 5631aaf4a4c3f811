"""How others fetch the same file: raw sockets, which are the floor, and clients.

All know how large the file is. Those that take ranges ask as the floor does: for the config and for
the head, both at once, then for 16 balanced ranges, all at once.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from time import sleep
from typing import Any

from harness import Contender, WrongBytesError
from lorax_async.remote.base import FIRST_BYTES
from peers import require, safetensors_load_file
from remote_stage import CONNECTIONS, Stage
from work_files import CONFIG, WEIGHTS

DISTRIBUTIONS = {
    "aiohttp": "aiohttp",
    "obstore": "obstore",
    "huggingface_hub": "huggingface_hub",
    "runai_model_streamer": "runai-model-streamer",
    "runai_model_streamer_s3": "runai-model-streamer-s3",
}

SINGLE_STREAM_EVERY = 5
"""One connection takes seconds on the throttled link: it takes part in every fifth round."""

_CHUNK = 256 << 10
_BUCKET = "bucket"


Asked = tuple[str, int, int]
"""Which bytes of which file."""


def waves(stage: Stage) -> tuple[list[Asked], list[Asked]]:
    """What is asked for first, and then."""
    config = (stage.folder.path / CONFIG).stat().st_size
    size = stage.nbytes - FIRST_BYTES
    cuts = [FIRST_BYTES + size * n // CONNECTIONS for n in range(CONNECTIONS + 1)]
    first = [(CONFIG, 0, config), (WEIGHTS, 0, FIRST_BYTES)]
    return first, [(WEIGHTS, *each) for each in pairwise(cuts)]


def place_of(stage: Stage, name: str) -> memoryview:
    """Where a file goes: the config is thrown away."""
    return stage.file if name == WEIGHTS else memoryview(bytearray(64 << 10))


class Threads:
    """As many as there are connections, started before any timer."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(CONNECTIONS)
        list(self._pool.map(sleep, [0.01] * CONNECTIONS))

    async def fetch(self, stage: Stage, work: Callable[[str, int, int], None]) -> None:
        loop = asyncio.get_running_loop()
        for wave in waves(stage):
            await asyncio.gather(*(loop.run_in_executor(self._pool, work, *one) for one in wave))

    def close(self) -> None:
        self._pool.shutdown()


class Sockets:
    """The floor: config and head at once, as the loader asks; then 16 ranges on fresh connections.

    What comes is read into the arena, or by way of a buffer into a file.
    """

    def __init__(self, stage: Stage, threads: Threads, file: int | None = None) -> None:
        self._stage = stage
        self._threads = threads
        self._file = file

    async def run(self) -> None:
        await self._threads.fetch(self._stage, self._fetch)

    def _fetch(self, name: str, start: int, stop: int) -> None:
        asked = f"GET /{name} HTTP/1.1\r\nHost: x\r\nRange: bytes={start}-{stop - 1}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self._stage.link.port)) as connected:
            connected.sendall(asked.encode())
            head = b""
            while b"\r\n\r\n" not in head:
                head += connected.recv(1 << 10)
            body = head.partition(b"\r\n\r\n")[2]
            place = place_of(self._stage, name)
            place[start : start + len(body)] = body
            at, file = start + len(body), self._file
            while file is None and at < stop:
                at += connected.recv_into(place[at:stop], 0, socket.MSG_WAITALL)
            if file is not None and name == WEIGHTS:
                _write(file, connected, body, start, stop)


def _write(file: int, connected: socket.socket, body: bytes, start: int, stop: int) -> None:
    at = start + os.pwrite(file, body, start)
    buffer = memoryview(bytearray(_CHUNK))
    while at < stop:
        part = buffer[: min(_CHUNK, stop - at)]
        got = connected.recv_into(part, 0, socket.MSG_WAITALL)
        at += os.pwrite(file, part[:got], at)


def floor(stage: Stage, threads: Threads) -> Contender:
    sockets = Sockets(stage, threads)
    return stage.contender("16 balanced raw sockets", "floor", sockets.run, stage.check_file)


def into_a_file(stage: Stage, threads: Threads, file: int) -> Contender:
    """The floor's twin, which leaves a file, as every cache on disk does."""
    sockets = Sockets(stage, threads, file)

    async def empty() -> None:
        os.ftruncate(file, 0)
        os.posix_fallocate(file, 0, stage.nbytes)

    def check() -> None:
        if os.pread(file, stage.nbytes, 0) != stage.folder.weights.read_bytes():
            raise WrongBytesError("the file is not the one that was served")

    name = "16 raw sockets into a file, alone"
    return stage.contender(name, "peer", sockets.run, check, prepare=empty)


def http_client(stage: Stage, threads: Threads) -> Contender:
    def fetch(name: str, start: int, stop: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", stage.link.port)
        try:
            connection.request("GET", f"/{name}", headers=_ranged(start, stop))
            response, place = connection.getresponse(), place_of(stage, name)
            while start < stop:
                start += response.readinto(place[start:stop])
        finally:
            connection.close()

    async def run() -> None:
        await threads.fetch(stage, fetch)

    name = "http.client readinto, 16 threads, download alone"
    return stage.contender(name, "peer", run, stage.check_file)


def _ranged(start: int, stop: int) -> dict[str, str]:
    return {"Range": f"bytes={start}-{stop - 1}"}


def aiohttp(stage: Stage) -> Contender:
    package = require("aiohttp")

    async def fetch(session: Any, name: str, start: int, stop: int) -> None:
        place = place_of(stage, name)
        url = stage.link.url(name)
        async with session.get(url, headers=_ranged(start, stop)) as response:
            async for part in response.content.iter_any():
                place[start : start + len(part)] = part
                start += len(part)

    async def run() -> None:
        async with package.ClientSession() as session:
            for wave in waves(stage):
                await asyncio.gather(*(fetch(session, *each) for each in wave))

    name = "aiohttp, 16 ranges, download alone"
    return stage.contender(name, "peer", run, stage.check_file)


def obstore(stage: Stage) -> Contender:
    """Its buffers stay where they are: nothing is copied."""
    package = require("obstore.store")
    parts: list[Any] = []

    async def run() -> None:
        options = {"allow_http": True}
        store = package.HTTPStore.from_url(stage.link.url(""), client_options=options)
        for wave in waves(stage):
            asked = (store.get_range_async(name, start=a, end=b) for name, a, b in wave)
            parts.extend(await asyncio.gather(*asked))

    def check() -> None:
        if b"".join(map(bytes, parts[1:])) != stage.folder.weights.read_bytes():
            raise WrongBytesError("obstore's parts are not what was served")
        parts.clear()

    name = "obstore get_range_async × 16, download alone"
    return stage.contender(name, "peer", run, check)


def hub(stage: Stage) -> Contender:
    """huggingface_hub's own download, one stream, then safetensors and a copy of each tensor."""
    download = require("huggingface_hub.file_download")

    def load() -> None:
        with tempfile.NamedTemporaryFile(dir=stage.folder.path.parent) as file:
            download.http_get(stage.link.url(WEIGHTS), file, expected_size=stage.nbytes)
            file.flush()
            safetensors_load_file(Path(file.name), stage.places)

    async def run() -> None:
        await asyncio.to_thread(load)

    name = "huggingface_hub's download + safetensors + copy"
    return stage.contender(name, "peer", run, stage.check_places, every=SINGLE_STREAM_EVERY)


def runai(stage: Stage) -> Contender:
    """Run:ai model streamer on S3, with its defaults; the link answers what it asks of a bucket."""
    streamer = require("runai_model_streamer")
    require("runai_model_streamer_s3")

    def load() -> None:
        os.environ["AWS_ENDPOINT_URL"] = stage.link.url("").rstrip("/")
        with streamer.SafetensorsStreamer() as stream:
            stream.stream_file(f"s3://{_BUCKET}/{WEIGHTS}", owned=False)
            for name, tensor in stream.get_tensors():
                stage.places[name].copy_(tensor)

    async def run() -> None:
        await asyncio.to_thread(load)

    name = "Run:ai streamer on S3 + copy"
    return stage.contender(name, "peer", run, stage.check_places)


def served(weights: Path) -> dict[str, Path]:
    """What the link has to serve for the peers' sake alone."""
    return {f"{_BUCKET}/{WEIGHTS}": weights}


def credentials() -> dict[str, str]:
    """What the streamer wants to find in the environment, for a server that asks for none."""
    return {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
    }


def require_all() -> list[str]:
    """Import every peer; their distributions."""
    for module in DISTRIBUTIONS:
        require(module)
    return list(DISTRIBUTIONS.values())
