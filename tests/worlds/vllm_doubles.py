"""Doubles of the parts of vLLM 0.32 that the plug-in needs; `make vllm` uses the real one."""

import asyncio
import hashlib
import sys
import threading
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
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
            "create_dummy_lora": lambda lora_id, rank, embedding_modules: "zeros",
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
        weights = torch.tensor(list(data), dtype=torch.uint8)
        return Model({"q": LayerWeights(weights, weights)})


class Gated(Lora):
    """Builds, and loads in the loop, when `may_load` allows one more."""

    def __init__(self) -> None:
        super().__init__()
        self.may_load = threading.Semaphore(0)
        self.begun: list[str] = []
        """The folders' names."""

    def _load_adapter(self, lora_request: Any) -> Any:
        self.begun.append(Path(lora_request.lora_path).name)
        self.may_load.acquire()
        return super()._load_adapter(lora_request)


class LayerWeights:
    def __init__(self, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        self.lora_a = lora_a
        self.lora_b = lora_b


class Model:
    """vLLM's LoRAModel."""

    def __init__(self, loras: dict[str, LayerWeights]) -> None:
        self.loras = loras

    def clone(self, lora_model_id: int) -> "Model":
        return self


@dataclass
class Mapping:
    index_mapping: tuple[int, ...]


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
    """vLLM's EngineClient, whose calls are noted, with a worker for each of `loras`.

    The first one generates.
    """

    def __init__(self, *loras: Lora, is_extended: bool = True) -> None:
        self.lora = loras[0]
        self._workers = [WorkerExtension() for _ in loras]
        for worker, lora in zip(self._workers, loras if is_extended else (), strict=False):
            vars(worker)["model_runner"] = SimpleNamespace(lora_manager=lora)
        self.calls: list[tuple[Any, ...]] = []
        self.output_processor: Any = SimpleNamespace(request_states={})
        self.vllm_config: Any = SimpleNamespace(
            lora_config=SimpleNamespace(max_lora_rank=16),
            model_config=SimpleNamespace(
                is_multimodal_model=False,
                is_moe=True,
                dtype=None,
                model="base",
                revision=None,
                hf_config=SimpleNamespace(to_dict=dict),
            ),
            parallel_config=SimpleNamespace(
                local_engines_only=True,
                data_parallel_size=1,
                data_parallel_size_local=1,
                data_parallel_index=0,
            ),
        )
        self._ids = count()

    async def collective_rpc(self, method: str, args: Any) -> list[Any]:
        self.calls.append((method, *args))
        return [getattr(worker, method)(*args) for worker in self._workers]

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
        errors = OutputCollector()
        states[id] = RequestState(str(id), lora_request, errors)
        try:
            while True:
                numbers = [each.lora_request.lora_int_id for each in states.values()]
                self.lora.set_active_adapters(
                    {each.lora_request for each in states.values()}, Mapping(tuple(numbers))
                )
                used.add(digest(self.lora.cached[lora_request.lora_int_id]))
                if not errors.empty():
                    raise errors.get_nowait()
                if go_on.is_set():
                    return used
                await asyncio.sleep(STEP_SECONDS)
        finally:
            del states[id]


class OutputCollector(asyncio.Queue[Exception]):
    def put(self, output: Exception) -> None:  # type: ignore[override]
        self.put_nowait(output)


@dataclass
class RequestState:
    request_id: str
    lora_request: Any
    queue: OutputCollector


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


@dataclass
class UnloadBody:
    lora_name: str


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

    async def load_lora_adapter(self, request: LoadBody) -> str:
        name = request.lora_name
        async with self.lora_resolver_lock[name]:
            before = self.lora_requests.get(name)
            number = before.lora_int_id if before else self.lora_id_counter.inc(1)
            found = LoRARequest(name, number, request.lora_path, request.load_inplace)
            await self._engine.add_lora(found)
            self.lora_requests[name] = found
            return "Success"

    async def unload_lora_adapter(self, request: UnloadBody) -> str:
        del self.lora_requests[request.lora_name]
        return "Success"


async def validate_json_request(raw_request: Request) -> None: ...


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    json: Any


def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the modules of vLLM that the plug-in imports be one, which is returned."""
    module = SimpleNamespace(
        envs=SimpleNamespace(VLLM_PLUGINS=["lorax_async"], VLLM_ALLOW_RUNTIME_LORA_UPDATING=True),
        LoRARequest=LoRARequest,
        LoRAModel=Model,
        LoRALayerWeights=LayerWeights,
        LoRAMapping=Mapping,
        get_pp_group=lambda: SimpleNamespace(world_size=1),
        GracefulHTTPError=GracefulHTTPError,
        LoadLoRAAdapterRequest=LoadBody,
        UnloadLoRAAdapterRequest=UnloadBody,
        ErrorResponse=ErrorResponse,
        RequestState=RequestState,
        RequestOutputCollector=OutputCollector,
        validate_json_request=validate_json_request,
        get_ip=lambda: "192.0.2.1",
        get_loopback_ip=lambda: "127.0.0.1",
    )
    serve, lora = "vllm.entrypoints.serve", "vllm.lora"
    for name in (
        *("vllm", "vllm.exceptions", "vllm.distributed", "vllm.entrypoints", serve),
        *(lora, f"{lora}.request", f"{lora}.lora_model", f"{lora}.lora_weights", f"{lora}.layers"),
        *(f"{serve}.engine", f"{serve}.engine.protocol", f"{serve}.lora"),
        *(f"{serve}.lora.protocol", f"{serve}.utils", f"{serve}.utils.api_utils"),
        *("vllm.v1", "vllm.v1.engine", "vllm.v1.engine.output_processor"),
        *("vllm.utils", "vllm.utils.network_utils"),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return module


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

        @self.app.post("/v1/load_lora_adapter")
        async def load_lora_adapter(body: LoadBody) -> str:
            return f"vLLM alone: {await self.models.load_lora_adapter(body)}"

        self.plugin = ServerPlugin()
        theirs = tuple(self.app.router.routes)
        self.plugin.attach_router(self.app)
        added = {getattr(each, "path", "") for each in self.app.router.routes[len(theirs) :]}
        for route in theirs:  # vLLM takes out those that a plug-in replaces
            if getattr(route, "path", "") in added:
                self.app.router.routes.remove(route)

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
        async with AsyncExitStack() as stack:
            if calls.extended:
                stack.callback((await calls.listen("127.0.0.1", served.handle_loss)).close)
            stack.push_async_callback(served.close)
            yield served
