"""A layout as the model that LoRAX's calls ask, without a model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import torch

from lorax_async.adapters.sharing.sharding import Share, shard_a, shard_b
from lorax_async.core.layout import ModelLayout, Module, Parallel
from lorax_async.errors import ConfigError, UsageError, shorten

ROW_PARALLEL_TYPES = frozenset({"lm_head"})
"""Cut by their input in LoRAX, whatever the layout says."""


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A layer's weight: `[out, in]`, or `[in, out]` where the base stores it so.

    It has one element, wherever it is indexed: only its shape, dtype and device are meant.
    """

    weight: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BaseLayer:
    linear: Linear


@dataclass(frozen=True, slots=True, eq=False)
class TargetLayer:
    base_layer: BaseLayer


@dataclass(frozen=True, slots=True)
class LayerNames:
    """The names of a layout's linear modules, by layer type and layer id.

    A type is the last component of a module's name ("q_proj"), or as many as tell the modules of
    one layer apart ("attn.c_proj" and "mlp.c_proj"). Modules outside of the layers are layer 0.
    """

    by_type: Mapping[str, Mapping[int, str]]

    @classmethod
    def of(cls, layout: ModelLayout) -> Self:
        linear = [module for module in layout.modules if not module.embedding]
        layer_of = {m.name: m.layer if 0 <= m.layer < layout.num_layers else 0 for m in linear}
        named: dict[str, dict[int, str]] = {}
        for last in dict.fromkeys(name.rpartition(".")[2] for name in layer_of):
            alike = [name for name in layer_of if name.rpartition(".")[2] == last]
            for name in alike:
                type_ = _suffix(name, _components(alike, layer_of))
                named.setdefault(type_, {})[layer_of[name]] = name
        return cls({type_: dict(sorted(names.items())) for type_, names in named.items()})

    def of_type(self, layer_type: str) -> Mapping[int, str]:
        """In the order of their ids. Raises `UsageError` for a type that the base does not have."""
        try:
            return self.by_type[layer_type]
        except KeyError:
            known = ", ".join(sorted(self.by_type))
            raise UsageError(
                f"the base has no layer type {shorten(str(layer_type), 100)!r}; it has {known}"
            ) from None


def _suffix(name: str, components: int) -> str:
    return ".".join(name.split(".")[-components:])


def _components(names: Sequence[str], layer_of: Mapping[str, int]) -> int:
    """How many of the last components of these names differ within each layer."""
    longest = max(name.count(".") + 1 for name in names)
    for components in range(1, longest):
        if len({(layer_of[name], _suffix(name, components)) for name in names}) == len(names):
            return components
    return longest


@dataclass(frozen=True)
class LayoutModel:
    """What `LoraWeights.load` asks of a model, answered from a layout.

    Parameters
    ----------
    layout
        Of the base.
    dtype
        Of the weights that are loaded.
    world_size, rank
        How many processes share a layer, and which of them this is.

    Raises
    ------
    ConfigError
        The dtype is none of floating point, the rank none of the world, or layers of one type are
        not cut alike.
    """

    layout: ModelLayout
    dtype: torch.dtype
    world_size: int
    rank: int = 0
    _share: Share = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ConfigError(f"the dtype of weights is one of floating point, not {self.dtype!r}")
        object.__setattr__(self, "_share", Share(self.rank, self.world_size))
        for layer_type, names in self.names.by_type.items():
            cuts = {(m.parallel, m.parts) for m in map(self._module, names.values())}
            if len(cuts) > 1:
                raise ConfigError(f"layout: the layers of {layer_type!r} are not all cut alike")

    @cached_property
    def names(self) -> LayerNames:
        """The modules' names, by layer type."""
        return LayerNames.of(self.layout)

    @property
    def adapter_layers(self) -> list[str]:
        """All layer types."""
        return list(self.names.by_type)

    @cached_property
    def weight_names(self) -> tuple[str, ...]:
        """Of all modules, as `LoraConfig.map_weights_for_model` takes them."""
        return tuple(name for name, _ in self.target_to_layer.values())

    @cached_property
    def target_to_layer(self) -> Mapping[tuple[int, str], tuple[str, TargetLayer]]:
        """By (layer id, layer type), a module's name and its layer."""
        layers: dict[tuple[int, str], tuple[str, TargetLayer]] = {}
        memory: dict[tuple[int, int], TargetLayer] = {}
        for layer_type, names in self.names.by_type.items():
            for layer, name in names.items():
                shape = _weight_shape(self._module(name))
                layers[layer, layer_type] = name, memory.setdefault(shape, self._layer(shape))
        return layers

    def _layer(self, shape: tuple[int, int]) -> TargetLayer:
        return TargetLayer(BaseLayer(Linear(torch.zeros((), dtype=self.dtype).expand(shape))))

    def get_num_layers_for_type(self, layer_type: str) -> int | list[int]:
        """How many layers have this type; their ids, where these are not 0, 1, …"""
        ids = list(self.names.of_type(layer_type))
        return len(ids) if ids == list(range(len(ids))) else ids

    def is_row_parallel(self, layer_type: str) -> bool:
        """Whether its A is cut by `in`. LoRAX counts the language model's head among these."""
        parallel = self._example(layer_type).parallel
        return layer_type in ROW_PARALLEL_TYPES or parallel is Parallel.ROW

    def shard_lora_weights(
        self, weights_a: list[torch.Tensor], weights_b: list[torch.Tensor], layer_type: str
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The parts that this process has of every A `[in, r]` and B `[r, out]`, cut as LoRAX cuts.

        Where the base is cut by its input, A is cut by `in`, else by the rank; B by `out` in both,
        a fused one part by part. A replicated module is whole everywhere.

        Raises
        ------
        IncompatibleAdapterError
            A size is not shared evenly.
        UsageError
            The base has no such type.
        """
        module, row = self._example(layer_type), self.is_row_parallel(layer_type)
        if not row and module.parallel is Parallel.REPLICATED:
            return weights_a, weights_b
        parts = () if row else module.parts
        return (
            [shard_a(a, self._share, row_parallel=row, what=layer_type) for a in weights_a],
            [shard_b(b, self._share, parts, layer_type) for b in weights_b],
        )

    def _example(self, layer_type: str) -> Module:
        return self._module(next(iter(self.names.of_type(layer_type).values())))

    def _module(self, name: str) -> Module:
        return self.layout.modules[self.layout.index(name)]


def _weight_shape(module: Module) -> tuple[int, int]:
    shape = module.out_features, module.in_features
    return shape[::-1] if module.transposed else shape
