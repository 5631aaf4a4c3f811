"""One server that changes its mind, one cache, and loads of which each is right or refused."""

import asyncio
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import torch
from fault_server import Asked, Client, FaultServer, Hangup
from safetensors.torch import load
from user_loads import at, contents, loader, written
from web_folder import CONFIG, WEIGHTS, Folder, name_of

from lorax_async import AdapterError, AdapterHandle, AdapterLoader

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

LAYERS = 4
Files = dict[str, bytes]


@dataclass
class ChangingFolder(Folder):
    etag: str | None = '"fixed"'
    ranges: bool = True
    stop_at: int | None = None
    """Before which byte of the weights each answer ends."""
    status: str | None = None
    silent: bool = False

    def serve(self, asked: Asked, client: Client) -> None:
        name, span = name_of(asked), asked.span if self.ranges else None
        data, head = self.files[name], [] if self.etag is None else [f"ETag: {self.etag}"]
        start, stop = span or (0, len(data))
        if self.status is not None:
            client.head(self.status, "Content-Length: 0")
        elif start >= len(data):
            client.head("416 No", f"Content-Range: bytes */{len(data)}", "Content-Length: 0")
        else:
            stop = min(stop, len(data))
            if span is None:
                client.head("200 OK", f"Content-Length: {len(data)}", *head)
            else:
                client.part(start, stop, len(data), *head)
            if self.silent:
                client.stall()
            cut = name == WEIGHTS and self.stop_at is not None and self.stop_at < stop
            client.send(data[start : self.stop_at if cut else stop])
            if cut:
                raise Hangup

    def change(self, random: Random) -> None:
        size = len(self.files[WEIGHTS])
        self.stop_at = random.choice([None, None, random.randrange(size), size * 3 // 4])
        self.status = random.choice([None] * 6 + ["503 Busy", "404 Gone", "403 No", "500 Oh"])
        self.silent, self.ranges = random.random() < 0.05, random.random() < 0.8
        self.etag = random.choice(['"fixed"'] * 5 + ['"other"', 'W/"weak"', None])

    def become_right(self) -> None:
        self.stop_at = self.status = None
        self.silent, self.ranges = False, True


def odd_versions(folder: Path, whole: Files) -> list[Files]:
    """What a server may have before it is right. The last two can be loaded, and are what they are."""
    weights, config = whole[WEIGHTS], whole[CONFIG]
    header = 8 + int.from_bytes(weights[:8], "little")
    half = (header + len(weights)) // 2
    return [
        {**whole, WEIGHTS: bytes(len(weights))},
        {**whole, WEIGHTS: weights.replace(b'"F32"', b'"F33"')},
        {**whole, WEIGHTS: weights[:header]},
        {**whole, WEIGHTS: weights + b"\0"},
        {**whole, CONFIG: config.replace(b'"LORA"', b'"LOHA"')},
        {**whole, CONFIG: config[:-1]},
        contents(written(folder / "deeper", 8, layers=LAYERS + 1, rank=96)),
        contents(written(folder / "other rank", 9, layers=LAYERS, rank=48)),
        {**whole, WEIGHTS: weights[:half].ljust(len(weights), b"\0")},
    ]


def is_of(handle: AdapterHandle, files: Files) -> bool:
    """Whether all on the device is what safetensors' own reader finds in the file."""
    try:
        saved = load(files[WEIGHTS])
    except Exception:
        return False
    mine = {
        f"base_model.model.{name}.lora_{part}.weight": getattr(module, part.lower())
        for name, module in handle.modules.items()
        for part in "AB"
    }
    return saved.keys() == mine.keys() and all(
        torch.equal(mine[name], saved[name]) for name in mine
    )


@dataclass
class RandomLoads:
    server: FaultServer
    origin: ChangingFolder
    folder: Path
    random: Random
    whole: list[Files]
    odd: list[Files]
    loader: AdapterLoader | None = None
    served: list[Files] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.server.url("/adapter/")

    def serve(self, files: Files) -> None:
        self.origin.files = dict(files)
        self.served.append(files)

    async def turn(self) -> None:
        """Once the server is right, the second load at the latest is too."""
        for _ in range(self.random.randrange(1, 4)):
            self.serve(self.random.choice([*self.whole, *self.odd]))
            self.origin.change(self.random)
            with suppress(AdapterError, TimeoutError):
                calls = [self.load] * 5 + [self.cancel, self.hint, self.kill]
                await self.random.choice(calls)()
            if self.random.random() < 0.3:
                await self.close()
            if self.random.random() < 0.05:
                shutil.rmtree(self.folder / "cache", ignore_errors=True)
        self.origin.become_right()
        self.serve(self.random.choice(self.whole))
        try:
            await self.load(20)
        except AdapterError:
            await self.load(20)

    async def load(self, timeout: float = 0.5) -> None:
        async with await (await self.open()).load(self.id, timeout=timeout) as handle:
            await handle.verified()
            assert any(is_of(handle, files) for files in self.served)
            assert {module.scale * module.rank for module in handle.modules.values()} == {8}

    async def cancel(self) -> None:
        loading = asyncio.create_task((await self.open()).load(self.id, timeout=0.5))
        await asyncio.wait([loading], timeout=self.random.random() * 0.03)
        loading.cancel()
        await asyncio.wait([loading])
        if not loading.cancelled():
            loading.result().release()

    async def hint(self) -> None:
        await (await self.open()).prefetch(self.id, tier="disk", timeout=0.5)

    async def kill(self) -> None:
        """A process of its own that fetches, as far as it comes."""
        begun, quiet = len(self.origin.asked), asyncio.subprocess.DEVNULL
        command = [sys.executable, "-m", "lorax_async", "fetch", self.id, "--hub-cache", "off"]
        command += ["--cache-dir", str(self.folder / "cache")]
        process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
        ended = asyncio.create_task(process.wait())
        while not ended.done() and len(self.origin.asked) == begun:
            await asyncio.wait([ended], timeout=0.02)
        await asyncio.wait([ended], timeout=self.random.random() * 0.1)
        if not ended.done():
            process.kill()
        await ended

    async def open(self) -> AdapterLoader:
        if self.loader is None:
            given = {"allow": (at(self.server.netloc),), "max_slots": self.random.choice([1, 4])}
            opening = loader(self.folder, layers=LAYERS, revalidate=0, **given)
            self.loader = await opening.__aenter__()
        return self.loader

    async def close(self) -> None:
        closing, self.loader = self.loader, None
        if closing is not None:
            await closing.close()


@pytest.mark.soak
@pytest.mark.each_loop
async def test_servers_at_random(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    seconds, seed = pytestconfig.getoption("soak_seconds"), pytestconfig.getoption("soak_seed")
    folders = [written(tmp_path / str(n), n, layers=LAYERS, rank=96) for n in range(3)]
    whole = [contents(folder) for folder in folders]
    origin = ChangingFolder(dict(whole[0]))
    with FaultServer(b"", origin) as server:
        odd = odd_versions(tmp_path, whole[0])
        loads = RandomLoads(server, origin, tmp_path, Random(seed), whole, odd)
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                await loads.turn()
        finally:
            await loads.close()
