"""LoraConfig: what it says, where it is found, and that nobody else's word is taken."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import constants

from adapters import hub_cache
from adapters import small_base as base
from common import Run
from lorax_async.adapters import AdapterConfig, LoraConfig, WeightsFile
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    IncompatibleAdapterError,
    InternalError,
    InvalidAdapterIdError,
    LoraxError,
    UnsupportedAdapterError,
    UsageError,
)

pytestmark = pytest.mark.usefixtures("nothing_left", "no_network")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a network request")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(folder), raising=False)
    return folder


def folder(tmp_path: Path, **changes: Any) -> Path:
    return base.write(tmp_path / "adapter", base.tensors(types=["q_proj"]), **changes)


# -- what it says ---------------------------------------------------------------------------------


def test_the_fields_of_lorax(tmp_path: Path) -> None:
    config = LoraConfig.load(folder(tmp_path, r=8, lora_alpha=16, use_rslora=True), None)
    assert config.base_model_name_or_path == "org/base"
    assert (config.r, config.lora_alpha, config.use_rslora) == (8, 16, True)
    assert isinstance(config.lora_alpha, int)
    assert config.target_modules == ["q_proj", "v_proj", "down_proj", "lm_head"]
    assert config.fan_in_fan_out is False
    assert config.padded_rank is None
    assert isinstance(config, AdapterConfig)


@pytest.mark.parametrize("alpha", [16.5, 0, -3])
@pytest.mark.parametrize("targets", [None, "all-linear", r".*\.(q|v)_proj", ["q_proj"]])
def test_peft_reads_the_same(tmp_path: Path, alpha: float, targets: object) -> None:
    path = folder(tmp_path, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=True)
    config, theirs = LoraConfig.load(path), peft.LoraConfig.from_pretrained(str(path))
    assert (config.r, config.lora_alpha) == (theirs.r, theirs.lora_alpha)
    assert config.fan_in_fan_out is theirs.fan_in_fan_out is True
    ours = config.target_modules
    assert (set(ours) if isinstance(ours, list) else ours) == theirs.target_modules


def test_it_never_changes() -> None:
    config = base.config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 16  # type: ignore[misc]
    assert dataclasses.replace(config, r=16).r == 16


@pytest.mark.parametrize(
    "changes", [{"r": 0}, {"r": True}, {"r": 8.0}, {"alpha": float("nan")}, {"alpha": "16"}]
)
def test_made_by_hand_it_is_checked(changes: Any) -> None:
    with pytest.raises(UsageError, match=r"r is|lora_alpha is"):
        base.config(**changes)


# -- nobody else's word ---------------------------------------------------------------------------


def test_peft_gets_plain_values_and_compiles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = r"((a+)+)+$|evil_marker"
    path = folder(tmp_path, target_modules=hostile, auto_mapping={"base_model_class": "evil"})
    given: list[dict[str, object]] = []

    class Watched(peft.LoraConfig):
        def __init__(self, **values: Any) -> None:
            given.append(values)
            super().__init__(**values)

        @classmethod
        def from_pretrained(cls, *args: object, **kwargs: object) -> Any:
            raise AssertionError("peft reads no file")

    real = re.compile

    def compile(pattern: Any, flags: Any = 0) -> Any:
        assert "evil_marker" not in str(pattern)
        return real(pattern, flags)

    monkeypatch.setattr(peft, "LoraConfig", Watched)
    monkeypatch.setattr(re, "compile", compile)
    assert LoraConfig.load(path).target_modules == hostile
    (values,) = given
    assert set(values) == {
        *("base_model_name_or_path", "r", "lora_alpha", "use_rslora", "fan_in_fan_out"),
        *("target_modules", "inference_mode"),
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", 9),
        ("lora_alpha", 17),
        ("use_rslora", True),
        ("fan_in_fan_out", True),
        ("target_modules", {"k_proj"}),
        ("base_model_name_or_path", "org/other"),
    ],
)
def test_peft_and_we_must_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    class Other(peft.LoraConfig):
        def __post_init__(self) -> None:
            super().__post_init__()  # type: ignore[no-untyped-call]
            setattr(self, name, value)

    monkeypatch.setattr(peft, "LoraConfig", Other)
    with pytest.raises(InternalError, match=f"'{name}'"):
        LoraConfig.load(folder(tmp_path))


def test_what_peft_refuses_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**values: object) -> None:
        raise ValueError("not this rank")

    monkeypatch.setattr(peft, "LoraConfig", refuse)
    with pytest.raises(AdapterFormatError, match="not this rank"):
        LoraConfig.load(folder(tmp_path))


@pytest.mark.parametrize(
    ("changes", "feature"),
    [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "bias"), ({"bias": "all"}, "biases")],
)
def test_features_are_refused_by_name(tmp_path: Path, changes: Any, feature: str) -> None:
    path = folder(tmp_path, **changes)
    with pytest.raises(UnsupportedAdapterError, match=feature) as caught:
        LoraConfig.load(path)
    assert caught.value.id == str(path)


# -- local folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("spell", [Path, str, lambda path: f"./{path.name}"])
def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spell: Any) -> None:
    path = folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert LoraConfig.load(spell(path)).r == 8
    with WeightsFile.open(spell(path)) as file:
        assert len(file) == 6


def test_a_folder_beside_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert LoraConfig.load("../adapter").r == 8


def test_a_config_needs_no_weights_beside_it(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / WEIGHTS).unlink()
    assert LoraConfig.load(path).r == 8
    with pytest.raises(AdapterNotFoundError, match=WEIGHTS):
        WeightsFile.open(path)


@pytest.mark.parametrize("name", ["nothing", "adapter/adapter_config.json"])
def test_no_such_folder(tmp_path: Path, name: str) -> None:
    folder(tmp_path)
    with pytest.raises(AdapterNotFoundError, match=CONFIG):
        LoraConfig.load(tmp_path / name)


def _spoil(path: Path, how: str) -> None:
    config = path / CONFIG
    config.unlink()
    if how == "folder":
        config.mkdir()
    elif how == "long":
        config.write_bytes(b" " * (256 * 1024 + 1))
    elif how != "missing":
        config.write_bytes({"empty": b"", "json": b"{", "twice": b'{"r":1,"r":2}'}[how])


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("missing", AdapterNotFoundError),
        ("folder", AdapterFormatError),
        ("empty", AdapterFormatError),
        ("long", AdapterFormatError),
        ("json", AdapterFormatError),
        ("twice", AdapterFormatError),
    ],
)
def test_files_that_are_no_configs(tmp_path: Path, how: str, kind: type[LoraxError]) -> None:
    path = folder(tmp_path)
    _spoil(path, how)
    with pytest.raises(kind) as caught:
        LoraConfig.load(path)
    assert caught.value.id == str(path)


# -- the hub cache --------------------------------------------------------------------------------


def files(tmp_path: Path, rank: int) -> dict[str, bytes]:
    path = base.write(tmp_path / f"rank {rank}", base.tensors(rank, types=["q_proj"]), rank)
    return {name: (path / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture
def versions(tmp_path: Path, cache: Path) -> None:
    """Two commits of one adapter: the first is v1, the second main and a pull request."""
    hub_cache.put(cache, "org/sql", files(tmp_path, 4), commit=FIRST, refs=("v1",))
    refs = ("main", "refs/pr/1")
    hub_cache.put(cache, "org/sql", files(tmp_path, 8), commit=SECOND, refs=refs)


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize(
    ("id", "rank"),
    [
        ("org/sql", 8),
        ("org/sql@main", 8),
        ("org/sql@v1", 4),
        ("org/sql@refs/pr/1", 8),
        (f"org/sql@{FIRST}", 4),
    ],
)
def test_hub_ids_are_found_in_the_cache(run: Run, id: str, rank: int) -> None:
    assert LoraConfig.load(id, "hf_token").r == rank
    assert run(LoraConfig.load_async(id, None)).r == rank
    with WeightsFile.open(id, None) as file:
        assert file.shape(base.key(0, "q_proj", "A")) == (rank, 840)


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize(
    ("id", "remedy"),
    [
        ("org/other", "run 'hf download org/other' first"),
        ("org/sql@v2", "run 'hf download org/sql --revision v2' first"),
        (f"org/sql@{'3' * 40}", "first"),
    ],
)
def test_what_is_not_cached_says_how_to_fetch_it(id: str, remedy: str) -> None:
    for call in (LoraConfig.load, WeightsFile.open):
        with pytest.raises(AdapterNotFoundError, match=remedy) as caught:
            call(id, None)
        assert caught.value.id == id


def test_a_cached_config_without_weights(tmp_path: Path, cache: Path) -> None:
    only = {CONFIG: files(tmp_path, 8)[CONFIG]}
    hub_cache.put(cache, "org/sql", only, commit=FIRST, refs=("main",))
    assert LoraConfig.load("org/sql").r == 8
    with pytest.raises(AdapterNotFoundError, match=f"has no {WEIGHTS} of 'org/sql'"):
        WeightsFile.open("org/sql")


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize(
    "id",
    [
        *("", ".", "adapter", "a/b/c", "org/", "/../x\0", "org/sql@", "org/sql@../../x"),
        *("org/sql@/etc", "org/sql@a//b", "org/sql@a b", "org/..", "../\0", "org/a--b", "ö/x"),
        *(7, None, b"org/sql"),
    ],
)
def test_no_ids(id: Any) -> None:
    with pytest.raises(InvalidAdapterIdError):
        LoraConfig.load(id)


@pytest.mark.parametrize("id", ["s3://loras/foo/bar", "file:///x", "https://x/y", "gs://x/y"])
def test_sources_to_come(id: str) -> None:
    with pytest.raises(ConfigError, match="not available in this version"):
        LoraConfig.load(id)


# -- on a loop ------------------------------------------------------------------------------------


def test_no_file_is_opened_and_nothing_imported_on_the_loops_thread(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    for name in ("read_small", "require_agreement"):
        target = f"lorax_async.adapters.config.{name}"
        real = getattr(__import__("lorax_async.adapters.config", fromlist=["_"]), name)

        def watched(*args: Any, real: Any = real, name: str = name) -> Any:
            seen.append((name, threading.current_thread().name))
            return real(*args)

        monkeypatch.setattr(target, watched)
    path = folder(tmp_path)
    assert run(LoraConfig.load_async(path, None)) == LoraConfig.load(path)
    here = threading.current_thread().name
    assert [name for name, _ in seen] == ["read_small", "require_agreement"] * 2
    assert [thread == here for _, thread in seen] == [False, False, True, True]


def test_errors_reach_the_one_who_awaits(run: Run, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError) as caught:
        run(LoraConfig.load_async(tmp_path / "nothing", None))
    assert caught.value.id == str(tmp_path / "nothing")


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["A", "B"])
def test_only_one_of_a_and_b_is_refused(gone: str) -> None:
    made = base.tensors()
    del made[base.key(1, "q_proj", gone)]
    other = "B" if gone == "A" else "A"
    with pytest.raises(AdapterFormatError, match=f"q_proj.lora_{other}.weight' has no {gone}"):
        base.config().map_weights_for_model(made, base.FakeModel().weight_names)


def test_tensors_that_no_module_takes_are_refused() -> None:
    """LoRAX drops them without a word; the adapter's answers are others then."""
    made = base.tensors()
    names = [n for n in base.FakeModel().weight_names if "v_proj" not in n]
    with pytest.raises(IncompatibleAdapterError, match=r"v_proj.*\(6 tensors in all\)"):
        base.config().map_weights_for_model(made, names)
    kept = {name: tensor for name, tensor in made.items() if "v_proj" not in name}
    module_map, matched = base.config().map_weights_for_model(kept, names)
    assert matched == set(kept)
    assert set(module_map) == set(names)


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding"),
        ("base_model.model.lm_head.base_layer.weight", "full base weights"),
        ("something.else", "no 'base_model.model.' in front"),
    ],
)
def test_tensors_of_other_features_are_refused_by_name(name: str, feature: str) -> None:
    made = base.tensors() | {name: torch.zeros(1)}
    with pytest.raises(UnsupportedAdapterError, match=feature):
        base.config().map_weights_for_model(made, base.FakeModel().weight_names)


def test_patterns_that_would_take_too_long(tmp_path: Path) -> None:
    path = folder(tmp_path, rank_pattern={f"(a|b)*{n}x": 8 for n in range(100)})
    config = LoraConfig.load(path)
    names = [f"{'a' * 100}.{n}" for n in range(6000)]
    made = {
        f"base_model.model.{name}.lora_{part}.weight": torch.zeros(8, 8)
        for name in names
        for part in "AB"
    }
    with pytest.raises(UnsupportedAdapterError, match="too long to match"):
        config.map_weights_for_model(made, names)


def test_json_text_is_what_peft_writes(tmp_path: Path) -> None:
    """The test's own adapters are no easier than real ones."""
    path = folder(tmp_path)
    peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"]).save_pretrained(str(path))
    assert len(json.loads((path / CONFIG).read_text())) > 30
    assert LoraConfig.load(path).target_modules == ["q_proj"]
