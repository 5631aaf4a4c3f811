"""Modules that get the same input: it is shrunk for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorax_kernels import dense
from lorax_kernels.segments import expand_rows, shrink_rows
from lorax_kernels.work import Work
from lorax_kernels.workspace import Workspace, stacked


@dataclass(frozen=True, slots=True, eq=False)
class Stacks:
    """For each segment (start, stop) A of its modules, one below the other; and as a view, turned.

    `columns` has for each module and the start of its pieces: which segment, from and to.
    """

    segments: tuple[tuple[int, int, Tensor, Tensor], ...]
    columns: dict[int, dict[int, tuple[int, int, int]]]


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """What `x` gave when it was shrunk for `works`, by module; `x` is held, so that it is no other.

    `h` is one tensor where `by` is dense, else one per segment.
    """

    x: Tensor
    version: int
    works: dict[int, Work]
    by: dense.Shrinking | Stacks
    h: tuple[Tensor, ...]

    def is_of(self, x: Tensor, work: Work) -> bool:
        """Whether `x` is that very tensor, unchanged, and so are the module's operands."""
        return self.x is x and self.version == _version(x) and self.works.get(work.module) is work


def shrink(x: Tensor, works: Sequence[Work], space: Workspace) -> Shared | None:
    """Shrink `x` for all of the works that take it; None if it pays not, or not yet."""
    space.shared = None  # its memory is written to now
    taking = tuple(work for work in works if work.takes(x))
    if len(taking) > 1:
        space.shared = _shrink(x, taking, space)
    return space.shared


def expand(y: Tensor, work: Work, shared: Shared, space: Workspace) -> None:
    """Add to `y` `[tokens, out]` what the module makes of it."""
    if isinstance(shared.by, dense.Shrinking):
        begin, end = shared.by.columns[work.module]
        by = dense.expanding(work, space)
        assert by is not None  # else there were no dense shrink
        dense.expand(y, shared.h[0][:, begin:end], shared.by.first, by, space)
        return
    y_parts, columns = work.parts(y), shared.by.columns[work.module]
    for piece in work.pieces:
        at, begin, end = columns[piece.start]
        expand_rows(y_parts[piece.part], shared.h[at][:, begin:end], piece, space)


def _shrink(x: Tensor, works: tuple[Work, ...], space: Workspace) -> Shared | None:
    by = _dense(works, space) or space.kept("stacks", works, _nbytes(works), lambda: _stack(works))
    if by is None:
        return None
    if isinstance(by, dense.Shrinking):
        h: tuple[Tensor, ...] = (dense.shrink(x, by, space, "shared"),)
    else:
        h = tuple(
            shrink_rows(x[start:stop], a, a_t, space, ("shared", at))
            for at, (start, stop, a, a_t) in enumerate(by.segments)
        )
    return Shared(x, _version(x), {work.module: work for work in works}, by, h)


def _version(x: Tensor) -> int:
    return x._version  # noqa: SLF001 - the name under which torch documents it


def _dense(works: tuple[Work, ...], space: Workspace) -> dense.Shrinking | None:
    if all(dense.expanding(work, space) is not None for work in works):
        return dense.shrinking(works, space)
    return None


def _nbytes(works: tuple[Work, ...]) -> int:
    return sum(piece.a.nbytes for work in works for piece in work.adapters)


def _stack(works: tuple[Work, ...]) -> Stacks:
    parts: dict[int, list[Tensor]] = {}
    for work in works:
        for adapter in work.adapters:
            parts.setdefault(adapter.slot, []).append(adapter.a)
    stacks = {slot: stacked(each, 0) for slot, each in parts.items()}
    turned = {slot: stack.t() for slot, stack in stacks.items()}
    where = {(p.start, p.stop, p.slot) for work in works for p in work.pieces}
    order = sorted(where)
    number = {start: at for at, (start, _, _) in enumerate(order)}
    ends = [0] * len(order)
    columns: dict[int, dict[int, tuple[int, int, int]]] = {}
    for work in works:
        own = columns[work.module] = {}
        for piece in work.pieces:
            at = number[piece.start]
            own[piece.start] = at, ends[at], ends[at] + piece.rank
            ends[at] += piece.rank
    segments = tuple((start, stop, stacks[slot], turned[slot]) for start, stop, slot in order)
    return Stacks(segments, columns)
