"""Modules that get the same input: it is shrunk for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorax_kernels import dense, segments
from lorax_kernels.work import Work
from lorax_kernels.workspace import Workspace, stacked


class Stacks:
    """For each segment A of its modules, one below the other, and where each module's columns are.

    `columns` has for each piece of a module: the number of the segment, from and to.
    """

    def __init__(self, works: tuple[Work, ...], space: Workspace) -> None:
        parts: dict[int, list[Tensor]] = {}
        for work in works:
            for adapter in work.adapters:
                parts.setdefault(adapter.slot, []).append(adapter.a)
        stacks = {slot: stacked(each, 0) for slot, each in parts.items()}
        order = sorted({(p.start, p.stop, p.slot) for work in works for p in work.pieces})
        self.segments = tuple(
            (start, stop, segments.shrinking(stacks[slot], stop - start, space, ("shared", at)))
            for at, (start, stop, slot) in enumerate(order)
        )
        number = {start: at for at, (start, _, _) in enumerate(order)}
        ends = [0] * len(order)
        self.columns: dict[int, list[tuple[int, int, int]]] = {}
        for work in works:
            own = self.columns[work.module] = []
            for piece in work.pieces:
                at = number[piece.start]
                own.append((at, ends[at], ends[at] + piece.rank))
                ends[at] += piece.rank

    def shrink(self, x: Tensor) -> None:
        for start, stop, by in self.segments:
            segments.shrink_rows(x[start:stop], by)


class FromStacks:
    """How one module expands what its group shrank, segment by segment."""

    def __init__(self, work: Work, stacks: Stacks, space: Workspace) -> None:
        self._work = work
        self._each = tuple(
            (stacks.segments[at][2].h[:, begin:end], segments.expanding(piece, space))
            for piece, (at, begin, end) in zip(
                work.pieces, stacks.columns[work.module], strict=True
            )
        )

    def expand(self, y: Tensor) -> None:
        y_parts = self._work.parts(y)
        for h, by in self._each:
            segments.expand_rows(y_parts[by.part], h, by)


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """What several modules do with one input; `expanding` is each module's."""

    shrinking: dense.Shrinking | Stacks
    expanding: dict[int, dense.Dense | FromStacks]

    def shrink(self, x: Tensor) -> None:
        if isinstance(self.shrinking, Stacks):
            self.shrinking.shrink(x)
        else:
            dense.shrink(x, self.shrinking)


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """What is there of `x`, which is held, so that no other tensor can be taken for it."""

    x: Tensor
    version: int
    works: dict[int, Work]
    group: Group

    def is_of(self, x: Tensor, work: Work) -> bool:
        """Whether `x` is that very tensor, unchanged, and so are the module's operands."""
        return self.x is x and self.version == _version(x) and self.works.get(work.module) is work

    def expand(self, y: Tensor, work: Work) -> None:
        """Add to `y` `[tokens, out]` what the module makes of it."""
        self.group.expanding[work.module].expand(y)


def shrink(x: Tensor, works: Sequence[Work], space: Workspace) -> Shared | None:
    """Shrink `x` for all of the works that take it; None if it pays not, or not yet."""
    space.shared = None  # its memory is written to now
    taking = tuple(work for work in works if work.takes(x))
    group = space.kept("group", taking, 0, lambda: _group(taking, space))
    if group is not None:
        group.shrink(x)
        space.shared = Shared(x, _version(x), {work.module: work for work in taking}, group)
    return space.shared


def _group(works: tuple[Work, ...], space: Workspace) -> Group | None:
    if len(works) < 2:
        return None
    ready = dense.dense(works, space)
    if ready:
        modules = (work.module for work in works)
        return Group(ready[0].shrinking, dict(zip(modules, ready, strict=True)))
    nbytes = sum(piece.a.nbytes for work in works for piece in work.adapters)
    stacks = space.kept("stacks", works, nbytes, lambda: Stacks(works, space))
    if stacks is None:
        return None
    return Group(stacks, {work.module: FromStacks(work, stacks, space) for work in works})


def _version(x: Tensor) -> int:
    return x._version  # noqa: SLF001 - the name under which torch documents it
