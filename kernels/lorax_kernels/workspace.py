"""What a plan keeps between calls on the CPU: memory to compute in, and weights put together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import prod
from threading import Lock
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from lorax_kernels.tables import Segment, Tables
from lorax_kernels.thresholds import Thresholds
from lorax_kernels.work import Work

if TYPE_CHECKING:
    from lorax_kernels.together import Shared

Made = TypeVar("Made")


class Workspace:
    """Of one plan, for one call at a time: `with plan.workspace.lent() as space`."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.shared: Shared | None = None
        self._lock = Lock()
        self._memory: dict[tuple[Hashable, torch.dtype], Tensor] = {}
        self._views: dict[tuple[Hashable, torch.dtype], dict[tuple[int, ...], Tensor]] = {}
        self._works: dict[tuple[int, int], Work] = {}
        self._made: dict[Hashable, tuple[tuple[Work, ...], object, int]] = {}
        self._kept = 0

    def lent(self) -> Workspace:
        """Itself; while another thread computes with it, a new one that ends with the call."""
        free = self._lock.acquire(blocking=False)
        return self if free else Workspace(self.thresholds).lent()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def view(self, name: Hashable, dtype: torch.dtype, *shape: int) -> Tensor:
        """Memory to compute in, contiguous. What is in it lasts until the name's next use."""
        views = self._views.setdefault((name, dtype), {})
        found = views.get(shape)
        if found is None:
            size = prod(shape)
            flat = self._memory.get((name, dtype))
            if flat is None or flat.numel() < size:
                flat = self._memory[name, dtype] = new_memory(size, dtype)
                views.clear()
            found = views[shape] = flat[:size].view(shape)
        return found

    def known_work(self, module: int, tables: Tables) -> Work | None:
        """A module's work, if it was prepared and the tables give the same operands as then."""
        found = self._works.get((id(tables), module))
        if found is None or not found.stands():
            return None
        found.again = True
        return found

    def new_work(
        self, tokens: int, segments: tuple[Segment, ...], module: int, tables: Tables
    ) -> Work:
        """Prepared now. It holds the tables, so that no others get their id."""
        made = self._works[id(tables), module] = Work(tokens, segments, module, tables)
        return made

    def kept(
        self, kind: str, works: tuple[Work, ...], nbytes: int, make: Callable[[], Made | None]
    ) -> Made | None:
        """What `make` puts together of the works' operands, once; it takes `nbytes`.

        None if it makes nothing, if that is more than a plan may keep, or as long as nobody knows
        that the operands will be asked for again.
        """
        key = kind, tuple((id(work.tables), work.module) for work in works)
        found = self._made.get(key)
        if found is not None:
            of, ready, taken = found
            if all(map(_same, of, works)):
                return cast("Made | None", ready)
            del self._made[key]
            self._kept -= taken
        if not all(work.again for work in works):
            return None
        made = make() if self._kept + nbytes <= self.thresholds.kept_bytes else None
        taken = 0 if made is None else nbytes
        self._made[key] = works, made, taken
        self._kept += taken
        return made


def _same(one: Work, other: Work) -> bool:
    return one is other


def new_memory(size: int, dtype: torch.dtype) -> Tensor:
    """Of the CPU; also what inference mode asks for may be written to outside of it."""
    with torch.inference_mode(mode=False):
        return torch.empty(size, dtype=dtype)


def stacked(parts: Sequence[Tensor], dim: int) -> Tensor:
    """A copy of the parts, beside each other along `dim`."""
    with torch.inference_mode(mode=False):
        return torch.cat(list(parts), dim)
