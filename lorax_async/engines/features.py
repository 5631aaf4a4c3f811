"""What adapters have that kernels do not know: embeddings, biases, magnitudes.

The order of operations is that of PEFT, in `lora.Linear`, `lora.Embedding` and `lora.dora`: in
float32 a batch of one adapter gives its bits. There is no dropout, for adapters answer only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import embedding, linear

from lorax_async.core.layout import Module
from lorax_async.core.peft_names import Part
from lorax_async.errors import UsageError
from lorax_async.io.ports import Device
from lorax_async.runtime.vectors import Vectors
from lorax_kernels import Operands, Tables

_AT_A_TIME = 1 << 24
"""Elements of a base's weight that are measured at a time: 64 MiB in float32."""

Segment = tuple[int, int, int]
"""(start, stop, slot), as a plan's."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapted:
    """A module of the model, what the layout says of it, and its place there.

    `group` are the places of the modules that are given the same input, or nothing.
    """

    base: nn.Module
    module: Module
    index: int
    group: tuple[int, ...] = ()


class Factors:
    """What DoRA multiplies outputs with: the magnitude of each row of a weight, over its length.

    Computed at the first use from the base's weight, float32 `[out]`, and kept until the adapter
    leaves its slot. In any thread.
    """

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Vectors, dict[int, torch.Tensor]] = WeakKeyDictionary()
        self._lock = Lock()

    def of(
        self, vectors: Vectors, magnitude: torch.Tensor, operands: Operands, adapted: Adapted
    ) -> torch.Tensor:
        with self._lock:
            known = self._known.setdefault(vectors, {})
            factor = known.get(adapted.index)
            if factor is None:
                factor = _factor(magnitude, operands, adapted)
                if factor.device.type != "cpu":  # the next one may compute on another stream
                    torch.accelerator.current_stream(factor.device).synchronize()
                known[adapted.index] = factor
        return factor

    def forget(self) -> None:
        with self._lock:
            self._known.clear()


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """Adds to modules' outputs what is not A and B of a linear module.

    `vectors` are those of the batch's adapters that have some, by slot. Such an adapter has them
    for each of its modules.
    """

    device: Device
    tables: Tables
    factors: Factors
    vectors: Mapping[int, Vectors]

    @torch.no_grad()
    def add(
        self, y: torch.Tensor, x: torch.Tensor, segments: Iterable[Segment], adapted: Adapted
    ) -> None:
        """Add each segment's adapter to `y` `[tokens, out]`, in place.

        `x` is `[tokens, in]`, or the ids `[tokens]` that an embedding was given. Raises ValueError
        for a dtype that is not the adapter's, `UsageError` if the base's weight is not there.
        """
        for start, stop, slot in segments:
            operands = self.tables.operands(adapted.index, slot)
            if operands is None:
                continue
            if y.dtype != operands[0].dtype:
                raise ValueError(f"expected y in {operands[0].dtype}, got {y.dtype}")
            add = self._add_embedded if adapted.module.embedding else self._add_linear
            add(y[start:stop], x[start:stop], slot, operands, adapted)

    def _add_linear(
        self, y: torch.Tensor, x: torch.Tensor, slot: int, operands: Operands, adapted: Adapted
    ) -> None:
        a, b, scale = operands
        bias = self._vector(slot, Part.BIAS, adapted)
        delta = linear(linear(x, a), b, None if bias is None else bias.to(b.dtype))
        factor = self._factor(slot, operands, adapted)
        if factor is None:
            y.add_(delta.mul_(scale))
            return
        own = getattr(adapted.base, "bias", None)
        y.add_((factor - 1) * (y if own is None else y - own) + factor * delta * scale)

    def _add_embedded(
        self, y: torch.Tensor, ids: torch.Tensor, slot: int, operands: Operands, adapted: Adapted
    ) -> None:
        a, b, scale = operands
        delta, factor = embedding(ids, a.T) @ b.T, self._factor(slot, operands, adapted)
        if delta.dtype != y.dtype:
            raise ValueError(f"expected y in {y.dtype}, and the adapter's product is {delta.dtype}")
        delta = (delta if factor is None else factor * delta) * scale
        scale_of_all = getattr(adapted.base, "embed_scale", None)
        if scale_of_all is not None:
            # The base's output is scaled already.
            delta *= torch.as_tensor(scale_of_all, dtype=delta.dtype, device=delta.device)
        y.copy_((y if factor is None else factor * y) + delta)

    def _factor(self, slot: int, operands: Operands, adapted: Adapted) -> torch.Tensor | None:
        vectors, magnitude = self.vectors.get(slot), self._vector(slot, Part.MAGNITUDE, adapted)
        if vectors is None or magnitude is None:
            return None
        return self.factors.of(vectors, magnitude, operands, adapted)

    def _vector(self, slot: int, part: Part, adapted: Adapted) -> torch.Tensor | None:
        vectors = self.vectors.get(slot)
        return None if vectors is None else vectors.view(self.device, adapted.index, part)


def _factor(magnitude: torch.Tensor, operands: Operands, adapted: Adapted) -> torch.Tensor:
    """`magnitude / |weight + scale * B @ A|`, where lengths are of rows of `[out, in]`."""
    weight, (a, b, scale) = _rows(adapted), operands
    step = max(1, _AT_A_TIME // weight.shape[1])
    lengths = []
    for some, b_rows in zip(torch.split(weight, step), torch.split(b, step), strict=True):
        # In the memory order of the weight: quick to add, and PEFT's order of summation.
        left, right = b_rows.float(), a.float()
        whole = left @ right if some.is_contiguous() else (right.T @ left.T).T
        lengths.append(torch.linalg.norm(whole.mul_(scale).add_(some), dim=1))
    return magnitude.float() / torch.cat(lengths)


def _rows(adapted: Adapted) -> torch.Tensor:
    """The base's weight as `[out, in]`."""
    module, weight = adapted.module, adapted.base.weight
    assert isinstance(weight, torch.Tensor)  # the model was attached
    rows = weight.T if module.transposed or module.embedding else weight
    # Any other type is a packed one's, whatever dtype and shape it says it has.
    plain = type(weight) in {torch.Tensor, nn.Parameter} and weight.is_floating_point()
    if plain and not weight.is_meta and rows.shape == (module.out_features, module.in_features):
        return rows
    raise UsageError(
        f"DoRA scales the rows of the base's weight, and that of module {module.name!r} is a"
        f" {type(weight).__name__} of {weight.dtype} on {weight.device}; give the model its plain"
        " weights, or merge the adapter into its base"
    )
