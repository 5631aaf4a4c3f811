"""Ray LLM's adapters from a store, in its own server behind its own ingress."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
from user_loads import at

from engines.ray_serve.conftest import ADAPTERS, World
from engines.test_ray_llm_checks import BASE
from lorax_async import AdapterStore, Allow, StoreConfig
from lorax_async.engines.ray.ray_llm import model_downloader
from lorax_async.sources.local import WEIGHTS

pytestmark = [pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]  # Ray's own

BUCKET = "loras"


def digest(folder: str) -> str:
    return sha256((Path(folder) / WEIGHTS).read_bytes()).hexdigest()


@pytest.mark.parametrize("client", ["/llm"], indirect=True)
def test_openais_client_gets_adapters_from_ray_llms_server(
    world: World, client: Any, tmp_path: Path
) -> None:
    """A replica has two adapters at once, and its cache no room for a third."""
    import openai
    from ray import serve

    server = pytest.importorskip(
        "ray.serve.llm.deployment",
        reason="Ray LLM's server is imported with vLLM only",
        exc_type=ImportError,
    )
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
    from ray.serve.llm import LLMConfig
    from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

    from engines.ray_serve.path_engine import PathEngine

    folders = [world.root / "adapters" / name for name in list(world.digests)[:ADAPTERS]]
    for folder in folders:
        world.put(BUCKET, folder.name, folder)
    world.put(BUCKET, "other-base", tiny.write(tmp_path / "other-base", hidden=48))
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    size = sum(file.stat().st_size for file in folders[0].iterdir())
    config = StoreConfig(
        allow=(Allow("s3", BUCKET),), cache_dir=tmp_path / "cache", cache_bytes=int(2.5 * size)
    )
    llm = LLMConfig(
        model_loading_config={"model_id": "base", "model_source": str(tmp_path)},
        engine_kwargs={"max_lora_rank": 256},
        lora_config={
            "dynamic_lora_loading_path": f"s3://{BUCKET}/",
            "max_num_adapters_per_replica": 2,
        },
    )
    # Ray LLM takes adapters from object stores only. Without signatures, nginx answers like S3.
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{world.proxy.web}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    options = {"num_cpus": 0, "runtime_env": {"env_vars": variables}}
    downloader = model_downloader(config)
    servers = serve.deployment(server.LLMServer).options(ray_actor_options=options)
    bound = servers.bind(llm, engine_cls=PathEngine, model_downloader=downloader)
    ingress = serve.deployment(make_fastapi_ingress(OpenAiIngress))
    ingress = ingress.options(ray_actor_options=options)
    app = ingress.bind({"base": bound}, {"base": to_model_metadata("base", llm)})
    serve.run(app, name="ray_llm", route_prefix="/llm")

    def ask(name: str) -> tuple[str, int]:
        answer = client.completions.create(model=f"base:{name}", prompt="x")
        path, number = json.loads(answer.choices[0].text)
        return path, number

    with suppress(openai.APITimeoutError):  # while the store opens, unless that is quick
        client.with_options(timeout=0.2).completions.create(model="base:a000", prompt="x")
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(ask, ["a000", "a001"] * 3))
    assert len(set(answers)) == len({number for _, number in answers}) == 2
    assert [digest(path) for path, _ in answers[:2]] == [
        world.digests["a000"],
        world.digests["a001"],
    ]
    assert peft.PeftConfig.from_pretrained(answers[0][0]).r == 200
    assert world.fetches(BUCKET) == 2
    assert ask("a001") == answers[1]  # Ray drops the other one, before it loads
    for name, status in {"nobody": 404, "../caches": 400, "": 400, "other-base": 400}.items():
        with pytest.raises(openai.APIStatusError) as refused:
            ask(name)
        assert refused.value.status_code == status
        stage = "verify" if name == "other-base" else "resolve"
        assert f"adapter 'base:{name}', stage {stage}: " in refused.value.response.text
    assert ask("a001") == answers[1]
    assert digest(ask("a002")[0]) == world.digests["a002"]
    assert not Path(answers[0][0]).exists()
    assert ask("a001") == answers[1]
    assert digest(answers[1][0]) == world.digests["a001"]
    assert world.fetches(BUCKET) == 3
    serve.delete("ray_llm")


async def test_without_a_path_adapters_are_the_hubs(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.llm._internal.serve.core.configs.llm_config import LLMConfig

    llm = LLMConfig(
        model_loading_config={"model_id": "base"},
        engine_kwargs={"max_lora_rank": 256},
        lora_config={},
    )
    config = StoreConfig(
        hub_endpoint=world.hub.endpoint,
        hub_cache="off",
        allow=(at(world.hub.store_netloc),),
        cache_dir=tmp_path,
    )
    stores, enter = list[AdapterStore](), AdapterStore.__aenter__

    async def record(store: AdapterStore) -> AdapterStore:
        stores.append(store)
        return await enter(store)

    monkeypatch.setattr(AdapterStore, "__aenter__", record)
    downloader = model_downloader(config)()
    try:
        found = await downloader.load_model_from_config("base:org/a003", llm)
        assert digest(found.local_path) == world.digests["a003"]
        del found
    finally:
        for store in stores:  # a replica's ends with its process
            await store.close(timeout=1)
