"""What the page's own requests come to, as a client reads it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from openai import AsyncOpenAI

from server.world import TOKEN, FakeTokens, Rule, World, tokens_of
from tracing.chrome_format import require_trace

TRACE, PICTURE = "/page/trace.json", "/page/timeline.svg"
OPERATOR = {"Authorization": f"Bearer {TOKEN}"}


class Told:
    """A stream of events, put together as a page does it."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.rows: dict[str, Any] = {}
        self.first: dict[str, Any] = {}
        self.cold: Any = None
        self.more = 0
        self._reader = reader

    async def next(self) -> dict[str, Any] | None:
        """One event; None once the server has ended the stream."""
        async with asyncio.timeout(20):
            while True:
                line = await self._reader.readline()
                if not line or line == b"data: [DONE]\n":
                    return None
                if line.startswith(b"data: "):
                    break
        news: dict[str, Any] = json.loads(line[len(b"data: ") :])
        self.first = self.first or news
        self.rows |= news.get("rows", {})
        for id in news.get("gone", ()):
            del self.rows[id]
        self.cold = news.get("cold", self.cold)
        self.more = news.get("more", self.more)
        return news

    async def until_tier(self, id: str, tier: str) -> dict[str, Any]:
        while self.rows.get(id, {}).get("tier") != tier:
            assert await self.next() is not None
        found: dict[str, Any] = self.rows[id]
        return found

    async def until_cold(self, number: int) -> dict[str, Any]:
        while self.cold is None or self.cold["number"] != number:
            assert await self.next() is not None
        found: dict[str, Any] = self.cold
        return found


@asynccontextmanager
async def watching(world: World, headers: dict[str, str] | None = None) -> AsyncIterator[Told]:
    """The events of one open page; what has come so far when it is entered is the first one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    try:
        lines = ["GET /page/events HTTP/1.1", "Host: test"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        assert b"content-type: text/event-stream" in head
        told = Told(reader)
        await told.next()
        yield told
    finally:
        writer.close()


def loading(world: list[World], said: str = "aye") -> Rule:
    """An engine that computes nothing, but takes its adapter from the loader, as a real one does.

    `world` gets its one item later.
    """

    async def answer(tokens: FakeTokens) -> None:
        adapter = tokens.generation.adapter
        try:
            if adapter is not None:
                (await world[0].service.loader.load(adapter)).release()
        except Exception as error:
            tokens.fail(error)
            return
        tokens.give(*tokens_of(said))
        tokens.end()

    tasks = set[asyncio.Task[None]]()

    def rule(tokens: FakeTokens) -> None:
        task = asyncio.create_task(answer(tokens))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return rule


async def asked(client: AsyncOpenAI, model: str) -> str:
    answer = await client.completions.create(model=model, prompt="x", max_tokens=8)
    return answer.choices[0].text


async def names_in(world: World, headers: dict[str, str] | None = None) -> set[str]:
    """All texts of the trace."""
    answer = await world.ask("GET", TRACE, **(headers or {}))
    assert answer.status == 200
    require_trace(answer.json)
    found: set[str] = set()

    def look(value: Any) -> None:
        if isinstance(value, str):
            found.add(value)
        for each in (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        ):
            look(each)

    look(answer.json["traceEvents"])
    return found
