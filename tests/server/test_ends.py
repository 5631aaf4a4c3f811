"""How a server begins and ends: what is under way may end, new requests are told, nothing is left."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from contextlib import closing, suppress
from typing import Any

import pytest

from common import Run, until
from lorax_async.server.serving import Serving, listen
from server.world import FakeEngine, request, saying, serving

pytestmark = pytest.mark.usefixtures("no_socket_left")

PLAIN = {"model": "base", "prompt": "x"}

# -- beginning ------------------------------------------------------------------------------------


@pytest.mark.each_loop
async def test_it_is_ready_when_it_listens() -> None:
    """One that cannot begin closes its listener."""
    async with serving() as world:
        told, listener = list[bool](), listen("127.0.0.1", 0)
        other = Serving(world.service, lambda: told.append(other.started))
        ended = asyncio.create_task(other.serve([listener]))
        await until(lambda: told)
        other.stop()
        await ended
        assert told == [True]

        async def fail(sockets: Any) -> None:
            raise OSError("it cannot")

        listener = listen("127.0.0.1", 0)
        third: Any = Serving(world.service)
        third.startup = fail
        with pytest.raises(OSError, match="it cannot"):
            await third.serve([listener])
        assert listener.fileno() == -1


def test_a_loop_of_another_thread_serves_and_hears_no_signals(run: Run) -> None:
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
        first = (await world.ask("GET", "/health")).headers["date"]
        async with asyncio.timeout(20):
            while (await world.ask("GET", "/health")).headers["date"] == first:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def test_the_process_keeps_its_logging(caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn alone would write to it; and nobody asked for a line for each request."""
    access = logging.getLogger("uvicorn.access")
    before = (list(access.handlers), access.propagate, access.level)
    with caplog.at_level(logging.INFO):
        async with serving() as world:
            await world.completing(PLAIN)
    assert (access.handlers, access.propagate, access.level) == before
    assert not [record for record in caplog.records if record.name == "uvicorn.access"]


# -- ending ---------------------------------------------------------------------------------------


@pytest.mark.each_loop
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains(number: int) -> None:
    engine, before = FakeEngine(), signal.getsignal(number)
    asyncio.get_running_loop().set_debug(True)  # it raises for calls from elsewhere
    async with serving(engine) as world:
        first = world.completing(PLAIN)
        tokens = await engine.asked()
        os.kill(os.getpid(), number)
        while (await world.ask("GET", "/health")).status == 200:
            pass
        refused = await world.completing(PLAIN)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert not world.ended.done()
        tokens.say("done")
        tokens.end()
        assert (await first).json["choices"][0]["text"] == "done"
        await world.ended
        with pytest.raises(ConnectionRefusedError):
            await world.completing(PLAIN)
    assert signal.getsignal(number) == before


async def test_uvicorns_own_way_of_ending_takes_no_new_requests() -> None:
    engine = FakeEngine()
    async with serving(engine) as world:
        first = world.completing(PLAIN)
        tokens = await engine.asked()
        world.server.should_exit = True
        await until(lambda: not world.service.healthy)
        assert (await world.completing(PLAIN)).status == 503
        tokens.end()
        assert (await first).status == 200
        await world.ended


@pytest.mark.parametrize(
    ("drain", "stops", "stream"), [(0.01, 1, False), (0.01, 1, True), (1e6, 2, False)]
)
async def test_after_the_deadline_or_a_second_signal_the_rest_fails(
    drain: float, stops: int, stream: bool
) -> None:
    engine = FakeEngine()
    async with serving(engine, drain=drain) as world:
        asked = world.completing(PLAIN | {"stream": stream})
        tokens = await engine.asked()
        if stream:
            tokens.say("half")
        for _ in range(stops):
            world.server.stop()
        answer = await asked
        await world.ended
        assert tokens.cancelled.is_set()
    assert answer.status == (200 if stream else 503)
    assert b"the server is closing" in answer.body


async def test_a_body_that_comes_too_late_is_not_begun_with() -> None:
    async with serving() as world:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(request(PLAIN)[:-1])
        await world.until_busy()
        world.server.stop()
        world.server.stop()
        writer.write(request(PLAIN)[-1:])
        assert b" 503 " in await reader.readline()
        writer.close()
        assert not world.engine.submitted


async def test_connections_that_ask_nothing_are_closed() -> None:
    async with serving() as world:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        world.server.stop()
        await world.ended
        assert await reader.read() == b""
        writer.close()


@pytest.mark.each_loop
async def test_what_was_computed_is_taken_to_its_end() -> None:
    """Also where all buffers on the way are full when the server ends."""
    text, received = "x" * 60_000, bytearray()
    engine = FakeEngine(saying(text))
    async with serving(engine, send_buffer=4096) as world:
        loop = asyncio.get_running_loop()
        with closing(socket.socket()) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", world.port))
            client.setblocking(False)
            await loop.sock_sendall(client, request(PLAIN | {"max_tokens": 65_000}))
            await engine.asked()
            assert await world.ends()
            world.server.stop()
            while piece := await loop.sock_recv(client, 1 << 16):
                received += piece
            await world.ended
    assert text.encode() in received


@pytest.mark.each_loop
async def test_left_by_force_it_leaves_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    engine = FakeEngine()
    async with serving(engine) as world:
        asked = world.completing(PLAIN)
        tokens = await engine.asked()
        world.ended.cancel()
        with pytest.raises(asyncio.CancelledError):
            await world.ended
        assert not world.service.healthy
        assert tokens.cancelled.is_set(), "its request has ended, and not only its connection"
        assert await world.service.under_way.ended(0)
        assert signal.getsignal(signal.SIGTERM) == before
        with pytest.raises(ConnectionRefusedError):
            await world.completing(PLAIN)
        with pytest.raises((ConnectionError, IndexError)):
            await asked


# -- heads ----------------------------------------------------------------------------------------


@pytest.mark.each_loop
@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("parts", [b"", b"P", b"POST /v1/comp" * 1000])
async def test_a_head_that_does_not_end_is_cut_off(parts: bytes, answered: bool) -> None:
    """It has its time from its beginning: each further part does not have it anew."""
    async with serving(slow_client=0.1) as world, asyncio.timeout(20):
        world.server.config.timeout_keep_alive = 0.1  # type: ignore[assignment]
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        if answered:
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        for byte in parts:
            if reader.at_eof() or reader.exception() is not None:
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(0.01)
        with suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()


@pytest.mark.each_loop
async def test_an_answer_may_take_longer_than_a_head() -> None:
    """And a client that takes nothing of what the system has is cut off by the system."""
    engine = FakeEngine()
    async with serving(engine, slow_client=0.05) as world:
        asked = world.completing(PLAIN)
        tokens = await engine.asked()
        (connection,) = world.server.server_state.connections
        told: Any = connection
        found = told.transport.get_extra_info("socket")
        assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 50
        await asyncio.sleep(0.1)
        tokens.end()
        assert (await asked).status == 200
