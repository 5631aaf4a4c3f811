"""Where vLLM is not as the plug-in expects, the start says so, and no request fails for it."""

import os
import pkgutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm_doubles
from event_loops import until
from vllm_doubles import Engine, Lora, Server, digest

from lorax_async import ConfigError
from lorax_async.engines.vllm.interface import (
    SERVER_MODULES,
    SERVER_OBJECTS,
    WORKER,
    Name,
    find_missing,
)
from lorax_async.engines.vllm.worker import FILES
from vllm_stage import write_adapter

pytestmark = pytest.mark.usefixtures("builds_end")

NAMES = {str(name): name for name in (*SERVER_MODULES, *SERVER_OBJECTS, *WORKER)}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's modules, which are one."""
    return vllm_doubles.install(monkeypatch)


def _owner(path: str, objects: dict[str, object]) -> Any:
    root, _, rest = path.partition(".")
    if root not in objects:
        return pkgutil.resolve_name(path)
    return attrgetter(rest)(objects[root]) if rest else objects[root]


def remove(patch: pytest.MonkeyPatch, name: Name, **objects: object) -> None:
    """Let vLLM lack a name."""
    above, _, last = name.path.rpartition(".")
    owner = _owner(above, objects)
    patch.delattr(owner if last in vars(owner) else type(owner), last)


def change(patch: pytest.MonkeyPatch, name: Name, **objects: object) -> None:
    """Let a function have other parameters."""
    above, _, last = name.path.rpartition(".")
    owner = _owner(above, objects)
    patch.setitem(vars(owner), last, lambda lora_request, requests, mapping, lora_model, more: None)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("shown", NAMES)
def test_each_name_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, shown: str) -> None:
    engine = Engine(Lora())
    server = Server(engine)
    objects = {"client": engine, "models": server.models, "lora": engine.lora}
    assert find_missing(NAMES.values(), **objects) == []
    with monkeypatch.context() as patch:
        remove(patch, NAMES[shown], **objects)
        assert shown in find_missing(NAMES.values(), **objects)
    if NAMES[shown].is_exact:
        change(monkeypatch, NAMES[shown], **objects)
        assert find_missing(NAMES.values(), **objects) == [shown]


@asynccontextmanager
async def started(
    monkeypatch: pytest.MonkeyPatch, root: Path, engine: Engine
) -> AsyncIterator[Server]:
    """Start a server with the plug-in as vLLM does, its folders of adapters in `root`."""
    server = Server(engine)
    monkeypatch.setattr("lorax_async.engines.vllm.plugin.RESOLVER", server.resolver)
    monkeypatch.setattr("lorax_async.engines.vllm.plugin.attach_metrics", lambda *_: None)
    for name in [name for name in os.environ if name.startswith("LORAX_ASYNC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LORAX_ASYNC_SOURCES", str(root))
    monkeypatch.setenv("LORAX_ASYNC_CACHE_DIR", f"{root}/cache")
    server.app.state.openai_serving_models = server.models
    async with server.app.router.lifespan_context(server.app):
        await server.plugin.init_state(engine, server.app.state, None)
        yield server
    server.resolver.serving = server.app.state.lorax = None
    server.app.state.openai_serving_models = None
    vars(server).clear()  # FastAPI caches what it found out about functions, and these have the app


@pytest.mark.usefixtures("module")
async def test_an_expected_vllm_is_served_by_all_of_the_plug_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_adapter(tmp_path / "a", rank=1, seed=1, layers=1)
    caplog.set_level("INFO", "vllm.lorax_async")
    async with started(monkeypatch, tmp_path, Engine(Lora())) as server:
        assert (await server.ask("a")).json["weights"] == [digest(folder)]
        load = {"lora_name": "b", "lora_path": str(folder)}
        assert (await server.post("/v1/load_lora_adapter", **load)).json == "Success"
        assert (await server.post("/v1/lorax/prefetch", adapters=["a"])).status == 202
        _, served = server.app.state.lorax
        await until(lambda: {row["name"] for row in served.describe()} == {"a", "b"})
    ours = [each.getMessage() for each in caplog.records if each.name == "vllm.lorax_async"]
    assert len([text for text in ours if f"requests may name adapters of {tmp_path}" in text]) == 1
    assert not any("version of lorax_async needs" in text for text in ours)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    "shown",
    [
        "vllm.exceptions.GracefulHTTPError",
        "vllm.entrypoints.serve.utils.api_utils.validate_json_request(raw_request)",
        "client.abort(internal)",
        "client.vllm_config.model_config.is_moe",
    ],
)
async def test_another_vllm_gets_folders_and_keeps_its_routes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, shown: str
) -> None:
    folder = write_adapter(tmp_path / "a", rank=1, seed=1, layers=1)
    torn = write_adapter(tmp_path / "torn", rank=1, seed=2, layers=1)
    os.truncate(torn / FILES[1], 100)
    engine = Engine(Lora())
    remove(monkeypatch, NAMES[shown], client=engine)
    async with started(monkeypatch, tmp_path, engine) as server:
        for _ in range(2):
            reply = await server.ask("a")
            assert (reply.json["weights"], reply.json["path"]) == ([digest(folder)], str(folder))
            refused = await server.ask("torn")
            assert refused.status == 400
            assert "'torn'" in refused.json["error"]["message"]
        assert (await server.ask("nobody")).status == 404
        refused = await server.ask("../a")
        assert refused.status == 403
        assert "only inside the folders of LORAX_ASYNC_SOURCES" in refused.json["error"]["message"]
        assert "local_roots" not in refused.json["error"]["message"]
        load = {"lora_name": "b", "lora_path": str(folder)}
        assert (await server.post("/v1/load_lora_adapter", **load)).json == "vLLM alone: Success"
        assert (await server.post("/v1/lorax/prefetch", adapters=["a"])).status == 404
    lines = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    needs = [text for text in lines if "version of lorax_async needs vLLM's" in text]
    assert len(needs) == 1
    assert needs[0].endswith(f"needs vLLM's {shown}")


@pytest.mark.usefixtures("module")
async def test_a_server_without_lora_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(Lora())
    engine.vllm_config = SimpleNamespace(lora_config=None)
    with pytest.raises(ConfigError, match="--enable-lora"):
        async with started(monkeypatch, tmp_path, engine):
            pass
