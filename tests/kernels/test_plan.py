"""The kernels' plan, and its tiles, which a program of a GPU is given: what they keep and refuse."""

import subprocess
import sys

import pytest
import torch

from lorax_kernels import Plan
from lorax_kernels.tiles import Tiles


def test_a_plan_keeps_all_segments_as_tensors_and_the_adapters_as_integers() -> None:
    plan = Plan.from_segments([0, 3, 3, 5, 6], [2, 1, -1, 0])
    assert plan.segments == ((0, 3, 2), (5, 6, 0))
    assert (plan.tokens, plan.top_slot, plan.tiles) == (6, 2, None)
    assert (plan.bounds.tolist(), plan.slots.tolist()) == ([0, 3, 3, 5, 6], [2, 1, -1, 0])
    assert plan.bounds.dtype == plan.slots.dtype == torch.int32
    tiled = Plan.from_segments([0, 2, 3], [-1, 4], tile_rows=32, tile_room=2, max_rank=20)
    assert tiled.tiles is not None
    assert tiled.tiles.table.tolist() == [[2, 3, 4], [0, 0, -1]]
    assert (tiled.tiles.rows, tiled.max_rank) == (32, 24)


def test_a_plan_refuses() -> None:
    for bounds, slots, named in [
        ([], [], "expected 1 bounds from 0 for 0 slots, got 0"),
        ([0, 1], [], "expected 1 bounds"),
        ([1, 2], [0], "got 2 from 1"),
        ([0, 3, 2], [0, 1], "ascending"),
        ([0, 1], [-2], "at least -1, got -2"),
    ]:
        with pytest.raises(ValueError, match=named):
            Plan.from_segments(bounds, slots)


def test_tiles_are_runs_of_one_slot_and_their_table_is_refilled_where_it_is() -> None:
    segments = [(0, 3, 2), (5, 22, 0), (22, 23, 0)]
    tiles = Tiles.of(segments, rows=16, room=None, device="cpu")
    assert tiles.table.tolist() == [[0, 3, 2], [5, 21, 0], [21, 22, 0], [22, 23, 0]]
    assert tiles.table.dtype == torch.int32
    address = tiles.table.data_ptr()
    tiles.refill([(0, 1, 0), (4, 9, 1)])
    refilled = [[0, 1, 0], [4, 9, 1], [0, 0, -1], [0, 0, -1]]
    assert tiles.table.tolist() == refilled
    with pytest.raises(ValueError, match="at most 4 tiles, the segments need 5"):
        tiles.refill([(n, n + 1, 0) for n in range(5)])
    assert tiles.table.tolist() == refilled
    tiles.refill([])
    assert tiles.table.tolist() == [[0, 0, -1]] * 4
    assert tiles.table.data_ptr() == address
    for longest, rows in ((1, 16), (16, 16), (17, 32), (100, 32)):
        made = Tiles.of([(0, 1, 0), (1, 1 + longest, 1)], rows=None, room=None, device="cpu")
        assert made.rows == rows
    for wrong, room, named in (
        (64, None, "16 or 32 rows, got 64"),
        (16, 1, "at most 1 tiles, the segments need 2"),
    ):
        with pytest.raises(ValueError, match=named):
            Tiles.of([(0, 17, 0)], rows=wrong, room=room, device="cpu")


@pytest.mark.slow
def test_triton_is_not_imported_before_a_gpu_is_used() -> None:
    program = "import sys, torch; before = set(sys.modules); import lorax_kernels; "
    program += "assert not [m for m in set(sys.modules) - before if m.startswith('triton')]"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
