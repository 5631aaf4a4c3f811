"""The layers of a model, LoRAX's or a `ModelLayout`'s, and stacks of their weights."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, Self

import torch

from lorax_async.adapters.weights_file import Factor, FileTensor, read
from lorax_async.concurrency import IsWanted
from lorax_async.errors import (
    AdapterFormatError,
    CapacityError,
    ConfigError,
    IncompatibleAdapterError,
    UnsupportedAdapterError,
    UsageError,
    shorten,
)
from lorax_async.planning.layout import FusedPart, ModelLayout, Module, Parallelism
from lorax_async.planning.pairing import require_transposed
from lorax_async.types import MAX_FACTOR, AdapterSpec

_HUGE_PAGE = 2 << 20


class AdapterModel(Protocol):
    """The part of a model that loading needs: a LoRAX model, or `LayoutModel`."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def world_size(self) -> int: ...
    @property
    def target_to_layer(self) -> Mapping[Any, tuple[str, Any]]: ...
    def get_num_layers_for_type(self, layer_type: str, /) -> int | Sequence[int]: ...
    def shard_lora_weights(
        self, weights_a: list[torch.Tensor], weights_b: list[torch.Tensor], layer_type: str, /
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]: ...


def padded_rank(rank: int, world_size: int) -> int:
    """Return the rank with its padding: at least 8 per process, above that a multiple of 16.

    Raise `IncompatibleAdapterError` if the processes cannot share it evenly, and `ConfigError` for
    an impossible world size. Source: LoRAX, `pad_rank` in server/lorax_server/utils/sgmv.py.
    """
    if type(world_size) is not int or world_size < 1:
        raise ConfigError(f"a world size is a positive integer, not {world_size!r}")
    least = 8 * world_size
    padded = least if rank <= least else -(-rank // 16) * 16
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
        paths, types, count = [module.name.split(".") for module in modules], list[str](), 0
        while len(set(zip(layers, types, strict=False))) < len(modules):
            count += 1
            types = [".".join(path[-count:]) for path in paths]
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
        return layer_type == "lm_head" or example.parallel is Parallelism.ROW

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
        parts = () if row else module.parts
        a = [self._piece(one, 0 if row else 1, f"A of {layer_type}") for one in weights_a]
        return a, [self._piece_of_b(one, parts, f"B of {layer_type}") for one in weights_b]

    def _piece_of_b(self, b: torch.Tensor, parts: Sequence[FusedPart], what: str) -> torch.Tensor:
        if not parts:
            return self._piece(b, 1, what)
        sizes = [part.size for part in parts]
        if sum(sizes) != b.shape[1]:
            raise IncompatibleAdapterError(
                f"{what} has {b.shape[1]:,} output features, and its parts {sum(sizes):,}; use an"
                " adapter of this base"
            )
        split = zip(torch.split(b, sizes, 1), parts, strict=True)
        return torch.cat([self._piece(one, 1, what, part.unit) for one, part in split], 1)

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


FACTORS = ("lora_A", "lora_B")
BY_RANK = range(16, 129)
"""Local ranks whose A is stored as `[r, in]`. Source: LoRAX, `orient_for_rank` in utils/sgmv.py."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""A `[…, in, r]` and B `[…, r, out]`."""


class Layer(NamedTuple):
    """One module: A `[rank, in]`, B `[out, rank]` (the rank without padding), and B's scale."""

    name: str
    a: Factor
    b: Factor
    scale: float

    @classmethod
    def of(cls, name: str, factors: Mapping[str, Factor], spec: AdapterSpec) -> Self:
        """Check A and B, and the scale, against the config. Raise as `LoraWeights.load`."""
        shown = f"module {shorten(name, 200)!r}"
        if missing := [factor for factor in FACTORS if factor not in factors]:
            raise UsageError(
                f"{shown} has no {missing[0]} in the module map; make it with"
                " LoraConfig.map_weights_for_model"
            )
        a, b, rank = factors["lora_A"], factors["lora_B"], spec.rank_of(name)
        if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
            raise AdapterFormatError(
                f"{shown}: A {list(a.shape)} and B {list(b.shape)} are not a pair of rank {rank},"
                " which the config says; correct its r or rank_pattern"
            )
        if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
            raise UnsupportedAdapterError(
                f"{shown}: A is {a.dtype} and B {b.dtype}; give them as floating point"
            )
        scale = spec.scale_of(name, rank)
        if not abs(scale) <= MAX_FACTOR:
            raise AdapterFormatError(
                f"{shown} would be scaled by {scale}, which no float32 holds; correct lora_alpha or"
                " alpha_pattern in the config"
            )
        return cls(name, a, b, scale)

    @property
    def features(self) -> tuple[int, int]:
        """In and out."""
        return self.a.shape[1], self.b.shape[0]


class StackedLayers(NamedTuple):
    """All layers of one type, each contiguous.

    A is `[layers, r, in]` for a local rank in `BY_RANK`, else `[layers, in, r]`; B is
    `[layers, r, out]`.
    """

    a: torch.Tensor
    b: torch.Tensor
    local_rank: int  # of A
    padded_rank: int
    names: list[str]  # of the modules that the adapter changes


def load_layers(
    spec: AdapterSpec,
    model: AdapterModel,
    module_map: Mapping[str, Mapping[str, Factor]],
    layer_type: str,
    is_wanted: IsWanted,
) -> StackedLayers | None:
    """Make one layer type; return None where the adapter has none. Raise as `LoraWeights.load`."""
    count = model.get_num_layers_for_type(layer_type)
    layout: ModelLayout | None = getattr(model, "layout", None)
    layers, devices = list[Layer | None](), set[torch.device]()
    for number in range(count) if isinstance(count, int) else count:
        try:
            name, base = model.target_to_layer[number, layer_type]
        except KeyError:
            raise UsageError(
                f"the model's target_to_layer has no layer {number} of type"
                f" {shorten(str(layer_type), 100)!r}; ask for one of its types"
            ) from None
        devices.add(base.base_layer.linear.weight.device)
        if name not in module_map:
            layers.append(None)
            continue
        layer = Layer.of(name, module_map[name], spec)
        layers.append(layer)
        if layout is None:
            features = base_features(base, layer_type, model.world_size)
        else:
            module = layout.modules[layout.index(name)]
            features = Features(module.in_features, module.out_features)
        features.require_fit(layer)
    if layout is not None and spec.fan_in_fan_out:
        places = [layout.resolve(name) for name in module_map]
        require_transposed([layout.modules[place] for place in places if place is not None])
    if len(devices) > 1:
        raise UsageError(f"the layers of {layer_type!r} are on {len(devices)} devices, not on one")
    device = devices.pop() if devices else torch.device("cpu")
    share = None if model.world_size == 1 else partial(_share, model, layer_type)
    return stack_layers(layers, model.dtype, device, is_wanted, model.world_size, share)


def _share(model: AdapterModel, layer_type: str, a: torch.Tensor, b: torch.Tensor) -> Pair:
    (part_a,), (part_b,) = model.shard_lora_weights([a], [b], layer_type)
    for part, whole in ((part_a, a), (part_b, b)):
        if part.numel() not in {whole.numel(), whole.numel() / model.world_size}:
            raise IncompatibleAdapterError(
                f"{layer_type!r}: {list(part.shape)} is not an even share of {list(whole.shape)}"
                f" for {model.world_size} processes; use another world size"
            )
    return part_a, part_b


class Features(NamedTuple):
    """In and out features of a base's module over all processes; 0 if unknown.

    `either_way` marks sizes of a weight whose orientation is unknown.
    """

    inputs: int
    outputs: int
    either_way: bool = False

    def require_fit(self, layer: Layer) -> None:
        """Raise `IncompatibleAdapterError` unless an adapter's layer fits."""
        inputs, outputs = layer.features
        fits = self.inputs in {0, inputs} and self.outputs in {0, outputs}
        if not fits and not (self.either_way and self[:2] == (outputs, inputs)):
            known = " → ".join(str(size or "?") for size in self[:2])
            raise IncompatibleAdapterError(
                f"module {shorten(layer.name, 200)!r} of the adapter maps {inputs} → {outputs}"
                f" features (A {list(layer.a.shape)}, B {list(layer.b.shape)}), and the base's maps"
                f" {known}; use an adapter of this base"
            )


def base_features(layer: Any, layer_type: str, world_size: int) -> Features:
    """Return the features of one layer type in a layer of a LoRAX model.

    LoRAX fuses modules with one input (q, k and v; gate and up) into one layer, which several layer
    types name in `target_to_layer`. Source: LoRAX, server/lorax_server/utils/layers.py. Raise
    `UsageError` if the layer is fused of other layer types.
    """
    local = _local_features(layer.base_layer.linear)
    names = getattr(layer, "layer_names", None)
    if isinstance(names, Sequence) and not isinstance(names, str):
        # With a single name LoRAX's `sizes` may be wrong: Phi's fc1 and Mllama's have the input's.
        if len(names) < 2 or layer.sizes is None:
            return Features(local.inputs, local.outputs * world_size)
        if layer_type not in names or len(names) != len(layer.sizes):
            parts = ", ".join(f"{n} ({size})" for n, size in zip(names, layer.sizes, strict=False))
            raise UsageError(
                f"the model's layer for type {shorten(str(layer_type), 100)!r} is fused of"
                f" {shorten(parts, 200)}, and would not apply that type; correct the model's"
                " target_to_layer"
            )
        return Features(local.inputs, layer.sizes[list(names).index(layer_type)])
    if isinstance(getattr(layer, "layer_name", None), str):
        gathers = getattr(layer.base_layer, "should_gather", None)
        if gathers is None:
            return Features(local.inputs * world_size, local.outputs)
        # A head is row-parallel for LoRAX's adapters, but its own weight is split by output, or
        # whole in every process where the vocabulary cannot be split evenly.
        return Features(local.inputs, local.outputs * (world_size if gathers else 1))
    # A layer without these attributes may be one process's share.
    return local if world_size == 1 else Features(0, 0)


def _local_features(linear: Any) -> Features:
    """Return the features of one process's linear layer.

    The shape of a quantized weight is often that of its packed integers. AWQ's, HQQ's and GPTQ's
    layers have attributes for the features; bitsandbytes' 4-bit weights keep the original shape.
    """
    for names in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        inputs, outputs = (getattr(linear, name, None) for name in names)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return Features(inputs, outputs)
    weight = linear.weight
    shape = getattr(getattr(weight, "quant_state", None), "shape", None)
    if shape is not None and len(shape) == 2:
        return Features(shape[1], shape[0])
    if not (isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dim() == 2):
        return Features(0, 0)
    # LoRAX stores float8 as [in, out].
    first, last = weight.shape if weight.dtype.itemsize == 1 else weight.shape[::-1]
    return Features(first, last, either_way=True)


def _common_features(layers: Sequence[Layer]) -> tuple[int, int]:
    first = layers[0]
    for layer in layers:
        if layer.features != first.features:
            sizes = " and ".join(
                f"{shorten(one.name, 200)!r} ({one.features[0]} → {one.features[1]})"
                for one in (first, layer)
            )
            raise IncompatibleAdapterError(
                f"layers of different sizes cannot be stacked: {sizes}; use AdapterLoader, which"
                " does not stack"
            )
    return first.features


def stack_layers(
    layers: Sequence[Layer | None],
    dtype: torch.dtype,
    device: torch.device,
    is_wanted: IsWanted,
    world_size: int = 1,
    share: Callable[[torch.Tensor, torch.Tensor], Pair] | None = None,
) -> StackedLayers | None:
    """Stack layers, zeros for None; return None where all are. Blocks.

    `share` gives this process's part of a padded A `[in, r]` and B `[r, out]`. Between layers,
    raise `UsageError` if nothing waits for the result any more.
    """
    present = [layer for layer in layers if layer is not None]
    if not present:
        return None
    features = _common_features(present)
    rank = padded_rank(max(layer.a.shape[0] for layer in present), world_size)
    stored_a = (rank, features[0]) if rank in BY_RANK else (features[0], rank)
    shapes, local_rank, stacks = (stored_a, (rank, features[1])), rank, list[torch.Tensor]()
    if share is None:
        stacks = [_zeros((len(layers), *shape), dtype, device) for shape in shapes]
    else:  # a layer is made on the device of its bytes; only this process's part is moved
        whole = [_zeros(shape, dtype, present[0].a.device) for shape in shapes]
    for place, each in enumerate(layers):
        if not is_wanted():
            raise UsageError("nothing waits for these weights any more")
        if each is None:
            continue
        stored, b = [one[place] for one in stacks] if share is None else [w.zero_() for w in whole]
        a = stored.mT if rank in BY_RANK else stored
        _fill(each, a.mT, b)
        if share is not None:
            a, b = share(a, b)
            local_rank, parts = a.shape[1], (a.mT if a.shape[1] in BY_RANK else a, b)
            stacks = stacks or [_zeros((len(layers), *one.shape), dtype, device) for one in parts]
            for stack, part in zip(stacks, parts, strict=True):
                stack[place].copy_(part)
    if device.type != "cpu":  # the caller may compute on any stream
        torch.accelerator.current_stream(device).synchronize()
    names = [layer.name for layer in present]
    return StackedLayers(stacks[0], stacks[1], local_rank, rank, names)


def _fill(layer: Layer, a: torch.Tensor, b: torch.Tensor) -> None:
    """Write a layer to A `[rank, in]` and, scaled, B `[rank, out]`; leave the padding as it is.

    Raise `AdapterFormatError` if the dtype cannot hold the scaled B.
    """
    rank, scale = layer.a.shape[0], layer.scale
    a, b = a[:rank], b[:rank]
    straight = a.is_contiguous() and a.device.type == "cpu"
    if isinstance(layer.a, FileTensor) and straight and a.dtype == layer.a.dtype:
        layer.a.file.read_into(layer.a.key, a)
    else:
        a.copy_(read(layer.a).to(a))
    unscaled = read(layer.b).to(b)
    b.copy_(unscaled.mT).mul_(scale)
    # In wide types B overflows by an enormous scale only; an infinity in the file is its author's.
    may_overflow = abs(scale) > (1 if b.dtype == torch.float16 else 2**64)
    if may_overflow and not b.isfinite().all() and unscaled.isfinite().all():
        raise AdapterFormatError(
            f"module {shorten(layer.name, 200)!r}: B times the scale {scale:g} is more than"
            f" {b.dtype} holds; load it as float32 or bfloat16, or correct lora_alpha or"
            " alpha_pattern in the config"
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros; on the host in huge pages, for faulting in small ones is slower than copying.

    Raise `CapacityError` where there is no memory.
    """
    nbytes = prod(shape) * dtype.itemsize
    try:
        if device.type != "cpu" or nbytes < _HUGE_PAGE:
            return torch.zeros(shape, dtype=dtype, device=device)
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, MemoryError, RuntimeError) as error:
        raise CapacityError(f"no {nbytes:,} bytes of {device} memory for weights") from error
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
