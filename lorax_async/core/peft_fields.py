"""The fields of `adapter_config.json`, and what becomes of each.

Fields and defaults are those of `peft.LoraConfig` 0.21.2; :data:`FIELDS` treats each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from lorax_async.core.strict_json import JsonValue
from lorax_async.errors import AdapterFormatError, UnsupportedAdapterError, shorten

WHAT = "adapter_config.json"


class Use(Enum):
    """What becomes of a field of the config."""

    READ = "read into the spec"
    CHECKED = "its type is checked; loading does not need it, for the file's tensors decide"
    INERT = "ignored, whatever it holds"
    REFUSED = "refused unless neutral"


@dataclass(frozen=True, slots=True)
class Field:
    """How one field is treated: `says` is the type it must have, or the feature it turns on."""

    use: Use
    accepts: Callable[[JsonValue], bool] = lambda _: True
    says: str = ""

    def check(self, name: str, value: JsonValue) -> None:
        if self.accepts(value):
            return
        if self.use is Use.REFUSED:
            raise UnsupportedAdapterError(
                f"{WHAT}: {shorten(name, 100)!r} is set ({self.says}), which"
                " base + scale * B @ A does not describe; train without it, or merge the adapter"
                " into its base model"
            )
        raise AdapterFormatError(f"{WHAT}: {name!r} must be {self.says}, not {shown(value)}")


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
    each = value if isinstance(value, list) else [value]
    return value is None or all(type(index) is int for index in each)


def _refused(feature: str, neutral: Callable[[JsonValue], bool] = _off) -> Field:
    return Field(Use.REFUSED, neutral, feature)


_READ = Field(Use.READ)
_FLAG = Field(Use.READ, _is_bool, "true or false")
_SWITCH = Field(Use.READ, _is_switch, "null, true or false")
_NAMES = Field(Use.CHECKED, _are_names, "null, a string or a list of strings")
_OBJECT = Field(Use.CHECKED, _is_object, "null or an object")
_INERT = Field(Use.INERT)
UNKNOWN = _refused("a field that this version does not know")

FIELDS: Mapping[str, Field] = {
    "peft_type": _READ,
    "r": _READ,
    "lora_alpha": _READ,
    "use_rslora": _FLAG,
    "use_dora": _SWITCH,
    "lora_bias": _SWITCH,
    "rank_pattern": _READ,
    "alpha_pattern": _READ,
    "init_lora_weights": _READ,
    "target_modules": Field(Use.READ, _are_names, "null, a string or a list of strings"),
    "fan_in_fan_out": _FLAG,
    "base_model_name_or_path": Field(Use.READ, _is_text, "null or a string"),
    "exclude_modules": _NAMES,
    "layers_pattern": _NAMES,
    "layers_to_transform": Field(Use.READ, _are_indices, "null, an integer or a list of integers"),
    # The settings of initialisations: only init_lora_weights turns one on.
    "loftq_config": _OBJECT,
    "eva_config": _OBJECT,
    "corda_config": _OBJECT,
    "lora_ga_config": _OBJECT,
    # Who trained it, how, and where the base came from.
    "auto_mapping": _INERT,
    "peft_version": _INERT,
    "revision": _INERT,
    "task_type": _INERT,
    "inference_mode": _INERT,
    "runtime_config": _INERT,
    "lora_dropout": _INERT,
    "megatron_core": _INERT,
    "qalora_group_size": _INERT,
    # PEFT writes the tied copy, too: as the A and B of lm_head.
    "ensure_weight_tying": _INERT,
    "bias": _refused("trained biases", lambda value: value == "none" or _off(value)),
    "modules_to_save": _refused("full copies of modules"),
    "trainable_token_indices": _refused("trained rows of the embedding"),
    "target_parameters": _refused("LoRA on bare parameters, as in fused experts"),
    "layer_replication": _refused("a base with repeated layers"),
    "alora_invocation_tokens": _refused("aLoRA, active only after its invocation tokens"),
    "use_qalora": _refused("QALoRA, whose input is pooled"),
    "megatron_config": _refused("Megatron's parallel layers", _unset),
    # An empty object turns these on: PEFT fills in the feature's defaults.
    "velora_config": _refused("VeLoRA", _unset),
    "monteclora_config": _refused("MonteCLoRA", _unset),
    "use_bdlora": _refused("BD-LoRA, whose factors are block-diagonal", _unset),
    "arrow_config": _refused("Arrow routing", _unset),
    "kasa_config": _refused("KaSA, which truncates the base's weights", _unset),
}
"""Every field of `peft.LoraConfig`. One that is not here passes only at a neutral value."""


def shown(value: JsonValue) -> str:
    if value is None or isinstance(value, bool | int | float):
        return "missing or null" if value is None else shorten(str(value), 24)
    return {str: "a string", list: "a list", dict: "an object"}[type(value)]
