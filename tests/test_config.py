"""Settings: what is accepted, what is refused at construction, and by which words."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch

from lorax_async import (
    AdapterLoader,
    ConfigError,
    Limits,
    LoaderConfig,
    LoraxError,
    UsageError,
)
from lorax_async import config as config_module

BYTES_AND_COUNTS = ["device_bytes", "staging_bytes", "max_slots", "io_threads"]
SECONDS = ["timeout", "starvation_age"]
LIMITS = [entry.name for entry in fields(Limits)]
NOT_POSITIVE_INTEGERS: list[object] = [
    *(0, -1, -(1 << 70)),
    *(1.0, 1.5, math.nan, math.inf),
    *(True, False),
    *("16", "", b"1", None, [1], ...),
]
NOT_SECONDS: list[object] = [
    *(0, -1, 0.0, -0.5, -math.inf),
    *(math.inf, math.nan, 1e10, 10**400),
    *(True, False),
    *("5", "", None, [5.0], 5j),
]


def made(**settings: Any) -> LoaderConfig:
    return LoaderConfig(**settings)


@pytest.mark.parametrize("value", NOT_POSITIVE_INTEGERS, ids=repr)
@pytest.mark.parametrize("name", BYTES_AND_COUNTS)
def test_bytes_and_counts_are_positive_integers(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be a positive integer, not "):
        made(**{name: value})


@pytest.mark.parametrize("name", BYTES_AND_COUNTS)
def test_one_is_enough(name: str) -> None:
    assert getattr(made(**{name: 1}), name) == 1


@pytest.mark.parametrize("value", NOT_SECONDS, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("name", SECONDS)
def test_seconds_are_positive_and_finite(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be a positive number of seconds"):
        made(**{name: value})


@pytest.mark.parametrize("value", [1, 0.001, 1e-9, 86_400 * 365, 1e9])
@pytest.mark.parametrize("name", SECONDS)
def test_seconds_may_be_few_or_many(name: str, value: float) -> None:
    assert getattr(made(**{name: value}), name) == value


@pytest.mark.parametrize("value", NOT_POSITIVE_INTEGERS, ids=repr)
@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_positive_integers(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be a positive integer, not "):
        Limits(**{name: value})  # type: ignore[arg-type]


def test_limits_as_the_design_has_them() -> None:
    """Header 16 MiB, 65,536 tensors, names 512 B, 8 dimensions, JSON depth 16, config 256 KiB, rank
    256, adapter 4 GiB."""
    limits = Limits()
    assert (limits.max_header_bytes, limits.max_tensors) == (16 * 1024 * 1024, 65_536)
    assert (limits.max_name_bytes, limits.max_dimensions, limits.max_json_depth) == (512, 8, 16)
    assert (limits.max_config_bytes, limits.max_rank) == (256 * 1024, 256)
    assert limits.max_adapter_bytes == 4 * 1024**3


@pytest.mark.parametrize(
    "device",
    [
        "cuda:",
        "cuda:01",
        "cuda:-1",
        "cuda:0 ",
        "mps",
        "meta",
        "CPU",
        "cpu:0",
        "",
        None,
        0,
        torch.device("cpu"),
    ],
    ids=repr,
)
def test_other_devices_are_not_available(device: object) -> None:
    with pytest.raises(ConfigError, match="is not 'cpu', 'cuda', 'cuda:N' or 'simulated'"):
        made(device=device)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:11", "simulated"])
def test_devices_by_name(device: str) -> None:
    assert made(device=device).device == device


@pytest.mark.parametrize("name", ["lru", "lfu", "gdsf"])
def test_policies_by_name(name: str) -> None:
    assert made(eviction=name).eviction == name


@pytest.mark.parametrize("name", ["LRU", "", "fifo", None, 1])
def test_other_policies_are_refused(name: object) -> None:
    with pytest.raises(ConfigError, match="eviction must be one of lru, lfu, gdsf"):
        made(eviction=name)


@pytest.mark.parametrize("name", ["host_bytes", "pinned_bytes"])
def test_budgets_that_may_be_nothing(name: str) -> None:
    assert getattr(made(**{name: 0}), name) == 0
    for wrong in (-1, True, 1.0, None, "1"):
        with pytest.raises(ConfigError, match=f"{name} must be an integer of at least 0"):
            made(**{name: wrong})


def test_a_minimum_residency_may_be_nothing() -> None:
    assert made(min_residency=0).min_residency == 0
    assert made(min_residency=2.5).min_residency == 2.5
    for wrong in (-1, False, float("nan"), float("inf"), None, "1"):
        with pytest.raises(ConfigError, match="min_residency must be"):
            made(min_residency=wrong)


@pytest.mark.parametrize(
    ("given", "name", "word"),
    [
        (None, None, None),
        ("float32", "float32", "F32"),
        ("float16", "float16", "F16"),
        ("bfloat16", "bfloat16", "BF16"),
        (torch.float32, "float32", "F32"),
        (torch.float16, "float16", "F16"),
        (torch.bfloat16, "bfloat16", "BF16"),
        (torch.half, "float16", "F16"),
    ],
    ids=repr,
)
def test_dtypes(given: object, name: str | None, word: str | None) -> None:
    config = made(dtype=given)
    assert (config.dtype, config.storage_dtype) == (name, word)


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.float64, torch.float8_e4m3fn, "float64", "F32", "fp16", "", 1, True, [], {}],
    ids=repr,
)
def test_other_dtypes_are_refused(dtype: object) -> None:
    with pytest.raises(ConfigError, match="^dtype must be one of float32, float16, bfloat16 or"):
        made(dtype=dtype)


@pytest.mark.parametrize("value", ["no", 0, 1, None, math.nan], ids=repr)
def test_check_finite_is_a_bool(value: object) -> None:
    with pytest.raises(ConfigError, match="check_finite must be True or False"):
        made(check_finite=value)


@pytest.mark.parametrize("value", [None, {"max_rank": 8}, 8, Limits], ids=repr)
def test_limits_are_limits(value: object) -> None:
    with pytest.raises(ConfigError, match=r"limits must be Limits"):
        made(limits=value)


@pytest.mark.parametrize("config", [LoaderConfig(), Limits()], ids=["config", "limits"])
def test_settings_are_frozen(config: LoaderConfig | Limits) -> None:
    for entry in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, entry.name, getattr(config, entry.name))
    with pytest.raises((AttributeError, TypeError)):
        config.something_new = 1  # type: ignore[union-attr]
    assert hash(config) == hash(type(config)())
    assert config == type(config)()


def test_a_changed_copy_is_checked_again() -> None:
    config = made(dtype="bfloat16")
    assert replace(config, max_slots=3).dtype == "bfloat16"
    with pytest.raises(ConfigError):
        replace(config, max_slots=0)


@pytest.mark.parametrize("value", [-1, -0.1, math.nan, math.inf, 1e10, 10**400, True, "5", [5]])
def test_a_calls_own_timeout_is_checked_too(value: object) -> None:
    with pytest.raises(UsageError, match="a timeout is from 0 to"):
        made().seconds(value)


def test_a_calls_own_timeout_comes_first() -> None:
    """No time at all is a question: is it here already?"""
    config = made(timeout=7)
    assert [config.seconds(value) for value in (None, 0, 2.5, 10**9)] == [7.0, 0.0, 2.5, 1e9]


def test_a_resolved_config_has_a_dtype() -> None:
    assert made(max_slots=3).resolved("BF16") == made(max_slots=3, dtype="bfloat16")
    assert made(dtype="float16").resolved("BF16") == made(dtype="float16")


def test_settings_go_by_name() -> None:
    with pytest.raises(TypeError):
        LoaderConfig("cpu")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        made(device_byte=1)


def test_a_long_value_makes_a_short_text() -> None:
    with pytest.raises(ConfigError) as caught:
        made(max_slots="x" * 100_000)
    assert len(str(caught.value)) <= 1000


def test_a_wrong_setting_is_a_wrong_call() -> None:
    with pytest.raises(UsageError) as caught:
        made(timeout=-1)
    assert isinstance(caught.value, LoraxError)
    assert not caught.value.retryable


def test_the_longest_timeout_can_be_waited_for() -> None:
    """What is accepted must not overflow in a lock."""
    from threading import TIMEOUT_MAX

    assert config_module.MAX_SECONDS < TIMEOUT_MAX


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_platforms_are_refused(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny

    monkeypatch.setattr("sys.platform", platform)
    with pytest.raises(ConfigError, match="runs on Linux only"):
        AdapterLoader(tiny.layout())
