"""HTTP routes and metrics that the plug-in adds to vLLM's server."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import REGISTRY, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorax_async.engines.plugin_settings import PluginSettings, response_to
from lorax_async.engines.vllm.served_adapters import ServedAdapters
from lorax_async.errors import LoraxError
from lorax_async.types import AdapterRef


class AdapterRefusal(HTTPException):
    """The response to a request whose adapter cannot be used.

    vLLM answers HTTPExceptions without their headers; `attach_refusals` answers these with them.
    """


def refuse(error: LoraxError, name: str) -> AdapterRefusal:
    """Return the response to an error; `name` is the client's name for the adapter."""
    return AdapterRefusal(*response_to(error, name))


async def _answer_refusal(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, AdapterRefusal)
    error = {
        "message": refusal.detail,
        "type": HTTPStatus(refusal.status_code).phrase,
        "param": "model",
        "code": refusal.status_code,
    }
    return JSONResponse({"error": error}, refusal.status_code, refusal.headers)


def attach_refusals(app: FastAPI) -> None:
    """Answer an `AdapterRefusal` with its headers."""
    app.add_exception_handler(AdapterRefusal, _answer_refusal)


def attach_routes(app: FastAPI) -> Callable[[], None]:
    """Add the plug-in's routes and renewal; those for `/v1/…_lora_adapter` replace vLLM's.

    Return what restores vLLM's.
    """
    before = tuple(app.router.routes)
    for path, (method, call) in ROUTES.items():
        app.add_api_route(path, call, methods=[method])
    renewed = _attach_renewal(app)

    def restore() -> None:
        theirs = [each for each in before if getattr(each, "path", None) in ROUTES]
        others = [each for each in app.router.routes if getattr(each, "path", None) not in ROUTES]
        app.router.routes[:] = [*theirs, *others]
        del app.dependency_overrides[renewed]

    return restore


def _attach_renewal(app: FastAPI) -> Callable[..., Any]:
    """Look at what the `model` of a request means now, before vLLM does.

    All of vLLM's routes whose body is JSON depend on its check of the content type, which is
    returned. FastAPI has parsed the body by then, and Starlette's request keeps it.
    """
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request  # noqa: PLC0415

    async def validate_and_renew(raw_request: Request) -> None:
        await validate_json_request(raw_request)
        serving = getattr(app.state, "lorax", None)
        try:
            body = await raw_request.json()
        except ValueError:
            return  # vLLM answers it
        name = body.get("model") if isinstance(body, dict) else None
        if serving is None or not isinstance(name, str):
            return
        try:
            await serving[1].renew(name)
        except LoraxError as error:
            raise refuse(error, name) from error

    app.dependency_overrides[validate_json_request] = validate_and_renew
    check: Callable[..., Any] = validate_json_request
    return check


async def list_adapters(request: Request) -> Response:
    """Return tier, bytes, version and last error of every adapter."""
    _, served = _serving(request)
    await served.refresh()
    return JSONResponse({"data": served.describe()})


async def prefetch(request: Request) -> Response:
    """Begin to fetch and build adapters: `{"adapters": ["name or id", …]}`."""
    settings, served = _serving(request)
    names = (await _members(request)).get("adapters")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterRefusal(400, "'adapters' must be a list of names")
    refs = {}
    for name in names:
        if (ref := settings.find(name)) is None:
            raise AdapterRefusal(404, f"requests may not name the adapter {name!r}")
        refs[name] = ref
    for name, ref in refs.items():
        served.prefetch(name, ref)
    return JSONResponse({"adapters": names}, 202)


async def load_adapter(request: Request) -> Response:
    """Serve vLLM's route, for which `lora_path` may also be an adapter's name or id."""
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse  # noqa: PLC0415
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest  # noqa: PLC0415

    settings, served = _serving(request)
    models = request.app.state.openai_serving_models
    body = await _read(request, LoadLoRAAdapterRequest)
    name, path = body.lora_name, body.lora_path
    folder = os.path.expanduser(path)  # noqa: ASYNC240 - as vLLM does
    ref = None if os.path.isabs(folder) else settings.find(path)
    is_fixed = ref is None
    if ref is None:
        if not os.path.isdir(folder):  # noqa: ASYNC240 - vLLM would download it inside its loop
            raise AdapterRefusal(404, f"{path!r} is neither a folder nor an adapter of the sources")
        # vLLM lets this route load any folder.
        ref = AdapterRef(Path(os.path.abspath(folder)))  # noqa: ASYNC240
    try:
        adapter = await served.prepare(name, ref, in_place=body.load_inplace)
    except LoraxError as error:
        raise refuse(error, name) from error
    body.lora_path = adapter.path
    try:
        response = await models.load_lora_adapter(body)
    except BaseException:
        await served.discard(adapter)
        raise
    if isinstance(response, ErrorResponse):
        await served.discard(adapter)
        return JSONResponse(response.model_dump(), response.error.code)
    loaded = models.lora_requests[name]
    loaded.load_inplace = False  # vLLM would load it again in every step
    adapter.is_fixed = is_fixed
    served.add(adapter, loaded)
    return PlainTextResponse(response)


async def unload_adapter(request: Request) -> Response:
    """Serve vLLM's route, which also frees the engine once the adapter's requests have ended."""
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse  # noqa: PLC0415
    from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest  # noqa: PLC0415

    _, served = _serving(request)
    body = await _read(request, UnloadLoRAAdapterRequest)
    response = await request.app.state.openai_serving_models.unload_lora_adapter(body)
    if isinstance(response, ErrorResponse):
        return JSONResponse(response.model_dump(), response.error.code)
    await served.refresh()
    return PlainTextResponse(response)


ROUTES: Mapping[str, tuple[str, Callable[..., Any]]] = {
    "/v1/lorax/adapters": ("GET", list_adapters),
    "/v1/lorax/prefetch": ("POST", prefetch),
    "/v1/load_lora_adapter": ("POST", load_adapter),
    "/v1/unload_lora_adapter": ("POST", unload_adapter),
}


def _serving(request: Request) -> tuple[PluginSettings, ServedAdapters]:
    serving: tuple[PluginSettings, ServedAdapters] = request.app.state.lorax
    return serving


async def _members(request: Request) -> dict[str, Any]:
    """Return the members of the body's JSON object."""
    try:
        body = await request.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise AdapterRefusal(400, "the body must be a JSON object")
    return body


async def _read(request: Request, kind: Any) -> Any:
    from pydantic import ValidationError  # noqa: PLC0415

    try:
        return kind.model_validate(await _members(request))
    except ValidationError as error:
        raise AdapterRefusal(400, str(error)) from None


# -- metrics --------------------------------------------------------------------------------------


WAIT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class AdapterCollector(Collector):
    """The metrics of the plug-in, without I/O: where adapters were at the last refresh, and counts.

    Those of single adapters are named as in vLLM's PR #45411.
    """

    def __init__(self, served: ServedAdapters, engine: str) -> None:
        self._served = served
        self._engine = engine
        self._waits = Histogram(
            "lorax_wait_seconds",
            "Of requests for adapters that were not ready, until these were, or had failed.",
            buckets=WAIT_SECONDS,
            registry=None,
        )
        served.on_wait = self._waits.observe

    def collect(self) -> Iterator[Metric]:
        yield from self._tiers()
        counter = CounterMetricFamily(
            "lorax_worker_adapters",
            "Adapters built in a thread; served from host memory; loaded inside vLLM's loop;"
            " read from open files after their folder was gone; lost.",
            labels=["event"],
        )
        for event, count in self._served.counts.items():
            counter.add_metric([event], count)
        yield counter
        downloads = self._served.downloads
        for name, text, total in (
            ("downloads", "Adapters downloaded from their source.", downloads.downloads),
            ("downloaded_bytes", "Bytes of these adapters.", downloads.downloaded_bytes),
        ):
            yield CounterMetricFamily(f"lorax_{name}", text, value=total)
        failures = CounterMetricFamily(
            "lorax_failures", "Attempts to get an adapter that failed.", labels=["stage", "error"]
        )
        for kind, count in sorted(self._served.failures.counts.items()):
            failures.add_metric(kind, count)
        yield failures
        text = "Requests that wait for an adapter which is not ready."
        yield GaugeMetricFamily("lorax_waiting", text, value=self._served.waiting)
        yield from self._waits.collect()

    def _tiers(self) -> Iterator[Metric]:
        levels = {"device": "gpu", "host": "cpu"}
        loaded = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "1 for each adapter in a slot (gpu) or in host memory (cpu).",
            labels=["engine", "adapter_name", "level"],
        )
        tiers = list(self._served.tiers())
        for name, tier in tiers:
            if tier in levels:
                loaded.add_metric([self._engine, name, levels[tier]], 1)
        yield loaded
        number = Counter(tier for _, tier in tiers)
        for tier, level in levels.items():
            gauge = GaugeMetricFamily(
                f"vllm:num_{level}_loaded_lora_adapters",
                f"Adapters at level {level}.",
                labels=["engine"],
            )
            gauge.add_metric([self._engine], number[tier])
            yield gauge


def attach_metrics(served: ServedAdapters, engine: int | None) -> None:
    """Add the plug-in's metrics to prometheus_client's registry, which vLLM's server shows."""
    REGISTRY.register(AdapterCollector(served, str(engine or 0)))
