"""Compute one product over all adapters of a batch, and mask each row's other adapters.

For small batches, where a call costs more than the masked products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from lorax_kernels.module_batch import AdapterSegment, ModuleBatch
from lorax_kernels.thresholds import Thresholds
from lorax_kernels.workspace import Workspace, new_memory, stacked


@dataclass(frozen=True, slots=True, eq=False)
class DenseShrink:
    """The stacked A of one or several modules, and a mask of each row's other adapters.

    `h` is memory for the rows [first, last); `columns` maps modules to their range of columns.
    """

    first: int
    last: int
    all_rows: bool
    a_t: Tensor
    others: Tensor
    h: Tensor
    columns: dict[int, tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class DenseExpand:
    """The concatenated B of all adapters, and their scales: one number, or one per column.

    `spans` are the runs of rows with an adapter; other rows keep their bits.
    """

    spans: tuple[tuple[int, int], ...]
    b_t: Tensor
    scale: float
    scales: Tensor | None


class Dense:
    """The product of one module; the shrink may be its group's."""

    __slots__ = ("_all_rows", "_by", "_h", "_scaled", "_spans", "shrinking")

    def __init__(
        self, batch: ModuleBatch, shrinking: DenseShrink, by: DenseExpand, space: Workspace
    ) -> None:
        self.shrinking, self._by = shrinking, by
        begin, end = shrinking.columns[batch.module]
        self._h = self._scaled = shrinking.h[:, begin:end]
        if by.scales is not None:
            self._scaled = space.view("scaled", self._h.dtype, *self._h.shape)
        self._all_rows = shrinking.all_rows and len(by.spans) == 1
        first = shrinking.first
        self._spans = tuple(
            (start, stop, self._scaled[start - first : stop - first]) for start, stop in by.spans
        )

    def apply(self, y: Tensor, x: Tensor) -> None:
        """Shrink `x`, and add the expanded result to `y`."""
        shrink(x, self.shrinking)
        self.expand(y)

    def expand(self, y: Tensor) -> None:
        """Expand the last result of :func:`shrink` onto `y` `[tokens, out]`."""
        by = self._by
        if by.scales is not None:
            torch.mul(self._h, by.scales, out=self._scaled)
        if self._all_rows:
            y.addmm_(self._scaled, by.b_t, alpha=by.scale)
            return
        for start, stop, h in self._spans:
            y[start:stop].addmm_(h, by.b_t, alpha=by.scale)


def shrink(x: Tensor, by: DenseShrink) -> None:
    """Shrink `x` `[tokens, in]` into `by.h`, and zero the columns of other adapters, even NaN."""
    torch.mm(x if by.all_rows else x[by.first : by.last], by.a_t, out=by.h)
    by.h.masked_fill_(by.others, 0)


def dense(batches: tuple[ModuleBatch, ...], space: Workspace) -> tuple[Dense, ...]:
    """Prepare the products of modules with the same input, or of a single one.

    Return () if it does not pay for one of them, takes too much memory, or the operands may not be
    reused. Also if scales would be rounded, or B is not finite: zero times infinity is NaN, in the
    rows of other adapters.
    """
    expandings = []
    for batch in batches:
        if len(batch.segments) < 2 or (by := _expanding(batch, space)) is None:
            return ()
        expandings.append(by)
    nbytes = sum(segment.a.nbytes for batch in batches for segment in batch.adapters)
    shrinking = space.build_once("A", batches, nbytes, lambda: _make_shrinking(batches, space))
    if shrinking is None:
        return ()
    pairs = zip(batches, expandings, strict=True)
    return tuple(Dense(batch, shrinking, by, space) for batch, by in pairs)


def _expanding(batch: ModuleBatch, space: Workspace) -> DenseExpand | None:
    nbytes = sum(segment.b.nbytes for segment in batch.adapters)
    return space.build_once("B", (batch,), nbytes, lambda: _make_expanding(batch, space.thresholds))


def _saves(batch: ModuleBatch, thresholds: Thresholds) -> bool:
    """Return whether the masked products cost less than the saved calls."""
    segments = batch.segments
    saved, worth = len(segments) - len(_spans(segments)), thresholds.dense(segments[0].a.dtype)
    if not (saved and worth):
        return False
    features, out = segments[0].a.shape[1], segments[0].b.shape[0]
    width = sum(segment.rank for segment in batch.adapters)
    rows = sum(segment.rows for segment in segments)
    needed = sum(segment.rows * segment.rank for segment in segments) * (features + out)
    computed = width * ((segments[-1].stop - segments[0].start) * features + rows * out)
    return computed - needed <= saved * worth


def _make_shrinking(batches: tuple[ModuleBatch, ...], space: Workspace) -> DenseShrink:
    first = min(batch.segments[0].start for batch in batches)
    last = max(batch.segments[-1].stop for batch in batches)
    a = stacked([segment.a for batch in batches for segment in batch.adapters], 0)
    others = new_memory((last - first) * len(a), torch.bool).view(last - first, len(a)).fill_(True)
    columns, at = {}, 0
    for batch in batches:
        begin, place = at, {}
        for adapter in batch.adapters:
            place[adapter.slot] = slice(at, at + adapter.rank)
            at += adapter.rank
        for segment in batch.segments:
            others[segment.start - first : segment.stop - first, place[segment.slot]] = False
        columns[batch.module] = begin, at
    h = space.view("dense" if len(batches) == 1 else "shared", a.dtype, last - first, len(a))
    tokens = sum(batches[0].lengths)
    return DenseShrink(first, last, last - first == tokens, a.t(), others, h, columns)


def _make_expanding(batch: ModuleBatch, thresholds: Thresholds) -> DenseExpand | None:
    if not _saves(batch, thresholds):
        return None
    scales = [segment.scale for segment in batch.adapters]
    alike, factors = len(set(scales)) == 1, _factors(batch.adapters)
    b = stacked([segment.b for segment in batch.adapters], 1)
    if not (all(map(isfinite, scales)) and (alike or factors is not None) and b.isfinite().all()):
        return None
    one = scales[0] if alike else 1.0
    return DenseExpand(tuple(_spans(batch.segments)), b.t(), one, None if alike else factors)


def _factors(adapters: Sequence[AdapterSegment]) -> Tensor | None:
    """Return the scale of each column, or None if one would be rounded."""
    scales = [segment.scale for segment in adapters]
    with torch.inference_mode(mode=False):
        exact = torch.tensor(scales, dtype=adapters[0].a.dtype)
        ranks = torch.tensor([segment.rank for segment in adapters])
        return exact.repeat_interleave(ranks) if exact.tolist() == scales else None


def _spans(segments: Sequence[AdapterSegment]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for segment in segments:
        if spans and spans[-1][1] == segment.start:
            spans[-1] = spans[-1][0], segment.stop
        else:
            spans.append((segment.start, segment.stop))
    return spans
