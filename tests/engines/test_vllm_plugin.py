"""What the vLLM plug-in decides without vLLM; `make vllm` runs it in vLLM's server."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorax_async import ConfigError
from lorax_async.engines.plugins import PluginSettings
from lorax_async.engines.vllm.worker import FILES, BuiltWeights, unexpected_interface


def settings(**values: str) -> PluginSettings:
    return PluginSettings.from_environment(
        {f"LORAX_ASYNC_{name}": value for name, value in values.items()} | {"PATH": "/bin"}
    )


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"SORUCES": "hub"}, "LORAX_ASYNC_SORUCES is not a setting"),
        ({"SOURCES": "relative/folder"}, "LORAX_ASYNC_SOURCES: 'relative/folder' is neither"),
        ({"SOURCES": "https://user:pass@models.example/"}, "LORAX_ASYNC_SOURCES"),
        ({"ADAPTERS": "org/name"}, "'org/name' is not NAME=ID"),
        ({"HOST_BYTES": "2 GB"}, "LORAX_ASYNC_HOST_BYTES must be bytes, such as 16GiB"),
        ({"TIMEOUT": "soon"}, "LORAX_ASYNC_TIMEOUT must be seconds"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**values)
    assert message in str(caught.value)
    assert "pass@" not in str(caught.value)


class Lora:
    """vLLM 0.32's, as far as the plug-in looks."""

    embedding_modules = None

    def __init__(self, **changed: Any) -> None:
        expected: dict[str, Any] = {
            "_create_merged_loras_inplace": lambda lora_model: None,
            "modules": {"q": None},
            "device": torch.device("cpu"),
            "lora_index_to_id": [],
            "list_adapters": dict,
            "create_dummy_lora": lambda *_: "zeros",
            "is_pooling_model": True,
            "_is_moe": False,
        }
        self._adapter_manager = SimpleNamespace(**expected | changed)

    def _load_adapter(self, lora_request: Any) -> Any:
        """Return a model whose weights are the file's bytes."""
        data = Path(lora_request.lora_path, FILES[1]).read_bytes()
        if data == b"bad":
            raise ValueError("vLLM does not support it")
        return Model(torch.tensor(list(data), dtype=torch.uint8))


class Model:
    def __init__(self, weights: torch.Tensor) -> None:
        self.loras = {"q": SimpleNamespace(lora_a=weights, lora_b=weights)}

    def clone(self, number: int) -> "Model":
        return self


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
def test_only_the_expected_interface_is_extended(lora: object, reason: str | None) -> None:
    found = unexpected_interface(lora)
    assert found is None if reason is None else found is not None and reason in found


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> BuiltWeights:
    """Room for 20 bytes of weights: those of a file of 10."""
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(LoRARequest=request))
    return BuiltWeights(Lora(), 20, "/nowhere")


def request(name: str, number: int, path: str) -> Any:
    return SimpleNamespace(
        lora_name=name, lora_int_id=number, lora_path=path, is_3d_lora_weight=False
    )


def write(folder: Path, weights: bytes) -> str:
    folder.mkdir(exist_ok=True)
    for name in FILES:
        (folder / name).write_bytes(weights)
    return str(folder)


def build(built: BuiltWeights, path: str, **options: bool) -> str | None:
    built.prepare(path, **options)
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
    assert built.load(request("a", 1, path)).loras
    write(tmp_path / "a", b"bad")
    assert built.load(request("a", 1, path)) == "zeros"
    assert built.report()["lost"] == {path: "vLLM does not support it"}
    with pytest.raises(ValueError, match="does not support"):
        built.load(request("b", 2, path))


def test_an_adapter_beyond_the_budget_is_checked_and_drives_nothing_out(
    built: BuiltWeights, tmp_path: Path
) -> None:
    small, large = write(tmp_path / "small", b"10 bytes.."), write(tmp_path / "large", b"." * 11)
    assert build(built, small) is None
    assert build(built, large) is None
    assert built.load(request("large", 1, large)).loras
    assert built.report()["built"] == {small: 20}
    write(tmp_path / "large", b"bad")
    assert build(built, large) == "vLLM does not support it"


def test_a_folder_whose_files_changed_is_built_again(built: BuiltWeights, tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"1")
    assert build(built, path) is None
    write(tmp_path / "a", b"2")
    assert build(built, path, again=True) is None
    assert built.load(request("a", 1, path)).loras["q"].lora_a.tolist() == [ord("2")]
