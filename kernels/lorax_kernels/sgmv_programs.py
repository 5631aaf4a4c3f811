"""The GPU programs in Triton: `shrink_program` and `expand_program`.

Both read the tables by address, so that one launch handles all ranks, and a replayed graph uses the
adapters present at the time. Without atomics, one program computes each element of a partial and of
y, and the order of every sum is fixed.

Only constants specialise arguments, which bounds the number of variants. The compiler learns
alignment from hints or from a multiplication; otherwise loads become scalar. It accepts hints only
on results of operations, never on a bare argument.

`promoted` is for Triton's interpreter, which multiplies the bits of bfloat16 and truncates instead
of rounding. `modules` and `outs` pack three integers of 20 bits, one per member of the group.
"""

from __future__ import annotations

import triton
import triton.language as tl

_TABLES = "tiles address ranks modules tokens module_step slot_step rank_module_step rank_slot_step"
_SHRINK = f"partials x {_TABLES} width_units in_units steps".split()
_EXPAND = (
    f"first_y second_y third_y partials scales {_TABLES} side_step scale_module_step"
    " scale_slot_step width_units split_count outs"
).split()


@triton.jit
def _of_member(packed: tl.tensor, member: tl.tensor) -> tl.tensor:
    return ((packed >> (member * 20)) & 0xFFFFF).to(tl.int32)


@triton.jit
def _operand(cell: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Load the address of A or B from its cell of the address table."""
    return tl.multiple_of(tl.load(cell).to(tl.pointer_type(dtype)), 16)


@triton.jit
def _fitting(rank: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Limit the rank. The division tells the compiler that rows of B are aligned to 16 bytes."""
    return tl.minimum(rank, width) // 8 * 8


@triton.jit
def _products(
    left: tl.tensor, right: tl.tensor, total: tl.tensor, promoted: tl.constexpr
) -> tl.tensor:
    """Return total + left [rows, n] · right [columns, n] transposed, in float32."""
    if promoted:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, tl.trans(right), total, input_precision="ieee")


@triton.jit
def _rounded(value: tl.tensor, dtype: tl.constexpr, promoted: tl.constexpr) -> tl.tensor:
    """Round float32 to a narrower type, ties to even."""
    if promoted and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit(do_not_specialize=_SHRINK)
def shrink_program(
    partials: tl.tensor,
    x: tl.tensor,
    tiles: tl.tensor,
    address: tl.tensor,
    ranks: tl.tensor,
    modules: tl.int64,
    tokens: tl.tensor,
    module_step: tl.tensor,
    slot_step: tl.tensor,
    rank_module_step: tl.tensor,
    rank_slot_step: tl.tensor,
    width_units: tl.tensor,
    in_units: tl.tensor,
    steps: tl.tensor,
    in_unit: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_ranks: tl.constexpr,
    tile_inner: tl.constexpr,
    promoted: tl.constexpr,
) -> None:
    """partials[partial, member, rows, ranks] = x[rows, part] · A[ranks, part] transposed.

    Grid: tiles, members, partials x blocks of ranks. A partial is `steps` tiles of features.
    """
    tile = tiles + tl.program_id(0) * 3
    slot = tl.load(tile + 2)
    member = tl.program_id(1)
    width = width_units * 8
    blocks = tl.cdiv(width, tile_ranks)
    partial = tl.program_id(2) // blocks
    first_rank = tl.program_id(2) % blocks * tile_ranks
    module = _of_member(modules, member)
    rank_cell = ranks + module * rank_module_step + slot * rank_slot_step
    rank = tl.minimum(tl.load(rank_cell, mask=slot >= 0, other=0), width)
    if first_rank >= rank:
        return
    start = tl.load(tile)
    row = tl.arange(0, tile_rows)[:, None]
    has_row = row < tl.load(tile + 1) - start
    features = in_units * in_unit
    x_start = x + start.to(tl.int64) * features
    if in_unit > 1:
        x_start = tl.multiple_of(x_start, 16)
    a_index = first_rank + tl.arange(0, tile_ranks)[:, None]
    a_start = _operand(address + module * module_step + slot * slot_step, x.dtype.element_ty)
    a_row = a_start + a_index * features
    begin = partial * steps * tile_inner
    end = tl.minimum(begin + steps * tile_inner, features)
    x_row = x_start + row * features
    total = _products_over(
        x_row, has_row, a_row, a_index < rank, begin, end, features, tile_inner, promoted
    )
    line = (partial * tl.num_programs(1) + member).to(tl.int64) * tokens + start
    column = first_rank + tl.arange(0, tile_ranks)[None, :]
    tl.store(partials + line * width + row * width + column, total, mask=has_row & (column < rank))


@triton.jit
def _products_over(
    x_row: tl.tensor,
    has_row: tl.tensor,
    a_row: tl.tensor,
    has_a: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    features: tl.tensor,
    tile_inner: tl.constexpr,
    promoted: tl.constexpr,
) -> tl.tensor:
    """Return x · Aᵀ over the features [begin, end), [tile_rows, tile_ranks]."""
    inner = tl.arange(0, tile_inner)[None, :]
    total = tl.zeros([has_row.shape[0], has_a.shape[0]], tl.float32)
    for at in range(begin, end, tile_inner):
        has_inner = inner < features - at
        x_tile = tl.load(x_row + at + inner, mask=has_row & has_inner, other=0.0)
        a_tile = tl.load(a_row + at + inner, mask=has_a & has_inner, other=0.0)
        total = _products(x_tile, a_tile, total, promoted)
    return total


@triton.jit(do_not_specialize=_EXPAND)
def expand_program(
    first_y: tl.tensor,
    second_y: tl.tensor,
    third_y: tl.tensor,
    partials: tl.tensor,
    scales: tl.tensor,
    tiles: tl.tensor,
    address: tl.tensor,
    ranks: tl.tensor,
    modules: tl.int64,
    tokens: tl.tensor,
    module_step: tl.tensor,
    slot_step: tl.tensor,
    rank_module_step: tl.tensor,
    rank_slot_step: tl.tensor,
    width_units: tl.tensor,
    side_step: tl.tensor,
    scale_module_step: tl.tensor,
    scale_slot_step: tl.tensor,
    outs: tl.int64,
    split_count: tl.tensor,
    out_unit: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_ranks: tl.constexpr,
    promoted: tl.constexpr,
) -> None:
    """y[rows, columns] += scale * (sum of partials) · Bᵀ. Grid: tiles, members, column blocks."""
    tile = tiles + tl.program_id(0) * 3
    slot = tl.load(tile + 2)
    member = tl.program_id(1)
    first_column = tl.program_id(2) * tile_columns
    out = _of_member(outs, member) * out_unit
    module = _of_member(modules, member)
    rank_cell = ranks + module * rank_module_step + slot * rank_slot_step
    true_rank = tl.load(rank_cell, mask=slot >= 0, other=0)
    if (true_rank == 0) | (first_column >= out):
        return
    # A rank that does not fit cannot be refused here: its rows become NaN.
    width = width_units * 8
    rank = _fitting(true_rank, width)
    scale = tl.load(scales + module * scale_module_step + slot * scale_slot_step)
    scale = tl.where(rank == true_rank, scale, float("nan"))
    b_cell = address + side_step + module * module_step + slot * slot_step
    column = first_column + tl.arange(0, tile_columns)[:, None]
    b_row = _operand(b_cell, first_y.dtype.element_ty) + column * rank
    start = tl.load(tile)
    row = tl.arange(0, tile_rows)[:, None]
    has_row = row < tl.load(tile + 1) - start
    partial_start = partials + (member.to(tl.int64) * tokens + start) * width
    partial_row = tl.multiple_of(partial_start, 16) + row * width
    partial_step = tl.num_programs(1).to(tl.int64) * tokens * width
    total = _sum_times_b(
        partial_row,
        partial_step,
        split_count,
        has_row,
        b_row,
        column < out,
        rank,
        tile_ranks,
        promoted,
    )
    y_start = tl.where(member == 0, first_y, tl.where(member == 1, second_y, third_y))
    y_start += start.to(tl.int64) * out
    if out_unit > 1:
        y_start = tl.multiple_of(y_start, 16)
    _add(y_start, scale * total, has_row, first_column, out, promoted)


@triton.jit
def _sum_times_b(
    partial_row: tl.tensor,
    partial_step: tl.tensor,
    split_count: tl.tensor,
    has_row: tl.tensor,
    b_row: tl.tensor,
    has_b: tl.tensor,
    rank: tl.tensor,
    tile_ranks: tl.constexpr,
    promoted: tl.constexpr,
) -> tl.tensor:
    """Return (rounded sum of partials) · Bᵀ, [tile_rows, tile_columns]."""
    inner = tl.arange(0, tile_ranks)[None, :]
    total = tl.zeros([has_row.shape[0], has_b.shape[0]], tl.float32)
    for at in range(0, rank, tile_ranks):
        has_inner = inner < rank - at
        shrunk = tl.zeros([has_row.shape[0], tile_ranks], tl.float32)
        part = partial_row + at + inner
        for _ in range(split_count):
            shrunk += tl.load(part, mask=has_row & has_inner, other=0.0)
            part += partial_step
        b_tile = tl.load(b_row + at + inner, mask=has_b & has_inner, other=0.0)
        total = _products(_rounded(shrunk, b_tile.dtype, promoted), b_tile, total, promoted)
    return total


@triton.jit
def _add(
    y_start: tl.tensor,
    delta: tl.tensor,
    has_row: tl.tensor,
    first_column: tl.tensor,
    out: tl.tensor,
    promoted: tl.constexpr,
) -> None:
    row = tl.arange(0, delta.shape[0])[:, None]
    column = first_column + tl.arange(0, delta.shape[1])[None, :]
    y_part = y_start + row * out + column
    inside = has_row & (column < out)
    value = tl.load(y_part, mask=inside, other=0.0).to(tl.float32) + delta
    tl.store(y_part, _rounded(value, y_start.dtype.element_ty, promoted), mask=inside)
