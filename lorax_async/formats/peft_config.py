"""Read, check and write `adapter_config.json`; refuse unsupported features."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from math import isfinite
from typing import Protocol, TypeAlias, runtime_checkable

from lorax_async.config import Limits
from lorax_async.errors import AdapterFormatError, UnsupportedAdapterError, UsageError, shorten
from lorax_async.formats.peft_names import compile_pattern, pattern_error
from lorax_async.formats.strict_json import JsonValue, parse_object
from lorax_async.types import AdapterSpec, ModulePattern

WHAT = "adapter_config.json"


class FieldUse(Enum):
    """How a field of the config is used."""

    READ = "read into the spec"
    CHECKED = "type-checked, but not needed: the file's tensors decide"
    INERT = "ignored, whatever its value"
    REFUSED = "refused unless neutral"


@dataclass(frozen=True, slots=True)
class ConfigField:
    """The treatment of one field; `meaning` is its required type, or the feature it enables."""

    use: FieldUse
    accepts: Callable[[JsonValue], bool] = lambda _: True
    meaning: str = ""

    def check(self, name: str, value: JsonValue) -> None:
        if self.accepts(value):
            return
        if self.use is FieldUse.REFUSED:
            raise UnsupportedAdapterError(
                f"{WHAT}: {shorten(name, 100)!r} is set ({self.meaning}), which"
                " base + scale * B @ A does not describe; train without it, or merge the adapter"
                " into its base model"
            )
        raise AdapterFormatError(f"{WHAT}: {name!r} must be {self.meaning}, not {describe(value)}")


def _off(value: JsonValue) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _unset(value: JsonValue) -> bool:
    return value is None or value is False


def _is_bool(value: JsonValue) -> bool:
    return isinstance(value, bool)


def _is_switch(value: JsonValue) -> bool:
    return value is None or isinstance(value, bool)


def _is_text(value: JsonValue) -> bool:
    return value is None or isinstance(value, str)


def _is_object(value: JsonValue) -> bool:
    return value is None or isinstance(value, dict)


def _are_names(value: JsonValue) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _are_indices(value: JsonValue) -> bool:
    indices = value if isinstance(value, list) else [value]
    return value is None or all(type(index) is int for index in indices)


def _refused(feature: str, neutral: Callable[[JsonValue], bool] = _off) -> ConfigField:
    return ConfigField(FieldUse.REFUSED, neutral, feature)


_READ = ConfigField(FieldUse.READ)
_FLAG = ConfigField(FieldUse.READ, _is_bool, "true or false")
_SWITCH = ConfigField(FieldUse.READ, _is_switch, "null, true or false")
_NAMES = ConfigField(FieldUse.CHECKED, _are_names, "null, a string or a list of strings")
_OBJECT = ConfigField(FieldUse.CHECKED, _is_object, "null or an object")
_INERT = ConfigField(FieldUse.INERT)
UNKNOWN = _refused("a field that this version does not know")

FIELDS: Mapping[str, ConfigField] = {
    "peft_type": _READ,
    "r": _READ,
    "lora_alpha": _READ,
    "use_rslora": _FLAG,
    "use_dora": _SWITCH,
    "lora_bias": _SWITCH,
    "rank_pattern": _READ,
    "alpha_pattern": _READ,
    "init_lora_weights": _READ,
    "target_modules": ConfigField(FieldUse.READ, _are_names, "null, a string or a list of strings"),
    "fan_in_fan_out": _FLAG,
    "base_model_name_or_path": ConfigField(FieldUse.READ, _is_text, "null or a string"),
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "layers_to_transform": ConfigField(
        FieldUse.READ, _are_indices, "null, an integer or a list of integers"
    ),
    # Settings of initialisations, which only init_lora_weights enables.
    "loftq_config": _OBJECT,
    "eva_config": _OBJECT,
    "corda_config": _OBJECT,
    "lora_ga_config": _OBJECT,
    # Provenance: training and the source of the base.
    "auto_mapping": _INERT,
    "peft_version": _INERT,
    "revision": _INERT,
    "task_type": _INERT,
    "inference_mode": _INERT,
    "runtime_config": _INERT,
    "lora_dropout": _INERT,
    "megatron_core": _INERT,
    "qalora_group_size": _INERT,
    # PEFT also writes the tied copy, as the A and B of lm_head.
    "ensure_weight_tying": _INERT,
    "bias": _refused("trained biases", lambda value: value == "none" or _off(value)),
    "modules_to_save": _refused("full copies of modules"),
    "trainable_token_indices": _refused("trained rows of the embedding"),
    "target_parameters": _refused("LoRA on bare parameters, as in fused experts"),
    "layer_replication": _refused("a base with repeated layers"),
    "alora_invocation_tokens": _refused("aLoRA, active only after its invocation tokens"),
    "use_qalora": _refused("QALoRA, whose input is pooled"),
    "megatron_config": _refused("Megatron's parallel layers", _unset),
    # An empty object enables these, with PEFT's defaults.
    "velora_config": _refused("VeLoRA", _unset),
    "monteclora_config": _refused("MonteCLoRA", _unset),
    "use_bdlora": _refused("BD-LoRA, whose factors are block-diagonal", _unset),
    "arrow_config": _refused("Arrow routing", _unset),
    "kasa_config": _refused("KaSA, which truncates the base's weights", _unset),
}
"""Every field of `peft.LoraConfig`. An unknown field is accepted only at a neutral value."""


def describe(value: JsonValue) -> str:
    if value is None or isinstance(value, bool | int | float):
        return "missing or null" if value is None else shorten(str(value), 24)
    return {str: "a string", list: "a list", dict: "an object"}[type(value)]


MAX_PATTERNS = 2_048
"""The limit of entries of rank_pattern, and of alpha_pattern; EVA writes one per module."""

MAX_INSTRUCTIONS = 2_048
"""The limit of re2 instructions of all patterns of a field, which bounds the matching time."""


# Initialisations that leave the base unchanged: the result is plain LoRA.
_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})
# Initialisations that move part of the base's weights into A and B. Saved unconverted, the adapter
# only fits that changed base. Conversion resets init_lora_weights to true.
_MUTATING_INITS = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
}


def parse_config(text: bytes, limits: Limits) -> AdapterSpec:
    """Parse an `adapter_config.json`.

    Raises
    ------
    AdapterFormatError
        The config is not strict JSON, or a field is missing, out of range or of a wrong type.
    UnsupportedAdapterError
        The config enables an unsupported feature, or has an unsupported pattern or rank.
    """
    config = parse_object(
        text, what=WHAT, max_bytes=limits.max_config_bytes, max_depth=limits.max_json_depth
    )
    _check_type(config.get("peft_type"))
    for name, value in config.items():
        FIELDS.get(name, UNKNOWN).check(name, value)
    _check_initialisation(config.get("init_lora_weights"))
    _check_combination(config)
    base = config.get("base_model_name_or_path")
    read_rank = partial(_read_rank, max_rank=limits.max_rank)
    return AdapterSpec(
        rank=read_rank("r", config.get("r")),
        alpha=_read_finite("lora_alpha", config.get("lora_alpha")),
        rslora=config.get("use_rslora") is True,
        rank_patterns=_read_patterns("rank_pattern", config.get("rank_pattern"), read_rank),
        alpha_patterns=_read_patterns("alpha_pattern", config.get("alpha_pattern"), _read_finite),
        targets=_read_targets(config.get("target_modules")),
        layers=_read_layers(config.get("layers_to_transform")),
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


def _check_initialisation(value: JsonValue) -> None:
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, str):
        raise AdapterFormatError(
            f"{WHAT}: 'init_lora_weights' must be true, false or a name, not {describe(value)}"
        )
    start = value.lower()
    if start in _PLAIN_INITS:
        return
    method = next((m for s, m in _MUTATING_INITS.items() if start.startswith(s)), None)
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
    """Refuse combinations for which PEFT raises ValueError, in `LoraConfig` or in the layer."""
    start = config.get("init_lora_weights", True)
    dora, bias = config.get("use_dora") is True, config.get("lora_bias") is True
    pair = None
    if bias and dora:
        pair = "lora_bias with use_dora"
    elif bias and not isinstance(start, bool):
        pair = f"lora_bias with init_lora_weights {shorten(str(start), 40)!r}"
    elif dora and start == "mica":
        pair = "use_dora with init_lora_weights 'mica'"
    if pair is not None:
        raise UnsupportedAdapterError(
            f"{WHAT}: {pair} is a combination that PEFT does not define; train with one of them"
        )


def _read_rank(name: str, value: JsonValue, *, max_rank: int) -> int:
    if type(value) is not int or value < 1:
        raise AdapterFormatError(
            f"{WHAT}: {name} must be a positive integer, not {describe(value)}"
        )
    if value > max_rank:
        raise UnsupportedAdapterError(
            f"{WHAT}: {name} is {describe(value)}, above the limit of {max_rank};"
            " raise Limits.max_rank to accept it"
        )
    return value


def _read_finite(name: str, value: JsonValue) -> float:
    number = _number(value)
    if number is None or not isfinite(number):
        raise AdapterFormatError(f"{WHAT}: {name} must be a finite number, not {describe(value)}")
    return number


def _number(value: JsonValue) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _read_patterns(
    field: str, entries: JsonValue, read: Callable[[str, JsonValue], float]
) -> tuple[ModulePattern, ...]:
    if entries is None:
        return ()
    if not isinstance(entries, dict):
        raise AdapterFormatError(f"{WHAT}: {field!r} must be an object, not {describe(entries)}")
    if len(entries) > MAX_PATTERNS:
        raise _too_many_patterns(field)
    patterns: list[ModulePattern] = []
    instructions = 0
    for text, value in entries.items():
        matches, size = compile_pattern(text)
        instructions += size
        if instructions > MAX_INSTRUCTIONS:
            raise _too_many_patterns(field)
        number = read(f"{field} of {shorten(text, 100)!r}", value)
        patterns.append(ModulePattern(text, matches, number, max(1, size)))
    return tuple(patterns)


def _too_many_patterns(field: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"{WHAT}: {field!r} holds more patterns than are accepted; write fewer, as module names"
    )


def _read_targets(value: JsonValue) -> tuple[str, ...] | str | None:
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
            f"{WHAT}: 'target_modules' {shorten(value, 100)!r} is not a regular expression"
            f" ({reason}); correct it, or write a list of module names"
        )
    return value


def _read_layers(value: JsonValue) -> tuple[int, ...]:
    layers = value if isinstance(value, list) else [value]
    return tuple(layer for layer in layers if isinstance(layer, int))


@runtime_checkable
class ConvertibleConfig(Protocol):
    """A config object with `to_dict`, such as `peft.LoraConfig`."""

    def to_dict(self) -> Mapping[str, object]: ...


GivenConfig: TypeAlias = Mapping[str, object] | ConvertibleConfig
"""The members of an `adapter_config.json`, or an object that converts to them."""


def write_config(config: GivenConfig) -> bytes:
    """Return the bytes of an `adapter_config.json`.

    Keep the order of members, because the first matching pattern counts. Sets, in which
    `peft.LoraConfig` keeps names, become sorted lists.

    Raises
    ------
    UsageError
        `config` is neither a mapping nor convertible.
    AdapterFormatError
        A value has no JSON equivalent.
    """
    members: object = config
    if isinstance(config, ConvertibleConfig) and not isinstance(config, type):
        members = config.to_dict()
    if not isinstance(members, Mapping):
        kind = type(config).__name__
        raise UsageError(
            f"a config is a dict as in {WHAT}, or a peft.LoraConfig, not {shorten(kind, 100)}"
        )
    try:
        return json.dumps(dict(members), default=_as_list, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{WHAT} cannot be written: {error}") from None


def _as_list(value: object) -> list[object]:
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON equivalent")
