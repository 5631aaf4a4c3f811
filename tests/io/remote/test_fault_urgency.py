"""A hint that is under way on a slow link holds up nobody who waits."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from threading import Barrier, BrokenBarrierError

import pytest
from fault_server import Asked, Client
from fault_world import FaultyWorld, assert_at_rest, loads_right, over, part_of
from faults import begin
from fetching import engine
from remote_world import PATIENT

import tiny
from common import until

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

CONNECTIONS = 4
LAYERS = 80
"""Of 200 KB each: 16 MB, so that each connection has a piece to give up when it is asked to."""


class Slow:
    """Sends a little at a time, until it may go on as fast as it likes."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.sending = 0
        self._lock = threading.Lock()

    def __call__(self, world: FaultyWorld, asked: Asked, client: Client) -> None:
        body = begin(world, asked, client)
        if part_of(asked) != "body":
            client.send(body)
            return
        with self._lock:
            self.sending += 1
        try:
            for at in range(0, len(body), 65_536):
                client.send(body[at : at + 65_536])
                self.go_on.wait(0.04)
        finally:
            with self._lock:
                self.sending -= 1


class Together:
    """Answers no range of the weights before all connections have asked for one."""

    def __init__(self) -> None:
        self.barrier = Barrier(CONNECTIONS)
        self.met = 0

    def __call__(self, world: FaultyWorld, asked: Asked, client: Client) -> None:
        if part_of(asked) == "body" and not self.met:
            try:
                self.barrier.wait(20)
                self.met += 1
            except BrokenBarrierError:
                client.reset()
        world.well(asked, client)


async def test_a_load_gets_all_connections_of_a_prefetch(tmp_path: Path) -> None:
    http = engine(CONNECTIONS, timeouts=PATIENT)
    layout = tiny.layout(layers=LAYERS)
    with FaultyWorld(tmp_path / "cache", tmp_path, http=http) as world:
        large = world.stock("large", rank=256, layers=LAYERS)
        wanted = world.stock("wanted", 1, rank=64, layers=LAYERS)
        slow, together = Slow(), Together()
        world.faults |= {"large": slow, "wanted": together}

        async def body() -> None:
            async with over(world, layout, device_bytes=32 << 20) as loader:
                hint = loader.prefetch(world.ref("large"))
                await until(lambda: slow.sending == CONNECTIONS)
                try:
                    await loads_right(loader, world, wanted)
                    assert together.met == CONNECTIONS, "all of them, at the same time"
                    assert not hint.done
                finally:
                    slow.go_on.set()
                await hint
                async with await loader.load(world.ref("large")) as handle:
                    tiny.assert_equal_to_file(handle, large)
                await assert_at_rest(loader, world)

        await body()


async def test_a_load_of_what_is_hinted_at_hastens_it(tmp_path: Path) -> None:
    """It is one download still, which others' hints do not hold up any more."""
    http = engine(CONNECTIONS, timeouts=PATIENT)
    layout = tiny.layout(layers=LAYERS)
    with FaultyWorld(tmp_path / "cache", tmp_path, http=http) as world:
        folders = [world.stock(name, n, rank=256, layers=LAYERS) for n, name in enumerate("ab")]
        slow = [Slow(), Slow()]
        world.faults |= dict(zip("ab", slow, strict=True))

        async def body() -> None:
            async with over(world, layout, device_bytes=32 << 20) as loader:
                hint = loader.prefetch([world.ref("a"), world.ref("b")])
                await until(lambda: slow[0].sending and slow[1].sending)
                loading = asyncio.create_task(loader.load(world.ref("b")))
                await until(lambda: slow[1].sending == CONNECTIONS)
                for each in slow:
                    each.go_on.set()
                await hint
                async with await loading as handle:
                    tiny.assert_equal_to_file(handle, folders[1])
                await assert_at_rest(loader, world)

        await body()
        for name in "ab":
            assert len([span for span in world.spans_of(name) if span[0] == 0]) == 1
