"""Which bytes of the file a rank's plan moves where, by hand."""

from __future__ import annotations

import pytest

from core.adapter_files import plan
from core.shard_plans import SPEC, adapter, column, layout, planned, row
from lorax_async.adapter import AdapterSpec
from lorax_async.config import Limits, Shard
from lorax_async.core.layout import Part
from lorax_async.core.moves import Convert, Read, Row, Zero
from lorax_async.core.runs import Span
from lorax_async.core.sharding import shard_layout


def test_rows_of_b_are_one_range_for_each_part() -> None:
    """A is [4, 16], 256 bytes; B's rows of four F32 take 16 each and come after it."""
    group, start = planned(column(12, Part(8), Part(4)), Shard(1, 2))
    b = start + 256
    assert group.reads == (
        Read(start, 256, 0),
        Read(b + 4 * 16, 64, 256),
        Read(b + 10 * 16, 32, 320),
    )
    assert group.spans == (Span(start, b), Span(b + 64, b + 128), Span(b + 160, b + 192))
    assert (group.nbytes, group.converts, group.zeros) == (384, (), ())
    assert group.rows == (Row(0, 0, 256, 4, 4, 1.0),)


def test_columns_of_a_are_a_piece_of_each_row() -> None:
    """A is [4, 24]: rows of 96 bytes, of which the second of three ranks has bytes 32 to 64."""
    group, start = planned(row(24), Shard(1, 3))
    assert group.reads == (Read(start + 32, 4 * 32, 0, 4, 96), Read(start + 384, 256, 128))
    columns, b = group.spans
    assert b == Span(start + 384, start + 640)
    assert list(columns.ranges()) == [(start + 96 * n + 32, start + 96 * n + 64) for n in range(4)]
    assert (group.nbytes, group.rows) == (384, (Row(0, 0, 128, 4, 4, 1.0),))


def test_casts_and_padding_of_a_cut_b() -> None:
    """Rank 3 becomes 8: rows of three F32 become rows of eight BF16."""
    group, start = planned(
        column(4, Part(2), Part(2)), Shard(1, 2), rank=3, dtype="BF16", rank_multiple=8
    )
    assert group.converts == (
        Convert(start, 192, "F32", rows=1, columns=48, target=0, row_pitch=48),
        Convert(start + 192 + 12, 12, "F32", rows=1, columns=3, target=256, row_pitch=8),
        Convert(start + 192 + 36, 12, "F32", rows=1, columns=3, target=272, row_pitch=8),
    )
    assert group.zeros == (Zero(96, 5 * 16 * 2),)
    assert (group.reads, group.rows) == ((), (Row(0, 0, 256, 3, 8, 1.0),))


def test_casts_and_padding_of_a_cut_a() -> None:
    group, start = planned(row(4), Shard(0, 2), rank=2, dtype="BF16", rank_multiple=8)
    pieces = (Span(start, start + 8, 2, 16),)
    assert group.converts[0] == Convert(
        start, 16, "F32", rows=1, columns=4, target=0, row_pitch=4, pieces=pieces
    )
    assert group.zeros == (Zero(8, 6 * 2 * 2),)
    assert group.rows == (Row(0, 0, 64, 2, 8, 1.0),)


def test_pieces_are_cast_together_as_far_as_they_adjoin_on_the_device() -> None:
    """A is [4, 64], B [16, 4]; a move holds 256 bytes of F32: two halves of rows, then B."""
    file, base = adapter(row(64)), layout(row(64))
    cuts = shard_layout(base, Shard(1, 2)).cuts
    (group,) = plan(
        file,
        SPEC,
        base,
        dtype="BF16",
        cuts=cuts,
        limits=Limits(max_rank=32),
        staging_move_bytes=256,
    ).groups
    start = len(file) - 4 * 4 * (64 + 16)
    assert [move.sources for move in group.converts] == [
        (Span(start + 128, start + 256, 2, 256),),
        (Span(start + 640, start + 768, 2, 256),),
        (Span(start + 1024, start + 1280),),
    ]
    assert [move.target for move in group.converts] == [0, 128, 256]
    assert group.spans == (
        Span(start + 128, start + 256, 4, 256),
        Span(start + 1024, start + 1280),
    )


def test_a_cast_is_cut_inside_rows_too() -> None:
    """A is [4, 64], 128 bytes of each row are held, and a move holds 192: one row and a half."""
    file, base = adapter(row(64)), layout(row(64))
    (group,) = plan(
        file,
        SPEC,
        base,
        dtype="BF16",
        cuts=shard_layout(base, Shard(1, 2)).cuts,
        limits=Limits(max_rank=32),
        staging_move_bytes=192,
    ).groups
    start = len(file) - 4 * 4 * (64 + 16) + 128
    first, second, third, *_ = (move.sources for move in group.converts)
    assert first == (Span(start, start + 128), Span(start + 256, start + 320))
    assert second == (Span(start + 320, start + 384), Span(start + 512, start + 640))
    assert third == (Span(start + 768, start + 896), Span(start + 896, start + 960))  # of B


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_a_plan_of_many_rows_has_no_more_to_remember(dtype: str, multiple: int) -> None:
    base = layout(row(24))
    cuts = shard_layout(base, Shard(0, 3)).cuts
    found = []
    for rank in (5, 205):
        spec, limits = AdapterSpec(rank=rank, alpha=4.0), Limits(max_rank=256)
        made = plan(
            adapter(*base.modules, rank=rank),
            spec,
            base,
            cuts=cuts,
            dtype=dtype,
            rank_multiple=multiple,
            limits=limits,
        )
        (group,) = made.groups
        found.append((len(group.reads) + len(group.converts), made.needs(holdable=False).weight))
    assert found == [(2, 2), (2, 2)]


def test_what_many_pieces_take_to_remember_is_counted() -> None:
    """Of B there is one for each part, of A one for all rows, and else one for both."""
    base = layout(column(24, *[Part(4)] * 6))
    file = adapter(*base.modules)
    whole = plan(file, SPEC, base)
    cut = plan(file, SPEC, base, cuts=shard_layout(base, Shard(1, 4)).cuts)
    assert [made.needs(holdable=False).weight for made in (whole, cut)] == [1, 7]
