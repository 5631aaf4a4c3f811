"""What a kernel may know about the adapters on a device."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

Operands = tuple[Tensor, Tensor, float]
"""A `[r, in]`, B `[out, r]` (PEFT's own layout, contiguous) and the scale in double precision."""

Segment = tuple[int, int, int]
"""(start, stop, slot): the rows from start to stop, not included, are for the adapter in slot."""


class Tables(Protocol):
    """The pointer tables of a device: a column per slot, a row per module of the base model.

    The tensors keep their addresses while slots come and go, so that a captured graph may hold
    them. Their strides are the device's: where copies write a slot's column, it is contiguous. A
    rank of 0 says that the slot's adapter does not touch the module.
    """

    @property
    def address(self) -> Tensor:
        """Int64 `[2, modules, slots]`: where A (0) and B (1) begin."""

    @property
    def rank(self) -> Tensor:
        """Int32 `[modules, slots]`."""

    @property
    def scale(self) -> Tensor:
        """Float32 `[modules, slots]`."""

    def operands(self, module: int, slot: int) -> Operands | None:
        """Views of one module's weights, None where the rank is 0.

        They are read on the CPU. On a GPU only their sizes and dtype are asked for; there None may
        also say that they are not there yet.

        Tables that give the very same tuple again say by it that the weights are as they were:
        then a plan may keep what was put together of them.
        """
