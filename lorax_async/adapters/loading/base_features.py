"""In and out features of the base's modules, as the layers of LoRAX's models tell them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorax_async.errors import UsageError, shorten


@dataclass(frozen=True, slots=True)
class BaseFeatures:
    """In and out features of one module of the base over all processes; None if unknown.

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

    def __str__(self) -> str:
        inputs, outputs = ("?" if n is None else n for n in (self.inputs, self.outputs))
        return f"{inputs} → {outputs}"


UNKNOWN = BaseFeatures(None, None)


def base_features(layer: Any, layer_type: str, world_size: int) -> BaseFeatures:
    """Return the features of one layer type in a layer of a LoRAX model.

    LoRAX fuses modules with one input (q, k and v; gate and up) into one layer, which several layer
    types name in `target_to_layer`. Source: LoRAX, server/lorax_server/utils/layers.py.

    Raises
    ------
    UsageError
        The layer is fused of other layer types.
    """
    local = _local_features(layer.base_layer.linear)
    names = getattr(layer, "layer_names", None)
    if isinstance(names, Sequence) and not isinstance(names, str):
        outputs = _times(local.outputs, world_size)
        # With a single name LoRAX's `sizes` may be wrong: Phi's fc1 and Mllama's have the input's.
        if len(names) > 1 and layer.sizes is not None:
            outputs = _size_of_part(layer_type, names, layer.sizes)
        return BaseFeatures(local.inputs, outputs)
    if isinstance(getattr(layer, "layer_name", None), str):
        gathers = getattr(layer.base_layer, "should_gather", None)
        if gathers is None:
            return BaseFeatures(_times(local.inputs, world_size), local.outputs)
        # A head is row-parallel for LoRAX's adapters, but its own weight is split by output, or
        # whole in every process where the vocabulary cannot be split evenly.
        return BaseFeatures(local.inputs, _times(local.outputs, world_size if gathers else 1))
    if world_size > 1:  # a layer that does not say how it is split
        return UNKNOWN
    return local


def _size_of_part(layer_type: str, names: Sequence[str], sizes: Sequence[int]) -> int:
    """Return the output features of one part of a fused layer, over all processes."""
    if layer_type not in names or len(names) != len(sizes):
        parts = ", ".join(f"{name} ({size})" for name, size in zip(names, sizes, strict=False))
        raise UsageError(
            f"the model's layer for type {shorten(str(layer_type), 100)!r} is fused of"
            f" {shorten(parts, 200)}, and would not apply that type; correct the model's"
            " target_to_layer"
        )
    return sizes[list(names).index(layer_type)]


def _local_features(linear: Any) -> BaseFeatures:
    """Return what one process's linear layer says.

    The shape of a quantized weight is often that of its packed integers. AWQ's, HQQ's and GPTQ's
    layers have attributes that say the features; bitsandbytes' 4-bit weights keep their old shape.
    """
    for inputs, outputs in (("in_features", "out_features"), ("infeatures", "outfeatures")):
        found = getattr(linear, inputs, None), getattr(linear, outputs, None)
        if all(isinstance(size, int) for size in found):
            return BaseFeatures(*found)
    weight = linear.weight
    shape = getattr(getattr(weight, "quant_state", None), "shape", None)
    if shape is not None and len(shape) == 2:
        return BaseFeatures(shape[1], shape[0])
    if not (isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dim() == 2):
        return UNKNOWN
    if weight.dtype.itemsize == 1:  # LoRAX stores float8 as [in, out]
        return BaseFeatures(weight.shape[0], weight.shape[1], either_way=True)
    return BaseFeatures(weight.shape[1], weight.shape[0], either_way=True)


def _times(size: int | None, processes: int) -> int | None:
    return None if size is None else size * processes
