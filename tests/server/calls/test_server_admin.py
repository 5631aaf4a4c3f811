"""Adapters by name, as in vLLM, and where they are; for whoever has the token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from lorax_async import AdapterRef, ConfigError, FetchError, UsageError
from lorax_async.server.settings import ServerSettings
from server.world import TOKEN, Answer, serving
from tiny_loaders import loader as tiny_loader
from tiny_sources import over, stocked

LOAD, UNLOAD, ADAPTERS = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters"


async def test_load_use_and_unload(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "pirate")
    async with serving() as world:
        body = {"lora_name": "pirate", "lora_path": str(folder)}
        loaded = await world.admin(LOAD, body)
        assert loaded.status == 200
        assert loaded.body == b"Success: LoRA adapter 'pirate' added successfully."
        assert [where.state for where in world.service.loader.residency().values()] == ["resident"]
        models = await world.client.models.list()
        assert [model.id for model in models.data] == ["base", "pirate"]
        await world.client.completions.create(model="pirate", prompt="x")
        assert world.engine.submitted[0].generation.adapter == folder

        unloaded = await world.admin(UNLOAD, {"lora_name": "pirate"})
        assert unloaded.status == 200
        assert unloaded.body == b"Success: LoRA adapter 'pirate' removed successfully."
        models = await world.client.models.list()
        assert [model.id for model in models.data] == ["base"]
        tiers = [where.tier for where in world.service.loader.residency().values()]
        assert "device" not in tiers
        again = await world.admin(UNLOAD, {"lora_name": "pirate"})
        assert (again.status, again.error["type"]) == (404, "NotFoundError")
        assert again.error["message"] == "The lora adapter 'pirate' cannot be found."


async def test_an_id_can_be_named(tmp_path: Path) -> None:
    """What is no folder is an id, which the loader's sources know."""
    source = stocked(tmp_path, "org/pirate")
    async with serving(loader=over(source)) as world:
        body = {"lora_name": "pirate", "lora_path": "org/pirate"}
        assert (await world.admin(LOAD, body)).status == 200
        named = AdapterRef("org/pirate", use_token=True)
        assert world.service.names.find("pirate") == named


async def test_a_name_is_given_once(tmp_path: Path) -> None:
    one, two = tiny.write(tmp_path / "one", 1), tiny.write(tmp_path / "two", 2)
    async with serving() as world:
        body = {"lora_name": "a", "lora_path": str(one)}
        assert (await world.admin(LOAD, body)).status == 200
        again = await world.admin(LOAD, body)
        assert (again.status, again.error["type"]) == (400, "InvalidUserInput")
        assert "has already been loaded" in again.error["message"]
        other = body | {"lora_path": str(two), "load_inplace": True}
        assert (await world.admin(LOAD, other)).status == 200
        assert world.service.names.find("a") == two
        base = await world.admin(LOAD, body | {"lora_name": "base"})
        assert base.status == 400


async def test_a_folder_with_two_names_stays_for_the_other(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "one")
    async with serving() as world:
        for name in ("a", "b"):
            await world.admin(LOAD, {"lora_name": name, "lora_path": str(folder)})
        await world.admin(UNLOAD, {"lora_name": "a"})
        (where,) = world.service.loader.residency().values()
        assert where.tier == "device"


async def test_what_is_in_use_is_unloaded_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorax_async.server.calls.admin.UNLOAD_SECONDS", 0.01)
    folder = tiny.write(tmp_path / "one")
    async with serving(adapters={"a": folder}) as world:
        async with await world.service.loader.load(folder) as handle:
            assert (await world.admin(UNLOAD, {"lora_name": "a"})).status == 200
            assert not handle.released
        assert world.service.names.find("a") == "a"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"lora_name": "a"}, 400),
        ({"lora_name": "", "lora_path": "x/y"}, 400),
        ({"lora_name": "a", "lora_path": "no id"}, 400),
        ({"lora_name": "a", "lora_path": "./nowhere"}, 404),
        ({"lora_name": "a", "lora_path": "/etc/nowhere"}, 404),
        ({"lora_name": "a", "lora_path": "../nowhere"}, 403),
        ({"lora_name": "a", "lora_path": "x/\0"}, 400),
        ({"lora_name": 5, "lora_path": "x/y"}, 400),
    ],
)
async def test_what_cannot_be_loaded(tmp_path: Path, body: Any, status: int) -> None:
    async def play() -> Answer:
        async with serving(loader=tiny_loader(local_roots=(tmp_path,))) as world:
            answer = await world.admin(LOAD, body)
            assert not world.service.names.adapters
            return answer

    assert (await play()).status == status


async def test_a_malformed_folder_is_told(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "torn")
    (folder / "adapter_config.json").write_text("{")

    async def play() -> Answer:
        async with serving() as world:
            return await world.admin(LOAD, {"lora_name": "a", "lora_path": str(folder)})

    answer = await play()
    assert (answer.status, answer.error["code"]) == (422, "adapter_malformed")


def corrupt(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])


def reshape(folder: Path) -> None:
    wide = {
        name: torch.cat([one, one], -1) if "lora_A" in name else one
        for name, one in tiny.tensors(3).items()
    }
    save_file(wide, folder / "adapter_model.safetensors")


def rename(folder: Path) -> None:
    named = {name.replace("q_proj", "c_attn"): one for name, one in tiny.tensors(3).items()}
    save_file(named, folder / "adapter_model.safetensors")


def configure(**changes: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(tiny.config() | changes))

    return change


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


REFUSED: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "target modules": (configure(target_modules=["c_attn"]), 422, "adapter_incompatible"),
    "target pattern": (configure(target_modules=r".*\.c_attn"), 422, "adapter_incompatible"),
    "no target modules": (configure(target_modules=[]), 422, "adapter_malformed"),
    "broken target pattern": (configure(target_modules="("), 422, "adapter_malformed"),
    "layers to transform": (configure(layers_to_transform=[77]), 422, "adapter_incompatible"),
    "tensors": (rename, 422, "adapter_incompatible"),
    "shapes": (reshape, 422, "adapter_incompatible"),
    "layers": (lambda folder: tiny.write(folder, layers=9), 422, "adapter_incompatible"),
    "rank": (lambda folder: tiny.write(folder, rank=300), 422, "adapter_unsupported"),
    "feature": (configure(modules_to_save=["lm_head"]), 422, "adapter_unsupported"),
    "header": (corrupt, 422, "adapter_malformed"),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        404,
        "model_not_found",
    ),
    "no folder": (shutil.rmtree, 404, "model_not_found"),
    "a file": (replace_by_file, 422, "adapter_malformed"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_refused_adapter_is_not_named(tmp_path: Path, case: str) -> None:
    """And a name that it was to get in place keeps its meaning."""
    spoil, status, code = REFUSED[case]
    good, bad = tiny.write(tmp_path / "good", 1), tiny.write(tmp_path / "bad", 2)
    spoil(bad)
    async with serving() as world:
        body = {"lora_name": "a", "lora_path": str(bad)}
        refused = await world.admin(LOAD, body)
        assert (refused.status, refused.error["code"]) == (status, code)
        assert str(bad) in refused.error["message"]
        models = await world.client.models.list()
        assert [model.id for model in models.data] == ["base"]
        assert (await world.ask("GET", "/v1/models/a")).status == 404
        assert (await world.admin(UNLOAD, {"lora_name": "a"})).status == 404
        usage = world.service.loader.usage()
        assert (usage.waiting, usage.leases, usage.device_bytes.used) == (0, 0, 0)

        assert (await world.admin(LOAD, body | {"lora_path": str(good)})).status == 200
        again = await world.admin(LOAD, body | {"load_inplace": True})
        assert (again.status, again.error["code"]) == (status, code)
        assert world.service.names.find("a") == good


async def test_where_adapters_are(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "one")

    async def play() -> Any:
        async with serving() as world:
            body = {"lora_name": "a", "lora_path": str(folder)}
            await world.admin(LOAD, body)
            async with await world.service.loader.load(folder):
                answer = await world.ask("GET", ADAPTERS, Authorization=f"Bearer {TOKEN}")
            return answer.json["data"]

    (one,) = await play()
    assert one["names"] == ["a"]
    assert one["id"].endswith(str(folder))
    assert (one["tier"], one["state"], one["leases"], one["pins"]) == ("device", "resident", 1, 0)
    assert one["slot"] == {"index": 0, "generation": 1}
    assert one["device_bytes"] == 4 * 2 * 1536
    assert [event["event"] for event in one["story"]] == ["SlotGranted", "Resident"]
    assert one["story"][0]["layers"] == [0, 1, 2, 3]


async def test_a_failure_stands_in_the_story(tmp_path: Path) -> None:
    """Also with its error, which JSON does not know."""
    source = stocked(tmp_path, "org/a")
    source.fail("bring", FetchError("the line was cut", retryable=False))

    async def play() -> Any:
        async with serving(loader=over(source)) as world:
            with pytest.raises(FetchError):
                await world.service.loader.load("org/a")
            (await world.service.loader.load("org/a")).release()
            return (await world.ask("GET", ADAPTERS, Authorization=f"Bearer {TOKEN}")).json

    story = (await play())["data"][0]["story"]
    assert [event["event"] for event in story] == [
        "SlotGranted",
        "Failed",
        "Leaving",
        "SlotGranted",
        "Resident",
    ]
    assert story[1]["error"]["error"] == "FetchError"
    assert "the line was cut" in story[1]["error"]["message"]


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer wrong", f"Basic {TOKEN}", "Bearer \xe9"])
async def test_the_token_is_needed(key: str) -> None:
    async def play() -> list[Answer]:
        async with serving() as world:
            head = f"Host: x\r\nConnection: close\r\nAuthorization: {key}\r\nContent-Length: 2\r\n\r\n{{}}"
            return [
                await world.raw(f"{method} {path} HTTP/1.1\r\n{head}".encode("latin-1"))
                for method, path in (("POST", LOAD), ("POST", UNLOAD), ("GET", ADAPTERS))
            ]

    for answer in await play():
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert TOKEN not in answer.body.decode()


async def test_without_a_token_nobody_administers() -> None:
    async def play() -> list[Answer]:
        async with serving(admin_token=None) as world:
            return [
                await world.admin(LOAD, {"lora_name": "a", "lora_path": "b/c"}),
                await world.admin(UNLOAD, {"lora_name": "a"}),
                await world.ask("GET", ADAPTERS),
            ]

    for answer in await play():
        assert (answer.status, answer.error["code"]) == (403, "admin_disabled")


@pytest.mark.parametrize(
    "wrong",
    [
        {"admin_token": ""},
        {"admin_token": "two words"},
        {"max_body_bytes": 0},
        {"max_prompt_tokens": 0},
        {"max_waiting": 1},
        {"slow_client": 0},
        {"drain": -1},
        {"retry_after": "1"},
        {"base": ""},
        {"adapters": {"b": "x/y"}},
        {"adapters": {"": "x/y"}},
        {"adapters": {"a": 5}},
    ],
)
def test_settings_are_checked(wrong: Any) -> None:
    with pytest.raises((ConfigError, UsageError)):
        ServerSettings(**({"base": "b"} | wrong))


def test_names_are_the_servers_own() -> None:
    names = {"a": "x/y"}
    settings = ServerSettings(base="b", adapters=names)
    names["c"] = "x/z"
    assert settings.adapters == {"a": "x/y"}
    with pytest.raises(TypeError):
        settings.adapters["d"] = "x/y"  # type: ignore[index]
