"""The application, by FastAPI: its calls and their document; and uvicorn around it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar, cast

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from fastapi.types import DecoratedCallable
from pydantic import BaseModel, WithJsonSchema
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.server import HANDLED_SIGNALS

from lorax_async import ids
from lorax_async.errors import (
    AdapterInUseError,
    AdapterTimeoutError,
    InvalidAdapterIdError,
    LoaderClosedError,
    LoraxError,
    class_name,
    shorten,
)
from lorax_async.events import Event, SlotId
from lorax_async.runtime.placement import AdapterResidency
from lorax_async.server import answers
from lorax_async.server.completions import GeneratedResponse
from lorax_async.server.request_bodies import (
    MAX_PROMPTS,
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
from lorax_async.server.server_metrics import TEXT_FORMAT
from lorax_async.server.server_settings import (
    AllowedHosts,
    require_client,
    require_operator,
    sees_everything,
)
from lorax_async.server.service import CLOSING, RequestScope, Service
from lorax_async.types import AdapterId, AdapterKey, AdapterRef

HERE = Path(__file__).parent / "page"

FILES = {
    "/": (HERE / "page.html", "text/html"),
    "/page/page.css": (HERE / "page.css", "text/css"),
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

ABOUT = """\
OpenAI's API with one base model and any number of LoRA adapters: a request's model is the base's \
name or an adapter's. Parameters that the server does not implement are refused, unless their \
value changes nothing."""

IS_HEAD = "lorax_async.is_head"
"""Key in the scope of a HEAD request."""

T = TypeVar("T", bound=BaseModel)

# -- what the document says -----------------------------------------------------------------------

STATUSES: Mapping[int | str, str] = {
    400: "The request is malformed, too long for the model, or has a parameter that is refused",
    401: "No right key",
    403: "The source refuses the adapter",
    404: "It does not exist",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body's Content-Type is not application/json",
    422: "The adapter is refused: damaged, of a kind that is not applied, or for another base",
    429: "No room; Retry-After says when to try again",
    502: "The source failed, or sent other bytes than it promised",
    503: "It is closing, or the adapter was saved or evicted meanwhile; Retry-After says when",
    504: "The source took too long",
    "default": "Another error",
}

BODIES = (ChatBody, CompletionBody, TokenizeBody, DetokenizeBody, LoadBody, NameBody, UnloadBody)
OF_BODIES = (400, 408, 413, 415, 503)
OF_LOADS = (403, 404, 422, 429, 502, 504)
NO_OPERATOR = "The server has no admin token"

ICE = "What is ice?"
NAMED = {"lora_name": "sql"}
LOADED = NAMED | {"lora_path": "my-org/sql-adapter"}
EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

_SCHEMA = "#/components/schemas/{model}"


def _errors(*statuses: int | str, text: str | None = None) -> dict[int | str, dict[str, Any]]:
    """Return the responses with these statuses, all of which have an `ErrorResponse`."""
    content = {"application/json": {"schema": {"$ref": _SCHEMA.format(model="ErrorResponse")}}}
    return {each: {"description": text or STATUSES[each], "content": content} for each in statuses}


def _describe(generate: Callable[[], dict[str, Any]], service: Service) -> dict[str, Any]:
    """Return FastAPI's document with the schemas of errors and of bodies."""
    document = generate()
    if "ErrorResponse" not in document["components"]["schemas"]:  # it is generated once
        document["components"]["schemas"] |= _schemas(service)
        disabled = operator.routes if service.settings.admin_token is None else ()
        for route in cast(Iterable[APIRoute], disabled):
            for operation in document["paths"][route.path].values():
                operation["responses"] = _errors(403, text=NO_OPERATOR)
    return document


def _schemas(service: Service) -> dict[str, Any]:
    """Return the schemas of errors and of bodies, with the limits of this server."""
    models = [(each, "validation") for each in (*BODIES, answers.ErrorResponse)]
    _, definitions = models_json_schema(cast(Any, models), ref_template=_SCHEMA)
    schemas: dict[str, Any] = definitions["$defs"]
    prompts, max_choices = service.prompts, service.settings.max_choices
    tokens = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": prompts.vocabulary - 1},
    }
    schemas["DetokenizeBody"]["properties"]["tokens"] |= tokens
    text = {"type": "string"} | ({} if prompts.takes_empty_text else {"minLength": 1})
    one = tokens | {"minItems": 1, "maxItems": service.max_prompt_tokens}
    several = {"type": "array", "minItems": 1, "maxItems": min(MAX_PROMPTS, max_choices)}
    prompt = [text, several | {"items": text}, one, several | {"items": one}]
    schemas["CompletionBody"]["properties"]["prompt"]["anyOf"] = prompt
    for name in ("CompletionBody", "ChatBody"):
        members = schemas[name]["properties"]
        for member, most in (("n", max_choices), ("max_tokens", service.engine.max_length - 1)):
            number, null = members[member]["anyOf"]
            members[member]["anyOf"] = [number | {"maximum": most}, null]
    return schemas


# -- what calls have in common --------------------------------------------------------------------


async def _get_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOfApp = Annotated[Service, Depends(_get_service)]
"""Completions read it from the request: a dependency takes some 20 µs."""


def _bearer(name: str, text: str) -> Any:
    """Return a dependency for the document; `require_client` and others judge the keys."""
    return Depends(HTTPBearer(scheme_name=name, description=text, auto_error=False))


API_KEY = _bearer("apiKey", "a key of --api-key or LORAX_API_KEY")
ADMIN_TOKEN = _bearer("adminToken", "the value of LORAX_ADMIN_TOKEN")


def _body_of(kind: type[T]) -> Any:
    """Return a dependency: the body, read within the limits; the request counts as in flight."""

    async def read(request: Request) -> AsyncIterator[T]:
        service: Service = request.app.state.service
        settings = service.settings
        with service.in_flight.count_request():
            yield await read_body(kind, request, settings.max_body_bytes, settings.slow_client)

    return Depends(read)


# -- the application ------------------------------------------------------------------------------

public, client, viewer = APIRouter(), APIRouter(), APIRouter()
operator = APIRouter(default_response_class=PlainTextResponse)
"""The calls by who may make them. A viewer's wrong key is refused even if none is needed."""


def _post(
    router: APIRouter, path: str, body: type[BaseModel], example: Any, *errors: int, **options: Any
) -> Callable[[DecoratedCallable], DecoratedCallable]:
    """Declare a call with a body, which `_body_of` reads. `errors` are those beside the body's."""
    content = {"schema": {"$ref": _SCHEMA.format(model=body.__name__)}, "example": example}
    return router.post(
        path,
        responses=_errors(*OF_BODIES, *errors) | options.pop("responses", {}),
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": content}}},
        **options,
    )


class HeadAsGet:
    """ASGI middleware: HEAD is answered as GET is; the server leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") == "HEAD":
            scope = {**scope, "method": "GET", IS_HEAD: True}
        await self._app(scope, receive, send)


def create_app(service: Service) -> FastAPI:
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
    middleware = [Middleware(RequestObserver, count, settings.root_path), Middleware(HeadAsGet)]
    if settings.allowed_hosts is not None:
        middleware.append(Middleware(AllowedHosts, settings.allowed_hosts, settings.slow_client))
    app = FastAPI(
        title="lorax-async",
        version=importlib.metadata.version("lorax-async"),
        description=ABOUT,
        docs_url=None,  # its scripts are another host's
        redoc_url=None,
        redirect_slashes=False,  # its URLs are http:// behind a proxy that speaks TLS
        generate_unique_id_function=lambda route: route.name,
        middleware=middleware,
        exception_handlers={
            LoraxError: refuse,
            Refusal: refuse,
            HTTPException: refuse,
            RequestValidationError: refuse,
            ClientDisconnect: ignore_disconnect,
            Exception: refuse,  # starlette raises it again afterwards, so that it is logged
        },
    )
    app.state.service, app.state.settings = service, settings
    app.router.default = partial(_add_slash, app.router.default)
    _add_routes(app, service)
    app.openapi = partial(_describe, app.openapi, service)  # type: ignore[method-assign]
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    """Add the calls with the keys that they need. Blocks while it reads the page's files."""
    settings, other = service.settings, _errors("default")
    has_keys, has_operator = bool(settings.api_keys), settings.admin_token is not None
    admin = [ADMIN_TOKEN] if has_operator else []
    keys = [API_KEY, *admin] if has_keys else []
    denied = other | _errors(401)
    unseen = denied if has_keys or has_operator else other | _errors(403, text=NO_OPERATOR)
    app.include_router(
        client,
        dependencies=[*keys, Depends(require_client)] if has_keys else [],
        responses=denied if has_keys else other,
    )
    app.include_router(public, responses=other)
    app.include_router(viewer, dependencies=keys, responses=unseen)
    app.include_router(operator, dependencies=[*admin, Depends(require_operator)], responses=denied)

    async def show_file(content: bytes, kind: str, _: Request) -> Response:
        return Response(content, headers=SAFE | {"content-type": f"{kind}; charset=utf-8"})

    for path, (file, kind) in FILES.items():
        show = partial(show_file, file.read_bytes(), kind)
        app.add_route(path, show, include_in_schema=False)


async def _add_slash(not_found: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Redirect from /llm to /llm/, the page of a server that a proxy has below /llm."""
    root_path = scope.get("root_path")
    is_page = root_path and scope["path"] == root_path
    await (RedirectResponse(f"{root_path}/") if is_page else not_found)(scope, receive, send)


# -- OpenAI's calls, and tokens as in vLLM --------------------------------------------------------


@client.get("/v1/models")
async def list_models(service: ServiceOfApp) -> answers.ModelList:
    """List the base and the adapters that have names."""
    names = service.names
    return answers.ModelList(
        data=[_model_card(service, name) for name in (names.base, *names.adapters)]
    )


@client.get("/v1/models/{name:path}", responses=_errors(404))
async def describe_model(name: str, request: Request, service: ServiceOfApp) -> answers.ModelCard:
    """Describe one model. A slash may stand in its name as it is."""
    names = service.names
    note_id(request.scope, "model", name)
    if name != names.base and name not in names.adapters:
        raise unknown_model(name)
    return _model_card(service, name)


def _model_card(service: Service, name: str) -> answers.ModelCard:
    base = service.names.base
    return answers.ModelCard(
        id=name,
        created=service.created,
        parent=None if name == base else base,
        max_model_len=service.engine.max_length,
    )


@_post(
    client,
    "/v1/chat/completions",
    ChatBody,
    {"model": "NAME", "messages": [{"role": "user", "content": ICE}], "max_tokens": 32},
    *OF_LOADS,
    response_model=answers.ChatResponse,
    responses=EVENTS,
)
async def answer_conversation(
    request: Request, body: Annotated[ChatBody, _body_of(ChatBody)]
) -> Response:
    """Answer a conversation."""
    return GeneratedResponse(request.app.state.service, body)


@_post(
    client,
    "/v1/completions",
    CompletionBody,
    {"model": "NAME", "prompt": ICE, "max_tokens": 32, "temperature": 0},
    *OF_LOADS,
    response_model=answers.CompletionResponse,
    responses=EVENTS,
)
async def continue_prompts(
    request: Request, body: Annotated[CompletionBody, _body_of(CompletionBody)]
) -> Response:
    """Continue prompts."""
    return GeneratedResponse(request.app.state.service, body)


@_post(client, "/tokenize", TokenizeBody, {"prompt": ICE})
async def tokenize(
    service: ServiceOfApp, body: Annotated[TokenizeBody, _body_of(TokenizeBody)]
) -> answers.TokenizeResponse:
    """Return the token ids of a prompt or a conversation, as vLLM does."""
    tokens = await asyncio.to_thread(service.prompts.tokenize, body)
    return answers.TokenizeResponse(
        count=len(tokens), max_model_len=service.engine.max_length, tokens=list(tokens)
    )


@_post(client, "/detokenize", DetokenizeBody, {"tokens": [1, 2, 3]})
async def detokenize(
    service: ServiceOfApp, body: Annotated[DetokenizeBody, _body_of(DetokenizeBody)]
) -> answers.DetokenizeResponse:
    """Return the text of token ids, as vLLM does."""
    text = await asyncio.to_thread(service.prompts.detokenize, body.tokens)
    return answers.DetokenizeResponse(prompt=text)


# -- health and metrics ---------------------------------------------------------------------------


@public.get("/health", response_class=Response, responses=_errors(503))
@public.get("/ping", response_class=Response, responses=_errors(503), name="show_ping")
async def show_health(service: ServiceOfApp) -> Response:
    """Say whether requests are taken."""
    if service.healthy:
        return Response()
    closing, retry_after = service.in_flight.closing, service.settings.retry_after
    message, code = (CLOSING, "closing") if closing else ("the engine has stopped", "engine_gone")
    raise Refusal(503, message, code=code, retry_after=retry_after)


@public.get("/version")
async def show_version() -> answers.VersionResponse:
    """Return the version of lorax-async."""
    return answers.VersionResponse(version=importlib.metadata.version("lorax-async"))


@public.get("/metrics", response_class=PlainTextResponse)
async def show_metrics(service: ServiceOfApp) -> Response:
    """Return numbers, always in Prometheus' text format."""
    return Response(service.metrics.encode(), headers={"content-type": TEXT_FORMAT})


# -- the page -------------------------------------------------------------------------------------


class PageEvents(Response):
    """What the page shows, as events, which end with the client or with the server."""

    background = None

    def __init__(self, service: Service, *, operator: bool) -> None:
        self._service, self._operator = service, operator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        dashboard, seconds = self._service.dashboard, self._service.settings.slow_client
        # The dashboard ends it, also when requests in flight fail.
        with suppress(ClientDisconnect):
            async with RequestScope(set(), receive):
                stream = EventStream(scope, receive, send, seconds)
                await dashboard.send(stream, operator=self._operator)


@viewer.get("/page/events", response_class=Response, responses=EVENTS | _errors(429, 503))
async def show_events(
    request: Request, service: ServiceOfApp, operator: Annotated[bool, Depends(sees_everything)]
) -> Response:
    """Send what the page shows, as it changes."""
    if service.in_flight.closing:
        raise LoaderClosedError(CLOSING)
    if IS_HEAD in request.scope:
        return Response(media_type="text/event-stream", headers={"cache-control": "no-cache"})
    return PageEvents(service, operator=operator)


@viewer.get("/page/trace.json", responses=_errors(400, 404))
async def show_trace(
    service: ServiceOfApp,
    operator: Annotated[bool, Depends(sees_everything)],
    number: Annotated[
        str | None,
        Query(pattern="^[0-9]{1,18}$", description="That of one of the last cold requests"),
        WithJsonSchema({"type": "integer", "minimum": 0, "maximum": 10**18 - 1}),
    ] = None,
) -> Response:
    """Return the trace of the last cold request, in Chrome's format, or that of another one."""
    content = await service.cold.encoded(None if number is None else int(number), operator=operator)
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


@_post(operator, "/v1/load_lora_adapter", LoadBody, LOADED, *OF_LOADS)
async def load_adapter(
    request: Request, service: ServiceOfApp, body: Annotated[LoadBody, _body_of(LoadBody)]
) -> str:
    """Load an adapter, to report its errors, and give it a name."""
    names = service.names
    if not body.lora_name or not body.lora_path:
        raise _invalid_input("Both 'lora_name' and 'lora_path' must be provided.")
    note_details(request.scope, model=body.lora_name)
    note_id(request.scope, "path", body.lora_path)
    _require_free(service, body)
    adapter = await asyncio.to_thread(_parse_adapter, body.lora_path)
    try:
        with await service.loader.load(adapter) as handle:
            key = handle.key
    except UNKNOWN as error:
        raise _missing(body.lora_path, adapter, error) from error
    _require_free(service, body)
    names.add(body.lora_name, adapter)
    await service.pins.follow(body.lora_name, key)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


def _require_free(service: Service, body: LoadBody) -> None:
    if body.lora_name == service.names.base:
        raise _invalid_input(f"'{body.lora_name}' is the name of the base model.")
    if body.lora_name in service.names.adapters and not body.load_inplace:
        raise _invalid_input(
            f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load"
            " the adapter in place, set 'load_inplace' to True."
        )


async def _read_name(
    request: Request, service: ServiceOfApp, body: Annotated[NameBody, _body_of(NameBody)]
) -> str:
    """Return the adapter's name in an operator's request."""
    note_details(request.scope, model=body.lora_name)
    if body.lora_name not in service.names.adapters:
        raise _unknown_name(f"The lora adapter '{body.lora_name}' cannot be found.")
    return body.lora_name


@_post(operator, "/v1/pin_lora_adapter", NameBody, NAMED, *OF_LOADS)
async def pin_adapter(service: ServiceOfApp, name: Annotated[str, Depends(_read_name)]) -> str:
    """Load an adapter that has a name, and keep it on the device.

    The pin ends with an unpin, with the last name of its version, or with the server.
    """
    if not await service.pins.pin(name):
        raise _unknown_name(f"The lora adapter '{name}' was removed meanwhile.")
    return f"Success: LoRA adapter '{name}' pinned successfully."


@_post(operator, "/v1/unpin_lora_adapter", NameBody, NAMED, 404)
async def unpin_adapter(service: ServiceOfApp, name: Annotated[str, Depends(_read_name)]) -> str:
    """Let a pinned adapter be evicted again."""
    if not service.pins.unpin(name):
        raise _unknown_name(_describe_unpinned(service, name))
    return f"Success: LoRA adapter '{name}' unpinned successfully."


@_post(operator, "/v1/unload_lora_adapter", UnloadBody, NAMED, 404)
async def unload_adapter(
    request: Request, service: ServiceOfApp, body: Annotated[UnloadBody, _body_of(UnloadBody)]
) -> str:
    """Take a name from its adapter; requests that use the adapter keep it.

    It leaves memory, and its pin ends, with the last name of its version.
    """
    if not body.lora_name:
        raise _invalid_input("'lora_name' needs to be provided to unload a LoRA adapter.")
    note_details(request.scope, model=body.lora_name)
    adapter = service.names.remove(body.lora_name)
    if adapter is None:
        raise _unknown_name(f"The lora adapter '{body.lora_name}' cannot be found.")
    service.pins.leave(body.lora_name)
    key = service.loader.placement().key(adapter)
    if key is not None and not service.pins.names_of(key):
        # One in use stays on the device until it is evicted like any other.
        with suppress(AdapterInUseError, AdapterTimeoutError):
            await service.loader.unload(adapter, timeout=UNLOAD_SECONDS)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


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


@operator.get("/v1/adapters", response_class=JSONResponse, response_model=answers.AdapterRows)
async def list_adapters(service: ServiceOfApp) -> Response:
    """List where each adapter is, and its last events."""
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
        return {"error": class_name(value), "message": str(value)}
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
