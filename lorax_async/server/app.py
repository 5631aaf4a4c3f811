"""The ASGI application: its routes, the page's, and uvicorn around it."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.server import HANDLED_SIGNALS

from lorax_async.errors import LoraxError
from lorax_async.server.admin import AdminEndpoints, is_operator
from lorax_async.server.clients import ABORT, CLOSING, EventStream, UnreadRefusal
from lorax_async.server.completions import CompletionEndpoint
from lorax_async.server.error_responses import Refusal, create_refusal
from lorax_async.server.request_bodies import ChatBody, CompletionBody
from lorax_async.server.server_metrics import GONE, RequestCounter
from lorax_async.server.server_settings import AllowedHosts
from lorax_async.server.service import Service
from lorax_async.tracing.drawing import SCRIPT

HERE = Path(__file__).parent / "page"

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


def create_app(service: Service) -> Starlette:
    """Return an application over `service`, which it neither opens nor closes."""
    models, admin = ModelEndpoints(service), AdminEndpoints(service)
    settings = service.settings

    async def refuse(_: Request, error: Exception) -> Response:
        refusal = create_refusal(error, settings.retry_after)
        return UnreadRefusal(refusal, settings.slow_client) if refusal.close else refusal.response()

    async def ignore_disconnect(_: Request, __: Exception) -> Response:
        return Response(status_code=int(GONE))

    middleware = [Middleware(RequestCounter, service.metrics)]
    if settings.allowed_hosts is not None:
        middleware.append(Middleware(AllowedHosts, settings.allowed_hosts, settings.slow_client))
    return Starlette(
        routes=[
            Route("/v1/models", models.all),
            Route("/v1/models/{name:path}", models.one),
            Route("/v1/completions", CompletionEndpoint(service, CompletionBody), methods=["POST"]),
            Route("/v1/chat/completions", CompletionEndpoint(service, ChatBody), methods=["POST"]),
            Route("/v1/load_lora_adapter", admin.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", admin.unload, methods=["POST"]),
            Route("/v1/adapters", admin.adapters),
            Route("/health", models.health),
            Route("/metrics", service.metrics.show),
            *page_routes(service),
        ],
        middleware=middleware,
        exception_handlers={
            LoraxError: refuse,
            Refusal: refuse,
            HTTPException: refuse,
            ClientDisconnect: ignore_disconnect,
            Exception: refuse,  # starlette raises it again afterwards, so that it is logged
        },
    )


class ModelEndpoints:
    """The list of models, and the server's health."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    async def all(self, _: Request) -> Response:
        """GET /v1/models: list the base and the adapters that have names."""
        names = self._service.names
        data = [self._card(name) for name in (names.base, *names.adapters)]
        return JSONResponse({"object": "list", "data": data})

    async def one(self, request: Request) -> Response:
        """GET /v1/models/NAME: describe one model."""
        name, names = request.path_params["name"], self._service.names
        if name != names.base and name not in names.adapters:
            raise Refusal(404, "No model has this name", param="model", code="model_not_found")
        return JSONResponse(self._card(name))

    async def health(self, _: Request) -> Response:
        """GET /health: 200, or 503 if no requests are taken."""
        if self._service.healthy:
            return Response()
        closing = self._service.in_flight.closing
        raise Refusal(
            503,
            CLOSING if closing else "the engine has stopped",
            code="closing" if closing else "engine_gone",
            retry_after=self._service.settings.retry_after,
        )

    def _card(self, name: str) -> dict[str, object]:
        base = self._service.names.base
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "lorax-async",
            "parent": None if name == base else base,
            "max_model_len": self._service.engine.max_length,
        }


LAST_SECONDS = 5
"""Time for clients to take finished answers and errors at the end."""

BACKLOG = 2048

TICKS_PER_SECOND = 10
"""Uvicorn's unit of `on_tick`."""


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 is any. Raise `OSError`."""
    if not host:  # to sockets, every address
        raise OSError("the host is empty")
    if not 0 <= port < 1 << 16:
        raise OSError(f"{port} is not a port")
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise OSError(f"the host is not a valid name: {error}") from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


async def serve(
    service: Service, listener: socket.socket, *, ready: Callable[[], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, or until cancelled; close `listener`.

    After the signal, new requests get status 503. In-flight requests have the settings' `drain`
    seconds, or until a second signal; then they fail, and all connections are closed. Signals are
    handled in the main thread only.

    Parameters
    ----------
    ready
        Called once requests are taken.
    """
    await DrainingServer(service, ready).serve([listener])


class DrainingServer(uvicorn.Server):
    """Serve one service on the running event loop, of any kind."""

    def __init__(self, service: Service, ready: Callable[[], None] | None = None) -> None:
        self._service = service
        self._in_flight = service.in_flight
        self._ready = ready
        super().__init__(_config(service))

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        try:
            await super().serve(sockets)
        finally:
            self._in_flight.close()
            self._service.metrics.close()
            await self._disconnect_all(sockets or ())

    def stop(self) -> None:
        """Do as a signal does. On the loop."""
        if self._in_flight.closing:
            self._in_flight.fail()
        self._in_flight.close()
        self._service.feeds.end()
        self.should_exit = True
        self._stopped.set()

    # -- uvicorn's hooks --------------------------------------------------------------------------

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None:
            self._ready()

    async def main_loop(self) -> None:
        """Tick once a second, for the date header; uvicorn's own polls ten times."""
        counter = 0
        while not await self.on_tick(counter):
            counter += TICKS_PER_SECOND
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._stopped.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, do not raise signals again: the caller has parts to close."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del sig, frame
        self._loop.call_soon_threadsafe(self.stop)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain. Keep listening meanwhile, so that new requests get a status."""
        self._in_flight.close()
        if not await self._in_flight.wait_until_idle(self._service.settings.drain):
            self._in_flight.fail()
        await super().shutdown(sockets)

    async def _disconnect_all(self, sockets: Iterable[socket.socket]) -> None:
        """Close what is left; after a cancelled `serve`, that is everything."""
        for server in getattr(self, "servers", ()):
            server.close()
        for listener in sockets:
            listener.close()
        for connection in tuple(self.server_state.connections):
            cast(Any, connection).transport.abort()
        if self.server_state.tasks:  # they end once their clients are disconnected
            await asyncio.wait(tuple(self.server_state.tasks), timeout=LAST_SECONDS)


def _config(service: Service) -> uvicorn.Config:
    class ServedConnection(_AbortableConnection, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        head_seconds = service.settings.slow_client

    return uvicorn.Config(
        create_app(service),
        http=ServedConnection,
        ws="none",
        lifespan="off",
        log_config=None,  # the process configures logging
        proxy_headers=False,  # clients are limited by address, which must not be theirs to choose
        server_header=False,
        timeout_graceful_shutdown=LAST_SECONDS,
        backlog=BACKLOG,
    )


class _AbortableConnection(asyncio.Protocol):
    """Uvicorn's protocol: requests can drop the connection, heads have a deadline, no access log.

    Uvicorn alone waits forever for the head of a request.
    """

    app_state: dict[str, Any]
    access_log: bool
    cycle: Any
    transport: asyncio.Transport
    head_seconds: float
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Uvicorn's own switch empties the handlers of a logger of the whole process.
        self.access_log = False
        self.app_state = self.app_state | {ABORT: cast(asyncio.Transport, transport).abort}
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in {socket.AF_INET, socket.AF_INET6}:
            # Disconnect a client that does not take the data that the kernel has buffered.
            milliseconds = min(int(self.head_seconds * 1000), 2**31 - 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()
        else:
            self._expect_nothing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._deadline is None and not self.transport.is_closing():
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(self.head_seconds, self.transport.abort)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
