"""A server that stalls costs only its own callers, and nothing once they have left."""

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from event_loops import until
from fault_server import Asked, Client, FaultServer, begin
from leaks import open_sockets
from user_loads import at, contents
from web_folder import Folder, hold, name_of

from lorax_async import AdapterLoader, AdapterTimeoutError, LoaderConfig
from lorax_async.remote.base import FIRST_BYTES

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

CONNECTIONS = 16
LOADS = 16
RANK = 256
"""Some 800 KB: more than comes with the first request."""

SOON = 8.0
"""Seconds that a healthy load may take here: a stalled request alone is waited for for 20."""

STALLS: dict[str, Callable[[Asked], bool]] = {
    "no head": lambda asked: True,
    "half a head": lambda asked: True,
    "config": lambda asked: asked.span is None,
    "header": lambda asked: asked.span is not None,
    "weights": lambda asked: asked.span not in {None, (0, FIRST_BYTES)},
}
"""Which requests are not answered to the end, by the step of a load that stalls."""


@dataclass
class Stalling(Folder):
    """A folder of adapters whose server stalls at one step of a load."""

    step: str = "none"
    held: int = 0
    holding: set[int] = field(default_factory=set)
    """Connections whose client waits for more."""

    def __call__(self, asked: Asked, client: Client) -> None:
        if self.step == "none" or not STALLS[self.step](asked):
            super().__call__(asked, client)
            return
        self.held += 1
        self.holding.add(client.number)
        try:
            if self.step == "half a head":
                client.send(b"HTTP/1.1 206 Partial Con")
            elif self.step != "no head":
                name = name_of(asked)
                body = begin(asked, client, self.files[name], f'ETag: "{name}-1"')
                client.send(body[: min(10, len(body) - 1)])
            hold(client)
        finally:
            self.holding.discard(client.number)


class World:
    """A healthy server, one that stalls, and a loader that may ask both."""

    def __init__(self, tmp_path: Path, ends: ExitStack, step: str) -> None:
        self.adapter = tiny.write(tmp_path / "adapter", rank=RANK)
        files = contents(self.adapter)
        self.folder = Stalling(files, step=step)
        self.stalling = ends.enter_context(FaultServer(b"", self.folder))
        self.good = ends.enter_context(FaultServer(b"", Folder(files)))
        self.config = LoaderConfig(
            device_bytes=64 << 20,
            max_slots=40,
            io_threads=2,
            connections=CONNECTIONS,
            cache_dir=tmp_path / "cache",
            allow=(at(self.stalling.netloc), at(self.good.netloc)),
            timeout=60,
        )

    def loader(self) -> AdapterLoader:
        return AdapterLoader(tiny.layout(), self.config)

    async def load_healthy(self, loader: AdapterLoader, name: str = "good") -> None:
        async with asyncio.timeout(SOON):
            async with await loader.load(self.good.url(f"/{name}/")) as handle:
                tiny.assert_equal_to_file(handle, self.adapter)

    async def assert_nothing_held(self) -> None:
        """At the server's side every connection of a stalled request is closed."""
        await until(lambda: not self.folder.holding)


@contextmanager
def world(tmp_path: Path, step: str = "none") -> Iterator[World]:
    with ExitStack() as ends:
        yield World(tmp_path, ends, step)


async def times_out(loader: AdapterLoader, url: str) -> None:
    with pytest.raises(AdapterTimeoutError):
        await loader.load(url, timeout=1.0)


async def is_cancelled(loader: AdapterLoader, url: str) -> None:
    loading = asyncio.create_task(loader.load(url))
    await asyncio.sleep(1.0)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading


async def streams(loader: AdapterLoader, url: str) -> None:
    with suppress(AdapterTimeoutError):
        async with loader.stream(url, timeout=1.0) as handle:
            with suppress(AdapterTimeoutError):
                await handle.layer_ready(tiny.LAYERS - 1, timeout=0.5)


async def is_hinted_at(loader: AdapterLoader, url: str) -> None:
    hint = loader.prefetch(url)
    await asyncio.sleep(1.0)
    hint.cancel()
    await asyncio.wait([hint.task])


Leaving = Callable[[AdapterLoader, str], Coroutine[Any, Any, None]]


@pytest.mark.slow
@pytest.mark.parametrize("step", STALLS)
@pytest.mark.parametrize("leaves", [times_out, is_cancelled, streams, is_hinted_at])
async def test_a_stall_costs_only_its_callers(tmp_path: Path, step: str, leaves: Leaving) -> None:
    """A healthy load beside them and one after them; then nothing of theirs is left."""
    with world(tmp_path, step) as it:
        async with it.loader() as loader:
            await it.load_healthy(loader, "first")
            sockets = open_sockets()
            url = it.stalling.url
            leaving = [asyncio.create_task(leaves(loader, url(f"/{n}/"))) for n in range(LOADS)]
            await until(lambda: it.folder.held)
            await asyncio.sleep(0.3)
            await it.load_healthy(loader, "beside")
            await asyncio.gather(*leaving)
            await asyncio.sleep(0.5)  # the server's threads come to what was sent before
            await it.assert_nothing_held()
            held = it.folder.held
            await it.load_healthy(loader, "after")
            await asyncio.sleep(0.2)
            assert it.folder.held == held, "nothing is asked for that no caller waits for"
            await until(lambda: open_sockets() <= sockets + CONNECTIONS * 2)
            begun = time.monotonic()
        assert time.monotonic() - begun < SOON


@pytest.mark.slow
async def test_a_server_that_accepts_no_connection(tmp_path: Path) -> None:
    """A listener whose backlog is full: a connect waits for an answer that never comes."""
    with world(tmp_path) as it, socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        it.config = replace(it.config, allow=(*it.config.allow, at(f"127.0.0.1:{port}")))
        with ExitStack() as ends:
            for _ in range(4):
                client = ends.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(("127.0.0.1", port))
            async with it.loader() as loader:
                await it.load_healthy(loader, "first")
                sockets = open_sockets()
                url = f"http://127.0.0.1:{port}"
                loads = [asyncio.create_task(loader.load(f"{url}/{n}/")) for n in range(LOADS)]
                await until(lambda: open_sockets() >= sockets + CONNECTIONS - 2)
                await it.load_healthy(loader, "beside")
                for load in loads:
                    load.cancel()
                await asyncio.wait(loads)
                await until(lambda: open_sockets() <= sockets + CONNECTIONS)


async def test_hints_of_a_server_that_stalls_hold_up_no_others(tmp_path: Path) -> None:
    with world(tmp_path, "no head") as it:
        async with it.loader() as loader:
            url = it.stalling.url
            stalled = loader.prefetch([url(f"/{n}/") for n in range(LOADS)], tier="disk")
            await until(lambda: it.folder.held)
            hints = loader.prefetch([it.good.url(f"/{n}/") for n in range(4)], tier="disk")
            async with asyncio.timeout(SOON):
                await hints
            assert not stalled.done
            assert len(it.folder.holding) <= 4, "two hints, with two requests each"
            stalled.cancel()
            await asyncio.wait([stalled.task])
            await it.assert_nothing_held()
