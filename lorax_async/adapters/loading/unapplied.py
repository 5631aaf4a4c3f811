"""Tensors that nothing would apply are an error: an adapter without them gives other answers.

LoRAX's form has A, B and a scale. What else an adapter may have is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from lorax_async.adapter import AdapterSpec
from lorax_async.core.peft_names import PREFIX, parse_tensor_name
from lorax_async.errors import (
    AdapterFormatError,
    IncompatibleAdapterError,
    UnsupportedAdapterError,
    shorten,
)

FACTORS = ("lora_A", "lora_B")
"""What a module's tensors are called in names, and in a module map."""

_SHOWN = 3
_PLAIN = tuple(f".{factor}.weight" for factor in FACTORS)
_OTHERS = {
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "DoRA",
    ".lora_embedding_A": "LoRA on an embedding",
    ".lora_embedding_B": "LoRA on an embedding",
}


def tensor_name(factor: str, module: str) -> str:
    """Of one of a module's factors, in the file."""
    return f"{PREFIX}{module}.{factor}.weight"


def require_plain_name(name: str) -> str:
    """The module that a tensor belongs to.

    Raises
    ------
    UnsupportedAdapterError
        It belongs to another feature than plain LoRA, by its name.
    AdapterFormatError
        The name is malformed.
    """
    module = parse_tensor_name(name).module
    if not name.endswith(_PLAIN):
        features = [feature for end, feature in _OTHERS.items() if name.endswith(end)]
        raise inexpressible(f"tensor {shorten(name, 200)!r}", *features)
    return module


def require_plain_spec(spec: AdapterSpec) -> None:
    """Refuse configs that turn on what LoRAX's form does not have: `UnsupportedAdapterError`."""
    for has_it, feature in ((spec.dora, "DoRA"), (spec.lora_bias, "lora_bias")):
        if has_it:
            raise inexpressible("the config", feature)


def inexpressible(
    what: str, feature: str = "another feature than plain LoRA"
) -> UnsupportedAdapterError:
    """The error for a feature that has no place beside A and B."""
    return UnsupportedAdapterError(
        f"{what} belongs to {feature}, for which LoRAX's form has no place; use AdapterLoader, or"
        " train without it"
    )


def require_all_matched(adapter_weights: Iterable[str], matched: Set[str]) -> None:
    """Every tensor of the adapter belongs to a module of the model.

    Raises
    ------
    UnsupportedAdapterError
        One belongs to another feature than plain LoRA, by its name.
    AdapterFormatError
        A has no B, or B no A.
    IncompatibleAdapterError
        The model has no such modules.
    """
    everything = set(adapter_weights)
    strays = sorted(everything - matched)
    for name in strays:
        module = require_plain_name(name)
        for factor in FACTORS:
            if tensor_name(factor, module) not in everything:
                raise AdapterFormatError(
                    f"tensor {shorten(name, 200)!r} has no {factor[-1]} beside it; save the"
                    " adapter again"
                )
    if strays:
        raise IncompatibleAdapterError(
            f"the model has no such module: {_first(strays)}; use an adapter of this base, or take"
            " these tensors out"
        )


def require_all_used(unused_weight_names: Set[str]) -> None:
    """For the end of a load, when every layer type was loaded: no tensor was left over.

    Raises `IncompatibleAdapterError`.
    """
    if unused_weight_names:
        raise IncompatibleAdapterError(
            f"no layer type has loaded {_first(sorted(unused_weight_names))}; load every type that"
            " the adapter changes, or use another adapter"
        )


def _first(names: list[str]) -> str:
    shown = ", ".join(shorten(name, 200) for name in names[:_SHOWN])
    more = ", …" if len(names) > _SHOWN else ""
    return f"{shown}{more} ({len(names)} tensor{'s' * (len(names) > 1)} in all)"
