"""Refusing weights that have NaN or infinity, named by their module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lorax_async.core.moves import Row
from lorax_async.core.windows import Window
from lorax_async.errors import AdapterFormatError
from lorax_async.io.ports import Device
from lorax_async.io.staging import TORCH_DTYPES


def require_finite_operands(
    device: Device, rows: Sequence[Row], slot: int, module_names: Sequence[str]
) -> None:
    """Look at what is in a column of the device. Raises `AdapterFormatError`."""
    for row in rows:
        operands = device.operands(row.module, slot)
        assert operands is not None
        a, b, _ = operands
        if not (a.isfinite().all() and b.isfinite().all()):
            raise _not_finite(module_names[row.module])


def require_finite_window(
    content: torch.Tensor,
    window: Window,
    dtype: str,
    rows: Sequence[Row],
    module_names: Sequence[str],
) -> None:
    """Look at what was staged: `content`, uint8, begins with the window's bytes.

    Only at what moves have written: what lies between is anything. Raises `AdapterFormatError`.
    """
    kind = TORCH_DTYPES[dtype]
    for first, last in _written(window, kind.itemsize):
        values = content[first:last].view(kind)
        good = values.isfinite()
        if not good.all():
            place = window.start + first + int(good.logical_not().nonzero()[0]) * kind.itemsize
            raise _not_finite(module_names[_module_at(place, rows)])


def _written(window: Window, item_bytes: int) -> Iterator[tuple[int, int]]:
    for read in window.reads:
        yield read.target, read.target + read.nbytes
    for move in window.converts:
        yield move.target, move.target + move.rows * move.row_pitch * item_bytes


def _module_at(place: int, rows: Sequence[Row]) -> int:
    """Of the tensor that begins last at or before `place` in the extent."""
    starts = [(start, row.module) for row in rows for start in (row.a, row.b) if start <= place]
    return max(starts)[1]


def _not_finite(module: str) -> AdapterFormatError:
    return AdapterFormatError(
        f"module {module!r} has NaN or infinite weights; "
        "load it with check_finite=False if that is meant"
    )
