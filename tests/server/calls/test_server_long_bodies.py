"""Bodies as long as they may be, and heads that do not end: nobody else waits for those."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from pydantic import ValidationError

from lorax_async.server.calls.prompts import Prompts
from lorax_async.server.calls.requests import ChatBody, CompletionBody
from server.world import serving, tokenizer, tokens_of


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (ChatBody, {"messages": [{}] * 1000}),
        (ChatBody, {"messages": [1] * 1000}),
        (ChatBody, {"messages": [{"role": "user", "content": [{}] * 1000}]}),
        (CompletionBody, {"prompt": [None] * 1000}),
        (CompletionBody, {"prompt": [[None] * 1000]}),
        (CompletionBody, {"prompt": [[None]] * 1000}),
    ],
)
def test_of_what_is_wrong_the_first_is_enough(
    kind: type[ChatBody | CompletionBody], given: dict[str, Any]
) -> None:
    """A body of 1 MiB has room for half a million mistakes, which took seconds to list."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "base", **given})
    assert caught.value.error_count() < 10


@pytest.fixture
def nobody_is_interrupted() -> Iterator[None]:
    """Threads run when another one lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("nobody_is_interrupted")
def test_others_go_on_while_a_long_text_becomes_tokens() -> None:
    prompts, text, turns = Prompts(tokenizer()), "penguins " * 30_000, [0]
    ended = threading.Event()

    def others() -> None:
        while not ended.is_set():
            turns[0] += 1
            time.sleep(0)  # lets others run

    thread = threading.Thread(target=others)
    thread.start()
    try:
        before = turns[0]
        found = prompts._encoded(text)
        during = turns[0] - before
    finally:
        ended.set()
        thread.join()
    assert found == tuple(tokens_of(text))
    assert during


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize("begun", [b"", b"POST /v1/comp"], ids=["nothing", "a part"])
async def test_a_head_that_does_not_end_is_cut_off(begun: bytes, answered: bool) -> None:
    async with serving(slow_client=0.05) as world, asyncio.timeout(20):
        world.server.config.timeout_keep_alive = 0.05  # type: ignore[assignment]
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        if answered:
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(begun)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
