"""One product over all adapters of a batch; a mask throws away what is not a row's own.

For small work: a call costs more than the products that are in vain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from lorax_kernels.thresholds import Thresholds
from lorax_kernels.work import Piece, Work
from lorax_kernels.workspace import Workspace, new_memory, stacked


@dataclass(frozen=True, slots=True, eq=False)
class Shrinking:
    """A of one or several modules, one below the other, and which columns are not a row's own.

    `h` is memory for the rows from `first` to `last`; `columns` are each module's, from and to.
    """

    first: int
    last: int
    all_rows: bool
    a_t: Tensor
    others: Tensor
    h: Tensor
    columns: dict[int, tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class Expanding:
    """B of all adapters beside each other, and their scales: one number, or one per column.

    `spans` are the runs of rows that all have an adapter: the others keep their bits.
    """

    spans: tuple[tuple[int, int], ...]
    b_t: Tensor
    scale: float
    scales: Tensor | None


class Dense:
    """Both, for one module; the shrinking may be that of its group."""

    __slots__ = ("_all_rows", "_by", "_h", "_scaled", "_spans", "shrinking")

    def __init__(self, work: Work, shrinking: Shrinking, by: Expanding, space: Workspace) -> None:
        self.shrinking, self._by = shrinking, by
        begin, end = shrinking.columns[work.module]
        self._h = self._scaled = shrinking.h[:, begin:end]
        if by.scales is not None:
            self._scaled = space.view("scaled", self._h.dtype, *self._h.shape)
        self._all_rows = shrinking.all_rows and len(by.spans) == 1
        first = shrinking.first
        self._spans = tuple(
            (start, stop, self._scaled[start - first : stop - first]) for start, stop in by.spans
        )

    def expand(self, y: Tensor) -> None:
        """Add to `y` `[tokens, out]` what :func:`shrink` made last of the shrinking."""
        by = self._by
        if by.scales is not None:
            torch.mul(self._h, by.scales, out=self._scaled)
        if self._all_rows:
            y.addmm_(self._scaled, by.b_t, alpha=by.scale)
            return
        for start, stop, h in self._spans:
            y[start:stop].addmm_(h, by.b_t, alpha=by.scale)


def shrink(x: Tensor, by: Shrinking) -> None:
    """From `x` `[tokens, in]`. A row's columns of other adapters are zero, whatever they hold."""
    torch.mm(x if by.all_rows else x[by.first : by.last], by.a_t, out=by.h)
    by.h.masked_fill_(by.others, 0)


def dense(works: tuple[Work, ...], space: Workspace) -> tuple[Dense, ...]:
    """For modules that get the same input, or a single one.

    None at all if it is not worth it for one of them, would take too much memory, or is too early
    to tell. Nor can it be where scales would be rounded, or B is not finite: zero times infinity is
    NaN, in the rows of others.
    """
    expandings = []
    for work in works:
        if len(work.pieces) < 2 or (by := _expanding(work, space)) is None:
            return ()
        expandings.append(by)
    nbytes = sum(piece.a.nbytes for work in works for piece in work.adapters)
    shrinking = space.kept("A", works, nbytes, lambda: _make_shrinking(works, space))
    if shrinking is None:
        return ()
    pairs = zip(works, expandings, strict=True)
    return tuple(Dense(work, shrinking, by, space) for work, by in pairs)


def _expanding(work: Work, space: Workspace) -> Expanding | None:
    nbytes = sum(piece.b.nbytes for piece in work.adapters)
    return space.kept("B", (work,), nbytes, lambda: _make_expanding(work, space.thresholds))


def _saves(work: Work, thresholds: Thresholds) -> bool:
    """Whether the products in vain cost less than the calls that are saved."""
    pieces = work.pieces
    saved, worth = len(pieces) - len(_spans(pieces)), thresholds.dense(pieces[0].a.dtype)
    if not (saved and worth):
        return False
    features, out = pieces[0].a.shape[1], pieces[0].b.shape[0]
    width = sum(piece.rank for piece in work.adapters)
    rows = sum(piece.rows for piece in pieces)
    needed = sum(piece.rows * piece.rank for piece in pieces) * (features + out)
    computed = width * ((pieces[-1].stop - pieces[0].start) * features + rows * out)
    return computed - needed <= saved * worth


def _make_shrinking(works: tuple[Work, ...], space: Workspace) -> Shrinking:
    first = min(work.pieces[0].start for work in works)
    last = max(work.pieces[-1].stop for work in works)
    a = stacked([piece.a for work in works for piece in work.adapters], 0)
    others = new_memory((last - first) * len(a), torch.bool).view(last - first, len(a)).fill_(True)
    columns, at = {}, 0
    for work in works:
        begin, place = at, {}
        for adapter in work.adapters:
            place[adapter.slot] = slice(at, at + adapter.rank)
            at += adapter.rank
        for piece in work.pieces:
            others[piece.start - first : piece.stop - first, place[piece.slot]] = False
        columns[work.module] = begin, at
    h = space.view("dense" if len(works) == 1 else "shared", a.dtype, last - first, len(a))
    tokens = sum(works[0].lengths)
    return Shrinking(first, last, last - first == tokens, a.t(), others, h, columns)


def _make_expanding(work: Work, thresholds: Thresholds) -> Expanding | None:
    if not _saves(work, thresholds):
        return None
    scales = [piece.scale for piece in work.adapters]
    alike, factors = len(set(scales)) == 1, _factors(work.adapters)
    b = stacked([piece.b for piece in work.adapters], 1)
    if not (all(map(isfinite, scales)) and (alike or factors is not None) and b.isfinite().all()):
        return None
    one = scales[0] if alike else 1.0
    return Expanding(tuple(_spans(work.pieces)), b.t(), one, None if alike else factors)


def _factors(adapters: Sequence[Piece]) -> Tensor | None:
    """The scale of each column; None if one has to be rounded for that."""
    scales = [piece.scale for piece in adapters]
    with torch.inference_mode(mode=False):
        exact = torch.tensor(scales, dtype=adapters[0].a.dtype)
        ranks = torch.tensor([piece.rank for piece in adapters])
        return exact.repeat_interleave(ranks) if exact.tolist() == scales else None


def _spans(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for piece in pieces:
        if spans and spans[-1][1] == piece.start:
            spans[-1] = spans[-1][0], piece.stop
        else:
            spans.append((piece.start, piece.stop))
    return spans
