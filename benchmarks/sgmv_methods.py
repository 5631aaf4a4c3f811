"""The ways to multiply a mixed batch, each fixed, that `lorax_kernels.apply` is held against.

Each has its weights in the form it likes best, made before the timer, and memory to write into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lorax_kernels import Operands, Plan, Thresholds, apply

SCALE = 2.0

SKEWED = (128, 64, 32, 16, 4, 2, *[1] * 10)

BATCHES: dict[str, tuple[int, ...]] = {
    "1/1": (1,),
    "8/8": (1,) * 8,
    "32/32": (1,) * 32,
    "128/8": (16,) * 8,
    "512/8": (64,) * 8,
    "512/1": (512,),
    "256/16 skewed": SKEWED,
}
"""Tokens/adapters, and how many rows each adapter has."""

GATHERED_BYTES = 256 << 20
"""Weights gathered for each token by itself: more than this is not tried."""

Method = Callable[[], object]


class WrongNumbersError(AssertionError):
    """A method does not compute what float64 says: its time means nothing."""


class NotTriedError(Exception):
    """Why a method has no time for a shape."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One cell of the grid. `hidden` is both in and out."""

    dtype: torch.dtype
    batch: str
    hidden: int
    rank: int

    @property
    def rows(self) -> tuple[int, ...]:
        return BATCHES[self.batch]

    def __str__(self) -> str:
        name = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}[self.dtype]
        return f"{name} {self.batch}, hidden {self.hidden}, rank {self.rank}"


class OneModule:
    """Tables of one module, a slot per adapter; satisfies `lorax_kernels.Tables`."""

    def __init__(self, operands: list[Operands]) -> None:
        self.address = torch.zeros(2, 1, len(operands), dtype=torch.int64)
        self.rank = torch.tensor([[a.shape[0] for a, _, _ in operands]], dtype=torch.int32)
        self.scale = torch.tensor([[scale for _, _, scale in operands]])
        self._operands = operands

    def operands(self, module: int, slot: int) -> Operands:
        assert module == 0
        return self._operands[slot]


class Work:
    """The numbers of one shape: `x`, `y` and the adapters' operands, drawn with a fixed seed."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.bounds = [0, *accumulate(shape.rows)]
        generator = torch.Generator().manual_seed(5)

        def draw(*size: int) -> Tensor:
            return torch.empty(size).uniform_(-1, 1, generator=generator).to(shape.dtype)

        tokens, hidden, rank = self.bounds[-1], shape.hidden, shape.rank
        self.x, self.y = draw(tokens, hidden), draw(tokens, hidden)
        self.a = [draw(rank, hidden) for _ in shape.rows]
        self.b = [draw(hidden, rank) for _ in shape.rows]
        self.before = self.y.clone()

    def spans(self) -> list[tuple[int, int]]:
        return list(pairwise(self.bounds))

    def reset(self) -> None:
        self.y.copy_(self.before)

    def delta(self) -> tuple[Tensor, Tensor]:
        """What is to be added to `y`, in float64, and the sum of the magnitudes in it."""
        parts = []
        for (start, stop), a, b in zip(self.spans(), self.a, self.b, strict=True):
            x = self.x[start:stop].double()
            exact = SCALE * (x @ a.double().T @ b.double().T)
            size = SCALE * (x.abs() @ a.double().abs().T @ b.double().abs().T)
            parts.append((exact, size))
        exact, size = (torch.cat(each) for each in zip(*parts, strict=True))
        return exact, size

    def check(self, name: str, expected: tuple[Tensor, Tensor]) -> None:
        """Raise WrongNumbersError if `y`, after one call, is further off than roundings explain."""
        exact, size = expected
        error = (self.y.double() - self.before.double() - exact).abs()
        allowed = 4 * torch.finfo(self.shape.dtype).eps * (size + self.before.double().abs())
        if not bool((error <= allowed).all()):
            raise WrongNumbersError(f"{name} is wrong for {self.shape}")


def ours(work: Work, thresholds: Thresholds) -> Method:
    operands: list[Operands] = [(a, b, SCALE) for a, b in zip(work.a, work.b, strict=True)]
    slots = list(range(len(operands)))
    plan = Plan.from_segments(work.bounds, slots, thresholds=thresholds)
    tables = OneModule(operands)
    return lambda: apply(work.y, work.x, plan, 0, tables)


def per_segment(work: Work) -> Method:
    """`mm` and `addmm_` on views that were made before."""
    spans = work.spans()
    xs = [work.x[start:stop] for start, stop in spans]
    ys = [work.y[start:stop] for start, stop in spans]
    hs = [x.new_empty(len(x), work.shape.rank) for x in xs]
    each = list(zip(xs, ys, hs, [a.t() for a in work.a], [b.t() for b in work.b], strict=True))

    def run() -> None:
        for x, y, h, a_t, b_t in each:
            torch.mm(x, a_t, out=h)
            y.addmm_(h, b_t, alpha=SCALE)

    return run


def dense(work: Work) -> Method:
    """One product over all adapters; a mask keeps what is a row's own."""
    a_t, b_t = torch.cat(work.a).t(), torch.cat(work.b, 1).t()
    others = torch.ones(len(work.x), a_t.shape[1], dtype=torch.bool)
    for at, (start, stop) in enumerate(work.spans()):
        others[start:stop, at * work.shape.rank : (at + 1) * work.shape.rank] = False
    h = work.x.new_empty(others.shape)

    def run() -> None:
        torch.mm(work.x, a_t, out=h)
        work.y.addmm_(h.masked_fill_(others, 0), b_t, alpha=SCALE)

    return run


def grouped(work: Work) -> Method:
    """`torch._grouped_mm`; it has no `out`."""
    function: Any = getattr(torch.nn.functional, "grouped_mm", getattr(torch, "_grouped_mm", None))
    if function is None:
        raise NotTriedError("this torch has no grouped_mm")
    a, b = torch.stack(work.a).transpose(1, 2), torch.stack(work.b).transpose(1, 2)
    ends = torch.tensor(work.bounds[1:], dtype=torch.int32)
    try:
        function(function(work.x, a, offs=ends), b, offs=ends)
    except (RuntimeError, ValueError) as error:
        raise NotTriedError(f"grouped_mm: {error}") from error
    return lambda: work.y.add_(function(function(work.x, a, offs=ends), b, offs=ends), alpha=SCALE)


def gather(work: Work) -> Method:
    """Each token's own copy of its adapter's weights, and `bmm`."""
    a, b = torch.stack(work.a), torch.stack(work.b)
    nbytes = 2 * len(work.x) * a[0].nbytes
    if nbytes > GATHERED_BYTES:
        raise NotTriedError(f"{nbytes >> 20} MiB would be gathered for each call")
    rows = torch.tensor(work.shape.rows)
    of = torch.arange(len(rows)).repeat_interleave(rows)
    a_of, b_of = a.new_empty(len(of), *a.shape[1:]), b.new_empty(len(of), *b.shape[1:])

    def run() -> None:
        torch.index_select(a, 0, of, out=a_of)
        torch.index_select(b, 0, of, out=b_of)
        h = torch.bmm(a_of, work.x.unsqueeze(2))
        work.y.add_(torch.bmm(b_of, h).squeeze(2), alpha=SCALE)

    return run


FIXED: dict[str, Callable[[Work], Method]] = {
    "per segment": per_segment,
    "dense + mask": dense,
    "grouped_mm": grouped,
    "gather": gather,
}
