"""Shrink an input once for all modules of a group, and expand it for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorax_kernels import dense, segments
from lorax_kernels.module_batch import ModuleBatch
from lorax_kernels.workspace import Workspace, stacked


class Stacks:
    """The stacked A of a group's modules for each segment.

    `columns` maps a module to (segment, begin, end) of its columns, for each of its segments.
    """

    def __init__(self, batches: tuple[ModuleBatch, ...], space: Workspace) -> None:
        parts: dict[int, list[Tensor]] = {}
        for batch in batches:
            for adapter in batch.adapters:
                parts.setdefault(adapter.slot, []).append(adapter.a)
        stacks = {slot: stacked(each, 0) for slot, each in parts.items()}
        order = sorted({(p.start, p.stop, p.slot) for batch in batches for p in batch.segments})
        self.segments = tuple(
            (start, stop, segments.plan_shrink(stacks[slot], stop - start, space, ("shared", at)))
            for at, (start, stop, slot) in enumerate(order)
        )
        number = {start: at for at, (start, _, _) in enumerate(order)}
        ends = [0] * len(order)
        self.columns: dict[int, list[tuple[int, int, int]]] = {}
        for batch in batches:
            own = self.columns[batch.module] = []
            for segment in batch.segments:
                at = number[segment.start]
                own.append((at, ends[at], ends[at] + segment.rank))
                ends[at] += segment.rank

    def shrink(self, x: Tensor) -> None:
        for start, stop, by in self.segments:
            segments.shrink_rows(x[start:stop], by)


class FromStacks:
    """Expand the shrunk input of a group for one module, segment by segment."""

    def __init__(self, batch: ModuleBatch, stacks: Stacks, space: Workspace) -> None:
        self._batch = batch
        self._steps = tuple(
            (stacks.segments[at][2].h[:, begin:end], segments.plan_expand(segment, space))
            for segment, (at, begin, end) in zip(
                batch.segments, stacks.columns[batch.module], strict=True
            )
        )

    def expand(self, y: Tensor) -> None:
        y_parts = self._batch.parts(y)
        for h, by in self._steps:
            segments.expand_rows(y_parts[by.part], h, by)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The prepared products of several modules with one input."""

    shrinking: dense.DenseShrink | Stacks
    expanding: dict[int, dense.Dense | FromStacks]

    def shrink(self, x: Tensor) -> None:
        if isinstance(self.shrinking, Stacks):
            self.shrinking.shrink(x)
        else:
            dense.shrink(x, self.shrinking)


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """The shrunk rows of `x`, which is kept alive so that its identity stays unique."""

    x: Tensor
    version: int
    batches: dict[int, ModuleBatch]
    group: Group

    def is_of(self, x: Tensor, batch: ModuleBatch) -> bool:
        """Return whether `x` is the same tensor, unchanged, with unchanged operands."""
        return (
            self.x is x and self.version == _version(x) and self.batches.get(batch.module) is batch
        )

    def expand(self, y: Tensor, batch: ModuleBatch) -> None:
        """Expand the shared rows for one module onto `y` `[tokens, out]`."""
        self.group.expanding[batch.module].expand(y)


def shrink(x: Tensor, batches: Sequence[ModuleBatch], space: Workspace) -> Shared | None:
    """Shrink `x` for all batches that accept it; None if that does not pay, or not yet."""
    space.shared = None  # its memory is overwritten now
    accepting = tuple(batch for batch in batches if batch.accepts(x))
    group = space.build_once("group", accepting, 0, lambda: _group(accepting, space))
    if group is not None:
        group.shrink(x)
        shared = Shared(x, _version(x), {batch.module: batch for batch in accepting}, group)
        space.shared = shared
        return shared
    return None


def _group(batches: tuple[ModuleBatch, ...], space: Workspace) -> Group | None:
    if len(batches) < 2:
        return None
    ready = dense.dense(batches, space)
    if ready:
        modules = (batch.module for batch in batches)
        return Group(ready[0].shrinking, dict(zip(modules, ready, strict=True)))
    nbytes = sum(segment.a.nbytes for batch in batches for segment in batch.adapters)
    stacks = space.build_once("stacks", batches, nbytes, lambda: Stacks(batches, space))
    if stacks is None:
        return None
    return Group(stacks, {batch.module: FromStacks(batch, stacks, space) for batch in batches})


def _version(x: Tensor) -> int:
    return x._version  # noqa: SLF001 - the name under which torch documents it
