"""The plug-in where vLLM's workers cannot be extended: adapters are still fetched and checked."""

from engines.vllm_plugin.conftest import NAMES, World
from vllm_stage import BASE

SMALL_CACHE = {"LORAX_ASYNC_CACHE_BYTES": "4MiB", "LORAX_ASYNC_TIMEOUT": "30"}
"""Room for four adapters."""


def test_without_the_extension_it_is_a_resolver_alone(world: World) -> None:
    with world.start("alone", plugin=True, extension="", **SMALL_CACHE) as server:
        assert server.text("pirate").startswith("Arr")
        assert server.text(world.url("shout")).isupper()
        assert server.text(BASE)
        assert server.chat(world.url("wrong-base")).status == 400
        assert server.post("/v1/unload_lora_adapter", lora_name="pirate").status == 200
        for name in (*NAMES, *NAMES[:2]):  # idle ones leave, or there would be no room on disk
            assert server.chat(world.url(name), tokens=4).status == 200
    log = (world.root / "alone.log").read_text()
    assert log.count("their weights are built inside its loop") == 1
