"""One layer type's weights, put together in one pass: read, cast, turned, scaled, padded, stacked.

Every layer is written straight into the result. Beside it there is never more than one layer.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import dataclass
from math import prod

import torch

from lorax_async.adapters.base import AdapterModel
from lorax_async.adapters.loading.layers import Factor, Layer, TypeLayers
from lorax_async.adapters.loading.threads import GoOn
from lorax_async.adapters.loading.weights_file import WeightsFile
from lorax_async.errors import (
    AdapterFormatError,
    CapacityError,
    IncompatibleAdapterError,
    UsageError,
    shorten,
)

BY_RANK = range(16, 129)
"""Local ranks whose A is stored as `[r, in]`. Source: LoRAX, `orient_for_rank` in utils/sgmv.py."""

_HUGE_PAGE = 2 << 20
# Up to here torch's ordinary copy turns a matrix faster than its blocked one (measured: 6.5 against
# 2.4 GB/s at rank 16, 2.3 against 3.2 at 128).
_NARROW = 32

Pair = tuple[torch.Tensor, torch.Tensor]
"""A `[in, r]` and B `[r, out]`."""


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """All layers of one type: A `[layers, in, r]`, B `[layers, r, out]`.

    In memory A is `[layers, r, in]` if its rank is in `BY_RANK`; then `a` is a view of that.
    """

    a: torch.Tensor
    b: torch.Tensor

    @property
    def stored_a(self) -> torch.Tensor:
        """A as it lies in memory: contiguous."""
        return self.a.mT if self.a.shape[2] in BY_RANK else self.a

    @classmethod
    def zeros(
        cls, layers: int, a: torch.Size, b: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> Stack:
        """For factors of these shapes, `[in, r]` and `[r, out]`."""
        features, rank = a
        by_rank = rank in BY_RANK
        stored = (layers, rank, features) if by_rank else (layers, features, rank)
        memory = _zeros(stored, dtype, device)
        return cls(memory.mT if by_rank else memory, _zeros((layers, *b), dtype, device))

    def put(self, place: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Copy one layer's factors, `[in, r]` and `[r, out]`, from whichever device."""
        stored = self.stored_a[place]
        stored.copy_(a.mT if a.shape[1] in BY_RANK else a)
        self.b[place].copy_(b)


def stack_layers(
    found: TypeLayers, model: AdapterModel | None, layer_type: str, go_on: GoOn
) -> Stack:
    """Make what `found` describes. Blocks; between layers it asks whether to go on.

    With several processes, `model` says which part of each layer is this one's.

    Raises
    ------
    IncompatibleAdapterError
        The parts do not make up the whole.
    AdapterFormatError
        The scale takes B beyond what its dtype holds.
    CapacityError
        There is no memory for the result.
    FetchError, IntegrityError
        The file cannot be read.
    """
    if found.world_size == 1 and found.origin == found.device:
        stack = _stack_in_place(found, go_on)
    else:
        stack = _stack_by_layer(found, model, layer_type, go_on)
    if found.device.type != "cpu":  # the caller may compute on any stream
        torch.accelerator.current_stream(found.device).synchronize()
    return stack


def _stack_in_place(found: TypeLayers, go_on: GoOn) -> Stack:
    result = _whole(len(found.layers), found, found.device)
    scratch = _Scratch()
    for place, layer in enumerate(found.layers):
        _require(go_on)
        if layer is not None:
            scratch.fill(layer, result.a[place], result.b[place])
    return result


def _stack_by_layer(
    found: TypeLayers, model: AdapterModel | None, layer_type: str, go_on: GoOn
) -> Stack:
    """Each layer is made where its bytes come from, and this process's part of it moved on."""
    result: Stack | None = None
    whole = _whole(1, found, found.origin)
    scratch = _Scratch()
    for place, layer in enumerate(found.layers):
        _require(go_on)
        if layer is None:
            continue
        whole.a[0, :, layer.rank :].zero_()  # the layer before may have had a higher rank
        whole.b[0, layer.rank :].zero_()
        scratch.fill(layer, whole.a[0], whole.b[0])
        a, b = whole.a[0], whole.b[0]
        if model is not None and found.world_size > 1:
            a, b = _part((a, b), model, layer_type)
        if result is None:
            result = Stack.zeros(len(found.layers), a.shape, b.shape, found.dtype, found.device)
        result.put(place, a, b)
    assert result is not None
    return result


def _whole(layers: int, found: TypeLayers, device: torch.device) -> Stack:
    (features_in, features_out), rank = found.features, found.padded_rank
    a, b = torch.Size((features_in, rank)), torch.Size((rank, features_out))
    return Stack.zeros(layers, a, b, found.dtype, device)


def _part(whole: Pair, model: AdapterModel, layer_type: str) -> Pair:
    (a,), (b,) = model.shard_lora_weights([whole[0]], [whole[1]], layer_type)
    for part, all_of_it in zip((a, b), whole, strict=True):
        if part.numel() not in {all_of_it.numel(), all_of_it.numel() / model.world_size}:
            raise IncompatibleAdapterError(
                f"{layer_type!r}: {list(part.shape)} is no even share of {list(all_of_it.shape)}"
                f" for {model.world_size} processes; use another world size"
            )
    return a, b


def _require(go_on: GoOn) -> None:
    if not go_on():
        raise UsageError("nobody waits for these weights any more")


class _Scratch:
    """Room for one layer's bytes as they lie in the file, and for their cast."""

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}

    def fill(self, layer: Layer, a: torch.Tensor, b: torch.Tensor) -> None:
        """Write a layer to A `[in, r]` and B `[r, out]`, of which the padding is left as it is."""
        rank = layer.rank
        self._copy(layer.a, a.mT[:rank], rank)
        self._copy(layer.b, b.mT[:, :rank], rank)
        if layer.scale != 1:
            b[:rank].mul_(layer.scale)
            if _may_overflow(layer.scale, b.dtype) and not b[:rank].isfinite().all():
                self._require_own_infinities(layer, b.dtype)

    def _require_own_infinities(self, layer: Layer, dtype: torch.dtype) -> None:
        """Raise unless B was infinite without the scale, which is for its author to know."""
        content = layer.b.content
        own = content.read(layer.b.key) if isinstance(content, WeightsFile) else content
        if own.to(dtype).isfinite().all():
            raise AdapterFormatError(
                f"module {shorten(layer.name, 200)!r}: B times the scale {layer.scale:g} is more"
                f" than {dtype} holds; load it as float32 or bfloat16, or correct lora_alpha or"
                " alpha_pattern in the config"
            )

    def _copy(self, factor: Factor, target: torch.Tensor, rank: int) -> None:
        """Write a factor as it is to a target of its shape, which may be a turned view."""
        content, straight = factor.content, target.is_contiguous()
        if isinstance(content, WeightsFile):
            if straight and target.device.type == "cpu" and factor.dtype == target.dtype:
                content.read_into(factor.key, target)
                return
            source = self._room("file", factor.shape, factor.dtype, torch.device("cpu"))
            content.read_into(factor.key, source)
        else:
            source = content.detach()
        alike = (source.dtype, source.device) == (target.dtype, target.device)
        if not (straight or alike):  # one at a time: casting while turning takes twice as long
            source = self._room("cast", factor.shape, target.dtype, target.device).copy_(source)
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
            memory = None  # before there is another
            memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._memory[use] = memory
        return memory[:nbytes].view(dtype).view(shape)


def _may_overflow(scale: float, dtype: torch.dtype) -> bool:
    """Return whether to look at B: in wide types it overflows by an enormous scale only."""
    return abs(scale) > (1 if dtype == torch.float16 else 2**64)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the host in huge pages: to fault small ones in takes longer than to fill them."""
    nbytes = prod(shape) * dtype.itemsize
    try:
        if device.type != "cpu" or nbytes < _HUGE_PAGE:
            return torch.zeros(shape, dtype=dtype, device=device)
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, MemoryError, RuntimeError) as error:
        raise CapacityError(f"no {nbytes:,} bytes of {device} memory for weights") from error
    with suppress(OSError):  # a wish, which a kernel without huge pages refuses
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
