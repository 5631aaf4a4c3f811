"""LoraConfig under LoRAX's names: what it says, where it is found, what it maps, what is refused."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch

from adapters import hub_cache
from adapters import small_base as base
from adapters.small_base import WEIGHTS
from common import Run
from lorax_async import adapters
from lorax_async.adapters import (
    AdapterConfig,
    LayoutModel,
    LoraConfig,
    WeightsFile,
    cached_architectures,
    check_architectures,
    check_architectures_async,
    lora,
    require_all_used,
)
from lorax_async.errors import (
    AccessDeniedError,
    AdapterFormatError,
    AdapterNotFoundError,
    ConfigError,
    FetchError,
    IncompatibleAdapterError,
    InternalError,
    InvalidAdapterIdError,
    UnsupportedAdapterError,
    UsageError,
)

pytestmark = pytest.mark.usefixtures("nothing_left", "no_network")

CONFIG = "adapter_config.json"


def folder(tmp_path: Path, **changes: Any) -> Path:
    return base.write(tmp_path / "adapter", base.tensors(types=["q_proj"]), **changes)


# -- LoRAX's names and calls ----------------------------------------------------------------------


def test_the_names() -> None:
    assert set(lora.__all__) == {
        *("AdapterBatchMetadata", "AdapterConfig", "AdapterWeights", "BatchAdapterWeights"),
        *("BatchLoraWeights", "LORA", "LoraConfig", "LoraWeights", "ModuleMap", "RankSegments"),
        "get_scaling_factor",
    }
    assert all(hasattr(lora, name) for name in lora.__all__)
    assert all(hasattr(adapters, name) for name in adapters.__all__)
    assert lora.get_scaling_factor(16, 4) == 4.0
    assert lora.get_scaling_factor(16, 4, uses_rslora=True) == 8.0


LOAD = "config model module_map layer_type unused_weight_names"


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (
            lora.LoraConfig,
            "base_model_name_or_path r target_modules fan_in_fan_out lora_alpha use_rslora",
        ),
        (lora.LoraConfig.load, "adapter_id api_token"),
        (lora.LoraConfig.load_async, "adapter_id api_token"),
        (lora.LoraConfig.map_weights_for_model, "self adapter_weights weight_names"),
        (
            lora.LoraConfig.load_batched_adapter_weights,
            "self model module_map layer_type unused_weight_names dynamic",
        ),
        (lora.LoraWeights, "weights_a weights_b adapter_config"),
        (lora.LoraWeights.load, LOAD),
        (lora.LoraWeights.load_async, LOAD),
        (lora.LoraWeights.from_adapter, "handle layer_type"),
        (LayoutModel, "layout dtype world_size rank"),
        (lora.get_scaling_factor, "lora_alpha r uses_rslora"),
    ],
)
def test_the_signatures(call: Any, names: str) -> None:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(call).parameters.items()
    assert [name for name, one in parameters if one.kind in kinds] == names.split()


def test_the_calls_of_loraxs_models(tmp_path: Path) -> None:
    """As `Model.load_adapter` makes them."""
    path = base.write(tmp_path / "sql", base.tensors(types=["q_proj", "lm_head"]))
    model = base.lorax_model(torch.float16)
    weight_names = tuple(v[0] for v in model.target_to_layer.values())
    adapter_config = lora.LoraConfig.load(str(path), "")
    layer_to_weights = {}
    with WeightsFile.open(str(path), "") as adapter_weights:
        module_map, names = adapter_config.map_weights_for_model(adapter_weights, weight_names)
        unused_weight_names = names.copy()
        for layer_name in base.SHAPES:
            weights = adapter_config.load_batched_adapter_weights(
                model, module_map, layer_name, unused_weight_names, True
            )
            if weights is not None:
                layer_to_weights[layer_name] = weights
    require_all_used(unused_weight_names)
    assert set(layer_to_weights) == {"q_proj", "lm_head"}
    (batch_type,) = layer_to_weights["q_proj"].get_batch_types()
    assert batch_type is lora.BatchLoraWeights
    meta = lora.AdapterBatchMetadata(
        adapter_indices=torch.tensor([7, 7, 0]),
        adapter_set={7, 0},
        adapter_segments=torch.tensor([0, 2, 3]),
        segment_indices=[7, 0],
    )
    data = lora.BatchLoraWeights.load({7: layer_to_weights["q_proj"]}, meta, "q_proj", False, None)
    assert data is not None
    indices = data.rank_data[8].indices
    assert indices is not None
    assert indices.tolist() == [0, 0, -1]
    assert data.adapter_index_configs[7].padded_rank == 8


# -- what it says ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [16.5, 0, -3, 16])
@pytest.mark.parametrize("targets", [None, "all-linear", r".*\.(q|v)_proj", ["q_proj"]])
def test_peft_reads_the_same(tmp_path: Path, alpha: float, targets: object) -> None:
    path = folder(
        tmp_path, lora_alpha=alpha, target_modules=targets, fan_in_fan_out=True, use_rslora=True
    )
    config, theirs = LoraConfig.load(path, None), peft.LoraConfig.from_pretrained(str(path))
    for name in ("r", "lora_alpha", "use_rslora", "fan_in_fan_out", "base_model_name_or_path"):
        ours, its = getattr(config, name), getattr(theirs, name)
        assert (name, ours) == (name, its)
    assert isinstance(config.lora_alpha, int) == (alpha != 16.5)
    ours = config.target_modules
    assert (set(ours) if isinstance(ours, list) else ours) == theirs.target_modules
    assert config.padded_rank is None
    assert isinstance(config, AdapterConfig)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("r", [0, True, 8.0, 10**400, 10**5000]),
        ("alpha", [float("nan"), -float("inf"), 10**400, 10**5000, "16"]),
    ],
)
def test_made_by_hand_it_is_checked_and_never_changes(field: str, values: list[Any]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.config().r = 16  # type: ignore[misc]
    for value in values:
        with pytest.raises(UsageError, match=r"r is|lora_alpha is"):
            base.config(**{field: value})


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


async def test_peft_judges_in_another_thread_and_what_it_refuses_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def refuse(**values: object) -> None:
        threads.append(threading.get_ident())
        raise ValueError("not this rank")

    monkeypatch.setattr(peft, "LoraConfig", refuse)
    with pytest.raises(AdapterFormatError, match="not this rank"):
        await LoraConfig.load_async(folder(tmp_path))
    assert threads
    assert threading.get_ident() not in threads


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


@pytest.mark.parametrize("spell", [Path, str, "./{}", "../here/{}"])
async def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spell: Any) -> None:
    (tmp_path / "here").mkdir()
    path = folder(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    id = spell.format("adapter") if isinstance(spell, str) else spell(path)
    assert LoraConfig.load(id).r == (await LoraConfig.load_async(id)).r == 8
    with WeightsFile.open(id) as file:
        assert len(file) == 6
    (path / WEIGHTS).unlink()
    assert LoraConfig.load(id).r == 8  # it needs no weights beside it
    with pytest.raises(AdapterNotFoundError, match=WEIGHTS):
        WeightsFile.open(id)


def _spoil(path: Path, how: str) -> None:
    config = path / CONFIG
    config.unlink()
    if how == "folder":
        config.mkdir()
    elif how == "long":
        config.write_bytes(b" " * (256 * 1024 + 1))
    elif how != "missing":
        config.write_bytes({"empty": b"", "json": b"{", "twice": b'{"r":1,"r":2}'}[how])


@pytest.mark.parametrize("how", ["folder", "empty", "long", "json", "twice", "missing"])
async def test_files_that_are_no_configs(tmp_path: Path, how: str) -> None:
    path = folder(tmp_path)
    _spoil(path, how)
    kind = AdapterNotFoundError if how == "missing" else AdapterFormatError
    with pytest.raises(kind) as caught:
        await LoraConfig.load_async(path)
    assert caught.value.id == str(path)


@pytest.mark.parametrize("name", ["nothing", "adapter/adapter_config.json"])
def test_no_such_folder(tmp_path: Path, name: str) -> None:
    folder(tmp_path)
    with pytest.raises(AdapterNotFoundError, match=CONFIG):
        LoraConfig.load(tmp_path / name)


# -- the hub cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [LoraConfig.load, WeightsFile.open])
def test_a_cache_that_is_damaged_or_may_not_be_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[str], object]
) -> None:
    """Damaged by what was being written when the machine went down, say."""
    hub_cache.put(cache, "org/sql", {CONFIG: b"{}"}, commit="1" * 40, refs=("main",))
    (cache / "models--org--sql" / "refs" / "main").write_bytes(b"\xff\xfe")
    with pytest.raises(FetchError, match="cache is damaged") as caught:
        call("org/sql")
    assert caught.value.id == "org/sql"

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", refused)
    with pytest.raises(AccessDeniedError, match="hub cache may not be read"):
        call("org/sql")


@pytest.mark.usefixtures("cache")
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


@pytest.mark.parametrize("id", ["s3://loras/foo/bar", "file:///x", "https://x/y", "gs://abc/y"])
def test_sources_that_only_a_loader_asks(id: str) -> None:
    with pytest.raises(ConfigError, match="an AdapterLoader loads adapters from elsewhere"):
        LoraConfig.load(id)


# -- every tensor belongs to a module, or is refused by its name ----------------------------------


@pytest.mark.parametrize("gone", ["A", "B"])
def test_only_one_of_a_and_b_is_refused(gone: str) -> None:
    made = base.tensors()
    del made[base.key(1, "q_proj", gone)]
    other = "B" if gone == "A" else "A"
    with pytest.raises(AdapterFormatError, match=f"q_proj.lora_{other}.weight' has no {gone}"):
        base.config().map_weights_for_model(made, base.lorax_model().weight_names)


def test_tensors_that_nothing_applies_are_refused() -> None:
    """LoRAX drops them without a word; the adapter's answers are others then."""
    made = base.tensors()
    names = [n for n in base.lorax_model().weight_names if "v_proj" not in n]
    with pytest.raises(IncompatibleAdapterError, match=r"v_proj.*\(6 tensors in all\)"):
        base.config().map_weights_for_model(made, names)
    kept = {name: tensor for name, tensor in made.items() if "v_proj" not in name}
    module_map, matched = base.config().map_weights_for_model(kept, names)
    assert matched == set(kept)
    assert len(module_map) == len(kept) / 2
    require_all_used(set())
    with pytest.raises(IncompatibleAdapterError, match=r"loaded a, b, c, … \(4 tensors in all\)"):
        require_all_used(set("abcd"))


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding"),
        ("base_model.model.lm_head.base_layer.weight", "copy of the base"),
        ("something.else", "no 'base_model.model.' in front"),
    ],
)
def test_tensors_of_other_features_are_refused_by_name(name: str, feature: str) -> None:
    made = base.tensors() | {name: torch.zeros(1)}
    with pytest.raises(UnsupportedAdapterError, match=feature):
        base.config().map_weights_for_model(made, base.lorax_model().weight_names)


def test_patterns_that_would_take_too_long(tmp_path: Path) -> None:
    path = folder(tmp_path, rank_pattern={f"(a|b)*{n}x": 8 for n in range(100)})
    names = [f"{'a' * 100}.{n}" for n in range(6000)]
    made = {
        f"base_model.model.{name}.lora_{part}.weight": torch.zeros(8, 8)
        for name in names
        for part in "AB"
    }
    with pytest.raises(UnsupportedAdapterError, match="too long to match"):
        LoraConfig.load(path).map_weights_for_model(made, names)


# -- another base than the one that is served: names warn, architectures refuse -------------------

LLAMA, QWEN = ["LlamaForCausalLM"], ["Qwen2ForCausalLM"]


def put(cache: Path, config: object) -> None:
    files = {"config.json": config if isinstance(config, bytes) else json.dumps(config).encode()}
    hub_cache.put(cache, "org/base", files, commit="a" * 40, refs=("main",))


@pytest.fixture(params=["plain", "async"])
def check(request: pytest.FixtureRequest, run: Run) -> Any:
    if request.param == "plain":
        return check_architectures
    return lambda *args: run(check_architectures_async(*args))


@pytest.mark.parametrize(
    ("name", "architectures", "outcome"),
    [
        *[(same, QWEN, None) for same in ("", None, "org/served")],  # or no word of it
        ("org/base", LLAMA, UserWarning),
        ("org/base", None, UserWarning),  # shapes decide
        ("org/base", QWEN, IncompatibleAdapterError),
    ],
)
def test_another_base_warns_and_another_architecture_is_refused(
    cache: Path, check: Any, name: str | None, architectures: list[str] | None, outcome: Any
) -> None:
    if architectures is not None:
        put(cache, {"architectures": architectures})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            check("org/served", "sql", base.config(base_model_name_or_path=name), LLAMA)
        except (UserWarning, IncompatibleAdapterError) as error:
            assert type(error) is outcome
            words = ("'sql'", "'org/served'", "serve 'org/base'")
            more = (*LLAMA, *QWEN) if outcome is IncompatibleAdapterError else ()
            assert all(word in str(error) for word in (*words, *more))
        else:
            assert outcome is None


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"architectures": LLAMA + QWEN}, ("LlamaForCausalLM", "Qwen2ForCausalLM")),
        ({"architectures": []}, None),
        ({"architectures": None}, None),
        ({"architectures": "x"}, None),
        ({}, None),
        (b"{", None),
    ],
)
def test_what_a_cached_config_says(cache: Path, content: object, names: object) -> None:
    put(cache, content)
    assert cached_architectures("org/base") == names


def test_a_strangers_name_leads_nowhere_else(cache: Path, tmp_path: Path) -> None:
    put(cache, {"architectures": LLAMA})
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text(json.dumps({"architectures": LLAMA}))
    for name in ("../../x", "/etc", "./x", "a/b/c", "x" * 500, "\0", "org/base@v1"):
        assert cached_architectures(name) is None


@pytest.mark.usefixtures("cache")
async def test_the_cache_is_read_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda *_, **__: threads.append(threading.get_ident()),
    )
    with pytest.warns(UserWarning, match="was not trained"):
        await check_architectures_async("org/served", "sql", base.config(), LLAMA)
    assert threads
    assert threading.get_ident() not in threads
