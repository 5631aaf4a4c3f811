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
    """A of one or several modules, one below the other, and whose columns each row throws away.

    Rows `first` to `last` are computed; `columns` are each module's, from and to.
    """

    first: int
    last: int
    a_t: Tensor
    others: Tensor
    columns: dict[int, tuple[int, int]]


@dataclass(frozen=True, slots=True, eq=False)
class Expanding:
    """B of all adapters beside each other, and their scales: one number, or one per column."""

    spans: tuple[tuple[int, int], ...]
    b_t: Tensor
    scale: float
    scales: Tensor | None


def saves(work: Work, thresholds: Thresholds) -> bool:
    """Whether the products in vain cost less than the calls that are saved."""
    pieces = work.pieces
    saved, worth = len(pieces) - len(_spans(pieces)), thresholds.dense(pieces[0].a.dtype)
    if not (saved and worth):
        return False
    features, out = pieces[0].a.shape[1], pieces[0].b_t.shape[1]
    width = sum(piece.rank for piece in work.adapters)
    rows = sum(piece.rows for piece in pieces)
    needed = sum(piece.rows * piece.rank for piece in pieces) * (features + out)
    computed = width * ((pieces[-1].stop - pieces[0].start) * features + rows * out)
    return computed - needed <= saved * worth


def shrinking(works: tuple[Work, ...], space: Workspace) -> Shrinking | None:
    """Of several modules whose :func:`expanding` there is; None if it would be too large."""
    nbytes = sum(piece.a.nbytes for work in works for piece in work.adapters)
    return space.kept("A", works, nbytes, lambda: _make_shrinking(works))


def expanding(work: Work, space: Workspace) -> Expanding | None:
    """None if it is not worth it, cannot be, or not yet.

    It cannot be if scales would be rounded, or if B is not finite: zero times infinity is NaN, in
    the rows of others.
    """
    if len(work.pieces) < 2 or not work.again:
        return None
    nbytes = sum(piece.b_t.nbytes for piece in work.adapters)
    return space.kept("B", (work,), nbytes, lambda: _make_expanding(work, space.thresholds))


def shrink(x: Tensor, by: Shrinking, space: Workspace, name: str) -> Tensor:
    """`[last - first, columns]`, in memory of that name; a row is zero where it is not its own."""
    h = space.view(name, x.dtype, by.last - by.first, by.a_t.shape[1])
    torch.mm(x[by.first : by.last], by.a_t, out=h)
    return h.masked_fill_(by.others, 0)


def expand(y: Tensor, h: Tensor, first: int, by: Expanding, space: Workspace) -> None:
    """Add to `y` what `h` gives, of which row 0 is row `first` of `y`."""
    if by.scales is not None:
        h = torch.mul(h, by.scales, out=space.view("scaled", h.dtype, *h.shape))
    for start, stop in by.spans:
        y[start:stop].addmm_(h[start - first : stop - first], by.b_t, alpha=by.scale)


def _make_shrinking(works: tuple[Work, ...]) -> Shrinking:
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
    return Shrinking(first, last, a.t(), others, columns)


def _make_expanding(work: Work, thresholds: Thresholds) -> Expanding | None:
    if not saves(work, thresholds):
        return None
    scales = [piece.scale for piece in work.adapters]
    alike, factors = len(set(scales)) == 1, _factors(work.adapters)
    b = stacked([piece.b_t.t() for piece in work.adapters], 1)
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
    """Runs of rows that all have an adapter."""
    spans: list[tuple[int, int]] = []
    for piece in pieces:
        if spans and spans[-1][1] == piece.start:
            spans[-1] = spans[-1][0], piece.stop
        else:
            spans.append((piece.start, piece.stop))
    return spans
