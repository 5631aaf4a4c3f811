"""One module's weights for the segments of a plan, looked up and viewed once."""

from __future__ import annotations

from math import frexp
from typing import NamedTuple

from torch import Tensor

from lorax_kernels.tables import Operands, Segment, Tables


class Piece(NamedTuple):
    """A segment whose adapter touches the module. Its rows are part `part` of `Work.lengths`."""

    part: int
    start: int
    stop: int
    slot: int
    a: Tensor
    a_t: Tensor
    b_t: Tensor
    scale: float
    scale_is_exact: bool
    """A power of two: to multiply by it rounds nothing."""

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class Work:
    """The pieces of one module, and the lengths into which they cut the batch's rows.

    `adapters` are a piece of each slot.
    `again` says that a second call found the operands as they were: what is put together of them
    will be of use.
    """

    __slots__ = ("adapters", "again", "lengths", "module", "pieces", "tables", "used")

    def __init__(
        self, tokens: int, segments: tuple[Segment, ...], module: int, tables: Tables
    ) -> None:
        self.module, self.tables, self.again = module, tables, False
        slots = dict.fromkeys(slot for _, _, slot in segments)
        self.used = {slot: tables.operands(module, slot) for slot in slots}
        self.lengths: list[int] = []
        pieces, at = [], 0
        for start, stop, slot in segments:
            operands = self.used[slot]
            if operands is None:
                continue
            if at < start:
                self.lengths.append(start - at)
            pieces.append(_piece(len(self.lengths), (start, stop, slot), operands))
            self.lengths.append(stop - start)
            at = stop
        if at < tokens:
            self.lengths.append(tokens - at)
        self.pieces = tuple(pieces)
        self.adapters = tuple({piece.slot: piece for piece in pieces}.values())

    def stands(self) -> bool:
        """Whether the tables still give the very same operands."""
        operands, module = self.tables.operands, self.module
        return all(operands(module, slot) is known for slot, known in self.used.items())

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Views of `rows` `[tokens, …]`, by the lengths."""
        return (rows,) if len(self.lengths) == 1 else rows.split_with_sizes(self.lengths)

    def check(self, *, x: Tensor | None = None, y: Tensor | None = None) -> None:
        """Raise ValueError unless `x` `[tokens, in]` and `y` `[tokens, out]` fit all operands."""
        for piece in self.adapters:
            a, b_t = piece.a, piece.b_t
            if not (_fits(x, a) and _fits(y, b_t) and a.dtype == b_t.dtype):
                pairs = [("x", x, a), ("y", y, b_t)]
                given = [(name, one, of) for name, one, of in pairs if one is not None]
                wanted = [f"{name} [tokens, {of.shape[1]}] in {of.dtype}" for name, _, of in given]
                got = [f"{name} {list(one.shape)} in {one.dtype}" for name, one, _ in given]
                raise ValueError(f"expected {' and '.join(wanted)}, got {' and '.join(got)}")

    def takes(self, x: Tensor) -> bool:
        """Whether `x` is what the module is given; not so where the batch has no adapter of it."""
        return bool(self.adapters) and all(_fits(x, piece.a) for piece in self.adapters)


def _fits(rows: Tensor | None, weights: Tensor) -> bool:
    return rows is None or (rows.shape[1] == weights.shape[1] and rows.dtype == weights.dtype)


def _piece(part: int, segment: Segment, operands: Operands) -> Piece:
    a, b, scale = operands
    return Piece(part, *segment, a, a.t(), b.t(), scale, abs(frexp(scale)[0]) == 0.5)
