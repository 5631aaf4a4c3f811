"""Argument checks for every device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorax_kernels.tables import Tables

MAX_SCALE = 3.4028234663852886e38
"""The largest float32, the dtype of scales in tables."""


def check_rows(name: str, tensor: Tensor, tokens: int, device: str = "cpu") -> None:
    """Raise ValueError unless it is contiguous `[tokens, …]` on that kind of device."""
    fits = tensor.dim() == 2 and tensor.shape[0] == tokens
    if not (fits and tensor.is_contiguous() and tensor.device.type == device):
        raise ValueError(
            f"expected {name} contiguous [{tokens}, features] on {device}, "
            f"got {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )


def check_tables(top_slot: int, named: Sequence[int], tables: Tables) -> None:
    """Raise ValueError unless the tables have the named modules, and slots up to `top_slot`."""
    modules, slots = tables.rank.shape
    for module in named:
        if not 0 <= module < modules:
            raise ValueError(f"expected a module from 0 to {modules - 1}, got {module}")
    if top_slot >= slots:
        raise ValueError(f"expected slots below {slots}, the plan has slot {top_slot}")


def check_apart(name: str, written: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError if two contiguous tensors share memory, of which one is written."""
    begin, other_begin = written.data_ptr(), other.data_ptr()
    end, other_end = begin + written.nbytes, other_begin + other.nbytes
    if max(begin, other_begin) < min(end, other_end):
        raise ValueError(
            f"expected {name} and {other_name} in memory of their own, got tensors that overlap by "
            f"{min(end, other_end) - max(begin, other_begin)} bytes; clone one of them"
        )


def check_scale(module: int, slot: int, scale: float) -> None:
    """Raise ValueError unless the scale is a finite number that float32 holds."""
    if not abs(scale) <= MAX_SCALE:
        shown = str(scale) if isinstance(scale, float) else "an integer beyond float64"
        raise ValueError(
            f"expected a finite scale of at most {MAX_SCALE:.2g} for module {module}, "
            f"slot {slot} has {shown}"
        )


def check_group(module: int, group: Sequence[int], top_slot: int, tables: Tables) -> None:
    """Raise ValueError unless the group's modules are there, and `module` is one of them."""
    check_tables(top_slot, group, tables)
    if module not in group:
        raise ValueError(f"expected module {module} in its group, got {list(group)}")
