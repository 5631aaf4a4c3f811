"""Refusing weights that have NaN or infinity, named by their module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lorax_async.core.arena import Extent
from lorax_async.core.moves import GroupPlan, Vector
from lorax_async.core.windows import Window
from lorax_async.errors import AdapterFormatError
from lorax_async.io.ports import Device
from lorax_async.io.staging import TORCH_DTYPES


def require_finite_operands(
    device: Device, group: GroupPlan, extent: Extent, slot: int, module_names: Sequence[str]
) -> None:
    """Look at what a copy brought to the device. Raises `AdapterFormatError`."""
    for row in group.rows:
        operands = device.operands(row.module, slot)
        assert operands is not None
        a, b, _ = operands
        if not (a.isfinite().all() and b.isfinite().all()):
            raise _not_finite(module_names[row.module])
    for vector in group.vectors:
        content = device.view(Extent(extent.offset + vector.offset, vector.nbytes))
        if not content.view(TORCH_DTYPES[vector.dtype]).isfinite().all():
            raise _not_finite(module_names[vector.module])


def require_finite_window(
    content: torch.Tensor,
    window: Window,
    dtype: str,
    group: GroupPlan,
    module_names: Sequence[str],
) -> None:
    """Look at what was staged: `content`, uint8, begins with the window's bytes.

    Only at what moves have written: what lies between is anything. Raises `AdapterFormatError`.
    """
    for first, last, kind in _written(window, TORCH_DTYPES[dtype], group.vectors):
        good = content[first:last].view(kind).isfinite()
        if not good.all():
            place = window.start + first + int(good.logical_not().nonzero()[0]) * kind.itemsize
            raise _not_finite(module_names[_module_at(place, group)])


def _written(
    window: Window, kind: torch.dtype, vectors: Sequence[Vector]
) -> Iterator[tuple[int, int, torch.dtype]]:
    """[first, last) in the window, and as what to read them: vectors lie in the file's dtype."""
    whole = sorted((v.offset - window.start, v.nbytes, TORCH_DTYPES[v.dtype]) for v in vectors)
    for move in window.converts:
        yield move.target, move.target + move.rows * move.row_pitch * kind.itemsize, kind
    for read in window.reads:
        first, last = read.target, read.target + read.nbytes
        for start, nbytes, own in whole:
            if start < last and first < start + nbytes:
                if first < start:
                    yield first, start, kind
                yield max(first, start), min(last, start + nbytes), own
                first = start + nbytes
        if first < last:
            yield first, last, kind


def _module_at(place: int, group: GroupPlan) -> int:
    """Of the tensor that begins last at or before `place` in the extent."""
    starts = [(start, row.module) for row in group.rows for start in (row.a, row.b)]
    starts += [(vector.offset, vector.module) for vector in group.vectors]
    return max(start for start in starts if start[0] <= place)[1]


def _not_finite(module: str) -> AdapterFormatError:
    return AdapterFormatError(
        f"module {module!r} has NaN or infinite weights; "
        "load it with check_finite=False if that is meant"
    )
