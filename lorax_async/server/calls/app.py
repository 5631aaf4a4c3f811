"""The server's calls, as an ASGI application."""

from __future__ import annotations

import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lorax_async.errors import LoraxError
from lorax_async.server.calls.admin import Administration
from lorax_async.server.calls.answering import Answering
from lorax_async.server.calls.bodies import refuse_unread
from lorax_async.server.calls.errors import INTERNAL, Refusal, refusal_of
from lorax_async.server.calls.host_check import AllowedHosts
from lorax_async.server.calls.metrics import CountedRequests
from lorax_async.server.calls.page.routes import page_routes
from lorax_async.server.calls.requests import ChatBody, CompletionBody
from lorax_async.server.calls.service import Service
from lorax_async.server.calls.under_way import CLOSING, ClientGone
from lorax_async.server.settings import ServerSettings


def create_app(service: Service) -> Starlette:
    """An application over `service`; it opens and closes nothing itself."""
    models, admin = Models(service), Administration(service)
    settings = service.settings

    async def refuse(_: Request, error: Exception) -> Response:
        refusal = refusal_of(error, settings.retry_after)
        return Unread(refusal, settings.slow_client) if refusal.close else refusal.response()

    return Starlette(
        routes=[
            Route("/v1/models", models.all),
            Route("/v1/models/{name:path}", models.one),
            Route("/v1/completions", Answering(service, CompletionBody), methods=["POST"]),
            Route("/v1/chat/completions", Answering(service, ChatBody), methods=["POST"]),
            Route("/v1/load_lora_adapter", admin.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", admin.unload, methods=["POST"]),
            Route("/v1/adapters", admin.adapters),
            Route("/health", models.health),
            Route("/metrics", service.metrics.show),
            *page_routes(service),
        ],
        middleware=[Middleware(CountedRequests, service.metrics), *_hosts(settings)],
        exception_handlers={
            LoraxError: refuse,
            Refusal: refuse,
            ClientGone: _tell_nobody,
            HTTPException: _refuse_route,
            Exception: _refuse_fault,
        },
    )


def _hosts(settings: ServerSettings) -> list[Middleware]:
    if settings.allowed_hosts is None:
        return []
    return [Middleware(AllowedHosts, settings.allowed_hosts, settings.slow_client)]


class Unread(Response):
    """A refusal of a body that was not read to its end."""

    def __init__(self, refusal: Refusal, seconds: float) -> None:
        self._refusal = refusal
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await refuse_unread(self._refusal, scope, receive, send, self._seconds)


class Nothing(Response):
    """For a client that has gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pass


class Models:
    """What there is to be asked, and whether there is anybody to ask."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._created = int(time.time())

    async def all(self, _: Request) -> Response:
        """GET /v1/models: the base, and the adapters that have names."""
        names = self._service.names
        data = [self._card(name) for name in (names.base, *names.adapters)]
        return JSONResponse({"object": "list", "data": data})

    async def one(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name, names = request.path_params["name"], self._service.names
        if name != names.base and name not in names.adapters:
            raise Refusal(404, "No model has this name", param="model", code="model_not_found")
        return JSONResponse(self._card(name))

    async def health(self, _: Request) -> Response:
        """GET /health."""
        if self._service.healthy:
            return Response()
        closing = self._service.under_way.closing
        raise Refusal(
            503,
            CLOSING if closing else "the engine is gone",
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


async def _tell_nobody(_: Request, __: Exception) -> Response:
    return Nothing()


async def _refuse_route(_: Request, error: Exception) -> Response:
    """No such path, or not by this method."""
    assert isinstance(error, HTTPException)
    response = Refusal(error.status_code, error.detail, code="unknown_url").response()
    response.headers.update(error.headers or {})
    return response


async def _refuse_fault(_: Request, __: Exception) -> Response:
    """Whoever runs the server finds it in the log: it is raised once more behind this."""
    return Refusal(500, INTERNAL, code="internal_error").response()
