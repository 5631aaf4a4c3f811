"""What the entries refuse, on every device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorax_kernels.plan import Plan
from lorax_kernels.tables import Tables


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


def check_group(module: int, group: Sequence[int], plan: Plan, tables: Tables) -> None:
    """Raise ValueError unless the group's modules are there, and `module` is one of them."""
    check_tables(plan, group, tables)
    if module not in group:
        raise ValueError(f"expected module {module} in its group, got {list(group)}")
