"""The interface of a device's pointer tables."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

Operands = tuple[Tensor, Tensor, float]
"""A `[r, in]`, B `[out, r]` (PEFT's own layout, contiguous) and the scale in double precision."""

Segment = tuple[int, int, int]
"""(start, stop, slot): rows [start, stop) use the adapter in slot."""


class Tables(Protocol):
    """The pointer tables of a device: a column per slot, a row per module of the base model.

    The tensors keep their addresses, so that a captured graph may hold them. Strides are up to the
    device. A rank of 0 means that the slot's adapter does not touch the module.
    """

    @property
    def address(self) -> Tensor:
        """Int64 `[2, modules, slots]`: the addresses of A (0) and B (1)."""

    @property
    def rank(self) -> Tensor:
        """Int32 `[modules, slots]`."""

    @property
    def scale(self) -> Tensor:
        """Float32 `[modules, slots]`."""

    def operands(self, module: int, slot: int) -> Operands | None:
        """Return views of one module's weights, or None if the rank is 0.

        The CPU reads them. A GPU uses only their sizes and dtype, and None may also mean that they
        are not ready. Returning the identical tuple again promises unchanged weights, so that a
        plan may keep what it built from them.
        """
