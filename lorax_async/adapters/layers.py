"""The layers of a model, LoRAX's or a `ModelLayout`'s, and stacks of their weights."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from lorax_async.adapters.base import AdapterModel, Content, OpenModuleMap
from lorax_async.adapters.weights_file import WeightsFile
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
from lorax_async.planning.layout import ModelLayout, Module, Parallelism
from lorax_async.planning.pairing import require_transposed
from lorax_async.types import MAX_FACTOR, AdapterSpec

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


BY_RANK = range(16, 129)
"""Local ranks whose A is stored as `[r, in]`. Source: LoRAX, `orient_for_rank` in utils/sgmv.py."""

FACTORS = ("lora_A", "lora_B")
_HUGE_PAGE = 2 << 20
# Up to this rank torch's ordinary copy transposes a matrix faster than its blocked one (measured:
# 6.5 against 2.4 GB/s at rank 16, 2.3 against 3.2 at 128).
_NARROW = 32

Pair = tuple[torch.Tensor, torch.Tensor]
"""A `[…, in, r]` and B `[…, r, out]`."""


class FileTensor(NamedTuple):
    """A tensor in an open file, not yet read."""

    file: WeightsFile
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.shape(self.key)

    @property
    def dtype(self) -> torch.dtype:
        return self.file.dtype(self.key)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


class Layer(NamedTuple):
    """One module: A `[rank, in]`, B `[out, rank]` (the rank without padding), and B's scale."""

    name: str
    a: torch.Tensor | FileTensor
    b: torch.Tensor | FileTensor
    scale: float

    @property
    def features(self) -> tuple[int, int]:
        """In and out."""
        return self.a.shape[1], self.b.shape[0]


class StackedLayers(NamedTuple):
    """All layers of one type: A `[layers, in, r]`, contiguous `as_stored`; B `[layers, r, out]`."""

    a: torch.Tensor
    b: torch.Tensor
    padded_rank: int
    present: list[Layer]


def load_layers(
    spec: AdapterSpec,
    model: AdapterModel,
    module_map: OpenModuleMap,
    layer_type: str,
    is_wanted: IsWanted,
) -> StackedLayers | None:
    """Make one layer type; return None where the adapter has none. Raise as `LoraWeights.load`."""
    ids = model.get_num_layers_for_type(layer_type)
    targets = [
        _target(model, layer, layer_type)
        for layer in (range(ids) if isinstance(ids, int) else list(ids))
    ]
    layers = [
        _layer(name, module_map[name], spec) if name in module_map else None for name, _ in targets
    ]
    layout: ModelLayout | None = getattr(model, "layout", None)
    for layer, (name, base) in zip(layers, targets, strict=True):
        if layer is not None and layout is not None:
            module = layout.modules[layout.index(name)]
            _require_fit(layer, Features(module.in_features, module.out_features))
        elif layer is not None:
            _require_fit(layer, base_features(base, layer_type, model.world_size))
    if layout is not None and spec.fan_in_fan_out:
        places = [layout.resolve(name) for name in module_map]
        require_transposed([layout.modules[place] for place in places if place is not None])
    devices = {layer.base_layer.linear.weight.device for _, layer in targets}
    if len(devices) > 1:
        raise UsageError(f"the layers of {layer_type!r} are on {len(devices)} devices, not on one")
    device = devices.pop() if devices else torch.device("cpu")
    share = None if model.world_size == 1 else partial(_share, model, layer_type)
    return stack_layers(layers, model.dtype, device, is_wanted, model.world_size, share)


def _target(model: AdapterModel, layer: int, layer_type: str) -> tuple[str, Any]:
    try:
        return model.target_to_layer[layer, layer_type]
    except KeyError:
        raise UsageError(
            f"the model's target_to_layer has no layer {layer} of type"
            f" {shorten(str(layer_type), 100)!r}; ask for one of its types"
        ) from None


def _layer(name: str, factors: Mapping[str, tuple[Content, str]], spec: AdapterSpec) -> Layer:
    shown = f"module {shorten(name, 200)!r}"
    if missing := [factor for factor in FACTORS if factor not in factors]:
        raise UsageError(
            f"{shown} has no {missing[0]} in the module map; make it with"
            " LoraConfig.map_weights_for_model"
        )
    a, b = (
        FileTensor(content, key) if isinstance(content, WeightsFile) else content.detach()
        for content, key in (factors[factor] for factor in FACTORS)
    )
    rank = spec.rank_of(name)
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == rank:
        raise AdapterFormatError(
            f"{shown}: A {list(a.shape)} and B {list(b.shape)} are no pair of rank {rank}, which"
            " the config says; correct its r or rank_pattern"
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
    return Layer(name, a, b, scale)


# -- features of the base's modules ---------------------------------------------------------------


class Features(NamedTuple):
    """In and out features of a base's module over all processes; None if unknown.

    `either_way` marks sizes of a weight whose orientation is unknown.
    """

    inputs: int | None
    outputs: int | None
    either_way: bool = False

    def accept(self, inputs: int, outputs: int) -> bool:
        """Return whether an adapter of these features fits."""
        if self.inputs in {None, inputs} and self.outputs in {None, outputs}:
            return True
        return self.either_way and (self.inputs, self.outputs) == (outputs, inputs)


def _require_fit(layer: Layer, base: Features) -> None:
    inputs, outputs = layer.features
    if not base.accept(inputs, outputs):
        known = " → ".join("?" if size is None else str(size) for size in base[:2])
        raise IncompatibleAdapterError(
            f"module {shorten(layer.name, 200)!r} of the adapter maps {inputs} → {outputs} features"
            f" (A {list(layer.a.shape)}, B {list(layer.b.shape)}), and the base's maps {known}; use"
            " an adapter of this base"
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
        if len(names) > 1 and layer.sizes is not None:
            return Features(local.inputs, _size_of_part(layer_type, names, layer.sizes))
        return Features(local.inputs, _times(local.outputs, world_size))
    if isinstance(getattr(layer, "layer_name", None), str):
        gathers = getattr(layer.base_layer, "should_gather", None)
        if gathers is None:
            return Features(_times(local.inputs, world_size), local.outputs)
        # A head is row-parallel for LoRAX's adapters, but its own weight is split by output, or
        # whole in every process where the vocabulary cannot be split evenly.
        return Features(local.inputs, _times(local.outputs, world_size if gathers else 1))
    # A layer without these attributes may be one process's share.
    return local if world_size == 1 else Features(None, None)


def _size_of_part(layer_type: str, names: Sequence[str], sizes: Sequence[int]) -> int:
    if layer_type not in names or len(names) != len(sizes):
        parts = ", ".join(f"{name} ({size})" for name, size in zip(names, sizes, strict=False))
        raise UsageError(
            f"the model's layer for type {shorten(str(layer_type), 100)!r} is fused of"
            f" {shorten(parts, 200)}, and would not apply that type; correct the model's"
            " target_to_layer"
        )
    return sizes[list(names).index(layer_type)]


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
        return Features(None, None)
    # LoRAX stores float8 as [in, out].
    first, last = weight.shape if weight.dtype.itemsize == 1 else weight.shape[::-1]
    return Features(first, last, either_way=True)


def _times(size: int | None, processes: int) -> int | None:
    return None if size is None else size * processes


# -- stacking -------------------------------------------------------------------------------------


def as_stored(a: torch.Tensor) -> torch.Tensor:
    """Return A `[…, in, r]` in memory order: `[…, r, in]` for the ranks in `BY_RANK`."""
    return a.mT if a.shape[-1] in BY_RANK else a


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
    first = present[0]
    for layer in present:
        if layer.features != first.features:
            raise _uneven(first, layer)
    rank = padded_rank(max(layer.a.shape[0] for layer in present), world_size)
    shapes = (first.features[0], rank), (rank, first.features[1])
    origin = first.a.device
    in_place = share is None and origin == device
    # Each layer is made on the device of its bytes; only this process's part is moved.
    whole = _zeros(len(layers) if in_place else 1, *shapes, dtype, origin)
    result, scratch = whole if in_place else None, _Scratch()
    for place, each in enumerate(layers):
        if not is_wanted():
            raise UsageError("nothing waits for these weights any more")
        if each is None:
            continue
        a, b = (part[place if in_place else 0] for part in whole)
        if in_place:
            scratch.fill(each, a, b)
            continue
        a[:, each.a.shape[0] :].zero_()  # the layer before may have had a higher rank
        b[each.a.shape[0] :].zero_()
        scratch.fill(each, a, b)
        part_a, part_b = (a, b) if share is None else share(a, b)
        if result is None:
            result = _zeros(len(layers), part_a.shape, part_b.shape, dtype, device)
        as_stored(result[0])[place].copy_(as_stored(part_a))
        result[1][place].copy_(part_b)
    if device.type != "cpu":  # the caller may compute on any stream
        torch.accelerator.current_stream(device).synchronize()
    assert result is not None
    return StackedLayers(*result, rank, present)


def _uneven(first: Layer, other: Layer) -> IncompatibleAdapterError:
    sizes = " and ".join(
        f"{shorten(layer.name, 200)!r} ({layer.features[0]} → {layer.features[1]})"
        for layer in (first, other)
    )
    return IncompatibleAdapterError(
        f"layers of different sizes cannot be stacked: {sizes}; use AdapterLoader, which does not"
        " stack"
    )


def _share(model: AdapterModel, layer_type: str, a: torch.Tensor, b: torch.Tensor) -> Pair:
    (part_a,), (part_b,) = model.shard_lora_weights([a], [b], layer_type)
    for part, whole in ((part_a, a), (part_b, b)):
        if part.numel() not in {whole.numel(), whole.numel() / model.world_size}:
            raise IncompatibleAdapterError(
                f"{layer_type!r}: {list(part.shape)} is no even share of {list(whole.shape)} for"
                f" {model.world_size} processes; use another world size"
            )
    return part_a, part_b


class _Scratch:
    """Memory for one layer's bytes as in the file, and for their cast."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}

    def fill(self, layer: Layer, a: torch.Tensor, b: torch.Tensor) -> None:
        """Write a layer to A `[in, r]` and B `[r, out]`; leave the padding as it is."""
        rank, scale = layer.a.shape[0], layer.scale
        self._copy(layer.a, a.mT[:rank], rank)
        self._copy(layer.b, b.mT[:, :rank], rank)
        if scale == 1:
            return
        b[:rank].mul_(scale)
        # In wide types B overflows by an enormous scale only.
        if (
            abs(scale) > (1 if b.dtype == torch.float16 else 2**64)
            and not b[:rank].isfinite().all()
        ):
            unscaled = (
                layer.b.file.read(layer.b.key) if isinstance(layer.b, FileTensor) else layer.b
            )
            if unscaled.to(b.dtype).isfinite().all():  # else the infinity is in the file
                raise AdapterFormatError(
                    f"module {shorten(layer.name, 200)!r}: B times the scale {scale:g} is more than"
                    f" {b.dtype} holds; load it as float32 or bfloat16, or correct lora_alpha or"
                    " alpha_pattern in the config"
                )

    def _copy(self, source: torch.Tensor | FileTensor, target: torch.Tensor, rank: int) -> None:
        """Write a factor as it is to a target of its shape, which may be a turned view."""
        straight, alike = target.is_contiguous(), source.dtype == target.dtype
        if isinstance(source, FileTensor):
            if straight and alike and target.device.type == "cpu":
                source.file.read_into(source.key, target)
                return
            room = self._room("file", source.shape, source.dtype, source.device)
            source.file.read_into(source.key, room)
            source = room
        if not straight and not (alike and source.device == target.device):
            # In two steps: casting while transposing takes twice as long.
            source = self._room("cast", source.shape, target.dtype, target.device).copy_(source)
        if rank > _NARROW and not straight:
            target.mT.copy_(source.mT)
        else:
            target.copy_(source)

    def _room(
        self, use: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        nbytes = prod(shape) * dtype.itemsize
        memory = self._memory.pop(use, None)
        if memory is None or memory.nbytes < nbytes:
            memory = None  # free it before allocating another
            memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._memory[use] = memory
        return memory[:nbytes].view(dtype).view(shape)


def _zeros(
    layers: int, a: tuple[int, ...], b: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Pair:
    """Return A `[layers, in, r]` (contiguous `as_stored`) and B `[layers, r, out]`."""
    features, rank = a
    by_rank = rank in BY_RANK
    stored = (layers, rank, features) if by_rank else (layers, features, rank)
    memory = _memory(stored, dtype, device)
    return memory.mT if by_rank else memory, _memory((layers, *b), dtype, device)


def _memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
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
