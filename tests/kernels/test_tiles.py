"""What a program of a GPU is given of a batch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lorax_kernels import Plan
from lorax_kernels.tiles import Tiles


def test_tiles_are_runs_of_one_slot() -> None:
    segments = [(0, 3, 2), (5, 22, 0), (22, 23, 0)]
    tiles = Tiles.of(segments, rows=16, room=None, device="cpu")
    assert tiles.table.tolist() == [[0, 3, 2], [5, 21, 0], [21, 22, 0], [22, 23, 0]]
    assert tiles.table.dtype == torch.int32


@pytest.mark.parametrize(("longest", "rows"), [(1, 16), (16, 16), (17, 32), (100, 32)])
def test_their_rows_follow_from_the_longest_segment(longest: int, rows: int) -> None:
    segments = [(0, 1, 0), (1, 1 + longest, 1)]
    assert Tiles.of(segments, rows=None, room=None, device="cpu").rows == rows


def test_a_plan_has_tiles_where_they_are_asked_for() -> None:
    assert Plan.from_segments([0, 3], [0]).tiles is None
    plan = Plan.from_segments([0, 2, 3], [-1, 4], tile_rows=32, tile_room=2, max_rank=20)
    assert plan.tiles is not None
    assert plan.tiles.table.tolist() == [[2, 3, 4], [0, 0, -1]]
    assert (plan.tiles.rows, plan.max_rank) == (32, 24)


def test_a_table_is_refilled_where_it_is() -> None:
    tiles = Tiles.of([(0, 20, 1)], rows=16, room=3, device="cpu")
    address = tiles.table.data_ptr()
    tiles.refill([(0, 1, 0), (1, 2, 3), (4, 9, 1)])
    assert tiles.table.tolist() == [[0, 1, 0], [1, 2, 3], [4, 9, 1]]
    tiles.refill([])
    assert tiles.table.tolist() == [[0, 0, -1]] * 3
    assert tiles.table.data_ptr() == address


@pytest.mark.parametrize(
    ("rows", "room", "named"),
    [(64, None, "16 or 32 rows, got 64"), (16, 1, "at most 1 tiles, the segments need 2")],
)
def test_tiles_refuse(rows: int, room: int | None, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Tiles.of([(0, 17, 0)], rows=rows, room=room, device="cpu")


def test_a_refill_that_does_not_fit_changes_nothing() -> None:
    tiles = Tiles.of([(0, 1, 0)], rows=16, room=None, device="cpu")
    with pytest.raises(ValueError, match="at most 1 tiles, the segments need 2"):
        tiles.refill([(0, 1, 0), (1, 2, 1)])
    assert tiles.table.tolist() == [[0, 1, 0]]


def test_triton_is_not_imported_before_a_gpu_is_used() -> None:
    program = "import sys, torch; before = set(sys.modules); import lorax_kernels; "
    program += "assert not [m for m in set(sys.modules) - before if m.startswith('triton')]"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
