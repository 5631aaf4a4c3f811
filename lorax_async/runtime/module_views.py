"""The weights of an adapter on its device, module by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from lorax_async.core.layout import ModelLayout
from lorax_async.core.moves import Row
from lorax_async.core.peft_names import Part
from lorax_async.errors import UsageError
from lorax_async.io.ports import Device
from lorax_async.runtime.tenancy import Lease


@dataclass(frozen=True, slots=True, eq=False)
class ModuleWeights:
    """One module's part of an adapter: the delta is `scale * (x @ a.T) @ b.T`.

    Of an embedding `x @ a.T` is `a.T[ids]`. With a bias the delta is `scale * ((x @ a.T) @ b.T +
    bias)`. With a magnitude the rows of the base's weight plus delta are scaled to that length.

    Attributes
    ----------
    a, b
        `[rank, in]` and `[out, rank]`: views on the device, valid while the handle is held. Of a
        sharded loader `in` and `out` are the shard's (`loader.held_layout`).
    scale, rank
        As PEFT computes them; the rank is the true one, without padding.
    bias, magnitude
        `[out]`, in the file's dtype: lora_bias's and DoRA's; None where the adapter has none. Of a
        sharded loader's row-parallel module they are whole: for after the all-reduce, once.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    rank: int
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


class ModuleViews(Mapping[str, ModuleWeights]):
    """By the layout's names, for the layers that are ready; each look checks the lease."""

    def __init__(self, lease: Lease, device: Device, layout: ModelLayout) -> None:
        self._lease = lease
        self._device = device
        self._layout = layout
        self._rows: dict[int, Row] = {
            row.module: row for group in lease.tenancy.plan.groups for row in group.rows
        }

    def __getitem__(self, name: str) -> ModuleWeights:
        self._lease.check()
        module = self._layout.index(name)
        if module not in self._rows:
            raise KeyError(name)
        row = self._rows[module]
        layer = self._layout.modules[module].layer
        if not self._lease.tenancy.is_ready(layer):
            raise UsageError(f"layer {layer} is not here yet; await layer_ready({layer})")
        operands = self._device.operands(module, self._lease.tenancy.grant.slot.index)
        assert operands is not None
        a, b, _ = operands
        bias, magnitude = self._vector(module, Part.BIAS), self._vector(module, Part.MAGNITUDE)
        weights = (a[: row.rank], b[:, : row.rank])
        return ModuleWeights(*weights, row.scale, row.rank, bias, magnitude)

    def _vector(self, module: int, part: Part) -> torch.Tensor | None:
        vectors = self._lease.tenancy.vectors
        return None if vectors is None else vectors.view(self._device, module, part)

    def __iter__(self) -> Iterator[str]:
        return (self._layout.modules[module].name for module in self._rows)

    def __len__(self) -> int:
        return len(self._rows)
