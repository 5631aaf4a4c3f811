"""Tensors that nothing would apply are an error: an adapter without them gives other answers."""

from __future__ import annotations

from collections.abc import Iterable, Set

from lorax_async.core.peft_names import PREFIX, Part, parse_tensor_name
from lorax_async.errors import AdapterFormatError, IncompatibleAdapterError, shorten

_SHOWN = 3


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
        parsed = parse_tensor_name(name)
        other = Part.A if parsed.part is Part.B else Part.B
        if f"{PREFIX}{parsed.module}.{other.value}.weight" not in everything:
            raise AdapterFormatError(
                f"tensor {shorten(name, 200)!r} has no {other.value[-1]} beside it; save the"
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
