"""What the entries refuse, on every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lorax_kernels.tables import Tables

if TYPE_CHECKING:
    from lorax_kernels.plan import Plan

MAX_SCALE = 3.4028234663852886e38
"""The largest float32, as which tables hold scales."""


def check_rows(name: str, tensor: Tensor, plan: Plan, device: str = "cpu") -> None:
    """Raise ValueError unless it is contiguous `[plan.tokens, …]` on that kind of device."""
    fits = tensor.dim() == 2 and tensor.shape[0] == plan.tokens
    if not (fits and tensor.is_contiguous() and tensor.device.type == device):
        raise ValueError(
            f"expected {name} contiguous [{plan.tokens}, features] on {device}, "
            f"got {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )


def check_tables(plan: Plan, named: Sequence[int], tables: Tables) -> None:
    """Raise ValueError unless the tables have the modules that are named, and the plan's slots."""
    modules, slots = tables.rank.shape
    for module in named:
        if not 0 <= module < modules:
            raise ValueError(f"expected a module from 0 to {modules - 1}, got {module}")
    if plan.top_slot >= slots:
        raise ValueError(f"expected slots below {slots}, the plan has slot {plan.top_slot}")


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


def check_group(module: int, group: Sequence[int], plan: Plan, tables: Tables) -> None:
    """Raise ValueError unless the group's modules are there, and `module` is one of them."""
    check_tables(plan, group, tables)
    if module not in group:
        raise ValueError(f"expected module {module} in its group, got {list(group)}")
