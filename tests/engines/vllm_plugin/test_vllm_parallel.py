"""The plug-in with three workers, and adapters that vLLM itself loads at its start.

One test goes on where the one before ended: on two cores, a token takes the three over a second.
"""

import os
import shutil
from collections.abc import Iterator

import pytest

from engines.vllm_plugin.conftest import DEMO, World, counts, loaded, until
from vllm_stage import VllmServer

WORKERS = 3
HOST_BYTES = "1MiB"
"""Room for one adapter; vLLM's cache has room for two."""


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[VllmServer]:
    for name in DEMO:
        shutil.copytree(world.folders[name], world.root / "static" / name)
    modules = [f"own-{name}={world.root}/static/{name}" for name in DEMO]
    arguments = ["--tensor-parallel-size", str(WORKERS), "--lora-modules", *modules]
    with world.start(
        "parallel", plugin=True, arguments=arguments, LORAX_ASYNC_HOST_BYTES=HOST_BYTES
    ) as server:
        yield server


def text(server: VllmServer, name: str) -> str:
    return server.text(name, tokens=4)


@pytest.fixture(scope="module")
def own(server: VllmServer) -> dict[str, str]:
    """Texts of the two that are still in vLLM's cache."""
    return {name: text(server, f"own-{name}") for name in DEMO[1:]}


def test_texts_equal_those_of_vllms_own_loading(
    server: VllmServer, world: World, own: dict[str, str]
) -> None:
    until(lambda: counts(server)["built"] == WORKERS * len(DEMO))
    assert {name: text(server, world.url(name)) for name in own} == own
    assert len({*own.values()}) == len(own)
    assert text(server, "own-pirate").startswith("Arr")


def test_vllms_own_adapter_may_lose_its_folder_and_be_unloaded(
    server: VllmServer, world: World, own: dict[str, str]
) -> None:
    shutil.rmtree(world.root / "static")
    assert text(server, "own-shout") == own["shout"]
    assert counts(server)["reopened"] == WORKERS
    assert [len(numbers) for numbers in loaded(server)] == [2] * WORKERS
    assert server.post("/v1/unload_lora_adapter", lora_name="own-shout").status == 200
    until(lambda: [len(numbers) for numbers in loaded(server)] == [1] * WORKERS)
    assert server.chat("own-shout").status == 404


def test_an_adapter_that_all_workers_lost_fails_alone(
    server: VllmServer, world: World, own: dict[str, str]
) -> None:
    os.truncate(world.entry("shout", "parallel") / "adapter_model.safetensors", 100)
    assert text(server, world.url("json")) == own["json"]  # drives it out of our memory
    reply = server.chat(world.url("shout"))
    assert reply.status == 503
    assert "could not be read again" in reply.json["error"]["message"]
    assert text(server, world.url("json")) == own["json"]
