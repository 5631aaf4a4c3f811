"""Many adapters on a GPU, in two launches: a shrink `x · Aᵀ` into planes, an expand onto y.

A group is up to three modules with the same input (q, k and v; gate and up): they share the two
launches, each with its own ranks. The planes are parts of the sum over the input's features, which
`expand` adds up in their order, so that few rows of a decoding step still fill the GPU and equal
inputs give equal bits.

Every launch takes fixed addresses only: tables, the plan's tiles, x and y. Before a graph is
captured, the same shapes are to be launched once: the first launch of a variant compiles it.
Importing this file imports Triton.
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
    check_planes,
)
from lorax_kernels.sgmv_programs import expand_program, shrink_program
from lorax_kernels.tables import Tables
from lorax_kernels.tiles import DECODE_ROWS, PREFILL_ROWS, Tiles

MAX_PLANES = 8
PROGRAMS = 512
"""Tiles times planes: more planes than that do not make a GPU any busier."""

PLANE_FEATURES = 512
"""The fewest input features that are a plane of their own."""

_UNIT = ALIGNMENT
"""Rows of so many elements begin where 16-byte loads may, whatever the dtype."""


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
"""Triton's interpreter runs the programs; see there."""


def apply_one(y: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """As :func:`lorax_kernels.apply`, by two launches."""
    apply_group([y], x, plan, [module], tables)


def shrink_one(h: Tensor, x: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """As :func:`lorax_kernels.shrink`."""
    check_rows("h", h, plan, x.device.type)
    check_apart("h", h, "x", x)
    planes = new_planes(x, plan, 1).zero_()
    shrink(planes, x, plan, [module], tables)
    width = min(h.shape[1], plan.max_rank)
    h.zero_()
    h[:, :width].copy_(planes[:, 0, :, :width].sum(0))


def expand_one(y: Tensor, h: Tensor, plan: Plan, module: int, tables: Tables) -> None:
    """As :func:`lorax_kernels.expand`."""
    check_rows("h", h, plan, y.device.type)
    check_apart("y", y, "h", h)
    width = min(h.shape[1], plan.max_rank)
    shape = (1, 1, plan.tokens, plan.max_rank)
    planes = torch.zeros(shape, dtype=torch.float32, device=y.device)
    planes[0, 0, :, :width] = h[:, :width]
    expand([y], planes, plan, [module], tables)


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
    planes = new_planes(x, plan, len(modules))
    _launch_shrink(planes, x, plan, modules, tables)
    _launch_expand(ys, planes, plan, modules, tables)


def new_planes(x: Tensor, plan: Plan, members: int) -> Tensor:
    """Room for what `shrink` writes: float32 `[planes, members, tokens, plan.max_rank]`.

    Their number follows from the input's features and the number of tiles alone.
    """
    tiles = _tiles(plan)
    wanted = min(MAX_PLANES, x.shape[1] // PLANE_FEATURES, PROGRAMS // max(len(tiles.table), 1))
    count = _cut(x.shape[1], max(wanted, 1), SHAPES[tiles.rows].shrink_inner)[0]
    return torch.empty(
        count, members, plan.tokens, plan.max_rank, dtype=torch.float32, device=x.device
    )


def shrink(planes: Tensor, x: Tensor, plan: Plan, modules: Sequence[int], tables: Tables) -> None:
    """Write `x @ A.T` of each row's adapter to `planes`, in parts that sum to it.

    Only the ranks that an adapter has are written, in the rows that have one. Raises ValueError
    for tensors and modules that do not fit, and for more planes than the features of `x` can be
    cut into.
    """
    check_members(modules)
    check_inputs(x, plan, modules, tables)
    count = _cut(x.shape[1], len(planes), SHAPES[_tiles(plan).rows].shrink_inner)[0]
    check_planes(planes, (count, len(modules), plan.tokens, plan.max_rank))
    check_apart("planes", planes, "x", x)
    _launch_shrink(planes, x, plan, modules, tables)


def _launch_shrink(
    planes: Tensor, x: Tensor, plan: Plan, modules: Sequence[int], tables: Tables
) -> None:
    tiles = _tiles(plan)
    shape, features = SHAPES[tiles.rows], x.shape[1]
    count, depth = _cut(features, len(planes), shape.shrink_inner)
    unit = _unit(features, x)
    blocks = -(-plan.max_rank // shape.shrink_ranks)
    if not len(tiles.table):
        return
    shrink_program[len(tiles.table), len(modules), count * blocks](
        planes,
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
    ys: Sequence[Tensor], planes: Tensor, plan: Plan, modules: Sequence[int], tables: Tables
) -> None:
    """Add `scale * planes.sum(0) @ B.T` of each row's adapter to `ys` `[tokens, out]`, in place.

    The sum is rounded to the dtype of `ys` once, the result once; all else is float32. Raises
    ValueError for tensors and modules that do not fit.
    """
    check_outputs(ys, ys[0].dtype if ys else torch.float32, plan, modules, tables)
    check_planes(planes, (len(planes), len(modules), plan.tokens, plan.max_rank))
    check_memory([("y", y) for y in ys], ("planes", planes))
    _launch_expand(ys, planes, plan, modules, tables)


def _launch_expand(
    ys: Sequence[Tensor], planes: Tensor, plan: Plan, modules: Sequence[int], tables: Tables
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
        planes,
        tables.scale,
        *_words(plan, tiles, modules, tables),
        tables.address.stride(0),
        *tables.scale.stride(),
        _packed(y.shape[1] // unit for y in ys),
        len(planes),
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
    """The arguments that both programs take, in their order."""
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
    """Up to three integers of 20 bits in one."""
    members = list(members)
    assert all(0 <= member < 1 << 20 for member in members), members
    return sum(member << 20 * place for place, member in enumerate(members))


def _cut(features: int, planes: int, inner: int) -> tuple[int, int]:
    """At most so many planes, and the features of each but the last: whole tiles."""
    depth = -(-features // (planes * inner)) * inner
    return -(-features // depth), depth


def _unit(features: int, rows: Tensor) -> int:
    aligned = features % _UNIT == 0 and rows.data_ptr() % ALIGNMENT == 0
    return _UNIT if aligned else 1


def _tiles(plan: Plan) -> Tiles:
    if plan.tiles is None:
        raise ValueError("expected a plan with tiles: made for a GPU, or with tile_rows")
    return plan.tiles
