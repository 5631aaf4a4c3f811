"""What peft makes of a config: it gets the values that our reader accepted, and must agree."""

from __future__ import annotations

from lorax_async.adapter import AdapterSpec
from lorax_async.errors import AdapterFormatError, InternalError


def require_agreement(spec: AdapterSpec) -> None:
    """Build peft's `LoraConfig` of plain values. Blocks: it imports peft.

    No file is read, no regular expression compiled, and no code of the adapter's author run.

    Raises
    ------
    AdapterFormatError
        peft refuses the values.
    InternalError
        peft understands them otherwise.
    """
    from peft import LoraConfig  # noqa: PLC0415 (slow: it imports transformers)

    targets = spec.targets
    try:
        theirs = LoraConfig(
            base_model_name_or_path=spec.base_model,
            r=spec.rank,
            lora_alpha=spec.alpha,  # type: ignore[arg-type]  # peft says int, and saves floats
            use_rslora=spec.rslora,
            fan_in_fan_out=spec.fan_in_fan_out,
            target_modules=list(targets) if isinstance(targets, tuple) else targets,
            inference_mode=True,
        )
    except (TypeError, ValueError) as error:
        raise AdapterFormatError(f"peft refuses the config ({error}); save it again") from error
    values = {
        "r": (theirs.r, spec.rank),
        "lora_alpha": (theirs.lora_alpha, spec.alpha),
        "use_rslora": (theirs.use_rslora, spec.rslora),
        "fan_in_fan_out": (theirs.fan_in_fan_out, spec.fan_in_fan_out),
        "base_model_name_or_path": (theirs.base_model_name_or_path, spec.base_model),
        "target_modules": (_plain(theirs.target_modules), _plain(targets)),
    }
    for name, (their_value, our_value) in values.items():
        if their_value != our_value:
            raise InternalError(
                f"peft and this package read {name!r} differently; please report it"
            )


def _plain(targets: object) -> object:
    return set(targets) if isinstance(targets, list | tuple | set) else targets
