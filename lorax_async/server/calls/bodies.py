"""Reading what a client sends, within limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from lorax_async.server.calls.errors import Refusal
from lorax_async.server.calls.under_way import ClientGone
from lorax_async.server.settings import ServerSettings

LINGER_BYTES = 8 << 20
"""Of a body that is too large, what is thrown away before the connection is closed: who is still
sending would lose the answer with it."""


async def read_json(request: Request, settings: ServerSettings) -> bytes:
    """All of a body that is said to be JSON. Raises `Refusal` (415), and what `read_body` does.

    A page of another origin can send other types without asking, and none at all.
    """
    said = request.headers.getlist("content-type")
    kinds = {text.partition(";")[0].strip().lower() for text in said}
    if kinds != {"application/json"}:
        raise Refusal(
            415,
            "The body must be sent as Content-Type: application/json",
            code="unsupported_media_type",
            close=True,
        )
    return await read_body(request, settings.max_body_bytes, settings.slow_client)


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """All of it. Raises `Refusal` (413, 408), and `ClientGone`."""
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds), aclosing(_chunks(request.receive)) as chunks:
            async for chunk in chunks:
                if len(body) + len(chunk) > most:
                    raise _too_large(most)
                body += chunk
    except TimeoutError:
        raise Refusal(
            408, f"The body did not come within {seconds:g} s", code="timeout", close=True
        ) from None
    return bytes(body)


async def refuse_unread(
    refusal: Refusal, scope: Scope, receive: Receive, send: Send, seconds: float
) -> None:
    """Answer a request whose body was not read to its end, and close the connection."""

    async def send_slowly(message: dict[str, object]) -> None:
        """The answer is out, and complete; what the client still sends is thrown away meanwhile."""
        await send(message | {"more_body": True} if message["type"] == _BODY else message)

    await refusal.response()(scope, receive, send_slowly)  # type: ignore[arg-type]
    left = LINGER_BYTES
    with suppress(TimeoutError, ClientGone):
        async with asyncio.timeout(seconds), aclosing(_chunks(receive)) as chunks:
            async for chunk in chunks:
                left -= len(chunk)
                if left < 0:
                    break
    await send({"type": _BODY, "body": b"", "more_body": False})


_BODY = "http.response.body"


async def _chunks(receive: Receive) -> AsyncGenerator[bytes, None]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _too_large(most: int) -> Refusal:
    return Refusal(
        413, f"The body is larger than {most} bytes", code="request_too_large", close=True
    )
