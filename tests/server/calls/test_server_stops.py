"""How a server begins and ends, step by step; and for how long it waits for a head."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from contextlib import closing
from typing import Any, cast

import pytest

from common import Run, until
from lorax_async.server.serving import Serving, _Cuttable, listen
from server.world import POST, FakeEngine, World, saying, serving

pytestmark = pytest.mark.each_loop

PLAIN = {"model": "base", "prompt": "x"}


def ask(world: World, **fields: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(world.ask("POST", "/v1/completions", PLAIN | fields))


async def test_it_is_ready_when_it_listens() -> None:
    async with serving() as world:
        told, listener = list[bool](), listen("127.0.0.1", 0)
        other = Serving(world.service, lambda: told.append(other.started))
        ended = asyncio.create_task(other.serve([listener]))
        await until(lambda: told)
        other.stop()
        await ended
        assert told == [True]


async def test_a_signal_wakes_a_loop_that_sleeps() -> None:
    """Wherever it is heard: not as a loop's own callback."""
    asyncio.get_running_loop().set_debug(True)  # it raises for calls from elsewhere
    async with serving() as world:
        await asyncio.to_thread(world.server.handle_exit, signal.SIGTERM, None)
        await world.ended


def test_a_loop_of_another_thread_may_serve(run: Run) -> None:
    """Which hears no signals."""
    before = signal.getsignal(signal.SIGTERM)

    async def play() -> int:
        async with serving() as world:
            assert signal.getsignal(signal.SIGTERM) == before
            return (await world.ask("GET", "/health")).status

    found = list[int]()
    thread = threading.Thread(target=lambda: found.append(run(play())))
    thread.start()
    thread.join(20)
    assert found == [200]


async def test_dates_go_on() -> None:
    async with serving() as world:
        state = world.server.server_state
        first = state.default_headers
        await until(lambda: state.default_headers is not first)


async def test_who_ends_it_in_uvicorns_way_takes_no_new_ones() -> None:
    engine = FakeEngine()
    async with serving(engine) as world:
        first = ask(world)
        tokens = await engine.asked()
        world.server.should_exit = True
        await until(lambda: world.service.under_way.closing)
        assert (await ask(world)).status == 503
        tokens.end()
        assert (await first).status == 200
        await world.ended


async def test_what_was_computed_is_taken_to_its_end() -> None:
    """Also where all buffers on the way are full when the server ends."""
    text = "x" * 60_000

    async def play() -> bytes:
        engine = FakeEngine(saying(text))
        async with serving(engine, send_buffer=4096) as world:
            loop = asyncio.get_running_loop()
            with closing(socket.socket()) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                client.connect(("127.0.0.1", world.port))
                client.setblocking(False)
                body = json.dumps(PLAIN | {"max_tokens": 65_000}).encode()
                head = f"{POST}Content-Length: {len(body)}"
                await loop.sock_sendall(client, head.encode() + b"\r\n\r\n" + body)
                await engine.asked()
                assert await world.service.under_way.ended(20)
                world.server.stop()
                received = bytearray()
                while piece := await loop.sock_recv(client, 1 << 16):
                    received += piece
                await world.ended
                return bytes(received)

    assert text.encode() in await play()


async def test_left_by_force_it_leaves_nothing(no_socket_left: None) -> None:
    before = signal.getsignal(signal.SIGTERM)
    engine = FakeEngine()
    async with serving(engine) as world:
        asked = ask(world)
        tokens = await engine.asked()
        world.ended.cancel()
        with pytest.raises(asyncio.CancelledError):
            await world.ended
        assert tokens.cancelled.is_set(), "its request has ended, and not only its connection"
        assert not world.server.server_state.tasks
        assert not any(server.is_serving() for server in world.server.servers)
        assert signal.getsignal(signal.SIGTERM) == before
        with pytest.raises(ConnectionRefusedError):
            await ask(world)
        with pytest.raises((ConnectionError, IndexError)):
            await asked


async def test_one_that_cannot_begin_closes_its_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as world:
        other, listener = Serving(world.service), listen("127.0.0.1", 0)

        async def fail(sockets: Any) -> None:
            raise OSError("it cannot")

        monkeypatch.setattr(other, "startup", fail)
        with pytest.raises(OSError, match="it cannot"):
            await other.serve([listener])
        assert listener.fileno() == -1


# -- heads ----------------------------------------------------------------------------------------


class _Plain(asyncio.Protocol):
    """Where uvicorn's own protocol stands."""

    cycle: Any = None
    app_state: dict[str, Any]


class _Connection(_Cuttable, _Plain):
    patience = 1000.0

    def __init__(self) -> None:
        self.app_state = {}


class _Answer:
    response_complete = False


class _Wire(asyncio.Transport):
    """Nothing is behind it."""

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        raise AssertionError("it was cut off")


async def test_a_head_has_its_time_from_its_beginning() -> None:
    connection = _Connection()
    connection.transport = _Wire()
    connection.connection_made(connection.transport)
    timers = [connection._too_slow]
    connection.data_received(b"a part")
    timers.append(connection._too_slow)
    connection.cycle = _Answer()
    connection.data_received(b"the rest")
    timers.append(connection._too_slow)
    connection.cycle.response_complete = True
    connection.data_received(b"another one")
    timers.append(connection._too_slow)
    connection.connection_lost(None)
    first, part, answering, second = timers
    assert first is part, "each further part would have it anew"
    assert answering is None, "its answer may take longer"
    assert first is not None
    assert second is not None
    assert first.cancelled()
    assert second.cancelled()


async def test_who_takes_nothing_of_what_the_system_has_is_cut_off() -> None:
    """In its own time, which the system is told."""
    engine = FakeEngine()
    async with serving(engine, slow_client=7.5) as world:
        asked = ask(world)
        tokens = await engine.asked()
        (connection,) = world.server.server_state.connections
        found = cast(Any, connection).transport.get_extra_info("socket")
        assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7500
        tokens.end()
        await asked
