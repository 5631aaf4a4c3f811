"""Who asks, and how many requests are in flight."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, Self

from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from lorax_async.errors import CapacityError, LoaderClosedError
from lorax_async.server.error_responses import Refusal
from lorax_async.types import AdapterId, Ref, as_ref

ABORT = "lorax_abort"
"""Key in the scope's state: a function that drops the connection with all unsent data."""

LINGER_BYTES = 8 << 20
"""Bytes of an oversized body to discard before closing: a client that is still sending when the
connection closes loses the response."""

DONE = b"data: [DONE]\n\n"

_BODY = "http.response.body"
_BEARER = "bearer "
_EVENT_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
)

_logger = logging.getLogger("lorax_async.server")

# -- its identity ---------------------------------------------------------------------------------


def read_bearer_key(connection: HTTPConnection) -> str | None:
    """Return the client's bearer key, if it sends one."""
    field = connection.headers.get("authorization", "")
    return field[len(_BEARER) :].strip() if field.lower().startswith(_BEARER) else None


def identify_client(connection: HTTPConnection) -> tuple[str, str]:
    """Identify a client by its key if it has one, else by its address."""
    key = read_bearer_key(connection)
    if key is not None:
        return "key", key
    return "address", connection.client.host if connection.client else ""


# -- what it sends --------------------------------------------------------------------------------


async def read_json(request: Request, limit: int, seconds: float) -> bytes:
    """Read a JSON body. Raise `Refusal` (415) for other content types, else as `read_body`.

    A page of another origin can send other types without a preflight request.
    """
    fields = request.headers.getlist("content-type")
    if {field.partition(";")[0].strip().lower() for field in fields} != {"application/json"}:
        raise Refusal(
            415,
            "The body must have the Content-Type application/json",
            code="unsupported_media_type",
            close=True,
        )
    return await read_body(request, limit, seconds)


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """Read a whole body. Raise `Refusal` (413, 408), or `ClientDisconnect`."""
    too_large = Refusal(
        413, f"The body is larger than {limit} bytes", code="request_too_large", close=True
    )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds), aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                if len(body) + len(chunk) > limit:
                    raise too_large
                body += chunk
    except TimeoutError:
        raise Refusal(
            408, f"The body did not arrive within {seconds:g} s", code="timeout", close=True
        ) from None
    return bytes(body)


async def wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client disconnects. Its request has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


# -- what it receives -----------------------------------------------------------------------------


class UnreadRefusal(Response):
    """Refuse a request before its body was read, and close the connection.

    The whole response is sent first; up to `LINGER_BYTES` of the body are discarded after it.
    """

    def __init__(self, refusal: Refusal, seconds: float) -> None:
        self._refusal = refusal
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_unfinished(message: Message) -> None:
            await send({**message, "more_body": True} if message["type"] == _BODY else message)

        await self._refusal.response()(scope, receive, send_unfinished)
        remaining, body = LINGER_BYTES, Request(scope, receive).stream()
        with suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(self._seconds), aclosing(body) as chunks:
                async for chunk in chunks:
                    remaining -= len(chunk)
                    if remaining < 0:
                        break
        await send({"type": _BODY, "body": b"", "more_body": False})


class EventStream:
    """The response to one request, whole or as server-sent events.

    A client that does not take ready data within `seconds` is disconnected: `ClientDisconnect`.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, seconds: float) -> None:
        self.receive = receive
        self.has_begun = False
        """Whether a status was sent: later errors go into the body."""
        self._streaming = False
        self._scope = scope
        self._send_on = send
        self._seconds = seconds

    async def respond(self, response: Response) -> None:
        """Send a whole response."""
        await response(self._scope, self.receive, self._send)

    async def begin(self) -> None:
        self._streaming = True
        headers = list(_EVENT_HEADERS)  # a middleware may append to it
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send_event(self, data: dict[str, Any]) -> None:
        """Send one event."""
        await self._send_body(_encode_event(data))

    async def end(self) -> None:
        await self._send_body(DONE, more=False)

    async def fail(self, refusal: Refusal, error: Exception) -> None:
        """End a response that has begun with an error."""
        if refusal.status == 500:
            _logger.error("a response failed after its start", exc_info=error)
        with suppress(ClientDisconnect):
            if self._streaming:
                await self._send_body(_encode_event(refusal.as_json()), more=False)
            else:  # its length was announced, so it can only be dropped
                await self._disconnect()

    def abort(self) -> bool:
        """Drop the connection with all unsent data; return whether that is possible."""
        abort = self._scope.get("state", {}).get(ABORT)
        if abort is not None:
            abort()
        return abort is not None

    async def _send_body(self, content: bytes, *, more: bool = True) -> None:
        await self._send({"type": _BODY, "body": content, "more_body": more})

    async def _send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._send_on(message)
                self.has_begun = True
        except TimeoutError:
            await self._disconnect()
            raise ClientDisconnect from None

    async def _disconnect(self) -> None:
        if self.abort():
            await wait_for_disconnect(self.receive)


def _encode_event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


CLOSING = "the server is closing"


class RequestScope:
    """End the enclosed block with an error from outside, wherever it waits.

    As `asyncio.timeout` does: cancel the block, then turn the cancellation into the error. A
    client that disconnects interrupts with `ClientDisconnect`.
    """

    def __init__(self, scopes: set[RequestScope], receive: Receive) -> None:
        self._scopes = scopes
        self._receive = receive
        self._reason: Exception | None = None

    def interrupt(self, reason: Exception) -> None:
        """End the block with `reason`. Only the first call counts."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._listening = asyncio.create_task(self._listen(), name="lorax client's presence")
        self._scopes.add(self)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._listening.cancel()
        self._scopes.discard(self)
        if self._reason is not None:
            cancelled = self._task.uncancel() > self._cancelling  # by another task as well
            if kind is asyncio.CancelledError and not cancelled:
                raise self._reason from None

    async def _listen(self) -> None:
        await wait_for_disconnect(self._receive)
        self.interrupt(ClientDisconnect())


class InFlightRequests:
    """Count in-flight requests, and refuse new ones once closed. On one event loop."""

    def __init__(self) -> None:
        self.closing = False
        self._failed = False
        self._count = 0
        self._scopes: set[RequestScope] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def count_request(self) -> Iterator[None]:
        """Count one request while entered. Raise `LoaderClosedError` when closing."""
        if self.closing:
            raise LoaderClosedError(CLOSING)
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()

    def open_scope(self, receive: Receive) -> RequestScope:
        """Return the scope in which to answer a request whose body was read.

        Raise `LoaderClosedError` after `fail`.
        """
        if self._failed:
            raise LoaderClosedError(CLOSING)
        return RequestScope(self._scopes, receive)

    def close(self) -> None:
        """Refuse new requests."""
        self.closing = True

    def fail(self) -> None:
        """End in-flight requests with `LoaderClosedError`, those still reading a body after it."""
        self._failed = True
        for scope in tuple(self._scopes):
            scope.interrupt(LoaderClosedError(CLOSING))

    async def wait_until_idle(self, seconds: float) -> bool:
        """Wait for the last request; return whether it ended in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set()


class ClientLimits:
    """Limit the different adapters that each client has in flight to `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._adapters: dict[tuple[str, str], Counter[Ref]] = {}

    @contextmanager
    def count_request(self, client: tuple[str, str], adapter: AdapterId | None) -> Iterator[None]:
        """Count one request while entered; the base (None) is free. Raise `CapacityError`."""
        if adapter is None:
            yield
            return
        ref, adapters = as_ref(adapter), self._adapters.setdefault(client, Counter())
        if ref not in adapters and len(adapters) >= self._limit:
            raise CapacityError(
                f"this client has requests for {self._limit} adapters in flight, the limit; try"
                " again when one has ended"
            )
        adapters[ref] += 1
        try:
            yield
        finally:
            adapters[ref] -= 1
            if not adapters[ref]:
                del adapters[ref]
            if not adapters:
                self._adapters.pop(client, None)
