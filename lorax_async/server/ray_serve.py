"""`lorax_async.server` on Ray Serve: an ingress, and replicas to which it routes by adapter.

Ray is imported by functions that use it. docs/fleet.md is for users.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

from anyio import create_memory_object_stream
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Message

from lorax_async.config import PEERS_REMOVED, LoaderConfig, MiB
from lorax_async.engines.ray.replicas import PublishedAdapters
from lorax_async.errors import ConfigError
from lorax_async.server.app import create_app
from lorax_async.server.server_metrics import TEXT_FORMAT, merge_replicas
from lorax_async.server.server_settings import ServerSettings
from lorax_async.server.service import ServedModel, ServerCapacity, open_service
from lorax_async.types import MAX_ID_BYTES, as_ref, text_of

METRICS_SECONDS = 10.0
"""Seconds for the numbers of all replicas: Prometheus waits as long by default."""

ROUTER = "lorax_async.engines.ray.router:AdapterRouter"


class AdapterServer(PublishedAdapters):
    """A replica of `lorax_async.server`: a base model and its adapters, behind `AdapterIngress`.

    Parameters
    ----------
    base
        The base model's folder.
    config
        The loader's settings.
    settings, capacity
        Arguments of `ServerSettings` and `ServerCapacity`.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self,
        base: Path,
        config: LoaderConfig,
        settings: Mapping[str, Any],
        capacity: Mapping[str, Any] | None = None,
    ) -> None:
        dtype = str(config.dtype or "float32")
        model = await asyncio.to_thread(ServedModel.load, base, dtype=dtype, device=config.device)
        self._closing = AsyncExitStack()
        opened = open_service(
            model, config, ServerSettings(**settings), ServerCapacity(**(capacity or {}))
        )
        self._service = await self._closing.enter_async_context(opened)
        self.adapters = self._service.loader
        self._app = create_app(self._service)

    async def __del__(self) -> None:  # Ray awaits it
        await self._closing.aclose()

    def adapter_names(self) -> Mapping[str, str]:
        """Return the server's names."""
        return {text_of(as_ref(id)): name for name, id in self._service.names.adapters.items()}

    async def check_health(self) -> None:
        """Fail if the engine has stopped: Ray replaces the replica."""
        if not self._service.healthy:
            raise RuntimeError("the engine has stopped")

    async def metrics(self) -> tuple[str, bytes]:
        """Return the replica's name, and its numbers in Prometheus' text format."""
        from ray import serve  # noqa: PLC0415

        return serve.get_replica_context().replica_tag, self._service.metrics.encode()

    async def respond(self, scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message, None]:
        """Yield the ASGI messages of the response to a request."""
        sending, sent = create_memory_object_stream[Message](1)
        request: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return request.pop() if request else await asyncio.Future()  # until it is cancelled

        async def run() -> None:
            async with sending:
                await self._app(scope, receive, sending.send)

        answering = asyncio.create_task(run(), name="lorax request")
        try:
            async with sent:
                async for message in sent:
                    yield message
            await answering
        finally:
            answering.cancel()


class AdapterIngress:
    """The deployment that clients call: it sends a request where its `model` is.

    OpenAI's completions, `GET /v1/models` and `GET /health` of one server, `GET /metrics` of all.
    Names of adapters are those of the servers' settings: calls that load and unload by name would
    reach one replica only.
    """

    PATHS = frozenset({"/v1/models", "/v1/completions", "/v1/chat/completions", "/health"})

    def __init__(self, servers: Any, base: str, max_body_bytes: int = MiB) -> None:
        self._servers = servers
        self._base = base
        self._max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        if (request.method, request.url.path) == ("GET", "/metrics"):
            return await self._show_metrics()
        if request.url.path not in self.PATHS:
            return Response(status_code=404)
        body = bytearray()
        async with aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > self._max_body_bytes:
                    return Response(status_code=413)
        kept = ("type", "http_version", "method", "scheme", "path", "query_string", "headers")
        scope = {name: request.scope[name] for name in kept} | {"client": request.client}
        model = adapter_of(bytes(body))
        servers = self._servers.options(
            stream=True, multiplexed_model_id="" if model == self._base else model
        )
        messages = servers.respond.remote(scope, bytes(body))
        start = await anext(messages)

        async def chunks_of_body() -> AsyncIterator[bytes]:
            async for message in messages:
                yield message.get("body", b"")

        response = StreamingResponse(chunks_of_body(), start["status"])
        response.raw_headers = start["headers"]
        return response

    async def _show_metrics(self) -> Response:
        """Return the numbers of all replicas that live, each with its name as a label."""
        asked = self._servers.broadcast("metrics")
        try:
            answers = await asked.results_async(timeout_s=METRICS_SECONDS, return_exceptions=True)
        except TimeoutError:
            return Response("a replica does not answer", HTTPStatus.SERVICE_UNAVAILABLE)
        texts = dict(each for each in answers if not isinstance(each, BaseException))
        return Response(merge_replicas(texts), media_type=TEXT_FORMAT)


def adapter_of(body: bytes) -> str:
    """Return the `model` of a request's body; "" if that is not a name, which a server refuses.

    Routers hash names, and remember them: one that is too long or has no UTF-8 is "" here.
    """
    with suppress(ValueError, RecursionError):
        members = json.loads(body)
        if isinstance(members, dict) and isinstance(model := members.get("model"), str):
            return model if len(model.encode()) <= MAX_ID_BYTES else ""
    return ""


def build_app(
    base: Path,
    config: LoaderConfig,
    settings: Mapping[str, Any],
    capacity: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Return an application for `serve.run`: an ingress before replicas of `AdapterServer`.

    `base` is a folder that each machine has by this path; a relative one is below the caller's
    current folder. `options` are those of the servers' deployment, such as `num_replicas` and
    `ray_actor_options`.
    """
    if "fleet" in options:
        raise ConfigError(PEERS_REMOVED)
    from ray import serve  # noqa: PLC0415
    from ray.serve.config import RequestRouterConfig  # noqa: PLC0415

    router = RequestRouterConfig(request_router_class=ROUTER)
    servers = serve.deployment(AdapterServer).options(
        **{"request_router_config": router, "max_ongoing_requests": 256} | options
    )
    bound = servers.bind(base.absolute(), config, settings, capacity)  # replicas run elsewhere
    limit = settings.get("max_body_bytes", MiB)
    return serve.deployment(AdapterIngress).bind(bound, settings["base"], limit)
