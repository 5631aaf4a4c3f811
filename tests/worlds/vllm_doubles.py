"""Doubles of the parts of vLLM 0.32 that the plug-in needs; `make vllm` uses the real one."""

import asyncio
import hashlib
import sys
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from httpx2 import ASGITransport, AsyncClient
from pydantic import BaseModel

from lorax_async import AdapterStore, StoreConfig
from lorax_async.engines.plugin_settings import BaseRequirements, PluginSettings
from lorax_async.engines.vllm.engine_calls import EngineCalls
from lorax_async.engines.vllm.plugin import NameResolver, ServerPlugin
from lorax_async.engines.vllm.served_adapters import ServedAdapters
from lorax_async.engines.vllm.worker import FILES, WorkerExtension

SLOTS = 2
STEP_SECONDS = 0.005


def settings(**values: str) -> PluginSettings:
    return PluginSettings.from_environment(
        {f"LORAX_ASYNC_{name}": value for name, value in values.items()} | {"PATH": "/bin"}
    )


class Lora:
    """A worker's manager of adapters, with `SLOTS` slots and as many places in its cache.

    The weights of an adapter are its file's bytes.
    """

    embedding_modules = None

    def __init__(self, **changed: Any) -> None:
        self.cached: OrderedDict[int, Model] = OrderedDict()
        expected: dict[str, Any] = {
            "_create_merged_loras_inplace": lambda lora_model: None,
            "modules": {"q": None},
            "device": torch.device("cpu"),
            "lora_index_to_id": [],
            "list_adapters": lambda: self.cached,
            "create_dummy_lora": lambda *_: "zeros",
            "is_pooling_model": True,
            "_is_moe": False,
        }
        self._adapter_manager = SimpleNamespace(**expected | changed)

    def step(self, lora_request: Any) -> Any:
        return self._load_adapter(lora_request)

    def add_adapter(self, lora_request: Any) -> None:
        number = lora_request.lora_int_id
        if number not in self.cached or lora_request.load_inplace:
            self.cached[number] = self._load_adapter(lora_request)
            if len(self.cached) > SLOTS:
                self.cached.popitem(last=False)
        self.cached.move_to_end(number)

    def set_active_adapters(self, requests: Iterable[Any], mapping: Any) -> None:
        for lora_request in requests:
            self.add_adapter(lora_request)
        for number in filter(None, mapping.index_mapping):
            self.cached[number]  # in vLLM too, a KeyError here ends the engine

    def _load_adapter(self, lora_request: Any) -> Any:
        """Return a model whose weights are the file's bytes."""
        data = Path(lora_request.lora_path, FILES[1]).read_bytes()
        if data == b"bad":
            raise ValueError("vLLM does not support it")
        return Model(torch.tensor(list(data), dtype=torch.uint8))


class Model:
    def __init__(self, weights: torch.Tensor) -> None:
        self.loras = {"q": SimpleNamespace(lora_a=weights, lora_b=weights)}

    def clone(self, number: int) -> "Model":
        return self


@dataclass
class LoRARequest:
    """Equal by name, as vLLM's."""

    lora_name: str
    lora_int_id: int
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRARequest) and self.lora_name == other.lora_name

    def __hash__(self) -> int:
        return hash(self.lora_name)


class Engine:
    """vLLM's EngineClient, with one worker, whose calls are noted."""

    def __init__(self, lora: Lora, *, is_extended: bool = True) -> None:
        self.lora = lora
        self.worker: Any = WorkerExtension()
        if is_extended:
            vars(self.worker)["model_runner"] = SimpleNamespace(lora_manager=lora)
        self.calls: list[tuple[Any, ...]] = []
        self.output_processor: Any = SimpleNamespace(request_states={})
        self._ids = count()

    async def collective_rpc(self, method: str, args: Any) -> list[Any]:
        self.calls.append((method, *args))
        return [getattr(self.worker, method)(*args)]

    async def add_lora(self, lora_request: Any) -> None:
        self.calls.append(("add_lora", lora_request.lora_int_id))
        self.lora.add_adapter(lora_request)

    async def remove_lora(self, number: int) -> bool:
        self.calls.append(("remove_lora", number))
        return self.lora.cached.pop(number, None) is not None

    async def abort(self, ids: list[str], *, internal: bool) -> None: ...

    async def generate(self, lora_request: Any, go_on: asyncio.Event) -> set[str]:
        """Take steps until `go_on` is set, with all requests in each; return the weights used."""
        states = self.output_processor.request_states
        id, used = next(self._ids), set()
        errors: asyncio.Queue[Exception] = asyncio.Queue()
        put = errors.put_nowait
        states[id] = SimpleNamespace(
            request_id=id, lora_request=lora_request, queue=SimpleNamespace(put=put)
        )
        try:
            while True:
                numbers = [each.lora_request.lora_int_id for each in states.values()]
                self.lora.set_active_adapters(
                    {each.lora_request for each in states.values()},
                    SimpleNamespace(index_mapping=tuple(numbers)),
                )
                used.add(digest(self.lora.cached[lora_request.lora_int_id]))
                if not errors.empty():
                    raise errors.get_nowait()
                if go_on.is_set():
                    return used
                await asyncio.sleep(STEP_SECONDS)
        finally:
            del states[id]


def digest(weights: Any) -> str:
    """Return a digest of a model's weights, or of an adapter's folder; "zeros" is itself."""
    if isinstance(weights, str):
        return weights
    if isinstance(weights, Path):
        data = (weights / FILES[1]).read_bytes()
    else:
        data = bytes(weights.loras["q"].lora_a.tolist())
    return hashlib.sha256(data).hexdigest()


class LoadBody(BaseModel):
    lora_name: str
    lora_path: str
    load_inplace: bool = False


class ErrorResponse:
    pass


class Models:
    """vLLM's OpenAIServingModels, as far as requests get adapters from it."""

    def __init__(self, engine: Engine, resolver: NameResolver) -> None:
        self.lora_requests: dict[str, Any] = {}
        self.lora_resolver_lock: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        numbers = count(1)
        self.lora_id_counter = SimpleNamespace(inc=lambda _: next(numbers))
        self._engine = engine
        self._resolver = resolver

    async def resolve_lora(self, name: str) -> Any:
        async with self.lora_resolver_lock[name]:
            if name in self.lora_requests:
                return self.lora_requests[name]
            number = self.lora_id_counter.inc(1)
            found = await self._resolver.resolve_lora("base", name)
            if found is not None:
                found.lora_int_id = number
                await self._engine.add_lora(found)
                self.lora_requests[name] = found
            return found

    async def load_lora_adapter(self, body: LoadBody) -> str:
        async with self.lora_resolver_lock[body.lora_name]:
            before = self.lora_requests.get(body.lora_name)
            number = before.lora_int_id if before else self.lora_id_counter.inc(1)
            found = LoRARequest(body.lora_name, number, body.lora_path, body.load_inplace)
            await self._engine.add_lora(found)
            self.lora_requests[body.lora_name] = found
            return "Success"


async def validate_json_request(raw_request: Request) -> None: ...


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    json: Any


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the modules of vLLM that the plug-in imports be these."""
    module = SimpleNamespace(
        LoRARequest=LoRARequest,
        GracefulHTTPError=GracefulHTTPError,
        LoadLoRAAdapterRequest=LoadBody,
        ErrorResponse=ErrorResponse,
        validate_json_request=validate_json_request,
    )
    serve = "vllm.entrypoints.serve"
    for name in (
        *("vllm", "vllm.lora", "vllm.lora.request", "vllm.exceptions", "vllm.entrypoints", serve),
        *(f"{serve}.engine", f"{serve}.engine.protocol", f"{serve}.lora"),
        *(f"{serve}.lora.protocol", f"{serve}.utils", f"{serve}.utils.api_utils"),
    ):
        monkeypatch.setitem(sys.modules, name, module)


class GracefulHTTPError(Exception):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = int(status)


class Server:
    """vLLM's app: a route that generates, and those of the plug-in."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.resolver = NameResolver()
        self.models = Models(engine, self.resolver)
        self.app = FastAPI()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.rendered = asyncio.Event()
        self.rendered.set()
        """While it is not set, requests are tokenized, and have not reached the engine."""

        @self.app.post("/v1/completions", dependencies=[Depends(validate_json_request)])
        async def complete(raw_request: Request) -> JSONResponse:
            return await self._complete(await raw_request.json())

        ServerPlugin().attach_router(self.app)

    async def _complete(self, body: Any) -> JSONResponse:
        """Check the name, tokenize, and only then look for the adapter, as vLLM does."""
        name = body["model"]
        if name not in self.models.lora_requests and await self.models.resolve_lora(name) is None:
            return JSONResponse({"error": {"message": "does not exist"}}, 404)
        await self.rendered.wait()
        if name not in self.models.lora_requests:
            return JSONResponse({"error": {"message": "does not exist"}}, 404)
        request = self.models.lora_requests[name]
        number, path = request.lora_int_id, request.lora_path
        try:
            used = await self.engine.generate(request, self.go_on)
        except GracefulHTTPError as error:
            return JSONResponse({"error": {"message": str(error)}}, error.status)
        return JSONResponse({"weights": sorted(used), "number": number, "path": path})

    async def post(self, path: str, **body: Any) -> Reply:
        app = ASGITransport(self.app)
        async with AsyncClient(transport=app, base_url="http://vllm", trust_env=False) as client:
            answer = await client.post(path, json=body, timeout=None)
        is_json = answer.headers["content-type"] == "application/json"
        content = answer.json() if is_json else answer.text
        return Reply(answer.status_code, dict(answer.headers), content)

    async def ask(self, name: str) -> Reply:
        return await self.post("/v1/completions", model=name)


@asynccontextmanager
async def serving(
    root: Path, engine: Engine, host_bytes: int = 1 << 20, named: Any = None
) -> AsyncIterator[ServedAdapters]:
    """Serve the folders in `root`; vLLM has the adapters `named`."""
    given = settings(SOURCES=str(root), CACHE_DIR=f"{root}/cache")
    models = SimpleNamespace(lora_requests=named or {}, lora_resolver_lock={})
    config = StoreConfig(**given.store_settings())
    async with _served(given, config, engine, models, host_bytes) as served:
        yield served


@asynccontextmanager
async def running(
    given: PluginSettings, engine: Engine, host_bytes: int = 1 << 20, **changed: Any
) -> AsyncIterator[tuple[Server, ServedAdapters]]:
    """Run a server; `changed` are settings of its store."""
    server = Server(engine)
    config = StoreConfig(**given.store_settings() | changed)
    async with _served(given, config, engine, server.models, host_bytes) as served:
        server.resolver.serving = server.app.state.lorax = given, served
        server.app.state.openai_serving_models = server.models
        try:
            yield server, served
        finally:  # FastAPI caches what it found out about functions, and these have the app
            server.app.state.lorax = server.app.state.openai_serving_models = None
            vars(server).clear()


@asynccontextmanager
async def _served(
    given: PluginSettings, config: StoreConfig, engine: Engine, models: Any, host_bytes: int
) -> AsyncIterator[ServedAdapters]:
    calls = EngineCalls(engine)
    await calls.setup(host_bytes, [each.lora_int_id for each in models.lora_requests.values()])
    async with AdapterStore(config) as store:
        served = ServedAdapters(given, store, calls, models, lambda: BaseRequirements(None, None))
        try:
            yield served
        finally:
            await served.close()
