"""One module's weights for the segments of a plan, looked up once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple, Protocol

from torch import Tensor

from lorax_kernels.checks import MAX_SCALE, check_apart, check_scale
from lorax_kernels.tables import Segment, Tables


class SegmentShrink(NamedTuple):
    """Compute `out = x @ a_t`, or `out = a @ x.T` if `a` is set. `h` is `out`, row by row."""

    a: Tensor | None
    a_t: Tensor
    out: Tensor
    h: Tensor


class SegmentExpand(NamedTuple):
    """Compute `y += scale * (h @ b_t)` for part `part` of the rows, in two steps with `delta`."""

    part: int
    b_t: Tensor
    scale: float
    delta: Tensor | None


SegmentStep = tuple[SegmentShrink, SegmentExpand]


class Product(Protocol):
    """A prepared way to compute all segments at once."""

    def apply(self, y: Tensor, x: Tensor) -> None:
        """Add each row's adapter to `y`."""


class AdapterSegment(NamedTuple):
    """A segment whose adapter has weights for the module; part `part` of `ModuleBatch.lengths`."""

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


class ModuleBatch:
    """A batch as one module sees it: its segments, and the lengths of all parts of the rows.

    `adapters` has one segment per slot. `is_reused` is set once a second call finds the operands
    unchanged: only then are combined weights worth building. `steps` and `product` are the prepared
    ways to compute it; `is_decided` is set once the choice is final. `group` was checked.
    """

    __slots__ = (
        *(
            "adapters",
            "group",
            "is_decided",
            "is_reused",
            "lengths",
            "module",
            "product",
            "segments",
        ),
        *("_expected", "_used", "_weights", "steps", "tables"),
    )

    def __init__(self, tokens: int, rows: tuple[Segment, ...], module: int, tables: Tables) -> None:
        self.module, self.tables, self.is_reused, self.is_decided = module, tables, False, False
        self.steps: tuple[SegmentStep, ...] | None = None
        self.product: Product | None = None
        self.group: Sequence[int] = ()
        used = {slot: tables.operands(module, slot) for _, _, slot in rows}
        self._used = tuple(used.items())
        self.lengths: list[int] = []
        segments, at = [], 0
        for start, stop, slot in rows:
            operands = used[slot]
            if operands is None:
                continue
            if at < start:
                self.lengths.append(start - at)
            segments.append(AdapterSegment(len(self.lengths), start, stop, slot, *operands))
            self.lengths.append(stop - start)
            at = stop
        if at < tokens:
            self.lengths.append(tokens - at)
        self.segments = tuple(segments)
        self.adapters = tuple({segment.slot: segment for segment in segments}.values())
        self._weights = _extents(
            weights for segment in self.adapters for weights in (segment.a, segment.b)
        )
        self._expected = self._expectation(tokens)

    def is_current(self) -> bool:
        """Return whether the tables still return the identical operands."""
        operands, module = self.tables.operands, self.module
        for slot, known in self._used:  # noqa: SIM110 - a third of a generator's time
            if operands(module, slot) is not known:
                return False
        return True

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split `rows` `[tokens, …]` by the lengths."""
        return (rows,) if len(self.lengths) == 1 else rows.split_with_sizes(self.lengths)

    def fits(self, y: Tensor, x: Tensor) -> bool:
        """Return whether `x` and `y` are valid for :func:`lorax_kernels.apply`. Fast.

        Also return False if the operands disagree; :meth:`check` raises the reason.
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

        `written`, one of them or the shrunk rows, must not share memory with weights.
        """
        for segment in self.adapters:
            check_scale(self.module, segment.slot, segment.scale)
            a, b_t = segment.a, segment.b.t()
            if not (_fits(x, a) and _fits(y, b_t) and a.dtype == b_t.dtype):
                pairs = [("x", x, a), ("y", y, b_t)]
                checked = [(name, rows, w) for name, rows, w in pairs if rows is not None]
                wanted = [f"{name} [tokens, {w.shape[1]}] in {w.dtype}" for name, _, w in checked]
                got = [f"{name} {list(rows.shape)} in {rows.dtype}" for name, rows, _ in checked]
                raise ValueError(f"expected {' and '.join(wanted)}, got {' and '.join(got)}")
            if written is not None:
                for weights in (segment.a, segment.b):
                    check_apart(
                        "the output", written, f"the weights of slot {segment.slot}", weights
                    )

    def accepts(self, x: Tensor) -> bool:
        """Return whether `x` fits the module's adapters, of which there must be one."""
        return bool(self.adapters) and all(_fits(x, segment.a) for segment in self.adapters)

    def _expectation(
        self, tokens: int
    ) -> tuple[tuple[int, int], tuple[int, int], object, int, int] | None:
        """Return the shapes of `x` and `y`, their dtype, and the bytes of each.

        Return None if the adapters disagree or have an invalid scale.
        """
        found = {
            ((tokens, segment.a.shape[1]), (tokens, segment.b.shape[0]), segment.a.dtype)
            for segment in self.adapters
        }
        sound = all(
            segment.a.dtype == segment.b.dtype and abs(segment.scale) <= MAX_SCALE
            for segment in self.adapters
        )
        if len(found) != 1 or not sound:
            return None
        x_shape, y_shape, dtype = found.pop()
        x_bytes, y_bytes = (prod(shape) * dtype.itemsize for shape in (x_shape, y_shape))
        return x_shape, y_shape, dtype, x_bytes, y_bytes


def _fits(rows: Tensor | None, weights: Tensor) -> bool:
    return rows is None or (rows.shape[1] == weights.shape[1] and rows.dtype == weights.dtype)


def _extents(weights: Iterable[Tensor]) -> tuple[list[int], list[int]]:
    """Return the sorted begins and ends of the weights' memory, with overlaps merged."""
    begins: list[int] = []
    ends: list[int] = []
    for begin, end in sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in weights):
        if ends and begin <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            begins.append(begin)
            ends.append(end)
    return begins, ends
