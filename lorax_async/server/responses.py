"""Responses: a status and OpenAI's JSON form for every error of a request; and event streams."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Mapping
from contextlib import aclosing, suppress
from dataclasses import fields
from math import ceil
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from lorax_async import errors
from lorax_async.config import LoaderConfig
from lorax_async.errors import LoraxError, http_status, shorten

ABORT = "lorax_abort"
"""Key in the scope's state: a function that drops the connection with all unsent data."""

LINGER_BYTES = 8 << 20
"""Bytes of an oversized body to discard before closing: a client that is still sending when the
connection closes loses the response."""

_BODY = "http.response.body"
_logger = logging.getLogger("lorax_async.server")

UNKNOWN = (errors.AdapterNotFoundError, errors.AccessDeniedError, errors.InvalidAdapterIdError)
"""Errors reported as 404, so that a client cannot probe for private adapters."""

INTERNAL = "Internal server error; the server's log has the details."
"""Internal details are for the operator's log only."""

_KINDS = {400: "invalid_request_error", 429: "rate_limit_error"}


class Refusal(Exception):  # noqa: N818 - a response, not always an error of the server
    """An error response to one request.

    `kind` is the error's type in OpenAI's JSON; None derives it from the status. `retry_after` is
    in seconds. With `close`, nothing more is read from the connection.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | int | None = None,
        kind: str | None = None,
        retry_after: float | None = None,
        close: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.kind = kind or _KINDS.get(status, "server_error" if status >= 500 else _KINDS[400])
        self.close = close
        self._headers = dict(headers or {})
        if retry_after is not None:
            self._headers["Retry-After"] = str(max(1, ceil(retry_after)))
        if status == 401:
            self._headers["WWW-Authenticate"] = "Bearer"
        if close:
            self._headers["Connection"] = "close"

    def as_json(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.as_json(), self.status, self._headers)


def invalid_parameter(message: str, param: str | None, code: str = "invalid_value") -> Refusal:
    """Return the response to a parameter that cannot be used; None is the whole body."""
    return Refusal(400, message, param=param, code=code)


def unknown_model(model: str) -> Refusal:
    """Return the response to a model that is unknown, or that its source keeps from this server.

    A client is not told which: what is private looks like what does not exist.
    """
    message = f"The model `{shorten(model, 200)}` does not exist."
    return Refusal(404, message, param="model", code="model_not_found")


def create_refusal(error: Exception, retry_after: float, model: str | None = None) -> Refusal:
    """Return the response to an error; `model` is the client's name for the adapter.

    It replaces the id in the message: behind an operator's name, the id may be a path. Of other
    paths the message has the last part. What a program could do is left out: the log has it.
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):  # starlette's, for an unknown path or method
        return Refusal(error.status_code, error.detail, code="unknown_url", headers=error.headers)
    if isinstance(error, RequestValidationError):  # of a path or query; bodies are `parse_body`'s
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return invalid_parameter(f"{name} is invalid: {first['msg'].lower()}", name)
    answer = http_status(error)
    if answer is None or not isinstance(error, LoraxError):
        return Refusal(500, INTERNAL, code="internal_error")
    status, code = answer
    shown = error if model is None or error.id is None else error.located(id=model)
    message = str(shown) if model is None else _QUOTED_PATH.sub("'", str(shown))
    retry = status in {429, 503} or (status in {502, 504} and error.retryable)
    return Refusal(
        status,
        without_code(message),
        param="model" if error.id is not None else None,
        code=code,
        retry_after=(error.retry_after or retry_after) if retry else None,
    )


_QUOTED_PATH = re.compile(r"'/[^']*/(?=[^'/]+')")

_SETTINGS = "|".join(each.name for each in fields(LoaderConfig) if "_" in each.name)
_CODE = rf"\w=\w|pathlib|Limits\.|Allow\(|LoaderConfig|StoreConfig|\b(?:{_SETTINGS})\b"
_HAS_CODE = re.compile(_CODE)
_CODE_IN_BRACKETS = re.compile(rf" \((?=[^()]*(?:{_CODE}))[^()]*\)")


def without_code(text: str) -> str:
    """Return an error's text without the remedy, after a semicolon, that is a program's or ours."""
    head, _, remedy = text.partition("; ")
    return _CODE_IN_BRACKETS.sub("", head if _HAS_CODE.search(remedy) else text)


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
        self.scope = scope
        self._send_on = send
        self._seconds = seconds

    async def respond(self, response: Response) -> None:
        """Send a whole response."""
        await response(self.scope, self.receive, self._send)

    async def begin(self) -> None:
        self._streaming = True
        headers = [  # a middleware may append to it
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send_event(self, data: dict[str, Any], *, more: bool = True) -> None:
        """Send one event; the response's last without `more`."""
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        body = f"data: {text}\n\n".encode()
        await self._send({"type": _BODY, "body": body, "more_body": more})

    async def end(self) -> None:
        await self._send({"type": _BODY, "body": b"data: [DONE]\n\n", "more_body": False})

    async def fail(self, refusal: Refusal, error: Exception) -> None:
        """End a response that has begun with an error."""
        if refusal.status == 500:
            _logger.error("a response failed after its start", exc_info=error)
        with suppress(ClientDisconnect):
            if self._streaming:
                await self.send_event(refusal.as_json(), more=False)
            else:  # its length was announced, so it can only be dropped
                await self._disconnect()

    def abort(self) -> bool:
        """Drop the connection with all unsent data; return whether that is possible."""
        abort = self.scope.get("state", {}).get(ABORT)
        if abort is not None:
            abort()
        return abort is not None

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


async def wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client disconnects. Its request has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass
