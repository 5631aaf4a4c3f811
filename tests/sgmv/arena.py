"""Memory in which whatever nobody put there is a NaN, and in which every stray write shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64
GUARD = 1 << 12
MARGIN = 1 << 16
"""Bytes at both ends: a kernel that reads far beyond its operands still reads NaN."""

_NAN = 0xFF
"""As every byte of a number: NaN in float32, float16 and bfloat16."""


class Arena:
    """Tensors one after the other in one buffer of a device, with guards between them."""

    def __init__(self, nbytes: int, device: torch.device | str) -> None:
        self.memory = torch.full((nbytes + 2 * MARGIN,), _NAN, dtype=torch.uint8, device=device)
        self._next = MARGIN + -self.memory.data_ptr() % ALIGNMENT
        self._before = self.memory
        self._spans: list[tuple[int, int]] = []

    def room(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """NaN, aligned to 64 bytes."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        start, self._next = self._next, self._next + -(-(nbytes + GUARD) // ALIGNMENT) * ALIGNMENT
        assert self._next <= len(self.memory) - MARGIN, "the arena is too small for this case"
        self._spans.append((start, start + nbytes))
        return self.memory[start : start + nbytes].view(dtype).view(shape)

    def put(self, values: Tensor) -> Tensor:
        """A copy of them."""
        view = self.room(*values.shape, dtype=values.dtype)
        view.copy_(values)
        return view

    def owned(self) -> Tensor:
        """Bool, by byte of the memory: where tensors are."""
        owned = torch.zeros(len(self.memory), dtype=torch.bool)
        for start, stop in self._spans:
            owned[start:stop] = True
        return owned

    def remember(self) -> None:
        self._before = self.memory.clone()

    def changed_outside(self, views: Sequence[Tensor]) -> int:
        """Bytes that are not in `views` and not what they were."""
        different = self.memory != self._before
        for view in views:
            start = view.data_ptr() - self.memory.data_ptr()
            different[start : start + view.numel() * view.element_size()] = False
        return int(different.sum())
