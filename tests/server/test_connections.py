"""Clients that go away, take nothing or send too much, and a server that ends: nothing is left."""

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import threading
from contextlib import closing, suppress
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
from event_loops import Run, until
from server_world import COMPLETIONS, POST, FakeEngine, FakeTokens, World, request, saying, serving
from starlette.requests import ClientDisconnect
from tiny_loaders import fails

from lorax_async.errors import LoaderClosedError, UsageError
from lorax_async.server.app import DrainingServer, listen
from lorax_async.server.completions import GeneratedResponse
from lorax_async.server.request_bodies import CompletionBody, parse_body
from lorax_async.server.responses import ABORT, Refusal
from lorax_async.server.service import RequestScope

pytestmark = pytest.mark.usefixtures("no_socket_left")

PLAIN = {"model": "org/a", "prompt": "x"}
BASE = {"model": "base", "prompt": "x"}
ONE: dict[str, Any] = {"max_adapters_per_client": 1, "max_waiting": 2, "max_choices": 2}
"""Room for one request, so that a place that is not given back shows."""


def ours() -> list[str]:
    names = (task.get_name() for task in asyncio.all_tasks())
    return [name for name in names if name in {"lorax choice", "lorax client's presence"}]


async def require_free(world: World) -> None:
    assert await world.ends()
    await asyncio.sleep(0)
    assert (world.engine.waiting, ours()) == (0, [])
    world.engine.rule = saying("hello")
    another = {"model": "org/another", "prompt": "x", "n": 2}
    assert (await world.ask("POST", COMPLETIONS, another)).status == 200


async def connection(world: World, sent: bytes) -> Any:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(sent)
    return reader, writer


def taking_little(world: World) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", world.port))
    return client


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_hangs_up_frees_its_place(stream: bool, begun: bool, n: int) -> None:
    engine = FakeEngine()
    async with serving(engine, **ONE) as world:
        reader, writer = await connection(world, request(PLAIN | {"stream": stream, "n": n}))
        tokens = await engine.asked(n)
        if n > 1:  # they are read beside each other
            await until(lambda: ours().count("lorax choice") == n)
        if begun:
            tokens.say("a")
            if stream:
                await reader.readuntil(b'"text":"a"')
        writer.close()
        for each in engine.submitted:
            await each.cancelled.wait()
        await require_free(world)


async def test_a_client_that_hangs_up_in_its_body_asks_nothing(caplog: Any) -> None:
    async with serving() as world:
        _, writer = await connection(world, request(PLAIN)[:-1])
        await world.until_busy()
        writer.close()
        assert await world.ends()
        assert not world.engine.submitted
    assert [record.getMessage() for record in caplog.records] == []


async def test_a_client_that_takes_nothing_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    """It ends when its connection has: before, uvicorn would complain that it has no answer."""
    engine = FakeEngine()
    async with serving(engine, slow_client=0.05, send_buffer=4096, **ONE) as world:
        with closing(taking_little(world)) as client:
            client.sendall(request(PLAIN | {"stream": True, "max_tokens": 2_000}))
            tokens = await engine.asked()
            tokens.say("x" * 2_000)
            await tokens.cancelled.wait()
            await require_free(world)
    assert "without completing" not in caplog.text


class Blocked:
    """A client's side of ASGI, which takes the beginning of an answer and nothing after it."""

    def __init__(self, takes: int) -> None:
        self.sent: list[Any] = []
        self.gone, self.blocked = asyncio.Event(), asyncio.Event()
        self._takes = takes

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if len(self.sent) == self._takes:
            self.blocked.set()
            await asyncio.Event().wait()
        self.sent.append(message)

    def asking(self, world: World) -> asyncio.Task[None]:
        scope: Any = {"type": "http", "client": ("127.0.0.1", 1), "state": {ABORT: self.gone.set}}
        scope["headers"] = []
        body = parse_body(CompletionBody, json.dumps(PLAIN | {"stream": True}).encode())
        response = GeneratedResponse(world.service, body)
        return asyncio.create_task(response(scope, self.receive, self.send))


@pytest.mark.parametrize(
    ("by", "takes"), [*(("slowness", n) for n in range(3)), ("a cancellation", 0), ("a failure", 0)]
)
async def test_a_request_that_is_ended_from_outside_frees_its_place(by: str, takes: int) -> None:
    """Wherever the client stops to take its answer; whose status was not taken gets another one."""
    patience = 0.01 if by == "slowness" else 1e6
    async with serving(FakeEngine(lambda t: t.say("abc")), slow_client=patience, **ONE) as world:
        client = Blocked(takes)
        asked = client.asking(world)
        await client.blocked.wait()
        if by == "a cancellation":
            asked.cancel()
            await fails(asked, asyncio.CancelledError)
        elif by == "a failure":
            world.service.in_flight.fail()
            error = await fails(asked, Refusal)
            assert error.status == 503
        else:
            await asked
            assert client.gone.is_set()
            await require_free(world)
        assert len(client.sent) == takes
        assert world.engine.submitted[0].cancelled.is_set()
        assert await world.ends()
        assert ours() == []


async def test_sequences_that_fail_together_leave_no_complaint() -> None:
    """Not even asyncio's, of an exception that was never retrieved."""
    complaints = list[Any]()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    async with serving(FakeEngine(lambda tokens: tokens.fail(UsageError("no")))) as world:
        answer = await world.ask("POST", COMPLETIONS, PLAIN | {"n": 3})
        assert answer.status == 400
        await asyncio.sleep(0)
        gc.collect()
    assert complaints == []


async def test_a_connection_is_used_again_after_an_answer_and_a_refusal() -> None:
    async with serving(FakeEngine(FakeTokens.end)) as world:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        statuses = []
        for body in (PLAIN, {"model": 5}, PLAIN):
            writer.write(request(body))
            statuses.append((await reader.readline()).split()[1])
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.split(b"content-length: ")[1].split()[0]))
        writer.close()
    assert statuses == [b"200", b"400", b"200"]


LARGE = b"x" * 400_000
ANNOUNCED = f"Content-Length: {len(LARGE)}\r\n\r\n"
CHUNKS = f"Transfer-Encoding: chunked\r\n\r\n{len(LARGE):x}\r\n"


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/load_lora_adapter"])
async def test_a_body_that_is_not_read_is_refused(path: str) -> None:
    """The client gets a whole answer, though it still sends or waits; the rest is not kept."""
    head = POST.replace(COMPLETIONS, path).encode() + b"Authorization: Bearer the-admin-token\r\n"
    announced = ANNOUNCED.encode()
    for rest, status, code in (
        (announced + LARGE, 413, "request_too_large"),
        (CHUNKS.encode() + LARGE + b"\r\n0\r\n\r\n", 413, "request_too_large"),
        (b"Expect: 100-continue\r\n" + announced, 413, "request_too_large"),
        (b"Content-Length: 9\r\n\r\n{", 408, "timeout"),
        (b"Content-Type: text/plain\r\n" + announced + LARGE, 415, "unsupported_media_type"),
    ):
        patience = 20 if LARGE in rest else 0.05
        async with serving(max_body_bytes=100_000, slow_client=patience) as world:
            answer = await world.raw(head + rest)
        assert (answer.status, answer.headers["connection"]) == (status, "close")
        assert answer.error["code"] == code


async def test_an_endless_body_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorax_async.server.responses.LINGER_BYTES", 100_000)
    async with serving(max_body_bytes=10) as world:
        head = f"{POST}Content-Length: 999999999999999\r\n\r\n".encode()
        reader, writer = await connection(world, head)
        with pytest.raises(ConnectionError):
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        del reader


async def interrupted(scope: RequestScope, *reasons: Exception) -> None:
    async with scope:
        for reason in reasons:
            asyncio.get_running_loop().call_soon(scope.interrupt, reason)
        await asyncio.Event().wait()


async def test_the_first_reason_ends_a_request() -> None:
    """A cancellation besides stays one; the next wait is not cancelled, and nothing listens."""
    scopes, receive = set[RequestScope](), cast(Any, asyncio.Event().wait)
    with pytest.raises(ClientDisconnect):
        late = LoaderClosedError("late")
        await interrupted(RequestScope(scopes, receive), ClientDisconnect(), late)
    await asyncio.sleep(0)

    scope = RequestScope(scopes, receive)
    waiting = asyncio.create_task(interrupted(scope))
    await asyncio.sleep(0)
    assert len(ours()) == len(scopes) == 1
    scope.interrupt(ClientDisconnect())
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    await asyncio.sleep(0)
    assert (ours(), scopes) == ([], set())


@pytest.mark.each_loop
async def test_it_is_ready_when_it_listens() -> None:
    async with serving() as world:
        told, listener = list[bool](), listen("127.0.0.1", 0)
        other = DrainingServer(world.service, lambda: told.append(other.started))
        ended = asyncio.create_task(other.serve([listener]))
        await until(lambda: told)
        other.stop()
        await ended
        assert told == [True]
        listener = listen("127.0.0.1", 0)
        third: Any = DrainingServer(world.service)
        third.startup = AsyncMock(side_effect=OSError("it cannot"))
        await fails(third.serve([listener]), OSError, "it cannot")
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
    """uvicorn alone would change it, and write a line for each request."""
    access = logging.getLogger("uvicorn.access")
    before = (list(access.handlers), access.propagate, access.level)
    with caplog.at_level(logging.INFO):
        async with serving() as world:
            await world.completing(BASE)
    assert (access.handlers, access.propagate, access.level) == before
    assert not [record for record in caplog.records if record.name == "uvicorn.access"]


@pytest.mark.each_loop
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, None])
async def test_a_signal_drains(number: int | None) -> None:
    engine, before = FakeEngine(), signal.getsignal(number or signal.SIGTERM)
    async with serving(engine) as world:
        first = world.completing(BASE)
        tokens = await engine.asked()
        if number is None:
            world.server.should_exit = True
        else:
            os.kill(os.getpid(), number)
        await until(lambda: not world.service.healthy)
        refused = await world.completing(BASE)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert not world.ended.done()
        tokens.say("done")
        tokens.end()
        assert (await first).json["choices"][0]["text"] == "done"
        await world.ended
        await fails(world.completing(BASE), ConnectionRefusedError)
    assert signal.getsignal(number or signal.SIGTERM) == before


@pytest.mark.parametrize(("drain", "stops", "stream"), [(0.01, 1, 0), (0.01, 1, 1), (1e6, 2, 0)])
async def test_a_deadline_or_second_signal_ends_all(drain: float, stops: int, stream: int) -> None:
    engine = FakeEngine()
    async with serving(engine, drain=drain) as world:
        asked = world.completing(BASE | {"stream": stream == 1})
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
        reader, writer = await connection(world, request(BASE)[:-1])
        await world.until_busy()
        world.server.stop()
        world.server.stop()
        writer.write(request(BASE)[-1:])
        assert b" 503 " in await reader.readline()
        writer.close()
        assert not world.engine.submitted


@pytest.mark.each_loop
async def test_connections_that_ask_nothing_are_closed() -> None:
    """A signal wakes a loop that sleeps, wherever it is heard."""
    async with serving() as world:
        reader, writer = await connection(world, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        asyncio.get_running_loop().set_debug(True)  # it raises for calls from other threads
        await asyncio.to_thread(world.server.handle_exit, signal.SIGTERM, None)
        await world.ended
        assert await reader.read() == b""
        writer.close()


@pytest.mark.each_loop
async def test_what_was_computed_is_taken_to_its_end() -> None:
    text, received = "x" * 60_000, bytearray()
    engine = FakeEngine(saying(text))
    async with serving(engine, send_buffer=4096) as world:
        loop = asyncio.get_running_loop()
        with closing(taking_little(world)) as client:
            client.setblocking(False)
            await loop.sock_sendall(client, request(BASE | {"max_tokens": 65_000}))
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
        asked = world.completing(BASE)
        tokens = await engine.asked()
        world.ended.cancel()
        await fails(world.ended, asyncio.CancelledError)
        assert not world.service.healthy
        assert tokens.cancelled.is_set(), "its request has ended, and not only its connection"
        assert await world.service.in_flight.wait_until_idle(0)
        assert signal.getsignal(signal.SIGTERM) == before
        await fails(world.completing(BASE), ConnectionRefusedError)
        with pytest.raises((ConnectionError, IndexError)):
            await asked


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
    async with serving(engine, slow_client=0.25) as world:
        asked = world.completing(BASE)
        tokens = await engine.asked()
        (connection,) = world.server.server_state.connections
        told: Any = connection
        found = told.transport.get_extra_info("socket")
        assert found.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 250
        await asyncio.sleep(0.4)
        tokens.end()
        assert (await asked).status == 200
