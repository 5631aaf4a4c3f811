"""LoraConfig: what it says, and that nobody else's word is taken."""

from __future__ import annotations

import dataclasses
import re
import threading
from pathlib import Path
from typing import Any

import peft
import pytest

from adapters import small_base as base
from lorax_async.adapters import AdapterConfig, LoraConfig
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    InternalError,
    UnsupportedAdapterError,
    UsageError,
)

pytestmark = pytest.mark.usefixtures("nothing_left", "no_network")


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
    "changes",
    [
        {"r": 0},
        {"r": True},
        {"r": 8.0},
        {"alpha": float("nan")},
        {"alpha": -float("inf")},
        {"alpha": 10**400},
        {"alpha": 10**5000},
        {"alpha": "16"},
        {"r": 10**400},
        {"r": 10**5000},
    ],
    ids=lambda changes: str(list(changes)),
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


# -- on a loop ------------------------------------------------------------------------------------


async def test_no_file_is_opened_and_nothing_imported_on_the_loops_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert await LoraConfig.load_async(path, None) == LoraConfig.load(path)
    here = threading.current_thread().name
    assert [name for name, _ in seen] == ["read_small", "require_agreement"] * 2
    assert [thread == here for _, thread in seen] == [False, False, True, True]


async def test_errors_reach_the_one_who_awaits(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError) as caught:
        await LoraConfig.load_async(tmp_path / "nothing", None)
    assert caught.value.id == str(tmp_path / "nothing")
