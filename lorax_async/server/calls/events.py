"""Server-sent events to one client, who may be slow."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from lorax_async.server.calls.errors import Refusal
from lorax_async.server.calls.forms import DONE, as_event
from lorax_async.server.calls.under_way import ClientGone, until_gone

ABORT = "lorax_abort"
"""In the scope's state: cuts the connection at once, whatever has not been sent."""

_HEADERS = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))

_logger = logging.getLogger("lorax_async.server")


class EventStream:
    """What goes out to the client of one request.

    A client that does not take, within `seconds`, what is ready for it is cut off: that is
    `ClientGone`.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, seconds: float) -> None:
        self.receive = receive
        self.begun = False
        """A status was sent: whatever happens now is told in the body."""
        self._streaming = False
        self._scope = scope
        self._send_on = send
        self._seconds = seconds

    async def respond(self, response: Response) -> None:
        """Send a whole response."""
        await response(self._scope, self.receive, self._send)

    async def begin(self) -> None:
        self._streaming = True
        message: Message = {"type": "http.response.start", "status": 200, "headers": []}
        headers = MutableHeaders(scope=message)
        for name, value in _HEADERS:
            headers.append(name, value)
        await self._send(message)

    async def tell(self, data: dict[str, Any]) -> None:
        await self._body(as_event(data))

    async def end(self) -> None:
        await self._body(DONE, more=False)

    async def fail(self, refusal: Refusal, error: Exception) -> None:
        """End with an error in the midst of it."""
        if refusal.status == 500:
            _logger.error("an answer broke off", exc_info=error)
        with suppress(ClientGone):
            if self._streaming:
                await self._body(as_event(refusal.as_json()), more=False)
            else:  # a body that was announced whole can only be cut
                await self._cut_off()

    async def _body(self, content: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": content, "more_body": more})

    async def _send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._send_on(message)
                self.begun = True
        except TimeoutError:
            await self._cut_off()
            raise ClientGone from None

    def cut(self) -> bool:
        """Whether the connection could be, with what has not been sent."""
        abort = self._scope.get("state", {}).get(ABORT)
        if abort is not None:
            abort()
        return abort is not None

    async def _cut_off(self) -> None:
        if self.cut():
            await until_gone(self.receive)
