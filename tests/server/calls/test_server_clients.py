"""Clients that go away, take nothing, or send too much: each frees its place."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import closing
from typing import Any

import pytest

from common import until
from lorax_async.server.calls.answering import Answering
from lorax_async.server.calls.events import ABORT
from lorax_async.server.calls.requests import CompletionBody
from server.world import POST, FakeEngine, FakeTokens, World, serving

PLAIN = {"model": "org/a", "prompt": "x"}


def request(body: object, *more: str) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"{POST}Content-Length: {len(content)}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + content


def assert_free(world: World) -> None:
    assert world.engine.waiting == 0
    assert world.service.clients._using == {}
    assert world.service.under_way._watches == set()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
async def test_who_hangs_up_frees_its_place(stream: bool, begun: bool, n: int) -> None:
    engine = FakeEngine()
    async with serving(engine) as world:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(request(PLAIN | {"stream": stream, "n": n}))
        tokens = await engine.asked(n)
        if begun:
            tokens.say("a")
            if stream:
                await reader.readuntil(b'"text":"a"')
        writer.close()
        for each in engine.submitted:
            await each.cancelled.wait()
        assert await world.service.under_way.ended(20)
        assert_free(world)


async def test_who_hangs_up_before_its_body_is_whole() -> None:
    async with serving() as world:
        _, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(request(PLAIN)[:-1])
        await until(lambda: world.service.under_way._count)
        writer.close()
        assert await world.service.under_way.ended(20)
        assert not world.engine.submitted


async def test_who_takes_nothing_is_cut_off() -> None:
    """Over sockets that hold little; more is said than all buffers on the way have room for."""
    engine = FakeEngine()
    async with serving(engine, slow_client=0.05, send_buffer=4096) as world:
        with closing(socket.socket()) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", world.port))
            client.sendall(request(PLAIN | {"stream": True, "max_tokens": 2_000}))
            tokens = await engine.asked()
            tokens.say("x" * 2_000)
            await tokens.cancelled.wait()
            assert await world.service.under_way.ended(20)
            assert_free(world)


class Blocked:
    """A client's side of ASGI, which takes the beginning of an answer and nothing after it."""

    def __init__(self, takes: int) -> None:
        self.sent: list[Any] = []
        self._takes = takes
        self._gone = asyncio.Event()
        self._body = [
            {"type": "http.request", "body": json.dumps(PLAIN | {"stream": True}).encode()}
        ]

    def abort(self) -> None:
        self._gone.set()

    async def receive(self) -> Any:
        if self._body:
            return self._body.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if len(self.sent) == self._takes:
            await asyncio.Event().wait()
        self.sent.append(message)

    def scope(self) -> Any:
        headers = [(b"content-type", b"application/json")]
        return {
            "type": "http",
            "headers": headers,
            "client": ("x", 1),
            "state": {ABORT: self.abort},
        }


@pytest.mark.parametrize("takes", [0, 1, 2])
async def test_who_is_slow_is_cut_off_wherever_it_stops(takes: int) -> None:
    def rule(tokens: FakeTokens) -> None:
        tokens.say("abc")

    async with serving(FakeEngine(rule), slow_client=0.01) as world:
        client = Blocked(takes)
        endpoint = Answering(world.service, CompletionBody)
        await endpoint(client.scope(), client.receive, client.send)
        assert client._gone.is_set()
        assert len(client.sent) == takes
        assert world.engine.submitted[0].cancelled.is_set()
        assert_free(world)


async def test_a_cancelled_server_frees_all_places() -> None:
    engine = FakeEngine()
    async with serving(engine) as world:
        client = Blocked(0)
        endpoint = Answering(world.service, CompletionBody)
        asked = asyncio.create_task(endpoint(client.scope(), client.receive, client.send))
        tokens = await engine.asked()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert tokens.cancelled.is_set()
        assert_free(world)


@pytest.mark.parametrize("said", [True, False], ids=["announced", "in chunks"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/load_lora_adapter"])
async def test_a_body_that_is_too_large(said: bool, path: str) -> None:
    """The client gets its answer, though it still sends; the rest is not kept."""
    body = b"x" * 400_000
    head = POST.replace("/v1/completions", path).encode()
    head += b"Authorization: Bearer the-admin-token\r\n"
    if said:
        content = head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    else:
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        content = head + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"

    async def play() -> Any:
        async with serving(max_body_bytes=100_000) as world:
            return await world.raw(content)

    answer = await play()
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert answer.error["message"] == "The body is larger than 100000 bytes"


async def test_who_waits_with_a_large_body_sends_none() -> None:
    """`Expect: 100-continue`: the answer comes first, and is the whole one."""

    async def play() -> Any:
        async with serving(max_body_bytes=10, slow_client=0.05) as world:
            reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
            writer.write(
                POST.encode() + b"Expect: 100-continue\r\nContent-Length: 1000000000\r\n\r\n"
            )
            answer = await reader.read()
            writer.close()
            return answer

    assert (await play()).startswith(b"HTTP/1.1 413 ")


async def test_an_endless_body_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who goes on sending is listened to for so many bytes, and no longer."""
    monkeypatch.setattr("lorax_async.server.calls.bodies.LINGER_BYTES", 100_000)
    async with serving(max_body_bytes=10) as world:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(POST.encode() + b"Content-Length: 999999999999999\r\n\r\n")
        with pytest.raises(ConnectionError):
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        del reader


async def test_a_body_that_does_not_come() -> None:
    async def play() -> Any:
        async with serving(slow_client=0.01) as world:
            return await world.raw(request(PLAIN)[:-1])

    answer = await play()
    assert (answer.status, answer.error["code"]) == (408, "timeout")


@pytest.mark.parametrize("content", [b"{", b"null", b'{"model": "base"}'])
async def test_bodies_that_are_none(content: bytes) -> None:
    async def play() -> Any:
        async with serving() as world:
            return await world.ask("POST", "/v1/completions", content)

    answer = await play()
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


async def test_a_connection_is_used_again() -> None:
    """After an answer, and after a refusal."""

    async def play() -> list[bytes]:
        engine = FakeEngine(lambda tokens: tokens.end())
        async with serving(engine) as world:
            reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
            lines = []
            for body in (PLAIN, {"model": 5}, PLAIN):
                writer.write(request(body))
                lines.append(await reader.readline())
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.split(b"content-length: ")[1].split()[0])
                await reader.readexactly(length)
            writer.close()
            return lines

    assert [line.split()[1] for line in await play()] == [b"200", b"400", b"200"]
