"""One module's weights for the segments of a plan, looked up and viewed once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from lorax_kernels.checks import MAX_SCALE, check_apart, check_scale
from lorax_kernels.tables import Segment, Tables

if TYPE_CHECKING:
    from lorax_kernels.dense import Dense
    from lorax_kernels.segments import Step


class Piece(NamedTuple):
    """A segment whose adapter touches the module. Its rows are part `part` of `Work.lengths`."""

    part: int
    start: int
    stop: int
    slot: int
    a: Tensor
    b: Tensor
    scale: float

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class Work:
    """The pieces of one module, and the lengths into which they cut the batch's rows.

    `adapters` are a piece of each slot. `again` says that a second call found the operands as they
    were: what is put together of them will be of use. `steps` and `dense` are the ways to compute
    it, as far as they are prepared; `decided` says that which need not be asked again. `group` is
    one that was checked.
    """

    __slots__ = (
        *("adapters", "again", "decided", "dense", "group", "lengths", "module", "pieces"),
        *("_expected", "_used", "_weights", "steps", "tables"),
    )

    def __init__(
        self, tokens: int, segments: tuple[Segment, ...], module: int, tables: Tables
    ) -> None:
        self.module, self.tables, self.again, self.decided = module, tables, False, False
        self.steps: tuple[Step, ...] | None = None
        self.dense: Dense | None = None
        self.group: Sequence[int] = ()
        used = {slot: tables.operands(module, slot) for _, _, slot in segments}
        self._used = tuple(used.items())
        self.lengths: list[int] = []
        pieces, at = [], 0
        for start, stop, slot in segments:
            operands = used[slot]
            if operands is None:
                continue
            if at < start:
                self.lengths.append(start - at)
            pieces.append(Piece(len(self.lengths), start, stop, slot, *operands))
            self.lengths.append(stop - start)
            at = stop
        if at < tokens:
            self.lengths.append(tokens - at)
        self.pieces = tuple(pieces)
        self.adapters = tuple({piece.slot: piece for piece in pieces}.values())
        self._weights = _extents(
            weights for piece in self.adapters for weights in (piece.a, piece.b)
        )
        self._expected = self._expectation(tokens)

    def stands(self) -> bool:
        """Whether the tables still give the very same operands."""
        operands, module = self.tables.operands, self.module
        for slot, known in self._used:  # noqa: SIM110 - a third of a generator's time
            if operands(module, slot) is not known:
                return False
        return True

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Views of `rows` `[tokens, …]`, by the lengths."""
        return (rows,) if len(self.lengths) == 1 else rows.split_with_sizes(self.lengths)

    def fits(self, y: Tensor, x: Tensor) -> bool:
        """Return whether `x` and `y` are as :func:`lorax_kernels.apply` wants them; for each call.

        False, too, for operands that do not fit each other: :meth:`check` says what is wrong.
        """
        if self._expected is None:
            return False
        x_shape, y_shape, dtype, x_bytes, y_bytes = self._expected
        if not (
            x.shape == x_shape
            and y.shape == y_shape
            and x.dtype == dtype
            and y.dtype == dtype
            and x.is_cpu
            and y.is_cpu
            and x.is_contiguous()
            and y.is_contiguous()
        ):
            return False
        x_begin, y_begin = x.data_ptr(), y.data_ptr()
        y_end = y_begin + y_bytes
        if x_begin < y_end and y_begin < x_begin + x_bytes:
            return False
        begins, ends = self._weights
        at = bisect_right(begins, y_begin)
        return (not at or ends[at - 1] <= y_begin) and (at == len(begins) or begins[at] >= y_end)

    def check(
        self, *, x: Tensor | None = None, y: Tensor | None = None, written: Tensor | None = None
    ) -> None:
        """Raise ValueError unless `x` `[tokens, in]` and `y` `[tokens, out]` fit all operands.

        `written`, one of them or the planes between the products, shares no memory with weights.
        """
        for piece in self.adapters:
            check_scale(self.module, piece.slot, piece.scale)
            a, b_t = piece.a, piece.b.t()
            if not (_fits(x, a) and _fits(y, b_t) and a.dtype == b_t.dtype):
                pairs = [("x", x, a), ("y", y, b_t)]
                given = [(name, one, of) for name, one, of in pairs if one is not None]
                wanted = [f"{name} [tokens, {of.shape[1]}] in {of.dtype}" for name, _, of in given]
                got = [f"{name} {list(one.shape)} in {one.dtype}" for name, one, _ in given]
                raise ValueError(f"expected {' and '.join(wanted)}, got {' and '.join(got)}")
            if written is not None:
                for weights in (piece.a, piece.b):
                    check_apart("the output", written, f"the weights of slot {piece.slot}", weights)

    def takes(self, x: Tensor) -> bool:
        """Whether `x` is what the module is given; not so where the batch has no adapter of it."""
        return bool(self.adapters) and all(_fits(x, piece.a) for piece in self.adapters)

    def _expectation(
        self, tokens: int
    ) -> tuple[tuple[int, int], tuple[int, int], object, int, int] | None:
        """Return the shapes of `x` and `y`, their dtype, and the bytes of each.

        None if the adapters do not agree, or have a scale that :meth:`check` refuses.
        """
        found = {
            ((tokens, piece.a.shape[1]), (tokens, piece.b.shape[0]), piece.a.dtype)
            for piece in self.adapters
        }
        sound = all(
            piece.a.dtype == piece.b.dtype and abs(piece.scale) <= MAX_SCALE
            for piece in self.adapters
        )
        if len(found) != 1 or not sound:
            return None
        x_shape, y_shape, dtype = found.pop()
        x_bytes, y_bytes = (prod(shape) * dtype.itemsize for shape in (x_shape, y_shape))
        return x_shape, y_shape, dtype, x_bytes, y_bytes


def _fits(rows: Tensor | None, weights: Tensor) -> bool:
    return rows is None or (rows.shape[1] == weights.shape[1] and rows.dtype == weights.dtype)


def _extents(weights: Iterable[Tensor]) -> tuple[list[int], list[int]]:
    """Return where the weights' memory begins and ends, in ascending order and without overlap."""
    begins: list[int] = []
    ends: list[int] = []
    for begin, end in sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in weights):
        if ends and begin <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            begins.append(begin)
            ends.append(end)
    return begins, ends
