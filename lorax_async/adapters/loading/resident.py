"""The weights that a loader holds on its device, as layers of one type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from lorax_async.adapters.loading.layers import Factor, Layer, TypeLayers
from lorax_async.adapters.loading.unapplied import FACTORS, inexpressible, tensor_name
from lorax_async.adapters.sharing.layout_model import LayerNames
from lorax_async.config import Shard
from lorax_async.core.layout import ModelLayout
from lorax_async.errors import UsageError, shorten
from lorax_async.runtime.module_views import ModuleWeights


class ResidentAdapter(Protocol):
    """Of an `AdapterHandle`, what is read here."""

    @property
    def modules(self) -> Mapping[str, ModuleWeights]: ...

    @property
    def layout(self) -> ModelLayout: ...

    @property
    def shard(self) -> Shard | None: ...

    def use(self) -> AbstractContextManager[None]: ...


def resident_layers(handle: ResidentAdapter, layer_type: str) -> TypeLayers | None:
    """The layers of one type, or None where the adapter has none of them.

    Raises `UsageError` if the loader keeps one shard of every module only, if the base has no such
    type, or if a layer is not here yet; `UnsupportedAdapterError` for an adapter that has more than
    A and B of linear modules.
    """
    _require_whole(handle)
    modules = handle.modules
    _require_linear(handle.layout, modules)
    names = LayerNames.of(handle.layout).of_type(layer_type)
    weights = {name: modules[name] for name in names.values() if name in modules}
    if not weights:
        return None
    example = next(iter(weights.values())).a
    return TypeLayers.of(
        [_layer(name, weights[name]) if name in weights else None for name in names.values()],
        world_size=1,
        dtype=example.dtype,
        device=example.device,
    )


def _layer(name: str, module: ModuleWeights) -> Layer:
    for vector, feature in ((module.bias, "lora_bias"), (module.magnitude, "DoRA")):
        if vector is not None:
            raise inexpressible(f"module {shorten(name, 200)!r}", feature)
    a, b = (tensor_name(factor, name) for factor in FACTORS)
    return Layer(name, Factor(module.a, a), Factor(module.b, b), module.scale)


def _require_linear(layout: ModelLayout, names: Iterable[str]) -> None:
    for name in names:
        if layout.modules[layout.index(name)].embedding:
            raise inexpressible(f"module {shorten(name, 200)!r}", "LoRA on an embedding")


def _require_whole(handle: ResidentAdapter) -> None:
    if handle.shard is not None and handle.shard.world_size > 1:
        raise UsageError(
            "the loader holds one shard of this adapter, cut as Megatron cuts, and LoRAX cuts"
            " otherwise; load the adapter's files with LoraConfig.load and LoraWeights.load"
        )
