"""`adapter_config.json`: what it says about applying the adapter, and what we refuse to guess.

What becomes of each field says :data:`lorax_async.core.peft_fields.FIELDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import isfinite

from lorax_async.adapter import AdapterSpec, ModulePattern
from lorax_async.config import Limits
from lorax_async.core.peft_fields import FIELDS, UNKNOWN, WHAT, shown
from lorax_async.core.peft_names import compile_pattern, pattern_error
from lorax_async.core.strict_json import JsonValue, parse_object
from lorax_async.errors import AdapterFormatError, UnsupportedAdapterError, shorten

MAX_PATTERNS = 2_048
"""Entries of rank_pattern, and of alpha_pattern; EVA writes one per module."""

MAX_INSTRUCTIONS = 2_048
"""Of all regular expressions of a field together, as re2 compiles them: bounds a match's time."""


# Starting points that leave the base as it is: afterwards the adapter is plain LoRA.
_PLAIN_STARTS = frozenset({"gaussian", "orthogonal", "eva", "mica"})
# Starting points that moved part of the base's weights into A and B: saved unconverted, the
# adapter only fits that changed base. Converting resets init_lora_weights to true.
_MUTATING_STARTS = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
}


def parse_config(text: bytes, limits: Limits) -> AdapterSpec:
    """Read the bytes of an `adapter_config.json`.

    Raises
    ------
    AdapterFormatError
        It is not strict JSON, or a field has a wrong type, or is missing or out of range.
    UnsupportedAdapterError
        It turns on a feature, or has a pattern or a rank, that is not accepted.
    """
    config = parse_object(
        text, what=WHAT, max_bytes=limits.max_config_bytes, max_depth=limits.max_json_depth
    )
    _check_type(config.get("peft_type"))
    for name, value in config.items():
        FIELDS.get(name, UNKNOWN).check(name, value)
    _check_start(config.get("init_lora_weights"))
    _check_combination(config)
    base = config.get("base_model_name_or_path")
    read_rank = partial(_rank, max_rank=limits.max_rank)
    return AdapterSpec(
        rank=read_rank("r", config.get("r")),
        alpha=_finite("lora_alpha", config.get("lora_alpha")),
        rslora=config.get("use_rslora") is True,
        rank_patterns=_patterns("rank_pattern", config.get("rank_pattern"), read_rank),
        alpha_patterns=_patterns("alpha_pattern", config.get("alpha_pattern"), _finite),
        targets=_targets(config.get("target_modules")),
        layers=_layers(config.get("layers_to_transform")),
        base_model=base if isinstance(base, str) else None,
        fan_in_fan_out=config.get("fan_in_fan_out") is True,
        dora=config.get("use_dora") is True,
        lora_bias=config.get("lora_bias") is True,
    )


def _check_type(value: JsonValue) -> None:
    if not isinstance(value, str):
        raise AdapterFormatError(f"{WHAT}: no 'peft_type'; save the adapter with PEFT")
    if value != "LORA":
        raise UnsupportedAdapterError(
            f"{WHAT}: peft_type {shorten(value, 40)!r} is not LORA; train a LoRA adapter"
        )


def _check_start(value: JsonValue) -> None:
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str):
        raise AdapterFormatError(
            f"{WHAT}: 'init_lora_weights' must be true, false or a name, not {shown(value)}"
        )
    start = value.lower()
    if start in _PLAIN_STARTS:
        return
    method = next((m for s, m in _MUTATING_STARTS.items() if start.startswith(s)), None)
    if method is None:
        raise UnsupportedAdapterError(
            f"{WHAT}: init_lora_weights {shorten(value, 40)!r} is unknown, and may have changed"
            " the base's weights; train with another initialisation"
        )
    remedy = (
        "merge it into the base it was trained on"
        if method == "LoftQ"
        else "save it with save_pretrained(path_initial_model_for_weight_conversion=...)"
    )
    raise UnsupportedAdapterError(
        f"{WHAT}: init_lora_weights is {method}, so the adapter fits a changed base; {remedy}"
    )


def _check_combination(config: Mapping[str, JsonValue]) -> None:
    """What PEFT itself raises ValueError for, in `LoraConfig` or when it makes the layer."""
    start = config.get("init_lora_weights", True)
    dora, bias = config.get("use_dora") is True, config.get("lora_bias") is True
    other = None
    if bias and dora:
        other = "lora_bias with use_dora"
    elif bias and not isinstance(start, bool):
        other = f"lora_bias with init_lora_weights {shorten(str(start), 40)!r}"
    elif dora and start == "mica":
        other = "use_dora with init_lora_weights 'mica'"
    if other is not None:
        raise UnsupportedAdapterError(
            f"{WHAT}: {other} is a combination that PEFT does not define; train with one of them"
        )


def _rank(name: str, value: JsonValue, *, max_rank: int) -> int:
    if type(value) is not int or value < 1:
        raise AdapterFormatError(f"{WHAT}: {name} must be a positive integer, not {shown(value)}")
    if value > max_rank:
        raise UnsupportedAdapterError(
            f"{WHAT}: {name} is {shown(value)}, above the limit of {max_rank};"
            " raise Limits.max_rank to accept it"
        )
    return value


def _finite(name: str, value: JsonValue) -> float:
    number = _number(value)
    if number is None or not isfinite(number):
        raise AdapterFormatError(f"{WHAT}: {name} must be a finite number, not {shown(value)}")
    return number


def _number(value: JsonValue) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _patterns(
    field: str, entries: JsonValue, read: Callable[[str, JsonValue], float]
) -> tuple[ModulePattern, ...]:
    if entries is None:
        return ()
    if not isinstance(entries, dict):
        raise AdapterFormatError(f"{WHAT}: {field!r} must be an object, not {shown(entries)}")
    if len(entries) > MAX_PATTERNS:
        raise _too_many(field)
    patterns: list[ModulePattern] = []
    instructions = 0
    for text, value in entries.items():
        matches, size = compile_pattern(text)
        instructions += size
        if instructions > MAX_INSTRUCTIONS:
            raise _too_many(field)
        number = read(f"{field} of {shorten(text, 100)!r}", value)
        patterns.append(ModulePattern(text, matches, number, max(1, size)))
    return tuple(patterns)


def _too_many(field: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"{WHAT}: {field!r} holds more patterns than are accepted; write fewer, as module names"
    )


def _targets(value: JsonValue) -> tuple[str, ...] | str | None:
    if isinstance(value, list | str) and not value:
        raise AdapterFormatError(
            f"{WHAT}: 'target_modules' is empty, and PEFT loads no such adapter; write the names of"
            " the modules that the adapter changes"
        )
    if isinstance(value, list):
        return tuple(str(name) for name in value)
    if not isinstance(value, str):
        return None
    if (reason := pattern_error(value)) is not None:
        raise AdapterFormatError(
            f"{WHAT}: 'target_modules' {shorten(value, 100)!r} is no regular expression"
            f" ({reason}); correct it, or write a list of module names"
        )
    return value


def _layers(value: JsonValue) -> tuple[int, ...]:
    layers = value if isinstance(value, list) else [value]
    return tuple(layer for layer in layers if isinstance(layer, int))
