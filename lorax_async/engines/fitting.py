"""Whether a model in memory is the base that a loader was made for: modules, dtype, device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from lorax_async.adaptable import looks_up
from lorax_async.config import DTYPES, Shard
from lorax_async.core.layout import ModelLayout, Module
from lorax_async.errors import ConfigError

_SHOWN = 3


def modules_of(model: nn.Module, layout: ModelLayout, shard: Shard | None) -> list[nn.Module]:
    """The model's module for each of the layout's; raises ConfigError naming those that differ.

    `shard` is what the layout's sizes are of.
    """
    found = dict(model.named_modules())
    problems = [
        problem
        for module in layout.modules
        if (problem := _mismatch(found.get(module.name), module)) is not None
    ]
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        base = "the loader's base" if shard is None else f"the {shard} that the loader holds"
        remedy = (
            "make the layout with layouts.from_module(model)"
            if shard is None
            else "for a whole model make the loader without a shard"
        )
        raise ConfigError(
            f"the model is not {base}: {'; '.join(problems[:_SHOWN])}{more}; {remedy}"
        )
    return [found[module.name] for module in layout.modules]


def _mismatch(found: nn.Module | None, module: Module) -> str | None:
    if found is None:
        return f"it has no module {module.name!r}"
    sizes = _sizes(found)
    if sizes is None or isinstance(found, nn.Embedding) != module.embedding:
        return f"module {module.name!r} is a {type(found).__name__}"
    if module.embedding and not looks_up(module.name, found):
        kind = type(found).__name__
        return f"module {module.name!r} ({kind}) does not just look tokens or positions up"
    if sizes != (module.in_features, module.out_features):
        wanted = f"{module.in_features} → {module.out_features}"
        return f"module {module.name!r} is {sizes[0]} → {sizes[1]}, not {wanted}"
    return None


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear module, (vocabulary, out) of an embedding, None for any other."""
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415 (slow)

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return (module.nx, module.nf) if isinstance(module, Conv1D) else None


def require_dtype(modules: list[nn.Module], stored: str) -> None:
    """Raise ConfigError unless adapters `stored` so fit what the model computes in.

    What most modules compute in counts, as in `layouts.from_module`: a router may be wider. A
    quantised weight is packed in integers and says nothing.
    """
    weights = [_weight(module).dtype for module in modules]
    floating = Counter(dtype for dtype in weights if dtype.is_floating_point)
    if not floating:
        return
    computed = str(floating.most_common(1)[0][0]).removeprefix("torch.")
    if computed not in DTYPES:
        raise ConfigError(
            f"the model computes in {computed}; convert it to one of {', '.join(DTYPES)}"
        )
    if computed != stored:
        raise ConfigError(
            f"the model computes in {computed} and the loader stores adapters in {stored}; make "
            f"it with LoaderConfig(dtype={computed!r})"
        )


def require_device(modules: list[nn.Module], device: torch.device) -> None:
    """Raise ConfigError unless the model is where the adapters are."""
    for module in modules:
        place = _weight(module).device
        if place.type != device.type:
            raise ConfigError(
                f"the model is on {place} and the loader's adapters are on {device}; move the "
                "model, or give LoaderConfig another device"
            )


def _weight(module: Any) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight
