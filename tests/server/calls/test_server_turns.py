"""Requests in the order of their steps: what is refused early, and whom nothing is left of."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
from contextlib import closing
from typing import Any

import pytest

from common import until
from lorax_async import LoaderClosedError, UsageError
from lorax_async.server.calls.answering import Answering
from lorax_async.server.calls.errors import Refusal
from lorax_async.server.calls.requests import CompletionBody
from server.calls.test_server_clients import Blocked, assert_free
from server.world import POST, FakeEngine, FakeTokens, saying, serving, tokens_of

PLAIN = {"model": "org/a", "prompt": "x"}


def reading() -> list[str]:
    names = (task.get_name() for task in asyncio.all_tasks())
    return [name for name in names if name == "lorax choice"]


async def test_all_sequences_take_turns() -> None:
    async def play() -> Any:
        async with serving(FakeEngine(saying("abc"))) as world:
            create = world.client.completions.create
            stream = await create(model="base", prompt="x", n=2, stream=True)
            return [piece.choices[0].index async for piece in stream]

    assert await play() == [0, 1] * 4


async def test_what_looked_like_a_stop_string_comes_out() -> None:
    async def play() -> str:
        async with serving(FakeEngine(saying("one ST"))) as world:
            create = world.client.completions.create
            return (await create(model="base", prompt="x", stop="STOP")).choices[0].text

    assert await play() == "one ST"


async def test_nothing_is_computed_after_a_stop_string() -> None:
    """Though another sequence of the same request goes on."""

    async def play() -> list[str]:
        engine = FakeEngine()
        async with serving(engine) as world:
            create = world.client.completions.create
            asked = asyncio.create_task(create(model="base", prompt="x", n=2, stop="STOP"))
            other = await engine.asked(2)
            engine.submitted[0].say("one STOP two")
            async with asyncio.timeout(20):
                await engine.submitted[0].cancelled.wait()
            other.say("more")
            other.end()
            return [choice.text for choice in (await asked).choices]

    assert await play() == ["one ", "more"]


async def test_of_whom_is_cancelled_nothing_is_read_any_more() -> None:
    """Whatever its tokens do then."""
    engine = FakeEngine()
    async with serving(engine) as world:
        _, writer = await asyncio.open_connection("127.0.0.1", world.port)
        content = json.dumps(PLAIN | {"n": 2}).encode()
        head = f"{POST}Content-Length: {len(content)}"
        writer.write(head.encode() + b"\r\n\r\n" + content)
        await engine.asked(2)
        await until(lambda: len(reading()) == 2)
        writer.close()
        assert await world.service.under_way.ended(20)
        await asyncio.sleep(0)
        assert not reading()


async def test_of_several_that_fail_nobody_complains() -> None:
    """Not even asyncio, of an exception that nobody asked for."""
    complaints = list[Any]()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    async with serving(FakeEngine(lambda tokens: tokens.fail(UsageError("no")))) as world:
        answer = await world.ask("POST", "/v1/completions", PLAIN | {"n": 3})
        assert answer.status == 400
        await asyncio.sleep(0)
        gc.collect()
    assert complaints == []


async def test_the_loop_is_free_while_a_prompt_is_read() -> None:
    threads = list[threading.Thread]()
    async with serving() as world:
        read = world.service.prompts.read

        def noted(body: Any) -> Any:
            threads.append(threading.current_thread())
            return read(body)

        world.service.prompts.read = noted  # type: ignore[method-assign]
        assert (await world.ask("POST", "/v1/completions", PLAIN)).status == 200
    assert len(threads) == 1
    assert threading.main_thread() not in threads


async def test_where_there_is_no_room_no_prompt_is_read() -> None:
    engine = FakeEngine()
    async with serving(engine, max_waiting=1, max_choices=1) as world:
        first = asyncio.create_task(world.ask("POST", "/v1/completions", PLAIN))
        tokens = await engine.asked()
        world.service.prompts.read = lambda body: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        assert (await world.ask("POST", "/v1/completions", PLAIN)).status == 429
        tokens.end()
        assert (await first).status == 200


async def test_where_one_is_refused_all_are() -> None:
    def rule(tokens: FakeTokens) -> None:
        tokens._engine.alive = False

    engine = FakeEngine(rule)
    async with serving(engine) as world:
        answer = await world.ask("POST", "/v1/completions", PLAIN | {"n": 2})
        assert answer.status == 503
        assert engine.submitted[0].cancelled.is_set()
        assert_free(world)


async def test_nothing_was_told_before_it_was_taken() -> None:
    """Whoever is interrupted while its status waits to be sent is refused with another one."""

    def rule(tokens: FakeTokens) -> None:
        tokens.say("abc")

    async with serving(FakeEngine(rule), slow_client=1e6) as world:
        client, blocked = Blocked(0), asyncio.Event()

        async def send(message: Any) -> None:
            blocked.set()
            await asyncio.Event().wait()

        endpoint = Answering(world.service, CompletionBody)
        asked = asyncio.create_task(endpoint(client.scope(), client.receive, send))
        await blocked.wait()
        world.service.under_way.fail()
        async with asyncio.timeout(20):
            with pytest.raises(Refusal) as refused:
                await asked
        assert refused.value.status == 503
        assert isinstance(refused.value.__cause__, LoaderClosedError | None)


async def test_who_is_cut_off_ends_when_its_connection_has(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Before, uvicorn would complain that it has no answer."""
    engine = FakeEngine()
    async with serving(engine, slow_client=0.05, send_buffer=4096) as world:
        with closing(socket.socket()) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", world.port))
            body = json.dumps(PLAIN | {"stream": True, "max_tokens": 2_000}).encode()
            head = f"{POST}Content-Length: {len(body)}"
            client.sendall(head.encode() + b"\r\n\r\n" + body)
            tokens = await engine.asked()
            tokens.give(*tokens_of("x" * 2_000))
            await tokens.cancelled.wait()
            assert await world.service.under_way.ended(20)
    assert "without completing" not in caplog.text
