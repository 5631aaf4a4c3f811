"""GET / and what the page there asks for."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lorax_async.errors import LoraxError
from lorax_async.server.admin import is_operator
from lorax_async.server.clients import EventStream
from lorax_async.server.errors import Refusal, refusal_of
from lorax_async.server.in_flight import CLOSING
from lorax_async.server.service import Service

HERE = Path(__file__).parent

FILES = {
    "/": ("page.html", "text/html"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/events.js": ("events.js", "text/javascript"),
}

SAFE = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; connect-src 'self'; img-src data:;"
        " style-src 'self' 'unsafe-inline'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Of every answer here. The picture has a style of its own, hence 'unsafe-inline' for styles."""


def page_routes(service: Service) -> list[Route]:
    """The page's files, and what they read. Blocks while it reads those files."""
    live = Live(service)
    return [
        *(Route(path, File(*of).show) for path, of in FILES.items()),
        Route("/page/events", Events(service), methods=["GET"]),
        Route("/page/timeline.svg", live.picture),
        Route("/page/trace.json", live.trace),
    ]


class File:
    """One of the page's own."""

    def __init__(self, name: str, kind: str) -> None:
        self._content = (HERE / name).read_bytes()
        self._headers = SAFE | {"content-type": f"{kind}; charset=utf-8"}

    async def show(self, _: Request) -> Response:
        return Response(self._content, headers=self._headers)


class Live:
    """The last cold request."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def picture(self, request: Request) -> Response:
        """GET /page/timeline.svg."""
        operator = is_operator(self._service.settings, request)
        svg = await self._service.timeline.svg(operator=operator)
        return _found(svg, "image/svg+xml", {})

    async def trace(self, request: Request) -> Response:
        """GET /page/trace.json, for Perfetto and for `lorax-async timeline`."""
        operator = is_operator(self._service.settings, request)
        content = await self._service.timeline.trace(operator=operator)
        name = {"content-disposition": 'attachment; filename="cold-request.json"'}
        return _found(content, "application/json", name)


class Events:
    """GET /page/events, in ASGI's form: it ends with its client, or with the server.

    HEAD ends at once.
    """

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
        with service.watching.one(stream, operator=operator):
            try:
                async with service.in_flight.watched(receive):
                    await service.watching.tell(stream, operator=operator)
            except ClientDisconnect:
                return
            except LoraxError as error:
                if not stream.begun:
                    raise
                await stream.fail(refusal_of(error, service.settings.retry_after), error)


def _found(content: str | bytes | None, kind: str, more: dict[str, str]) -> Response:
    if content is None:
        raise Refusal(404, "No cold request has ended yet", code="no_cold_request")
    # The operator's is for nobody else who has this browser later.
    return Response(
        content, headers=SAFE | {"content-type": kind, "cache-control": "no-store"} | more
    )
