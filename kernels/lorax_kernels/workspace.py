"""What a plan keeps between calls on the CPU: scratch memory and combined weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import prod
from threading import Lock
from typing import TypeVar, cast

import torch
from torch import Tensor

from lorax_kernels.module_batch import ModuleBatch
from lorax_kernels.tables import Segment, Tables
from lorax_kernels.thresholds import Thresholds

Made = TypeVar("Made")


class Workspace:
    """The memory of one plan, for one call at a time: `with plan.workspace.acquire() as space`."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.shared: object | None = None
        """The last result of `grouped.shrink`."""
        self._lock = Lock()
        self._memory: dict[tuple[Hashable, torch.dtype], Tensor] = {}
        self._views: dict[tuple[Hashable, torch.dtype], dict[tuple[int, ...], Tensor]] = {}
        self._batches: dict[tuple[int, int], ModuleBatch] = {}
        self._built: dict[Hashable, tuple[tuple[ModuleBatch, ...], object, int]] = {}
        self._built_bytes = 0

    def acquire(self) -> Workspace:
        """Return this workspace, or a temporary one while another thread uses it."""
        free = self._lock.acquire(blocking=False)
        return self if free else Workspace(self.thresholds).acquire()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def view(self, name: Hashable, dtype: torch.dtype, *shape: int) -> Tensor:
        """Return contiguous scratch memory, valid until the next use of `name`."""
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

    def known_batch(self, module: int, tables: Tables) -> ModuleBatch | None:
        """Return a module's batch if it was prepared and its operands are unchanged."""
        found = self._batches.get((id(tables), module))
        if found is None or not found.is_current():
            return None
        found.is_reused = True
        return found

    def new_batch(
        self, tokens: int, segments: tuple[Segment, ...], module: int, tables: Tables
    ) -> ModuleBatch:
        """Prepare a module's batch. It keeps the tables alive, so that their id stays unique."""
        made = self._batches[id(tables), module] = ModuleBatch(tokens, segments, module, tables)
        return made

    def build_once(
        self,
        kind: str,
        batches: tuple[ModuleBatch, ...],
        nbytes: int,
        make: Callable[[], Made | None],
    ) -> Made | None:
        """Return the result of `make`, of `nbytes`, built once from the batches' operands.

        Return None if `make` does, if the plan may not keep that much, or while no second call has
        shown that the operands are reused.
        """
        key = kind, tuple((id(batch.tables), batch.module) for batch in batches)
        found = self._built.get(key)
        if found is not None:
            of, ready, taken = found
            if all(map(_same, of, batches)):
                return cast("Made | None", ready)
            del self._built[key]
            self._built_bytes -= taken
        if not all(batch.is_reused for batch in batches):
            return None
        made = make() if self._built_bytes + nbytes <= self.thresholds.kept_bytes else None
        taken = 0 if made is None else nbytes
        self._built[key] = batches, made, taken
        self._built_bytes += taken
        return made


def _same(one: ModuleBatch, other: ModuleBatch) -> bool:
    return one is other


def new_memory(size: int, dtype: torch.dtype) -> Tensor:
    """Allocate CPU memory that is writable outside of inference mode too."""
    with torch.inference_mode(mode=False):
        return torch.empty(size, dtype=dtype)


def stacked(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate the parts along `dim`."""
    with torch.inference_mode(mode=False):
        return torch.cat(list(parts), dim)
