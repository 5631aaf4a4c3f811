"""Which weights make up one layer type of one adapter: found, and checked before a byte is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lorax_async.adapters.base import AdapterModel, Content, OpenModuleMap
from lorax_async.adapters.loading.base_features import BaseFeatures, base_features
from lorax_async.adapters.loading.unapplied import FACTORS
from lorax_async.adapters.loading.weights_file import WeightsFile
from lorax_async.adapters.sharing.padding import padded_rank
from lorax_async.core.layout import ModelLayout
from lorax_async.errors import (
    AdapterFormatError,
    IncompatibleAdapterError,
    UnsupportedAdapterError,
    UsageError,
    shorten,
)

MAX_SCALE = 3.4028234663852886e38
"""Of float32, in which B is multiplied."""


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A or B of one module, in memory or in a file."""

    content: Content
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.content, WeightsFile):
            return self.content.shape(self.key)
        return tuple(self.content.shape)

    @property
    def dtype(self) -> torch.dtype:
        if isinstance(self.content, WeightsFile):
            return self.content.dtype(self.key)
        return self.content.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One module: A `[rank, in]`, B `[out, rank]`, and the scale that is folded into B."""

    name: str
    a: Factor
    b: Factor
    scale: float

    @property
    def rank(self) -> int:
        """The true one, without padding."""
        return self.a.shape[0]

    @property
    def features(self) -> tuple[int, int]:
        """In and out."""
        return self.a.shape[1], self.b.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class TypeLayers:
    """All layers of one type, None where the adapter changes none, and what is made of them."""

    layers: tuple[Layer | None, ...]
    padded_rank: int
    world_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def present(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer is not None)

    @property
    def features(self) -> tuple[int, int]:
        """In and out, of every layer."""
        return self.present[0].features

    @property
    def origin(self) -> torch.device:
        """Where their bytes are now: a file's come to the host."""
        content = self.present[0].a.content
        return torch.device("cpu") if isinstance(content, WeightsFile) else content.device

    @property
    def keys(self) -> set[str]:
        """The names of the tensors that are used."""
        return {factor.key for layer in self.present for factor in (layer.a, layer.b)}

    @classmethod
    def of(
        cls,
        layers: Sequence[Layer | None],
        *,
        world_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> TypeLayers | None:
        """None where no layer is present.

        Raises
        ------
        IncompatibleAdapterError
            They cannot be stacked, or their rank not be shared.
        """
        present = [layer for layer in layers if layer is not None]
        if not present:
            return None
        for layer in present:
            if layer.features != present[0].features:
                raise _uneven(present[0], layer)
        rank = padded_rank(max(layer.rank for layer in present), world_size)
        return cls(tuple(layers), rank, world_size, dtype, device)


class Ranks(Protocol):
    """Of a config, what one module's rank and scale are."""

    @property
    def fan_in_fan_out(self) -> bool: ...

    def rank_of(self, module: str) -> int: ...

    def scale_of(self, module: str) -> float: ...


def layer_ids(model: AdapterModel, layer_type: str) -> Sequence[int]:
    """The ids of the layers that have this type; LoRAX's models tell the ids, or how many."""
    layers = model.get_num_layers_for_type(layer_type)
    return range(layers) if isinstance(layers, int) else list(layers)


def find_layers(
    config: Ranks, model: AdapterModel, module_map: OpenModuleMap, layer_type: str
) -> TypeLayers | None:
    """The layers of one type, or None where the adapter has none of them.

    Raises
    ------
    AdapterFormatError
        A and B are no pair of the rank that the config says.
    IncompatibleAdapterError
        They do not fit the base, or cannot be stacked or shared; or `fan_in_fan_out` contradicts
        the model's layout.
    UnsupportedAdapterError
        They are no numbers of floating point.
    UsageError
        The model has no such layers, or they are on several devices.
    """
    targets = [_target(model, layer, layer_type) for layer in layer_ids(model, layer_type)]
    layers = [
        _layer(name, module_map[name], config) if name in module_map else None
        for name, _ in targets
    ]
    weights = [layer.base_layer.linear.weight for _, layer in targets]
    layout: ModelLayout | None = getattr(model, "layout", None)
    for layer, (_, base) in zip(layers, targets, strict=True):
        if layer is None:
            continue
        if layout is not None:
            module = layout.modules[layout.index(layer.name)]
            _require_fit(layer, BaseFeatures(module.in_features, module.out_features))
        else:
            _require_fit(layer, base_features(base, layer_type, model.world_size))
    if layout is not None and config.fan_in_fan_out:
        check_fan_in_fan_out(module_map, layout)
    devices = {weight.device for weight in weights}
    if len(devices) > 1:
        raise UsageError(f"the layers of {layer_type!r} are on {len(devices)} devices, not on one")
    return TypeLayers.of(
        layers,
        world_size=model.world_size,
        dtype=model.dtype,
        device=devices.pop() if devices else torch.device("cpu"),
    )


def _target(model: AdapterModel, layer: int, layer_type: str) -> tuple[str, Any]:
    try:
        return model.target_to_layer[layer, layer_type]
    except KeyError:
        raise UsageError(
            f"the model's target_to_layer has no layer {layer} of type"
            f" {shorten(str(layer_type), 100)!r}; ask for one of its types"
        ) from None


def _layer(name: str, factors: Mapping[str, tuple[Content, str]], config: Ranks) -> Layer:
    if missing := [factor for factor in FACTORS if factor not in factors]:
        raise UsageError(
            f"module {shorten(name, 200)!r} has no {missing[0]} in the module map; make it with"
            " LoraConfig.map_weights_for_model"
        )
    a, b = (Factor(*factors[factor]) for factor in FACTORS)
    rank = config.rank_of(name)
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise AdapterFormatError(
            f"module {shorten(name, 200)!r}: A {list(a.shape)} and B {list(b.shape)} are no pair of"
            f" rank {rank}, which the config says; correct its r or rank_pattern"
        )
    if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
        raise UnsupportedAdapterError(
            f"module {shorten(name, 200)!r}: A is {a.dtype} and B {b.dtype}; give them as floating"
            " point"
        )
    scale = config.scale_of(name)
    if not abs(scale) <= MAX_SCALE:
        raise AdapterFormatError(
            f"module {shorten(name, 200)!r} would be scaled by {scale}, which no float32 holds;"
            " correct lora_alpha or alpha_pattern in the config"
        )
    return Layer(name, a, b, scale)


def _require_fit(layer: Layer, base: BaseFeatures) -> None:
    if not base.accept(*layer.features):
        inputs, outputs = layer.features
        raise IncompatibleAdapterError(
            f"module {shorten(layer.name, 200)!r} of the adapter maps {inputs} → {outputs} features"
            f" (A {list(layer.a.shape)}, B {list(layer.b.shape)}), and the base's maps {base}; use"
            " an adapter of this base"
        )


def check_fan_in_fan_out(module_names: Iterable[str], layout: ModelLayout) -> None:
    """For a config that says true: some module of the adapter is stored as `[in, out]`.

    False is PEFT's default and says nothing. Raises `IncompatibleAdapterError`.
    """
    indices = [layout.resolve(name) for name in module_names]
    if not any(index is not None and layout.modules[index].transposed for index in indices):
        raise IncompatibleAdapterError(
            "fan_in_fan_out is true, but this base stores none of the adapter's modules as"
            " [in, out]; use the base it was trained on, or set it to false"
        )


def _uneven(first: Layer, other: Layer) -> IncompatibleAdapterError:
    sizes = " and ".join(
        f"{shorten(layer.name, 200)!r} ({layer.features[0]} → {layer.features[1]})"
        for layer in (first, other)
    )
    return IncompatibleAdapterError(
        f"layers of different sizes cannot be stacked: {sizes}; use AdapterLoader, which does not"
        " stack"
    )
