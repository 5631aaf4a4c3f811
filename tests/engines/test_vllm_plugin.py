"""What the vLLM plug-in decides without vLLM; `make vllm` runs it in vLLM's server."""

import asyncio
import os
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from adapter_files import pad_header
from event_loops import until
from hub_stand_in import ADAPTER, HubStandIn
from leaks import open_files
from safetensors.torch import save_file
from vllm_doubles import Engine, Gated, Lora, LoRARequest, serving, settings

from lorax_async import AdapterRef, AdapterStore, ConfigError, LoraxError, StoreConfig
from lorax_async.engines.plugin_settings import BaseRequirements, explain
from lorax_async.engines.vllm.plugin import notice_host, register
from lorax_async.engines.vllm.worker import (
    FILES,
    BuiltWeights,
    WorkerExtension,
    unexpected_interface,
)
from lorax_async.errors import AccessDeniedError, AdapterFormatError
from lorax_async.ids import parse_allowed_ref
from vllm_stage import write_adapter

pytestmark = pytest.mark.usefixtures("builds_end")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sql", "https://models.example/sql/"),
        ("local", "{root}/elsewhere"),
        ("org/any@main", "org/any"),
        ("other/any", None),
        ("https://models.example/open/a/", "https://models.example/open/a/"),
        ("https://models.example/sql/", None),  # an alias opens its place to the operator alone
        ("pirate", "./pirate"),
        ("./pirate", "./pirate"),
        ("{root}/adapters/pirate", "{root}/adapters/pirate"),
        ("{root}/elsewhere", None),
        ("/etc", None),
        ("s3://bucket/a/", None),
        ("a/b/c", None),
    ],
)
def test_requests_name_what_the_operator_allows(
    tmp_path: Path, name: str, expected: str | None
) -> None:
    for folder in ("adapters", "elsewhere"):
        (tmp_path / folder).mkdir()
    given = settings(
        SOURCES=f"hub:org/ https://models.example/open/ {tmp_path}/adapters",
        ADAPTERS=f"sql=https://models.example/sql/ local={tmp_path}/elsewhere",
    )
    ref = given.find(name.format(root=tmp_path))
    assert (None if ref is None else ref.text) == (expected and expected.format(root=tmp_path))


def test_without_sources_nothing_is_allowed_not_even_the_hub() -> None:
    given = settings()
    assert given.find("org/name") is None
    assert given.find("name") is None
    allow = given.store_settings()["allow"]
    assert allow  # without entries, all of the hub would be allowed
    assert all(entry.scheme != "hub" for entry in allow)


def test_the_token_goes_to_web_sources_and_is_never_shown() -> None:
    given = settings(SOURCES="hub https://models.example/", TOKEN="5ecret", CACHE_BYTES="3GiB")
    web, hub = given.find("https://models.example/a/"), given.find("org/name")
    assert web is not None
    assert web.token == "5ecret"
    assert hub is not None
    assert hub.token is None
    assert "5ecret" not in repr(given)
    assert given.store_settings()["cache_bytes"] == 3 << 30


@pytest.mark.usefixtures("hub_client")
async def test_an_alias_gets_the_hubs_token_and_its_id_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_0perat0rsToken")
    given = settings(SOURCES="hub", ADAPTERS="sql=org/private", CACHE_DIR=str(tmp_path / "cache"))

    async def sent(name: str) -> set[str | None]:
        with HubStandIn() as hub:
            hub.put("org/private", ADAPTER, private_token="hf_0perat0rsToken")
            config = StoreConfig(**given.store_settings(), hub_endpoint=hub.endpoint)
            async with AdapterStore(config) as store:
                with pytest.raises(LoraxError):  # where large files lie is not allowed here
                    await store.checkout(given.find(name) or "")
            return {each.fields.get("authorization") for each in hub.asked}

    assert await sent("sql") == {"Bearer hf_0perat0rsToken"}
    assert await sent("org/private") == await sent("org/private@main") == {None}


def test_an_alias_may_be_a_pull_request() -> None:
    given = settings(SOURCES="hub", ADAPTERS="sql=org/name@refs/pr/1")
    ref = given.find("sql")
    assert ref is not None
    assert parse_allowed_ref(ref, given.store_settings()["allow"]).revision == "refs/pr/1"
    assert given.find("org/name@refs/pr/1") is None, "an id in a request is another matter"


def test_weights_that_would_ruin_an_engine_are_refused(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    size = BaseRequirements(None, None).check(folder)
    content = tiny.tensors(0, 4, torch.float32)
    list(content.values())[-1].view(-1)[-1] = torch.nan
    save_file(content, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterFormatError, match="NaN or infinite"):
        BaseRequirements(None, None).check(folder)
    assert BaseRequirements(None, None, check_finite=False).check(folder) == size
    assert [settings(**given).check_finite for given in ({}, {"CHECK_FINITE": "0"})] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"SORUCES": "hub"}, "LORAX_ASYNC_SORUCES is not a setting"),
        ({"SOURCES": "relative/folder"}, "LORAX_ASYNC_SOURCES: 'relative/folder' is neither"),
        ({"SOURCES": "https://user:pass@models.example/"}, "LORAX_ASYNC_SOURCES"),
        ({"ADAPTERS": "org/name"}, "'org/name' is not NAME=ID"),
        ({"HOST_BYTES": "2 GB"}, "LORAX_ASYNC_HOST_BYTES must be bytes, such as 16GiB"),
        ({"TIMEOUT": "soon"}, "LORAX_ASYNC_TIMEOUT must be seconds"),
        ({"REVALIDATE": "often"}, "LORAX_ASYNC_REVALIDATE must be seconds"),
        ({"ALLOW_STALE": "yes"}, "LORAX_ASYNC_ALLOW_STALE must be 0 or 1"),
        ({"CONNECTIONS": "many"}, "LORAX_ASYNC_CONNECTIONS must be a number"),
        ({"CONNECTIONS": "0"}, "LORAX_ASYNC_CONNECTIONS"),
        ({"CONNECTIONS": "1000"}, "LORAX_ASYNC_CONNECTIONS"),
        ({"TIMEOUT": "-1"}, "LORAX_ASYNC_TIMEOUT"),
        ({"MAX_TENSORS": "1e6"}, "LORAX_ASYNC_MAX_TENSORS must be a number"),
        ({"MAX_TENSORS": "0"}, "LORAX_ASYNC_MAX_TENSORS: max_tensors must be a positive integer"),
        ({"REVALIDATE": "nan"}, "LORAX_ASYNC_REVALIDATE"),
        ({"CACHE_BYTES": "0"}, "LORAX_ASYNC_CACHE_BYTES"),
        ({"CACHE_DIR": "/dev/null"}, "LORAX_ASYNC_CACHE_DIR"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**values)
    assert message in str(caught.value)
    assert "pass@" not in str(caught.value)


def test_connections_to_all_sources_are_the_operators(tmp_path: Path) -> None:
    given = settings(CONNECTIONS="3", CACHE_DIR=str(tmp_path))
    assert StoreConfig(**given.store_settings()).connections == 3
    assert StoreConfig(**settings().store_settings()).connections == StoreConfig().connections


async def test_the_limit_of_tensors_and_their_header_is_the_operators(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    tensors = len(tiny.tensors(0, 4, torch.float32))

    async def check(**values: str) -> None:
        given = settings(CACHE_DIR=str(tmp_path / "cache"), **values)
        async with AdapterStore(StoreConfig(**given.store_settings())) as store:
            with await store.checkout(folder) as checked:
                BaseRequirements(None, None, limits=given.limits).check(checked.path)

    await check()
    await check(MAX_TENSORS=str(tensors))
    with pytest.raises(AdapterFormatError, match=f"{tensors} tensors, more than the limit of 3"):
        await check(MAX_TENSORS="3")
    with pytest.raises(AdapterFormatError, match="limit of 3"):
        BaseRequirements(None, None, limits=settings(MAX_TENSORS="3").limits).check(folder)

    pad_header(folder / "adapter_model.safetensors", 11 << 20)
    with pytest.raises(AdapterFormatError, match="over the limit of 10,485,760"):
        await check()
    await check(MAX_TENSORS="80000")  # 160 bytes each: 12.8 MB


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The resolvers of a vLLM whose environment names the plug-in, which has no settings."""
    names: list[str] = []
    envs = SimpleNamespace(VLLM_PLUGINS=["lorax_async"], VLLM_ALLOW_RUNTIME_LORA_UPDATING=True)
    registry = SimpleNamespace(
        get_supported_resolvers=lambda: names, register_resolver=lambda name, _: names.append(name)
    )
    module = SimpleNamespace(envs=envs, LoRAResolverRegistry=registry)
    for name in ("vllm", "vllm.lora", "vllm.lora.resolver"):
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in os.environ if name.startswith("LORAX_ASYNC_")]:
        monkeypatch.delenv(name)
    return names


def test_wrong_settings_end_the_start_before_vllm_parses_its_arguments(
    registered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = sys.modules["vllm"].envs
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="LORAX_ASYNC_SORUCES"):
        patch.setenv("LORAX_ASYNC_SORUCES", "hub")
        register()
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="LORA_UPDATING=1"):
        patch.setattr(envs, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", False)
        register()
    with monkeypatch.context() as patch:
        patch.setattr(envs, "VLLM_PLUGINS", ["another"])
        patch.setenv("LORAX_ASYNC_SORUCES", "hub")
        register()
    assert not registered
    register()
    register()
    assert registered == ["lorax_async"]


def test_a_worker_on_another_host_needs_no_folders(
    registered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAX_ASYNC_SOURCES", "/only/where/the/server/is")
    with pytest.raises(ConfigError, match="LORAX_ASYNC_SOURCES"):
        register()
    monkeypatch.setattr("lorax_async.engines.vllm.plugin.parent_process", object)
    register()
    assert registered == ["lorax_async"]


def test_the_settings_are_one_line_of_a_log(tmp_path: Path) -> None:
    names = " ".join(f"n{number:02}=org/private" for number in range(12))
    given = settings(
        SOURCES=f"hub:org/ https://models.example:8443/open/ s3://bucket/loras/ {tmp_path}",
        ADAPTERS=names,
        TOKEN="5ecret",
        CACHE_DIR=f"{tmp_path}/cache",
        CACHE_BYTES="3GiB",
        HOST_BYTES="512MiB",
        CONNECTIONS="7",
    )
    line = given.describe()
    assert "\n" not in line
    assert "5ecret" not in line
    for word in (
        f"hub:org/, https://models.example:8443/open/, s3://bucket/loras/, {tmp_path};",
        "names: n00, n01, n02, n03, n04, n05, n06, n07, n08, n09, and 2 more;",
        f"{tmp_path}/cache, up to 3 GiB;",
        "up to 512 MiB in each worker",
        "7 connections",
    ):
        assert word in line
    assert "no source; names: none" in settings().describe()


@pytest.mark.parametrize(
    ("id", "remedy"),
    [
        ("org/name", r"HF_TOKEN.*LORAX_ASYNC_ADAPTERS \(NAME=org/name\).*hub:org/"),
        ("https://models.example/a/", "LORAX_ASYNC_TOKEN"),
        ("s3://bucket/a/", "environment"),
        ("./a", "LORAX_ASYNC_SOURCES"),
    ],
)
def test_a_refusal_names_what_an_operator_can_do(id: str, remedy: str) -> None:
    denied = AccessDeniedError("it is not yours", id=id)
    found = explain(denied, AdapterRef(id))
    assert re.search(remedy, str(found))
    assert str(found).startswith(str(denied))
    assert explain(found, AdapterRef(id)) is found
    other = AdapterFormatError("it is torn", id=id)
    assert explain(other, AdapterRef(id)) is other


class Renamed(Lora):
    def _load_adapter(self, request: object) -> None: ...


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        (Lora(), None),
        (None, "_load_adapter(lora_request)"),
        (Renamed(), "_load_adapter(lora_request)"),
        (Lora(_create_merged_loras_inplace=lambda model, rank: None), "_create_merged_loras"),
        (Lora(_is_moe=True), "experts"),
    ],
)
@pytest.mark.usefixtures("vllm")
def test_only_the_expected_interface_is_extended(lora: object, reason: str | None) -> None:
    found = unexpected_interface(lora)
    assert found is None if reason is None else found is not None and reason in found


@pytest.fixture
def built(vllm: None) -> BuiltWeights:
    """Room for 20 bytes of weights: those of a file of 10."""
    return BuiltWeights(Lora(), 20)


def write(folder: Path, weights: bytes) -> str:
    folder.mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).write_bytes(weights)
    return str(folder)


def build(built: BuiltWeights, path: str) -> str | None:
    built.prepare(path)
    while not (progress := built.progress(path))[0]:
        time.sleep(0.001)
    return progress[1]


def test_an_error_of_building_is_told_to_all_who_wait(built: BuiltWeights, tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"bad")
    built.prepare(path)
    assert build(built, path) == "vLLM does not support it"
    assert built.progress(path) == (True, "vLLM does not support it")
    write(tmp_path / "a", b"good")
    assert build(built, path) is None


def test_only_the_first_load_of_an_adapter_raises(built: BuiltWeights, tmp_path: Path) -> None:
    """A later one is in vLLM's step, where an exception would end the engine."""
    path = write(tmp_path / "a", b"good")
    assert built.load(LoRARequest("a", 1, path)).loras
    write(tmp_path / "a", b"bad")
    assert built.load(LoRARequest("a", 1, path)) == "zeros"
    assert built.report()["lost"] == {path: "vLLM does not support it"}
    with pytest.raises(ValueError, match="does not support"):
        built.load(LoRARequest("b", 2, path))


def test_an_adapter_beyond_the_budget_is_checked_and_drives_nothing_out(
    built: BuiltWeights, tmp_path: Path
) -> None:
    small, large = write(tmp_path / "small", b"10 bytes.."), write(tmp_path / "large", b"." * 11)
    assert build(built, small) is None
    assert build(built, large) is None
    assert built.load(LoRARequest("large", 1, large)).loras
    assert built.report()["built"] == {small: 20}
    write(tmp_path / "large", b"bad")
    assert build(built, large) == "vLLM does not support it"


@pytest.mark.usefixtures("vllm")
async def test_a_local_folder_is_built_again_when_its_files_changed(tmp_path: Path) -> None:
    folder, engine = write_adapter(tmp_path / "a", rank=1, seed=1, layers=1), Engine(Lora())
    async with serving(tmp_path, engine) as served:
        for seed, built in ((1, 1), (2, 2)):
            shutil.rmtree(folder)
            write_adapter(folder, rank=1, seed=seed, layers=1)
            for name in ("prefetched", "asked"):
                await served.discard(await served.prepare(name, AdapterRef(folder)))
            await served.refresh()
            assert served.counts["built"] == built


@pytest.mark.usefixtures("vllm")
async def test_a_request_waits_for_one_hint_at_most(tmp_path: Path) -> None:
    lora = Gated()
    names = [*(f"hint-{number}" for number in range(5)), "asked"]
    folders = [write_adapter(tmp_path / name, rank=1, seed=1, layers=1) for name in names]
    engine = Engine(lora)
    async with serving(tmp_path, engine) as served:
        for name in names[:-1]:
            served.prefetch(name, AdapterRef(f"./{name}"))
        await until(lambda: lora.begun)
        await asyncio.sleep(0.1)  # for all that there is to come
        asked = asyncio.create_task(served.prepare("asked", AdapterRef("./asked")))
        await until(lambda: any(str(folders[-1]) in call for call in engine.calls))
        lora.may_load.release(len(names))
        await served.discard(await asked)
        await until(lambda: len(lora.begun) == len(names))
    assert lora.begun.index("asked") == 1


@pytest.mark.usefixtures("vllm")
async def test_adapters_that_vllm_had_before_are_looked_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the two folders that go ends the engine: not even the one that had gone before.

    They stay, and do not count where others leave for lack of room.
    """
    monkeypatch.setattr("lorax_async.engines.vllm.served_adapters.MAX_SERVED", 1)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("lorax_async.engines.vllm.served_adapters.LINGER", 0.0)
    folder = write_adapter(tmp_path / "here", rank=1, seed=1, layers=1)
    here, gone = LoRARequest("here", 1, "~/here"), LoRARequest("gone", 2, f"{tmp_path}/gone")
    named, lora = {"here": here, "gone": gone}, Lora()
    engine = Engine(lora)
    async with serving(tmp_path, engine, 0, named) as served:
        served.add_loaded()
        await until(lambda: served.describe()[0]["bytes"] and served.describe()[1]["last_error"])
        write_adapter(tmp_path / "other", rank=1, seed=1, layers=1)
        other = await served.prepare("other", AdapterRef("./other"))
        named["other"] = LoRARequest("other", 3, other.path)
        other.is_resolvable = True
        served.add(other, named["other"])
        await served.refresh()
        assert set(named) == {"here", "gone", "other"}
        del named["other"]
        await served.refresh()
        shutil.rmtree(folder)
        assert lora.step(here).loras
        assert lora.step(gone) == "zeros"
        for name, number in (("here", 1), ("gone", 2)):
            named.pop(name, None)
            await served.refresh()
            assert ("remove_lora", number) in engine.calls
    assert str(folder) not in "".join(open_files())


@pytest.mark.parametrize(
    ("elsewhere", "engines", "expected"),
    [(False, 1, "127.0.0.1"), (True, 1, "192.0.2.1"), (False, 2, "192.0.2.1")],
)
def test_notices_leave_the_host_only_if_a_worker_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, elsewhere: bool, engines: int, expected: str
) -> None:
    network = SimpleNamespace(get_ip=lambda: "192.0.2.1", get_loopback_ip=lambda: "127.0.0.1")
    for name in ("vllm", "vllm.utils", "vllm.utils.network_utils"):
        monkeypatch.setitem(sys.modules, name, network)
    here = WorkerExtension().lorax_namespace()
    parallel = SimpleNamespace(
        local_engines_only=False, data_parallel_size_local=1, data_parallel_size=engines
    )
    assert notice_host([here, "another" if elsewhere else here], parallel) == expected
