"""The ASGI application: its routes; and uvicorn around it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import re
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.server import HANDLED_SIGNALS

from lorax_async import ids
from lorax_async.errors import (
    AdapterInUseError,
    AdapterTimeoutError,
    InvalidAdapterIdError,
    LoraxError,
    shorten,
)
from lorax_async.events import Event, SlotId
from lorax_async.runtime.placement import AdapterResidency
from lorax_async.server.completions import CompletionEndpoint
from lorax_async.server.openapi import MAX_NUMBER, DocumentedLimits, create_document, render_page
from lorax_async.server.request_bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    LoadBody,
    NameBody,
    TokenizeBody,
    UnloadBody,
    read_body,
)
from lorax_async.server.responses import (
    ABORT,
    UNKNOWN,
    EventStream,
    Refusal,
    UnreadRefusal,
    create_refusal,
    invalid_parameter,
    unknown_model,
)
from lorax_async.server.server_log import (
    GONE,
    RequestObserver,
    log_event,
    note_details,
    note_error,
    note_id,
)
from lorax_async.server.server_settings import (
    AllowedHosts,
    RequireApiKey,
    require_operator,
    sees_everything,
)
from lorax_async.server.service import CLOSING, Service
from lorax_async.types import AdapterId, AdapterKey, AdapterRef

HERE = Path(__file__).parent / "page"

FILES = {
    "/": (HERE / "page.html", "text/html"),
    "/page/page.css": (HERE / "page.css", "text/css"),
    "/page/docs.css": (HERE / "docs.css", "text/css"),
    **{f"/page/{file.name}": (file, "text/javascript") for file in sorted(HERE.glob("*.js"))},
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
"""Headers of every response of the page's routes."""

UNLOAD_SECONDS = 1.0
"""Time to wait for requests that use the adapter; new requests for it wait meanwhile."""

Handler = Callable[[Service, Request], Awaitable[Response]]


def create_app(service: Service) -> Starlette:
    """Return an application over `service`, which it neither opens nor closes.

    Blocks while it reads the page's files.
    """
    settings = service.settings

    async def refuse(request: Request, error: Exception) -> Response:
        note_error(request.scope, error)
        refusal = create_refusal(error, settings.retry_after)
        return UnreadRefusal(refusal, settings.slow_client) if refusal.close else refusal.response()

    async def ignore_disconnect(_: Request, __: Exception) -> Response:
        return Response(status_code=GONE)

    count = service.metrics.count_request
    middleware = [Middleware(RequestObserver, count, settings.root_path)]
    if settings.allowed_hosts is not None:
        middleware.append(Middleware(AllowedHosts, settings.allowed_hosts, settings.slow_client))
    app = Starlette(
        routes=_routes(service),
        middleware=middleware,
        exception_handlers={
            LoraxError: refuse,
            Refusal: refuse,
            HTTPException: refuse,
            ClientDisconnect: ignore_disconnect,
            Exception: refuse,  # starlette raises it again afterwards, so that it is logged
        },
    )
    app.router.redirect_slashes = False  # its URLs are http:// behind a proxy that speaks TLS
    app.router.default = partial(_add_slash, app.router.default)
    return app


async def _add_slash(not_found: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Redirect from /llm to /llm/, the page of a server that a proxy has below /llm."""
    root_path = scope.get("root_path")
    is_page = root_path and scope["path"] == root_path
    await (RedirectResponse(f"{root_path}/") if is_page else not_found)(scope, receive, send)


def _routes(service: Service) -> list[Route]:
    """Blocks while it reads the page's files."""
    api_key = [Middleware(RequireApiKey, service.settings)]

    async def show_file(content: bytes, kind: str, _: Request) -> Response:
        return Response(content, headers=SAFE | {"content-type": f"{kind}; charset=utf-8"})

    def route(path: str, handler: Handler, method: str = "GET", **options: Any) -> Route:
        return Route(path, partial(handler, service), methods=[method], **options)

    def api_route(path: str, endpoint: Callable[..., Any], method: str = "GET") -> Route:
        return Route(path, endpoint, methods=[method], middleware=api_key)

    files = {path: (file.read_bytes(), kind) for path, (file, kind) in FILES.items()}
    files["/docs"] = (render_page(_documented_limits(service)), "text/html")
    return [
        api_route("/v1/models", partial(list_models, service)),
        api_route("/v1/models/{name:path}", partial(describe_model, service)),
        api_route("/v1/completions", CompletionEndpoint(service, CompletionBody), "POST"),
        api_route("/v1/chat/completions", CompletionEndpoint(service, ChatBody), "POST"),
        route("/v1/load_lora_adapter", load_adapter, "POST"),
        route("/v1/unload_lora_adapter", unload_adapter, "POST"),
        route("/v1/pin_lora_adapter", pin_adapter, "POST"),
        route("/v1/unpin_lora_adapter", unpin_adapter, "POST"),
        route("/v1/adapters", list_adapters),
        api_route("/tokenize", partial(tokenize, service), "POST"),
        api_route("/detokenize", partial(detokenize, service), "POST"),
        route("/health", show_health),
        route("/ping", show_health),
        route("/version", show_version),
        route("/metrics", show_metrics),
        route("/openapi.json", show_openapi, include_in_schema=False),
        *(
            Route(path, partial(show_file, content, kind), include_in_schema=False)
            for path, (content, kind) in files.items()
        ),
        Route("/page/events", PageEvents(service), methods=["GET"]),
        route("/page/trace.json", show_trace),
    ]


# -- models, health, metrics ----------------------------------------------------------------------


async def list_models(service: Service, _: Request) -> Response:
    """GET /v1/models: list the base and the adapters that have names."""
    names = service.names
    data = [_model_as_json(service, name) for name in (names.base, *names.adapters)]
    return JSONResponse({"object": "list", "data": data})


async def describe_model(service: Service, request: Request) -> Response:
    """GET /v1/models/NAME: describe one model."""
    name, names = request.path_params["name"], service.names
    note_id(request.scope, "model", name)
    if name != names.base and name not in names.adapters:
        raise unknown_model(name)
    return JSONResponse(_model_as_json(service, name))


def _model_as_json(service: Service, name: str) -> dict[str, object]:
    base = service.names.base
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "lorax-async",
        "parent": None if name == base else base,
        "max_model_len": service.engine.max_length,
    }


async def show_health(service: Service, _: Request) -> Response:
    """GET /health: 200, or 503 if no requests are taken."""
    if service.healthy:
        return Response()
    closing, retry_after = service.in_flight.closing, service.settings.retry_after
    message, code = (CLOSING, "closing") if closing else ("the engine has stopped", "engine_gone")
    raise Refusal(503, message, code=code, retry_after=retry_after)


async def show_metrics(service: Service, _: Request) -> Response:
    """GET /metrics, always in Prometheus' text format."""
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Response(service.metrics.encode(), headers={"content-type": kind})


async def show_version(service: Service, _: Request) -> Response:  # noqa: ARG001 - a handler's
    """GET /version, as in vLLM."""
    return JSONResponse({"version": importlib.metadata.version("lorax-async")})


async def show_openapi(service: Service, request: Request) -> Response:
    """GET /openapi.json: what clients may call, where a proxy has it."""
    document = create_document(_documented_limits(service))
    root_path = request.scope.get("root_path")
    return JSONResponse(document | ({"servers": [{"url": root_path}]} if root_path else {}))


def _documented_limits(service: Service) -> DocumentedLimits:
    settings, prompts = service.settings, service.prompts
    return DocumentedLimits(
        needs_key=bool(settings.api_keys),
        has_operator=settings.admin_token is not None,
        vocabulary=prompts.vocabulary,
        takes_empty_text=prompts.takes_empty_text,
        max_choices=settings.max_choices,
        max_prompt_tokens=service.max_prompt_tokens,
        max_length=service.engine.max_length,
    )


async def tokenize(service: Service, request: Request) -> Response:
    """POST /tokenize, as in vLLM: the token ids of a prompt or a conversation."""
    settings = service.settings
    with service.in_flight.count_request():
        body = await read_body(TokenizeBody, request, settings.max_body_bytes, settings.slow_client)
        tokens = await asyncio.to_thread(service.prompts.tokenize, body)
    count = {"count": len(tokens), "max_model_len": service.engine.max_length}
    return JSONResponse({**count, "tokens": tokens, "token_strs": None})


async def detokenize(service: Service, request: Request) -> Response:
    """POST /detokenize, as in vLLM: the text of token ids."""
    settings = service.settings
    with service.in_flight.count_request():
        body = await read_body(
            DetokenizeBody, request, settings.max_body_bytes, settings.slow_client
        )
        text = await asyncio.to_thread(service.prompts.detokenize, body.tokens)
    return JSONResponse({"prompt": text})


# -- the page -------------------------------------------------------------------------------------

_NUMBER = re.compile(f"[0-9]{{1,{len(str(MAX_NUMBER))}}}")


class PageEvents:
    """GET /page/events as an ASGI app: ends with its client or with the server, HEAD at once."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, settings = self._service, self._service.settings
        operator = sees_everything(settings, Request(scope, receive))
        if service.in_flight.closing:
            raise Refusal(503, CLOSING, code="closing", retry_after=settings.retry_after)
        stream = EventStream(scope, receive, send, settings.slow_client)
        if scope["method"] == "HEAD":
            await stream.begin()
            await stream.end()
            return
        with service.dashboard.admit(stream, operator=operator):
            try:
                async with service.in_flight.open_scope(receive):
                    await service.dashboard.send(stream, operator=operator)
            except ClientDisconnect:
                return
            except LoraxError as error:
                if not stream.has_begun:
                    raise
                await stream.fail(create_refusal(error, settings.retry_after), error)


async def show_trace(service: Service, request: Request) -> Response:
    """GET /page/trace.json: a cold request, for the page, Perfetto and the command line.

    The last one, or that with ?number=N, of those that the viewer may see.
    """
    operator = sees_everything(service.settings, request)
    text = request.query_params.get("number")
    number = int(text) if text is not None and _NUMBER.fullmatch(text) else None
    if text is not None and number is None:
        raise invalid_parameter("number must be that of a cold request", "number")
    content = await service.cold.encoded(number, operator=operator)
    if content is None:
        message = f"Cold request {number} is not one of the last, or is not yours to see"
        message = "No cold request has ended yet" if number is None else message
        raise Refusal(404, message, code="no_cold_request")
    headers = {
        "content-type": "application/json",
        "content-disposition": 'attachment; filename="cold-request.json"',
        "cache-control": "no-store",  # the operator's trace is not for this browser's next user
    }
    return Response(content, headers=SAFE | headers)


# -- the operator's calls, as vLLM has them -------------------------------------------------------


async def load_adapter(service: Service, request: Request) -> Response:
    """POST /v1/load_lora_adapter. Load the adapter once, to report its errors."""
    names, settings = service.names, service.settings

    def require_free(body: LoadBody) -> None:
        if body.lora_name == names.base:
            raise _invalid_input(f"'{body.lora_name}' is the name of the base model.")
        if body.lora_name in names.adapters and not body.load_inplace:
            raise _invalid_input(
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load"
                " the adapter in place, set 'load_inplace' to True."
            )

    with service.in_flight.count_request():
        require_operator(settings, request)
        body = await read_body(LoadBody, request, settings.max_body_bytes, settings.slow_client)
        if not body.lora_name or not body.lora_path:
            raise _invalid_input("Both 'lora_name' and 'lora_path' must be provided.")
        note_details(request.scope, model=body.lora_name)
        note_id(request.scope, "path", body.lora_path)
        require_free(body)
        adapter = await asyncio.to_thread(_parse_adapter, body.lora_path)
        try:
            with await service.loader.load(adapter) as handle:
                key = handle.key
        except UNKNOWN as error:
            raise _missing(body.lora_path, adapter, error) from error
        require_free(body)
        names.add(body.lora_name, adapter)
        await service.pins.follow(body.lora_name, key)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def unload_adapter(service: Service, request: Request) -> Response:
    """POST /v1/unload_lora_adapter. Requests that use the adapter keep it.

    It leaves memory, and its pin ends, with the last name of its version.
    """
    names, settings = service.names, service.settings
    with service.in_flight.count_request():
        require_operator(settings, request)
        body = await read_body(UnloadBody, request, settings.max_body_bytes, settings.slow_client)
        if not body.lora_name:
            raise _invalid_input("'lora_name' needs to be provided to unload a LoRA adapter.")
        note_details(request.scope, model=body.lora_name)
        adapter = names.remove(body.lora_name)
        if adapter is None:
            raise _unknown_name(f"The lora adapter '{body.lora_name}' cannot be found.")
        service.pins.leave(body.lora_name)
        key = service.loader.placement().key(adapter)
        if key is not None and not service.pins.names_of(key):
            # One in use stays on the device until it is evicted like any other.
            with suppress(AdapterInUseError, AdapterTimeoutError):
                await service.loader.unload(adapter, timeout=UNLOAD_SECONDS)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def pin_adapter(service: Service, request: Request) -> Response:
    """POST /v1/pin_lora_adapter. Load a named adapter, and keep it on the device.

    The pin ends with `unpin_adapter`, with the last name of its version, or with the server.
    """
    with service.in_flight.count_request():
        name = await _read_name(service, request)
        if not await service.pins.pin(name):
            raise _unknown_name(f"The lora adapter '{name}' was removed meanwhile.")
    return PlainTextResponse(f"Success: LoRA adapter '{name}' pinned successfully.")


async def unpin_adapter(service: Service, request: Request) -> Response:
    """POST /v1/unpin_lora_adapter. The adapter stays on the device until it is evicted."""
    with service.in_flight.count_request():
        name = await _read_name(service, request)
        if not service.pins.unpin(name):
            raise _unknown_name(_describe_unpinned(service, name))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' unpinned successfully.")


async def _read_name(service: Service, request: Request) -> str:
    """Return the adapter's name in an operator's request."""
    settings = service.settings
    require_operator(settings, request)
    body = await read_body(NameBody, request, settings.max_body_bytes, settings.slow_client)
    note_details(request.scope, model=body.lora_name)
    if body.lora_name not in service.names.adapters:
        raise _unknown_name(f"The lora adapter '{body.lora_name}' cannot be found.")
    return body.lora_name


def _describe_unpinned(service: Service, name: str) -> str:
    """Say that a name has no pin, and which names pin its adapter all the same."""
    names = service.names
    key = service.loader.placement().key(names.adapters[name])
    others = [repr(other) for other, pinned in names.pinned.items() if pinned == key]
    elsewhere = f"; its adapter is, as {', '.join(others)}" if others else ""
    return f"The lora adapter '{name}' is not pinned{elsewhere}."


def _unknown_name(message: str) -> Refusal:
    return Refusal(404, message, param="lora_name", kind="NotFoundError", code=404)


def _parse_adapter(path: str) -> AdapterId:
    """Return the folder or id at `path`. Blocks.

    An absolute path is always a folder, a relative one if it exists. The hub gets this
    machine's token; other sources get none.
    """
    with suppress(OSError, ValueError):
        if os.path.isabs(path) or Path(path).is_dir():
            return Path(path).absolute()
    ref = AdapterRef(path)
    with suppress(InvalidAdapterIdError):
        if ids.parse_ref(ref).source == "hub":
            return replace(ref, use_token=True)
    return path


def _missing(path: str, adapter: AdapterId, error: LoraxError) -> Exception:
    """Return what to raise for a `lora_path` that leads nowhere, as a mistyped folder does."""
    if isinstance(adapter, AdapterRef):
        return error.prefixed("no such folder, and on the hub: ")
    if isinstance(adapter, Path) or "://" in path:
        return error
    message = f"no such folder: {shorten(path, 200)}"
    return Refusal(404, message, param="lora_path", code="model_not_found")


def _invalid_input(message: str) -> Refusal:
    return Refusal(400, message, kind="InvalidUserInput", code=400)


async def list_adapters(service: Service, request: Request) -> Response:
    """GET /v1/adapters: where each adapter is, and its last events."""
    require_operator(service.settings, request)
    placement = service.loader.placement()
    names: dict[AdapterKey, list[str]] = {}
    for name, adapter in service.names.adapters.items():
        key = placement.key(adapter)
        if key is not None:
            names.setdefault(key, []).append(name)
    rows = [
        (key, names.get(key, []), where, placement.story(key))
        for key, where in placement.adapters.items()
    ]
    # Thousands of adapters make a long text; encode it off the loop.
    return await asyncio.to_thread(_list_response, rows)


def _list_response(
    rows: Sequence[tuple[AdapterKey, list[str], AdapterResidency, Sequence[Event]]],
) -> Response:
    data = []
    for key, names, where, story in rows:
        events = [
            {"event": type(event).__name__}
            | {
                member.name: _as_json(getattr(event, member.name))
                for member in fields(event)
                if member.name != "key"
            }
            for event in story
        ]
        data.append({"id": str(key), "names": names} | asdict(where) | {"story": events})
    return JSONResponse({"object": "list", "data": data})


def _as_json(value: Any) -> Any:
    """Return the value of an event's member."""
    if isinstance(value, LoraxError):
        return {"error": type(value).__name__, "message": str(value)}
    return asdict(value) if isinstance(value, SlotId) else value


# -- uvicorn --------------------------------------------------------------------------------------

LAST_SECONDS = 5
"""Time for clients to take finished answers and errors at the end."""

BACKLOG = 2048


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
    handled in the main thread only. `ready` is called once requests are taken.
    """
    await DrainingServer(service, ready).serve([listener])


class DrainingServer(uvicorn.Server):
    """Serve one service on the running event loop, of any kind."""

    def __init__(self, service: Service, ready: Callable[[], None] | None = None) -> None:
        self._service = service
        self._in_flight = service.in_flight
        self._ready = ready

        class ServedConnection(_AbortableConnection, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
            head_seconds = service.settings.slow_client

        config = uvicorn.Config(
            create_app(service),
            http=ServedConnection,
            ws="none",
            lifespan="off",
            log_config=None,  # the process configures logging
            proxy_headers=False,  # clients are limited by their address, which must not be chosen
            server_header=False,
            timeout_graceful_shutdown=LAST_SECONDS,
            backlog=BACKLOG,
        )
        super().__init__(config)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await super().serve(sockets)
        finally:
            self._in_flight.close()
            self._service.metrics.close()
            await self._disconnect_all(sockets or ())
            log_event("closed")

    def stop(self) -> None:
        """Do as a signal does. On the loop."""
        in_flight = self._in_flight
        log_event("closing", in_flight=in_flight.count, at_once=in_flight.closing or None)
        if in_flight.closing:
            in_flight.fail()
        self._in_flight.close()
        self._service.dashboard.end()
        self.should_exit = True

    # -- uvicorn's hooks --------------------------------------------------------------------------

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None:
            self._ready()

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
