"""The batches of `bench_gpu_sgmv.py`: more weights than a cache holds, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lorax_kernels import Operands, Plan


@dataclass(frozen=True, slots=True)
class Size:
    """Tokens by segment, each of an adapter of its own, on modules of these features."""

    name: str
    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    features: tuple[int, int]

    @property
    def tokens(self) -> int:
        return sum(self.rows)

    def nbytes(self, itemsize: int, members: int = 1) -> int:
        """What one call has to move: x once; A, B, and y there and back for each member."""
        inside, outside = self.features
        weights = sum(rank * (inside + outside) for rank in self.ranks)
        return itemsize * (self.tokens * inside + members * (weights + 2 * self.tokens * outside))


class Batch:
    """Stacked weights of `modules` modules, and `lorax_kernels.Tables` over them.

    a, b
        By slot: `[modules, rank, in]` and `[modules, out, rank]`.
    """

    SCALE = 2.0

    def __init__(self, size: Size, modules: int, device: torch.device, dtype: torch.dtype) -> None:
        inside, outside = size.features
        torch.manual_seed(1)
        self.size = size
        self.modules = modules
        self.x = torch.randn(size.tokens, inside, device=device).to(dtype)
        self.y = torch.randn(size.tokens, outside, device=device).to(dtype)
        self.a = [torch.randn(modules, r, inside, device=device).to(dtype) for r in size.ranks]
        self.b = [torch.randn(modules, outside, r, device=device).to(dtype) for r in size.ranks]
        self.bounds = [0, *accumulate(size.rows)]
        slots = range(len(size.rows))
        self.plan = Plan.from_segments(
            self.bounds,
            list(slots),
            device=device,
            max_rank=max(size.ranks),
            tile_rows=16 if max(size.rows) <= 16 else 32,
        )
        starts = [
            [[w[m].data_ptr() for w in each] for m in range(modules)] for each in (self.a, self.b)
        ]
        self.address = torch.tensor(starts, device=device)
        ranks = torch.tensor(size.ranks, dtype=torch.int32, device=device)
        self.rank = ranks.expand(modules, -1).contiguous()
        self.scale = torch.full((modules, len(slots)), self.SCALE, device=device)

    def operands(self, module: int, slot: int) -> Operands:
        return self.a[slot][module], self.b[slot][module], self.SCALE

    def per_segment(self, y: Tensor, module: int) -> None:
        """What a server without a kernel does: two products for each segment."""
        for slot, (start, stop) in enumerate(pairwise(self.bounds)):
            a, b, scale = self.operands(module, slot)
            y[start:stop].addmm_(self.x[start:stop] @ a.t(), b.t(), alpha=scale)

    def expected(self, module: int) -> Tensor:
        """In float64."""
        y = self.y.double()
        for slot, (start, stop) in enumerate(pairwise(self.bounds)):
            a, b, scale = self.operands(module, slot)
            y[start:stop] += scale * (self.x[start:stop].double() @ a.double().t() @ b.double().t())
        return y
