"""LoraConfig under LoRAX's names: what it says, where it is found, what it maps, what is refused."""

import dataclasses
import errno
import inspect
import json
import re
import socket
import threading
import warnings
from contextlib import nullcontext
from math import inf, nan
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import hub_cache
import huggingface_hub
import peft
import pytest
import small_base as base
import torch
from small_base import WEIGHTS

from engines.conftest import watched
from lorax_async import errors
from lorax_async.adapters import lora
from lorax_async.adapters.layers import LayoutModel
from lorax_async.adapters.lora import AdapterConfig, LoraConfig, require_all_used
from lorax_async.adapters.weights_file import WeightsFile
from lorax_async.errors import AdapterFormatError, IncompatibleAdapterError, UnsupportedAdapterError

Patch = pytest.MonkeyPatch

pytestmark = pytest.mark.usefixtures("nothing_left", "no_network")

CONFIG = "adapter_config.json"


@pytest.fixture
def no_network(monkeypatch: Patch) -> None:
    refuse = Mock(side_effect=AssertionError("a network request"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def folder(tmp_path: Path, **changes: Any) -> Path:
    return base.write(tmp_path / "adapter", base.tensors(types=["q_proj"]), **changes)


LOAD = "config model module_map layer_type unused_weight_names"
BATCHED = "self model module_map layer_type unused_weight_names dynamic"


def test_the_names_and_signatures() -> None:
    assert {"AdapterWeights", "BatchAdapterWeights", "LORA", "RankSegments"} < set(lora.__all__)
    assert lora.get_scaling_factor(16, 4) == 4.0
    assert lora.get_scaling_factor(16, 4, uses_rslora=True) == 8.0
    signatures: dict[Any, str] = {
        lora.LoraConfig: "base_model_name_or_path r target_modules fan_in_fan_out lora_alpha use_rslora",
        lora.LoraConfig.load: "adapter_id api_token",
        lora.LoraConfig.load_async: "adapter_id api_token",
        lora.LoraConfig.map_weights_for_model: "self adapter_weights weight_names",
        lora.LoraConfig.load_batched_adapter_weights: BATCHED,
        lora.LoraWeights: "weights_a weights_b adapter_config",
        lora.LoraWeights.load: LOAD,
        lora.LoraWeights.load_async: LOAD,
        lora.LoraWeights.from_adapter: "handle layer_type",
        LayoutModel: "layout dtype world_size rank",
        lora.get_scaling_factor: "lora_alpha r uses_rslora",
    }
    for call, names in signatures.items():
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
        parameters = inspect.signature(call).parameters.items()
        assert [name for name, one in parameters if one.kind in kinds] == names.split()


def test_the_calls_of_loraxs_models(tmp_path: Path) -> None:
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
    indices, segments = torch.tensor([7, 7, 0]), torch.tensor([0, 2, 3])
    meta = lora.AdapterBatchMetadata(indices, {7, 0}, segments, [7, 0])
    data = lora.BatchLoraWeights.load({7: layer_to_weights["q_proj"]}, meta, "q_proj", False, None)
    assert data is not None
    found: Any = data.rank_data[8].indices
    assert found.tolist() == [0, 0, -1]
    assert data.adapter_index_configs[7].padded_rank == 8


@pytest.mark.parametrize("alpha", [16.5, 0, -3, 16])
@pytest.mark.parametrize("targets", [None, "all-linear", r".*\.(q|v)_proj", ["q_proj"]])
def test_peft_reads_the_same(tmp_path: Path, alpha: float, targets: object) -> None:
    flags = {"fan_in_fan_out": True, "use_rslora": True}
    path = folder(tmp_path, lora_alpha=alpha, target_modules=targets, **flags)
    config, theirs = LoraConfig.load(path, None), peft.LoraConfig.from_pretrained(str(path))
    for name in ("r", "lora_alpha", "use_rslora", "fan_in_fan_out", "base_model_name_or_path"):
        assert (name, getattr(config, name)) == (name, getattr(theirs, name))
    assert isinstance(config.lora_alpha, int) == (alpha != 16.5)
    ours = config.target_modules
    assert (set(ours) if isinstance(ours, list) else ours) == theirs.target_modules
    assert (config.padded_rank, isinstance(config, AdapterConfig)) == (None, True)


def test_made_by_hand_it_is_checked_and_never_changes() -> None:
    alphas: list[Any] = [nan, -inf, 10**400, 10**5000, "16"]
    wrong: dict[str, list[Any]] = {"r": [0, True, 8.0, 10**400, 10**5000], "alpha": alphas}
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.config().r = 16  # type: ignore[misc]
    for field, values in wrong.items():
        for value in values:
            with pytest.raises(errors.UsageError, match=r"r is|lora_alpha is"):
                base.config(**{field: value})


class Peft(peft.LoraConfig):
    """A config that some peft makes of the values: none if `refused`, else with other `changes`."""

    threads: list[int]
    changes: dict[str, Any]
    refused = False

    def __init__(self, **values: Any) -> None:
        assert all(isinstance(value, str | int | float | bool | list) for value in values.values())
        self.threads.append(threading.get_ident())
        if self.refused:
            raise ValueError("not this rank")
        super().__init__(**values)
        vars(self).update(self.changes)

    @classmethod
    def from_pretrained(cls, *args: object, **kwargs: object) -> Any:
        raise AssertionError("peft reads no file")


@pytest.fixture
def other_peft(monkeypatch: Patch) -> type[Peft]:
    made = type("Other", (Peft,), {"threads": [], "changes": {}})
    monkeypatch.setattr(peft, "LoraConfig", made)
    return made


async def test_peft_gets_plain_values_in_a_thread_and_compiles_nothing(
    tmp_path: Path, monkeypatch: Patch, other_peft: type[Peft]
) -> None:
    hostile = r"((a+)+)+$|evil_marker"
    path = folder(tmp_path, target_modules=hostile, auto_mapping={"base_model_class": "evil"})
    real = re.compile

    def compile(pattern: Any, flags: Any = 0) -> Any:
        assert "evil_marker" not in str(pattern)
        return real(pattern, flags)

    monkeypatch.setattr(re, "compile", compile)
    assert (await LoraConfig.load_async(path)).target_modules == hostile
    assert [thread == threading.get_ident() for thread in other_peft.threads] == [False]
    other_peft.refused = True
    with pytest.raises(AdapterFormatError, match="not this rank"):
        LoraConfig.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        *[{"r": 9}, {"lora_alpha": 17}, {"use_rslora": True}, {"fan_in_fan_out": True}],
        *[{"target_modules": {"k_proj"}}, {"base_model_name_or_path": "org/other"}],
    ],
)
def test_peft_must_agree(tmp_path: Path, other_peft: type[Peft], changes: dict[str, Any]) -> None:
    other_peft.changes = changes
    with pytest.raises(errors.InternalError, match=f"'{next(iter(changes))}'"):
        LoraConfig.load(folder(tmp_path))


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"use_dora": True}, UnsupportedAdapterError, "DoRA"),
        ({"lora_bias": True}, UnsupportedAdapterError, "bias"),
        ({"bias": "all"}, UnsupportedAdapterError, "biases"),
        (None, errors.AdapterNotFoundError, CONFIG),
        (b"", AdapterFormatError, "empty"),
        (b" " * (256 * 1024 + 1), AdapterFormatError, "262,145"),
        (b"{", AdapterFormatError, CONFIG),
        (b'{"r":1,"r":2}', AdapterFormatError, "r"),
        ("folder", AdapterFormatError, "a folder"),
        ("no folder", errors.AdapterNotFoundError, CONFIG),
        ("inside a file", errors.AdapterNotFoundError, CONFIG),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, change: Any, kind: Any, text: str) -> None:
    path = folder(tmp_path, **(change if isinstance(change, dict) else {}))
    config = path / CONFIG
    if change == "inside a file":
        path = config
    elif change == "no folder":
        path = tmp_path / "nothing"
    elif not isinstance(change, dict):
        config.unlink()
        if change == "folder":
            config.mkdir()
        elif change is not None:
            config.write_bytes(change)
    with pytest.raises(kind, match=text) as caught:
        LoraConfig.load(path)
    assert caught.value.id == str(path)


@pytest.mark.parametrize("spell", [Path, str, "./{}", "../here/{}"])
async def test_local_folders(tmp_path: Path, monkeypatch: Patch, spell: Any) -> None:
    (tmp_path / "here").mkdir()
    path = folder(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    id = spell.format("adapter") if isinstance(spell, str) else spell(path)
    assert LoraConfig.load(id).r == (await LoraConfig.load_async(id)).r == 8
    with WeightsFile.open(id) as file:
        assert len(file) == 6
    (path / WEIGHTS).unlink()
    assert LoraConfig.load(id).r == 8  # it needs no weights beside it
    with pytest.raises(errors.AdapterNotFoundError, match=WEIGHTS):
        WeightsFile.open(id)


def test_a_cache_that_is_damaged_or_may_not_be_read(hub_client: Path, monkeypatch: Patch) -> None:
    hub_cache.put(hub_client, "org/sql", {CONFIG: b"{}"}, commit="1" * 40, refs=("main",))
    (hub_client / "models--org--sql" / "refs" / "main").write_bytes(b"\xff\xfe")
    for call in (LoraConfig.load, WeightsFile.open):
        with pytest.raises(errors.FetchError, match="cache is damaged") as caught:
            call("org/sql")
        assert caught.value.id == "org/sql"
    refused = Mock(side_effect=PermissionError(errno.EACCES, "no"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", refused)
    with pytest.raises(errors.AccessDeniedError, match="hub cache may not be read"):
        LoraConfig.load("org/sql")


@pytest.mark.usefixtures("hub_client")
def test_no_ids() -> None:
    ids: list[Any] = ["", ".", "adapter", "a/b/c", "org/", "/../x\0", "org/sql@", "org/sql@../../x"]
    ids += ["org/sql@/etc", "org/sql@a//b", "org/sql@a b", "org/..", "../\0", "org/a--b", "ö/x"]
    elsewhere = ["s3://loras/foo/bar", "file:///x", "https://x/y", "gs://abc/y"]
    for id in (*ids, 7, None, b"org/sql", *elsewhere):
        kind = errors.ConfigError if id in elsewhere else errors.InvalidAdapterIdError
        with pytest.raises(kind) as caught:
            LoraConfig.load(id)
        assert ("an AdapterLoader loads" in str(caught.value)) == (id in elsewhere)


ROOT = "base_model.model."
ROWS = "embed_tokens.token_adapter.trainable_tokens_delta"
Q1 = f"{ROOT}{base.module_name(1, 'q_proj')}"


def test_tensors_without_a_place_are_refused_by_name() -> None:
    for gone, more, kind, text in [
        ("A", "", AdapterFormatError, "q_proj.lora_B.weight' has no A"),
        ("B", "", AdapterFormatError, "q_proj.lora_A.weight' has no B"),
        ("", f"{Q1}.lora_magnitude_vector", UnsupportedAdapterError, "DoRA"),
        ("", f"{Q1}.lora_B.bias", UnsupportedAdapterError, "lora_bias"),
        ("", f"{ROOT}model.embed.lora_embedding_A", UnsupportedAdapterError, "embedding"),
        ("", f"{ROOT}lm_head.base_layer.weight", UnsupportedAdapterError, "copy of the base"),
        ("", f"{ROOT}lm_head.weight", UnsupportedAdapterError, "modules_to_save"),
        ("", f"{ROOT}{ROWS}", UnsupportedAdapterError, "trainable_token_indices"),
        ("", "something.else", UnsupportedAdapterError, f"no '{ROOT}' in front"),
    ]:
        made = base.tensors() | ({more: torch.zeros(1)} if more else {})
        made.pop(base.key(1, "q_proj", gone), None)
        with pytest.raises(kind, match=text):
            base.config().map_weights_for_model(made, base.lorax_model().weight_names)


def test_tensors_that_nothing_applies_are_refused() -> None:
    """LoRAX drops them without a word; the adapter's answers are others then."""
    made = base.tensors()
    names = [n for n in base.lorax_model().weight_names if "v_proj" not in n]
    with pytest.raises(IncompatibleAdapterError, match=r"v_proj.*\(6 tensors in all\)"):
        base.config().map_weights_for_model(made, names)
    kept = {name: tensor for name, tensor in made.items() if "v_proj" not in name}
    module_map, matched = base.config().map_weights_for_model(kept, names)
    assert (matched, len(module_map)) == (set(kept), len(kept) / 2)
    require_all_used(set())
    with pytest.raises(IncompatibleAdapterError, match=r"loaded a, b, c, … \(4 tensors in all\)"):
        require_all_used(set("abcd"))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"target_modules": ["q_proj"]}, r"v_proj \(target_modules\)"),
        ({"exclude_modules": ["q_proj"]}, r"q_proj \(exclude_modules\)"),
        ({"layers_to_transform": [1]}, r"layers\.0\..*\(layers_to_transform\)"),
    ],
)
def test_tensors_that_the_config_leaves_out_are_refused(
    fields: dict[str, Any], text: str, tmp_path: Path
) -> None:
    """LoRAX applies them, and PEFT does not."""
    made, names = base.tensors(), base.lorax_model().weight_names
    config = LoraConfig.load(base.write(tmp_path / "narrow", made, **fields))
    with pytest.raises(AdapterFormatError, match=text):
        config.map_weights_for_model(made, names)
    broad = LoraConfig.load(base.write(tmp_path / "broad", made))
    assert len(broad.map_weights_for_model(made, names)[0]) == len(made) / 2


def test_patterns_that_would_take_too_long(tmp_path: Path) -> None:
    patterns = {f"(a|b)*{n}x": 8 for n in range(100)}
    path = folder(tmp_path, rank_pattern=patterns, target_modules=None)
    names = [f"{'a' * 100}.{n}" for n in range(6000)]
    keys = [f"base_model.model.{name}.lora_{part}.weight" for name in names for part in "AB"]
    made = dict.fromkeys(keys, torch.zeros(8, 8))
    with pytest.raises(UnsupportedAdapterError, match="too long to match"):
        LoraConfig.load(path).map_weights_for_model(made, names)


LLAMA, QWEN = ["LlamaForCausalLM"], ["Qwen2ForCausalLM"]


def put(hub_client: Path, config: object) -> None:
    files = {"config.json": config if isinstance(config, bytes) else json.dumps(config).encode()}
    hub_cache.put(hub_client, "org/base", files, commit="a" * 40, refs=("main",))


@pytest.mark.parametrize(
    ("name", "config", "outcome"),
    [
        *[(same, {"architectures": QWEN}, None) for same in ("", None, "org/served")],
        ("org/base", {"architectures": LLAMA}, UserWarning),
        ("org/base", None, UserWarning),
        ("org/base", {"architectures": []}, UserWarning),
        ("org/base", b"{", UserWarning),
        ("org/base", {"architectures": QWEN}, IncompatibleAdapterError),
        ("org/base", {"architectures": LLAMA + QWEN}, IncompatibleAdapterError),
    ],
)
async def test_another_base_warns_and_another_architecture_is_refused(
    hub_client: Path, monkeypatch: Patch, name: str | None, config: object, outcome: Any
) -> None:
    if config is not None:
        put(hub_client, config)
    looks = watched(monkeypatch, huggingface_hub, "try_to_load_from_cache")
    for check in (lora.check_architectures_async, lora.check_architectures):
        refused = pytest.raises(outcome) if outcome else nullcontext()
        with refused as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", module=__name__)  # the caller's
            config_of = base.config(base_model_name_or_path=name)
            found: Any = check("org/served", "sql", config_of, LLAMA)
            if found is not None:
                await found
        if caught is not None:
            words = ("'sql'", "'org/served'", "serve 'org/base'")
            more = (*LLAMA, *QWEN) if outcome is IncompatibleAdapterError else ()
            assert all(word in str(caught.value) for word in (*words, *more))
        if check is lora.check_architectures_async:  # it reads the cache in a thread
            assert threading.get_ident() not in {look.thread for look in looks}
    assert bool(looks) == (outcome is not None)


def test_a_strangers_name_leads_nowhere_else(hub_client: Path, tmp_path: Path) -> None:
    put(hub_client, {"architectures": LLAMA})
    assert lora.cached_architectures("org/base") == ("LlamaForCausalLM",)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text(json.dumps({"architectures": LLAMA}))
    for name in ("../../x", "/etc", "./x", "a/b/c", "x" * 500, "\0", "org/base@v1"):
        assert lora.cached_architectures(name) is None
