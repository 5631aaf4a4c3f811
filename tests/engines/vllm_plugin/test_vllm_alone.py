"""The plug-in where vLLM's workers cannot be extended: adapters are still fetched and checked."""

import pytest

from engines.vllm_plugin.conftest import NAMES, World
from vllm_stage import BASE

SMALL_CACHE = {"LORAX_ASYNC_CACHE_BYTES": "4MiB", "LORAX_ASYNC_TIMEOUT": "30"}
"""Room for four adapters."""


def test_without_the_extension_it_is_a_resolver_alone(world: World) -> None:
    with world.start("alone", plugin=True, extension="", **SMALL_CACHE) as server:
        assert server.text("pirate").startswith("Arr")
        assert server.text(world.url("shout")).isupper()
        assert server.text(BASE)
        for _ in range(2):
            assert server.chat(world.url("wrong-base")).status == 400
        assert server.post("/v1/unload_lora_adapter", lora_name="pirate").status == 200
        for name in (*NAMES, *NAMES[:2]):  # idle ones leave, or there would be no room on disk
            assert server.chat(world.url(name), tokens=4).status == 200
    log = (world.root / "alone.log").read_text()
    assert log.count("their weights are built inside its loop") == 1
    assert log.count("requests may name adapters of hub, http://") == 1
    assert log.count("wrong-base/' cannot be used: ") == 1


def test_a_misspelt_setting_ends_the_start_before_the_model_is_loaded(world: World) -> None:
    with pytest.raises(RuntimeError, match="LORAX_ASYNC_SORUCES is not a setting; there are"):
        world.start("misspelt", plugin=True, LORAX_ASYNC_SORUCES="hub").__enter__()
    assert "EngineCore" not in (world.root / "misspelt.log").read_text()
