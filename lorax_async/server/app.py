"""The server's routes, as an ASGI application."""

from __future__ import annotations

import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lorax_async.errors import LoraxError
from lorax_async.server.admin import AdminEndpoints
from lorax_async.server.clients import UnreadRefusal
from lorax_async.server.completions import CompletionEndpoint
from lorax_async.server.error_responses import Refusal, create_refusal
from lorax_async.server.in_flight import CLOSING
from lorax_async.server.page.routes import page_routes
from lorax_async.server.request_bodies import ChatBody, CompletionBody
from lorax_async.server.server_metrics import GONE, RequestCounter
from lorax_async.server.server_settings import AllowedHosts
from lorax_async.server.service import Service


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
