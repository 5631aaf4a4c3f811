"""The programs of docs/fleet.md run on real Ray Serve, on less than they ask for.

Replicas are two at most, on CPU, and the hub is a stand-in; what a program says otherwise is left.
"""

import ast
import asyncio
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from peft_adapters import save
from server_world import llama_config, tokenizer
from transformers import LlamaForCausalLM
from user_loads import at, contents

import lorax_async
from engines.ray_serve.conftest import World
from lorax_async.server import ray_serve

pytestmark = [pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]  # Ray's own

PAGE = Path(__file__).parents[3] / "docs" / "fleet.md"
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LESS = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0}}


@pytest.fixture
def programs(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The page's programs, in a folder with the base that they name."""
    from ray import serve

    torch.manual_seed(2)
    model: Any = LlamaForCausalLM(llama_config())
    model.eval()
    model.save_pretrained(tmp_path / "llama-3-8b")
    tokenizer().save_pretrained(tmp_path / "llama-3-8b")
    folder = save(model, {"r": 8, "lora_alpha": 64, "target_modules": ["q_proj"]}, tmp_path / "sql")
    world.hub.put("org/sql-adapter", contents(folder))
    monkeypatch.chdir(tmp_path)
    where = {
        "hub_endpoint": world.hub.endpoint,
        "hub_cache": "off",
        "allow": (at(world.hub.store_netloc),),
        "cache_dir": tmp_path / "cache",
    }
    on_cpu = {"device": "cpu", "dtype": "float32", "device_bytes": 1 << 20, "max_slots": 3}
    store, loader = lorax_async.StoreConfig, lorax_async.LoaderConfig
    monkeypatch.setattr(lorax_async, "StoreConfig", lambda **given: store(**where | given))
    monkeypatch.setattr(
        lorax_async, "LoaderConfig", lambda **given: loader(**where | given | on_cpu)
    )
    deployment, build = serve.deployment, ray_serve.build_app

    def deploy(*kind: Any, **options: Any) -> Any:
        return deployment(*kind, **options | LESS) if options else deployment(*kind)

    monkeypatch.setattr(serve, "deployment", deploy)
    monkeypatch.setattr(
        ray_serve, "build_app", lambda *given, **options: build(*given, **options | LESS)
    )
    return PROGRAM.findall(PAGE.read_text())


@pytest.fixture
def app() -> Iterator[str]:
    """The application of a program, which gives it no name."""
    from ray import serve

    name = "default"
    yield name
    serve.delete(name)


def run(code: str) -> dict[str, Any]:
    """Run a program, which may await; return its names."""
    names: dict[str, Any] = {"__name__": "fleet_page"}
    program = compile(code, str(PAGE), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    awaited = eval(program, names)
    if inspect.iscoroutine(awaited):
        asyncio.run(awaited)
    return names


def test_a_deployment_of_ones_own_answers(
    programs: list[str], app: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(programs[0])
    folder = Path(capsys.readouterr().out.split()[-1])
    assert folder.is_relative_to(tmp_path / "cache")
    found = (folder / "adapter_model.safetensors").read_bytes()
    assert found == (tmp_path / "sql" / "adapter_model.safetensors").read_bytes()


def test_our_server_answers_behind_its_ingress(programs: list[str], app: str, world: World) -> None:
    run(programs[1])
    body = {"model": "sql", "prompt": "once upon", "max_tokens": 4}
    url, kind = f"http://127.0.0.1:{world.port}", {"Content-Type": "application/json"}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), kind)
    with urlopen(request, timeout=60) as answer:
        assert json.load(answer)["model"] == "sql"
    with urlopen(f"{url}/metrics", timeout=60) as answer:
        assert b'replica="' in answer.read()


def test_ray_llms_server_takes_the_adapters_of_a_store(programs: list[str]) -> None:
    """It is bound: tests/engines/ray_serve/test_ray_llm.py runs it."""
    pytest.importorskip(
        "ray.serve.llm.deployment",
        reason="Ray LLM's server is imported with vLLM only",
        exc_type=ImportError,
    )
    assert run(programs[2])["llm_config"].lora_config.max_num_adapters_per_replica == 8


def test_the_replicas_may_name_the_proxy(programs: list[str]) -> None:
    run(programs[3])
    assert len(programs) == 4
