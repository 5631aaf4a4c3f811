"""Read, check and write `adapter_config.json`; refuse unsupported features."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import isfinite
from types import NoneType
from typing import Protocol, TypeAlias, runtime_checkable

from lorax_async.config import Limits
from lorax_async.errors import AdapterFormatError, UnsupportedAdapterError, UsageError, shorten
from lorax_async.formats.peft_names import (
    compile_pattern,
    layer_pattern,
    mlx_config_error,
    pattern_error,
)
from lorax_async.formats.strict_json import JsonValue, parse_object
from lorax_async.types import AdapterSpec, ModuleNames, ModulePattern

WHAT = "adapter_config.json"


def _is(*kinds: type) -> Callable[[JsonValue], bool]:
    return lambda value: isinstance(value, kinds)


def _off(value: JsonValue) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _unset(value: JsonValue) -> bool:
    return value is None or value is False


def _are_names(value: JsonValue) -> bool:
    names = value if isinstance(value, list) else [value]
    return value is None or all(isinstance(name, str) for name in names)


def _is_list_of_names(value: JsonValue) -> bool:
    return _off(value) or (isinstance(value, list) and _are_names(value))


def _are_tokens(value: JsonValue) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return _off(value) or all(isinstance(it, list) and _are_indices(it) for it in lists)


def _are_indices(value: JsonValue) -> bool:
    indices = value if isinstance(value, list) else [value]
    return value is None or all(type(index) is int for index in indices)


@dataclass(frozen=True, slots=True)
class ConfigField:
    """The treatment of one field.

    `meaning` is its required type; or, if the field is `refused` unless it has a neutral value, the
    feature that it enables.
    """

    accepts: Callable[[JsonValue], bool] = lambda _: True
    meaning: str = ""
    refused: bool = False

    def check(self, name: str, value: JsonValue) -> None:
        if self.accepts(value):
            return
        if self.refused:
            raise UnsupportedAdapterError(
                f"{WHAT}: {shorten(name, 100)!r} is set ({self.meaning}), which"
                " base + scale * B @ A does not describe; train without it, or merge the adapter"
                " into its base model"
            )
        raise AdapterFormatError(f"{WHAT}: {name!r} must be {self.meaning}, not {describe(value)}")


# PEFT tests these for truth: null is false.
_SWITCH = ConfigField(_is(NoneType, bool), "null, true or false")
_NAMES = ConfigField(_are_names, "null, a string or a list of strings")
_OBJECT = ConfigField(_is(NoneType, dict), "null or an object")
UNKNOWN = ConfigField(_off, "a field that this version does not know", refused=True)
_REFUSED: Mapping[str, tuple[str, Callable[[JsonValue], bool]]] = {
    "bias": ("trained biases", lambda value: value == "none" or _off(value)),
    "layer_replication": ("a base with repeated layers", _off),
    "alora_invocation_tokens": ("aLoRA, active only after its invocation tokens", _off),
    "use_qalora": ("QALoRA, whose input is pooled", _off),
    "megatron_config": ("Megatron's parallel layers", _unset),
    # An empty object enables these, with PEFT's defaults.
    "velora_config": ("VeLoRA", _unset),
    "monteclora_config": ("MonteCLoRA", _unset),
    "use_bdlora": ("BD-LoRA, whose factors are block-diagonal", _unset),
    "arrow_config": ("Arrow routing", _unset),
    "kasa_config": ("KaSA, which truncates the base's weights", _unset),
}

FIELDS: Mapping[str, ConfigField] = {
    # Read into the spec, and checked there.
    **dict.fromkeys(
        (
            *("peft_type", "r", "lora_alpha", "init_lora_weights"),
            *("rank_pattern", "alpha_pattern"),
        ),
        ConfigField(),
    ),
    **dict.fromkeys(("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias"), _SWITCH),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), _NAMES),
    "modules_to_save": ConfigField(_is_list_of_names, "null or a list of strings"),
    "trainable_token_indices": ConfigField(
        _are_tokens, "null, a list of tokens or an object of such"
    ),
    "target_parameters": ConfigField(_is_list_of_names, "null or a list of strings"),
    "base_model_name_or_path": ConfigField(_is(NoneType, str), "null or a string"),
    "layers_to_transform": ConfigField(_are_indices, "null, an integer or a list of integers"),
    # Settings of initialisations, which only init_lora_weights enables.
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), _OBJECT),
    # Ignored: training and the source of the base.
    **dict.fromkeys(
        (
            *("auto_mapping", "peft_version", "revision", "task_type", "inference_mode"),
            *("runtime_config", "lora_dropout", "megatron_core", "qalora_group_size"),
        ),
        ConfigField(),
    ),
    # PEFT also writes the tied copy, as the A and B of lm_head.
    "ensure_weight_tying": ConfigField(),
    **{
        name: ConfigField(neutral, feature, refused=True)
        for name, (feature, neutral) in _REFUSED.items()
    },
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

    Raise `AdapterFormatError` if it is not strict JSON, or a field is missing, out of range or of a
    wrong type; `UnsupportedAdapterError` for an unsupported feature, pattern or rank.
    """
    config = parse_object(
        text, what=WHAT, max_bytes=limits.max_config_bytes, max_depth=limits.max_json_depth
    )
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        if "lora_parameters" in config:
            raise mlx_config_error(WHAT)
        raise AdapterFormatError(f"{WHAT}: no 'peft_type'; save the adapter with PEFT")
    if kind != "LORA":
        raise UnsupportedAdapterError(
            f"{WHAT}: peft_type {shorten(kind, 40)!r} is not LORA; train a LoRA adapter"
        )
    for name, value in config.items():
        FIELDS.get(name, UNKNOWN).check(name, value)
    _check_initialisation(config.get("init_lora_weights"))
    _check_combination(config)
    base, layers = config.get("base_model_name_or_path"), config.get("layers_to_transform")
    task = config.get("task_type")
    layers = layers if isinstance(layers, list) else [layers]
    read_rank = partial(_read_rank, max_rank=limits.max_rank)
    return AdapterSpec(
        rank=read_rank("r", config.get("r")),
        alpha=_read_finite("lora_alpha", config.get("lora_alpha")),
        rslora=config.get("use_rslora") is True,
        rank_patterns=_read_patterns("rank_pattern", config.get("rank_pattern"), read_rank),
        alpha_patterns=_read_patterns("alpha_pattern", config.get("alpha_pattern"), _read_finite),
        targets=_read_targets(config.get("target_modules"), config.get("target_parameters")),
        parameters=_read_parameters(config.get("target_parameters")),
        excluded=_read_names("exclude_modules", config.get("exclude_modules")) or None,
        layers=tuple(layer for layer in layers if isinstance(layer, int)),
        layer_patterns=_read_layer_patterns(config.get("layers_pattern")),
        saved=_read_saved(config.get("modules_to_save"), task),
        tokens=_read_tokens(config.get("trainable_token_indices")),
        ensure_weight_tying=bool(config.get("ensure_weight_tying")),
        base_model=base if isinstance(base, str) else None,
        base_class=_read_base_class(config.get("auto_mapping")),
        task=task if isinstance(task, str) else None,
        fan_in_fan_out=config.get("fan_in_fan_out") is True,
        dora=config.get("use_dora") is True,
        lora_bias=config.get("lora_bias") is True,
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
    pair = pair or _check_parameters(config) or _check_layers(config)
    if pair is not None:
        raise UnsupportedAdapterError(
            f"{WHAT}: {pair} is a combination that PEFT does not define; train with one of them"
        )


def _check_parameters(config: Mapping[str, JsonValue]) -> str | None:
    """Return a field that PEFT does not take beside target_parameters."""
    if not config.get("target_parameters"):
        return None
    fields = ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora")
    field = next((field for field in fields if config.get(field)), None)
    return None if field is None else f"target_parameters with {field}"


def _check_layers(config: Mapping[str, JsonValue]) -> str | None:
    """Return fields that limit the layers of what PEFT cannot limit."""
    for field in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.get("target_modules"), str) and config.get(field) is not None:
            return f"{field} with target_modules that is not a list"
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        return "layers_pattern without layers_to_transform"
    return None


def _read_tokens(value: JsonValue) -> tuple[tuple[str, tuple[int, ...]], ...]:
    named = value.items() if isinstance(value, dict) else [("", value)] if value else []
    listed = ((name, ids if isinstance(ids, list) else []) for name, ids in named)
    return tuple((name, tuple(it for it in ids if isinstance(it, int))) for name, ids in listed)


# What PEFT's classes of these tasks add to modules_to_save.
_SAVED_BY_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _read_saved(names: JsonValue, task: JsonValue) -> tuple[str, ...]:
    by_task = _SAVED_BY_TASK.get(task, ()) if isinstance(task, str) else ()
    listed = names if isinstance(names, list) else []
    return (*(str(name) for name in listed if name), *by_task)


def _read_base_class(mapping: JsonValue) -> str | None:
    found = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return found if isinstance(found, str) else None


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
    number = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = float(value)
    if number is None or not isfinite(number):
        raise AdapterFormatError(f"{WHAT}: {name} must be a finite number, not {describe(value)}")
    return number


def _read_patterns(
    field: str, entries: JsonValue, read: Callable[[str, JsonValue], float]
) -> tuple[ModulePattern, ...]:
    if entries is None:
        return ()
    if not isinstance(entries, dict):
        raise AdapterFormatError(f"{WHAT}: {field!r} must be an object, not {describe(entries)}")
    patterns: list[ModulePattern] = []
    instructions = 0
    for text, value in entries.items() if len(entries) <= MAX_PATTERNS else ():
        matches, size = compile_pattern(text)
        instructions += size
        if instructions > MAX_INSTRUCTIONS:
            break
        number = read(f"{field} of {shorten(text, 100)!r}", value)
        patterns.append(ModulePattern(text, matches, number, max(1, size)))
    if len(patterns) < len(entries):
        raise UnsupportedAdapterError(
            f"{WHAT}: {field!r} holds more patterns than are accepted; write fewer, as module names"
        )
    return tuple(patterns)


def _read_targets(value: JsonValue, parameters: JsonValue) -> ModuleNames:
    if value == [] and parameters:
        return ()
    if isinstance(value, list | str) and not value:
        raise AdapterFormatError(
            f"{WHAT}: 'target_modules' is empty, and PEFT loads no such adapter; write the names of"
            " the modules that the adapter changes"
        )
    return _read_names("target_modules", value)


def _read_parameters(value: JsonValue) -> tuple[str, ...]:
    return tuple(str(name) for name in value) if isinstance(value, list) else ()


def _read_names(field: str, value: JsonValue) -> ModuleNames:
    if isinstance(value, list):
        return tuple(str(name) for name in value)
    if not isinstance(value, str):
        return None
    _require_pattern(field, value, pattern_error(value))
    return value


def _read_layer_patterns(value: JsonValue) -> tuple[str, ...]:
    patterns = value if isinstance(value, list) else [value or None]
    texts = tuple(text for text in patterns if isinstance(text, str))
    for text in texts:
        _require_pattern("layers_pattern", text, pattern_error(layer_pattern(text)))
    return texts


def _require_pattern(field: str, text: str, reason: str | None) -> None:
    if reason is not None:
        raise AdapterFormatError(
            f"{WHAT}: {field!r} {shorten(text, 100)!r} is not a regular expression"
            f" ({reason}); correct it, or write a list of names"
        )


@runtime_checkable
class ConvertibleConfig(Protocol):
    """A config object with `to_dict`, such as `peft.LoraConfig`."""

    def to_dict(self) -> Mapping[str, object]: ...


GivenConfig: TypeAlias = Mapping[str, object] | ConvertibleConfig
"""The members of an `adapter_config.json`, or an object that converts to them."""


def write_config(config: GivenConfig) -> bytes:
    """Return the bytes of an `adapter_config.json`.

    Keep the order of members, because the first matching pattern counts. Sets, in which
    `peft.LoraConfig` keeps names, become sorted lists. Raise `UsageError` if `config` is neither a
    mapping nor convertible, `AdapterFormatError` if a value has no JSON equivalent.
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
