"""A server that answers each request as a test says, and when it says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

HEAD = b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nConnection: close\r\n\r\n"
STREAM = b"text/event-stream; charset=utf-8"


class Asked:
    """One request, and the way back to whoever sent it. What is sent ends with the connection."""

    def __init__(self, path: str, headers: str, body: Any, writer: asyncio.StreamWriter) -> None:
        self.path, self.headers, self.body = path, headers, body
        self._writer = writer

    async def begin(self, status: int = 200, kind: bytes = STREAM) -> None:
        await self.send(HEAD % (status, b"said", kind))

    async def send(self, content: bytes) -> None:
        self._writer.write(content)
        await self._writer.drain()

    async def event(self, data: object) -> None:
        await self.send(f"data: {json.dumps(data)}\n\n".encode())

    async def text(self, text: str) -> None:
        await self.event({"choices": [{"index": 0, "delta": {"content": text}}]})

    async def usage(self, prompt: int, completion: int) -> None:
        told = {"prompt_tokens": prompt, "completion_tokens": completion}
        await self.event({"choices": [], "usage": told})

    async def done(self) -> None:
        await self.send(b"data: [DONE]\n\n")

    def cut(self) -> None:
        self._writer.transport.abort()


Script = Callable[[Asked], Awaitable[object]]


@dataclass
class StandIn:
    url: str
    asked: list[Asked] = field(default_factory=list)


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next(
        int(line.split(":")[1])
        for line in head.split("\r\n")
        if line.lower().startswith("content-length:")
    )
    body = json.loads(await reader.readexactly(length))
    return Asked(head.split()[1], head, body, writer)


@asynccontextmanager
async def standing_in(script: Script) -> AsyncIterator[StandIn]:
    """On loopback; whoever is still being answered at the end is cut off."""
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            asked = await _read(reader, writer)
            there.asked.append(asked)
            await script(asked)
        except (asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    there = StandIn(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield there
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
