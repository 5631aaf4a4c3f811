"""Reading bodies: nothing of one that is broken off is left to be collected."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.requests import Request

from common import until
from lorax_async.server.calls.bodies import read_body, refuse_unread
from lorax_async.server.calls.errors import Refusal
from lorax_async.server.calls.under_way import ClientGone
from server.world import POST, serving


class Sends:
    """A client with a body that does not end; and what it got."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.pieces = 0

    async def receive(self) -> Any:
        self.pieces += 1
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    async def send(self, message: Any) -> None:
        self.got.append((message["type"], message.get("more_body"), self.pieces))


SCOPE: Any = {"type": "http", "method": "POST", "path": "/", "headers": []}


@contextmanager
def collected() -> Iterator[list[AsyncGenerator[Any, Any]]]:
    """Generators that nobody closed."""
    found, before = list[AsyncGenerator[Any, Any]](), sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(finalizer=found.append)
    try:
        yield found
    finally:
        sys.set_asyncgen_hooks(*before)


async def test_a_body_is_let_go_of_where_it_is_too_large() -> None:
    client = Sends()
    with collected() as found:
        with pytest.raises(Refusal) as refused:
            await read_body(Request(SCOPE, client.receive), 2500, 20)
        assert (refused.value.status, client.pieces) == (413, 3)
        refused.value.__traceback__ = None
        assert found == []


async def test_who_hangs_up_has_sent_no_body() -> None:
    """However well its first part would read."""
    said = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b"{}", "more_body": True},
    ]

    async def receive() -> Any:
        return said.pop()

    with pytest.raises(ClientGone):
        await read_body(Request(SCOPE, receive), 100, 20)


async def test_nobody_complains_of_who_hangs_up(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as world:
        _, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(POST.encode() + b"Content-Length: 9\r\n\r\n{")
        await until(lambda: world.service.under_way._count)
        writer.close()
        assert await world.service.under_way.ended(20)
    assert [record.getMessage() for record in caplog.records] == []


async def test_the_answer_is_out_before_the_rest_is_thrown_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorax_async.server.calls.bodies.LINGER_BYTES", 2500)
    client = Sends()
    with collected() as found:
        refusal = Refusal(413, "too large", close=True)
        await refuse_unread(refusal, SCOPE, client.receive, client.send, 20)
        assert found == []
    assert client.got == [
        ("http.response.start", None, 0),
        ("http.response.body", True, 0),
        ("http.response.body", False, 3),
    ]
