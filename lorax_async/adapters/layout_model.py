"""A layout in place of a LoRAX model; LoRAX's padding and splitting of weights.

LoRAX splits the rank where Megatron, and so the loader's shards, do not. Both are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

import torch

from lorax_async.errors import ConfigError, IncompatibleAdapterError, UsageError, shorten
from lorax_async.planning.layout import ModelLayout, Module, Parallelism

ROW_PARALLEL_TYPES = frozenset({"lm_head"})
"""Split by their input in LoRAX, whatever the layout says."""

MIN_RANK = 8  # of each process
RANK_STEP = 16


def padded_rank(rank: int, world_size: int) -> int:
    """Return the rank with its padding: at least 8 per process, above that a multiple of 16.

    Raise `IncompatibleAdapterError` if the processes cannot share it evenly, and `ConfigError` for
    an impossible world size. Source: LoRAX, `pad_rank` in server/lorax_server/utils/sgmv.py.
    """
    if type(world_size) is not int or world_size < 1:
        raise ConfigError(f"a world size is a positive integer, not {world_size!r}")
    least = MIN_RANK * world_size
    padded = least if rank <= least else -(-rank // RANK_STEP) * RANK_STEP
    if padded % world_size:
        raise IncompatibleAdapterError(
            f"rank {rank} is padded to {padded}, which {world_size} processes cannot share evenly;"
            f" use an adapter of rank {least} or less, or another world size"
        )
    return padded


def modules_by_type(layout: ModelLayout) -> Mapping[str, Mapping[int, Module]]:
    """Return a layout's linear modules by layer type and, in order, by layer id.

    A type is the last component of a module's name ("q_proj"), or as many as tell the modules of
    one layer apart ("attn.c_proj" and "mlp.c_proj"). Modules outside the layers are layer 0.
    """
    alike: dict[str, list[Module]] = {}
    for module in layout.modules:
        if not module.embedding:
            alike.setdefault(module.name.rpartition(".")[2], []).append(module)
    found: dict[str, dict[int, Module]] = {}
    for modules in alike.values():
        layers = [one.layer if 0 <= one.layer < layout.num_layers else 0 for one in modules]
        paths = [module.name.split(".") for module in modules]
        longest = max(map(len, paths))
        tails = ([".".join(path[-count:]) for path in paths] for count in range(1, longest + 1))
        types = next(
            tail for tail in tails if len(set(zip(layers, tail, strict=True))) == len(tail)
        )
        for layer_type, layer, module in zip(types, layers, modules, strict=True):
            found.setdefault(layer_type, {})[layer] = module
    return {layer_type: dict(sorted(layers.items())) for layer_type, layers in found.items()}


def layers_of(by_type: Mapping[str, Mapping[int, Module]], layer_type: str) -> Mapping[int, Module]:
    """Return the modules of one type. Raise `UsageError` for a type that the base does not have."""
    if layer_type not in by_type:
        raise UsageError(
            f"the base has no layer type {shorten(str(layer_type), 100)!r}; it has"
            f" {', '.join(sorted(by_type))}"
        )
    return by_type[layer_type]


@dataclass(frozen=True)
class LayoutModel:
    """A layout in place of a LoRAX model for `LoraWeights.load`; no model in memory.

    This is process number `rank` of `world_size`; weights are loaded as `dtype`. Raise
    `ConfigError` for an impossible one, or if layers of one type are not split alike.
    """

    layout: ModelLayout
    dtype: torch.dtype
    world_size: int
    rank: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ConfigError(f"the dtype of weights is one of floating point, not {self.dtype!r}")
        padded_rank(1, self.world_size)
        if type(self.rank) is not int or not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"a rank is from 0 to {self.world_size - 1} in a world of {self.world_size}, not"
                f" {self.rank!r}"
            )
        for layer_type, layers in self._types.items():
            if len({(module.parallel, module.parts) for module in layers.values()}) > 1:
                raise ConfigError(f"layout: the layers of {layer_type!r} are not all split alike")

    @cached_property
    def _types(self) -> Mapping[str, Mapping[int, Module]]:
        return modules_by_type(self.layout)

    @property
    def adapter_layers(self) -> list[str]:
        """All layer types."""
        return list(self._types)

    @cached_property
    def weight_names(self) -> tuple[str, ...]:
        """The names of all modules, as `LoraConfig.map_weights_for_model` takes them."""
        return tuple(name for name, _ in self.target_to_layer.values())

    @cached_property
    def target_to_layer(self) -> Mapping[tuple[int, str], tuple[str, SimpleNamespace]]:
        """(layer id, layer type) → module name and a layer with `base_layer.linear.weight`.

        The weight has one element in memory: only its shape, dtype and device count.
        """
        element, found = torch.zeros((), dtype=self.dtype), {}
        for layer_type, layers in self._types.items():
            for layer, module in layers.items():
                shape = module.out_features, module.in_features
                weight = element.expand(shape[::-1] if module.transposed else shape)
                base_layer = SimpleNamespace(linear=SimpleNamespace(weight=weight))
                found[layer, layer_type] = module.name, SimpleNamespace(base_layer=base_layer)
        return found

    def get_num_layers_for_type(self, layer_type: str) -> int | list[int]:
        """Return how many layers have this type, or their ids if not consecutive from 0."""
        ids = list(layers_of(self._types, layer_type))
        return len(ids) if ids == list(range(len(ids))) else ids

    def is_row_parallel(self, layer_type: str) -> bool:
        """Return whether its A is split by `in`, as in LoRAX the language model's head is too."""
        example = next(iter(layers_of(self._types, layer_type).values()))
        return layer_type in ROW_PARALLEL_TYPES or example.parallel is Parallelism.ROW

    def shard_lora_weights(
        self, weights_a: list[torch.Tensor], weights_b: list[torch.Tensor], layer_type: str
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return this process's parts of every A `[in, r]` and B `[r, out]`, split as LoRAX does.

        A is split by `in` where the base is, otherwise by the rank; B always by `out`, a fused one
        part by part. A replicated module is whole everywhere. Raise `IncompatibleAdapterError` if a
        size is not shared evenly.
        """
        row = self.is_row_parallel(layer_type)
        module = next(iter(layers_of(self._types, layer_type).values()))
        if not row and module.parallel is Parallelism.REPLICATED:
            return weights_a, weights_b
        a = [self._piece(one, 0 if row else 1, f"A of {layer_type}") for one in weights_a]
        b = [self._piece_of_b(one, module, row, f"B of {layer_type}") for one in weights_b]
        return a, b

    def _piece_of_b(self, b: torch.Tensor, module: Module, row: bool, what: str) -> torch.Tensor:
        if row or not module.parts:
            return self._piece(b, 1, what)
        sizes = [part.size for part in module.parts]
        if sum(sizes) != b.shape[1]:
            raise IncompatibleAdapterError(
                f"{what} has {b.shape[1]:,} output features, and its parts {sum(sizes):,}; use an"
                " adapter of this base"
            )
        pieces = [
            self._piece(whole, 1, what, part.unit)
            for whole, part in zip(torch.split(b, sizes, 1), module.parts, strict=True)
        ]
        return torch.cat(pieces, 1)

    def _piece(self, tensor: torch.Tensor, dim: int, what: str, unit: int = 1) -> torch.Tensor:
        """Return this process's piece along a dimension, a view; `unit` elements stay together."""
        size = tensor.shape[dim]
        if size % (unit * self.world_size):
            units = f"{size:,}" if unit == 1 else f"{size:,} in units of {unit:,}"
            raise IncompatibleAdapterError(
                f"{what}: {units} cannot be shared evenly by {self.world_size} processes; use"
                " another world size"
            )
        piece = size // self.world_size
        return tensor.narrow(dim, self.rank * piece, piece)
