"""The routes of the page at /: its files, events and trace."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lorax_async.errors import LoraxError
from lorax_async.server.admin import is_operator
from lorax_async.server.clients import EventStream
from lorax_async.server.error_responses import Refusal, create_refusal
from lorax_async.server.in_flight import CLOSING
from lorax_async.server.service import Service
from lorax_async.tracing.drawing import SCRIPT

HERE = Path(__file__).parent

FILES = {
    "/": (HERE / "page.html", "text/html"),
    "/page/page.css": (HERE / "page.css", "text/css"),
    "/page/page.js": (HERE / "page.js", "text/javascript"),
    "/page/events.js": (HERE / "events.js", "text/javascript"),
    "/page/timeline.js": (SCRIPT, "text/javascript"),
}

SAFE = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; connect-src 'self'; img-src data:;"
        " style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Headers of every response of these routes."""


def page_routes(service: Service) -> list[Route]:
    """Return the page's files and the calls it makes. Blocks while it reads the files."""
    return [
        *(Route(path, _File(*file).get) for path, file in FILES.items()),
        Route("/page/events", _Events(service), methods=["GET"]),
        Route("/page/trace.json", _TraceRoute(service).get),
    ]


class _File:
    def __init__(self, path: Path, kind: str) -> None:
        self._content = path.read_bytes()
        self._headers = SAFE | {"content-type": f"{kind}; charset=utf-8"}

    async def get(self, _: Request) -> Response:
        return Response(self._content, headers=self._headers)


class _TraceRoute:
    """GET /page/trace.json: the last cold request, for the page, Perfetto and the command line."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def get(self, request: Request) -> Response:
        operator = is_operator(self._service.settings, request)
        content = await self._service.cold_trace.get(operator=operator)
        if content is None:
            raise Refusal(404, "No cold request has ended yet", code="no_cold_request")
        headers = {
            "content-type": "application/json",
            "content-disposition": 'attachment; filename="cold-request.json"',
            "cache-control": "no-store",  # the operator's trace is not for this browser's next user
        }
        return Response(content, headers=SAFE | headers)


class _Events:
    """GET /page/events as an ASGI app: ends with its client or with the server, HEAD at once."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        operator = is_operator(service.settings, Request(scope, receive))
        if service.in_flight.closing:
            raise Refusal(503, CLOSING, code="closing", retry_after=service.settings.retry_after)
        stream = EventStream(scope, receive, send, service.settings.slow_client)
        if scope["method"] == "HEAD":
            await stream.begin()
            await stream.end()
            return
        with service.feeds.admit(stream, operator=operator):
            try:
                async with service.in_flight.open_scope(receive):
                    await service.feeds.send(stream, operator=operator)
            except ClientDisconnect:
                return
            except LoraxError as error:
                if not stream.has_begun:
                    raise
                await stream.fail(create_refusal(error, service.settings.retry_after), error)
