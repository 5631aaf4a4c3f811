"""The plug-in where vLLM's workers cannot be extended: adapters are still fetched and checked."""

from pathlib import Path

from engines.vllm_plugin.conftest import World
from vllm_stage import BASE


def test_without_the_extension_it_is_a_resolver_alone(world: World) -> None:
    with world.start("alone", plugin=True, extension="") as server:
        assert server.text("pirate").startswith("Arr")
        assert server.text(world.url("shout")).isupper()
        assert server.text(BASE)
        assert server.chat(world.url("wrong-base")).status == 400
        assert server.post("/v1/unload_lora_adapter", lora_name="pirate").status == 200
        assert server.adapters()[world.url("shout")]["id"] == world.url("shout")
    log = (world.root / "alone.log").read_text()
    assert log.count("their weights are built inside its loop") == 1
    assert Path(world.root / "cache-alone").is_dir()
