"""The end of a server: what is under way may end, new requests are told, nothing is left."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from typing import Any

import pytest

from common import until
from server.world import POST, FakeEngine, World, serving

PLAIN = {"model": "base", "prompt": "x"}


def ask(world: World, **fields: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(world.ask("POST", "/v1/completions", PLAIN | fields))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains(number: int, no_socket_left: None) -> None:
    engine, before = FakeEngine(), signal.getsignal(number)
    async with serving(engine) as world:
        first = ask(world)
        tokens = await engine.asked()
        os.kill(os.getpid(), number)
        await world.server._stopped.wait()
        refused = await ask(world)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert (await world.ask("GET", "/health")).status == 503
        assert not world.ended.done()
        tokens.say("done")
        tokens.end()
        assert (await first).json["choices"][0]["text"] == "done"
        await world.ended
        with pytest.raises(ConnectionRefusedError):
            await ask(world)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("stream", [False, True])
async def test_after_the_deadline_the_rest_fails(stream: bool) -> None:
    async def play() -> Any:
        engine = FakeEngine()
        async with serving(engine, drain=0.01) as world:
            asked = ask(world, stream=stream)
            tokens = await engine.asked()
            if stream:
                tokens.say("half")
            world.server.stop()
            answer = await asked
            await world.ended
            assert tokens.cancelled.is_set()
            return answer

    answer = await play()
    assert answer.status == (200 if stream else 503)
    assert b"the server is closing" in answer.body


async def test_a_second_signal_ends_it_now() -> None:
    async def play() -> Any:
        engine = FakeEngine()
        async with serving(engine, drain=1e6) as world:
            asked = ask(world)
            await engine.asked()
            world.server.stop()
            world.server.stop()
            await world.ended
            return await asked

    assert (await play()).status == 503


async def test_who_is_still_asking_is_told() -> None:
    """A body that becomes whole when the time is up is not begun with."""

    async def play() -> bytes:
        async with serving() as world:
            reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
            body = json.dumps(PLAIN).encode()
            head = f"{POST}Content-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body[:-1])
            await until(lambda: world.service.under_way._count)
            world.server.stop()
            world.server.stop()
            writer.write(body[-1:])
            answer = await reader.readline()
            writer.close()
            assert not world.engine.submitted
            return answer

    assert b" 503 " in await play()


async def test_connections_that_ask_nothing_are_closed() -> None:
    async def play() -> bytes:
        async with serving() as world:
            reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            world.server.stop()
            await world.ended
            rest = await reader.read()
            writer.close()
            return rest

    assert await play() == b""


async def test_the_process_keeps_its_logging(caplog: pytest.LogCaptureFixture) -> None:
    """uvicorn alone would write to it; and nobody asked for a line for each request."""
    access = logging.getLogger("uvicorn.access")
    before = (list(access.handlers), access.propagate, access.level)
    with caplog.at_level(logging.INFO):
        async with serving() as world:
            await ask(world)
    assert (access.handlers, access.propagate, access.level) == before
    assert not [record for record in caplog.records if record.name == "uvicorn.access"]


async def test_a_loop_may_be_left_by_force() -> None:
    """Whoever cancels `serve` has its sockets closed all the same."""
    async with serving(FakeEngine()) as world:
        asked = ask(world)
        await world.engine.asked()
        world.ended.cancel()
        with pytest.raises(asyncio.CancelledError):
            await world.ended
        assert world.service.under_way.closing
        with pytest.raises((ConnectionError, IndexError)):
            await asked
