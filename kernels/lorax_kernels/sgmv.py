"""Apply many adapters on a GPU in two launches: shrink `x · Aᵀ` into partials, expand onto y.

A group of up to three modules with the same input (q, k and v; gate and up) shares the launches,
each module with its own ranks. The split-k partials are parts of the sum over the input features:
they let the few rows of a decoding step fill the GPU. `expand` adds them in order, so that equal
inputs give equal bits.

Launches take fixed addresses only: tables, the plan's tiles, x and y. Launch the same shapes once
before capturing a graph, because the first launch of a variant compiles it. Importing this module
imports Triton.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lorax_kernels.checks import check_apart, check_rows
from lorax_kernels.plan import Plan
from lorax_kernels.sgmv_checks import (
    ALIGNMENT,
    MAX_MEMBERS,
    check_inputs,
    check_members,
    check_memory,
    check_outputs,
    check_split_k_partials,
)
from lorax_kernels.sgmv_programs import expand_program, shrink_program
from lorax_kernels.tables import Tables
from lorax_kernels.tiles import DECODE_ROWS, PREFILL_ROWS, Tiles

MAX_SPLITS = 8
PROGRAMS = 512
"""The limit of tiles times partials: more do not make a GPU busier."""

SPLIT_FEATURES = 512
"""The minimum number of input features per partial."""

_UNIT = ALIGNMENT
"""Rows of a multiple of this many elements are aligned for 16-byte loads in every dtype."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A program's tile: ranks and input features of a shrink, columns and ranks of an expand.

    `warps` and `stages` are what Triton calls so.
    """

    shrink_ranks: int
    shrink_inner: int
    expand_columns: int
    expand_ranks: int
    warps: int
    stages: int


SHAPES = {
    DECODE_ROWS: Shape(16, 128, 64, 32, warps=4, stages=3),
    PREFILL_ROWS: Shape(32, 64, 64, 32, warps=4, stages=3),
}
_PROMOTED = not isinstance(shrink_program, triton.JITFunction)
"""Whether Triton's interpreter runs the programs; see `sgmv_programs`."""


def apply_one(y: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """Compute :func:`lorax_kernels.apply` in two launches."""
    apply_group([y], x, plan, [module], tables)


def shrink_one(h: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """Compute :func:`lorax_kernels.shrink`."""
    check_rows("h", h, plan.tokens, x.device.type)
    check_apart("h", h, "x", x)
    partials = new_split_k_partials(x, plan, 1).zero_()
    shrink(partials, x, plan, [module], tables)
    width = min(h.shape[1], plan.max_rank)
    h.zero_()
    h[:, :width].copy_(partials[:, 0, :, :width].sum(0))


def expand_one(y: Tensor, h: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """Compute :func:`lorax_kernels.expand`."""
    check_rows("h", h, plan.tokens, y.device.type)
    check_apart("y", y, "h", h)
    width = min(h.shape[1], plan.max_rank)
    shape = (1, 1, plan.tokens, plan.max_rank)
    partials = torch.zeros(shape, dtype=torch.float32, device=y.device)
    partials[0, 0, :, :width] = h[:, :width]
    expand([y], partials, plan, [module], tables)


@torch.no_grad()
def apply_group(
    ys: Sequence[Tensor], x: Tensor, plan: Plan, modules: Sequence[int], tables: Tables
) -> None:
    """Add each row's adapters to the outputs of up to three modules with one input, in place.

    `ys` are `[tokens, out]`, one per module, `x` `[tokens, in]`; as for :func:`lorax_kernels.apply`
    otherwise, and on the current device. The ranks in the tables are multiples of 8 up to
    `plan.max_rank`, and A and B begin at multiples of 16 bytes: a slot with another rank makes its
    rows NaN. Raises ValueError, before `ys` are touched, for what does not fit.
    """
    check_inputs(x, plan, modules, tables)
    check_outputs(ys, x.dtype, plan, modules, tables)
    check_memory([("y", y) for y in ys], ("x", x))
    partials = new_split_k_partials(x, plan, len(modules))
    _launch_shrink(partials, x, plan, modules, tables)
    _launch_expand(ys, partials, plan, modules, tables)


def new_split_k_partials(x: Tensor, plan: Plan, members: int) -> Tensor:
    """Allocate the output of `shrink`: float32 `[partials, members, tokens, plan.max_rank]`.

    Their number depends only on the input features and the number of tiles.
    """
    tiles = _tiles(plan)
    wanted = min(MAX_SPLITS, x.shape[1] // SPLIT_FEATURES, PROGRAMS // max(len(tiles.table), 1))
    count = _cut(x.shape[1], max(wanted, 1), SHAPES[tiles.rows].shrink_inner)[0]
    return torch.empty(
        count, members, plan.tokens, plan.max_rank, dtype=torch.float32, device=x.device
    )


def shrink(partials: Tensor, x: Tensor, plan: Plan, modules: Sequence[int], tables: Tables) -> None:
    """Write `x @ A.T` of each row's adapter to `partials`, in parts that sum to it.

    Only the ranks that an adapter has are written, in the rows that have one. Raises ValueError
    for tensors and modules that do not fit, and for more partials than the features of `x` can be
    cut into.
    """
    check_members(modules)
    check_inputs(x, plan, modules, tables)
    count = _cut(x.shape[1], len(partials), SHAPES[_tiles(plan).rows].shrink_inner)[0]
    check_split_k_partials(partials, (count, len(modules), plan.tokens, plan.max_rank))
    check_apart("partials", partials, "x", x)
    _launch_shrink(partials, x, plan, modules, tables)


def _launch_shrink(
    partials: Tensor, x: Tensor, plan: Plan, modules: Sequence[int], tables: Tables
) -> None:
    tiles = _tiles(plan)
    shape, features = SHAPES[tiles.rows], x.shape[1]
    count, depth = _cut(features, len(partials), shape.shrink_inner)
    unit = _unit(features, x)
    blocks = -(-plan.max_rank // shape.shrink_ranks)
    if not len(tiles.table):
        return
    shrink_program[len(tiles.table), len(modules), count * blocks](
        partials,
        x,
        *_words(plan, tiles, modules, tables),
        features // unit,
        depth // shape.shrink_inner,
        in_unit=unit,
        tile_rows=tiles.rows,
        tile_ranks=shape.shrink_ranks,
        tile_inner=shape.shrink_inner,
        promoted=_PROMOTED,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


def expand(
    ys: Sequence[Tensor], partials: Tensor, plan: Plan, modules: Sequence[int], tables: Tables
) -> None:
    """Add `scale * partials.sum(0) @ B.T` of each row's adapter to `ys` `[tokens, out]`, in place.

    The sum is rounded to the dtype of `ys` once, the result once; all else is float32. Raises
    ValueError for tensors and modules that do not fit.
    """
    check_outputs(ys, ys[0].dtype if ys else torch.float32, plan, modules, tables)
    check_split_k_partials(partials, (len(partials), len(modules), plan.tokens, plan.max_rank))
    check_memory([("y", y) for y in ys], ("partials", partials))
    _launch_expand(ys, partials, plan, modules, tables)


def _launch_expand(
    ys: Sequence[Tensor], partials: Tensor, plan: Plan, modules: Sequence[int], tables: Tables
) -> None:
    tiles = _tiles(plan)
    shape = SHAPES[tiles.rows]
    unit = min(_unit(y.shape[1], y) for y in ys)
    blocks = -(-max(y.shape[1] for y in ys) // shape.expand_columns)
    if not len(tiles.table):
        return
    expand_program[len(tiles.table), len(modules), blocks](
        *ys,
        *[ys[0]] * (MAX_MEMBERS - len(ys)),
        partials,
        tables.scale,
        *_words(plan, tiles, modules, tables),
        tables.address.stride(0),
        *tables.scale.stride(),
        _packed(y.shape[1] // unit for y in ys),
        len(partials),
        out_unit=unit,
        tile_rows=tiles.rows,
        tile_columns=shape.expand_columns,
        tile_ranks=shape.expand_ranks,
        promoted=_PROMOTED,
        num_warps=shape.warps,
        num_stages=shape.stages,
    )


def _words(
    plan: Plan, tiles: Tiles, modules: Sequence[int], tables: Tables
) -> tuple[Tensor | int, ...]:
    """Return the arguments that both programs share, in order."""
    return (
        tiles.table,
        tables.address,
        tables.rank,
        _packed(modules),
        plan.tokens,
        *tables.address.stride()[1:],
        *tables.rank.stride(),
        plan.max_rank // 8,
    )


def _packed(members: Iterable[int]) -> int:
    """Pack up to three integers of 20 bits into one."""
    members = list(members)
    assert all(0 <= member < 1 << 20 for member in members), members
    return sum(member << 20 * place for place, member in enumerate(members))


def _cut(features: int, partials: int, inner: int) -> tuple[int, int]:
    """At most so many partials, and the features of each but the last: whole tiles."""
    depth = -(-features // (partials * inner)) * inner
    return -(-features // depth), depth


def _unit(features: int, rows: Tensor) -> int:
    aligned = features % _UNIT == 0 and rows.data_ptr() % ALIGNMENT == 0
    return _UNIT if aligned else 1


def _tiles(plan: Plan) -> Tiles:
    if plan.tiles is None:
        raise ValueError("expected a plan with tiles: made for a GPU, or with tile_rows")
    return plan.tiles
