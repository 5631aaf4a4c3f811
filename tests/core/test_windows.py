"""Windows by hand; `test_transfer_plan` fills those of any plan and compares them with it."""

from __future__ import annotations

import pytest

from lorax_async.core.moves import Convert, GroupPlan, Read, Zero
from lorax_async.core.windows import Window, windows
from lorax_async.errors import InternalError


def test_by_hand() -> None:
    """One ends inside a read, one before a cast that would not fit, one with the end of a cast."""
    reads, zeros = (Read(10, 200, 0), Read(500, 64, 384)), (Zero(200, 24),)
    converts = (Convert(210, 80, "F32", 1, 20, 224, 20), Convert(290, 96, "F32", 4, 6, 264, 8))
    group = GroupPlan(0, 448, reads, converts, zeros, (), ())
    assert windows(group, 128, 2) == (
        Window(0, 128, (Read(10, 128, 0),), (), ()),
        Window(128, 224, (Read(138, 72, 0),), (), (Zero(72, 24),)),
        Window(
            224,
            328,
            (),
            (Convert(210, 80, "F32", 1, 20, 0, 20), Convert(290, 96, "F32", 4, 6, 40, 8)),
            (),
        ),
        Window(328, 448, (Read(500, 64, 56),), (), ()),
    )


def test_windows_cut_a_strided_read_at_ends_of_rows_and_inside_them() -> None:
    """Rows of 48 bytes, of which the file has 100: five and a third, then half of one, then two."""
    group = GroupPlan(0, 384, (Read(10, 384, 0, 8, 100),), (), (), (), ())
    assert windows(group, 256, 2) == (
        Window(0, 256, (Read(10, 240, 0, 5, 100), Read(510, 16, 240)), (), ()),
        Window(256, 384, (Read(526, 32, 0), Read(610, 96, 32, 2, 100)), (), ()),
    )
    inside = [each.reads for each in windows(group, 64, 2)]
    assert inside[:3] == [
        (Read(10, 48, 0), Read(110, 16, 48)),
        (Read(126, 32, 0), Read(210, 32, 32)),
        (Read(242, 16, 0), Read(310, 48, 16)),
    ]
    ends = [each.reads for each in windows(group, 192, 2)]
    assert ends == [(Read(10, 192, 0, 4, 100),), (Read(410, 192, 0, 4, 100),)]
    (row,) = windows(GroupPlan(0, 384, (Read(10, 384, 0, 2, 900),), (), (), (), ()), 64, 2)[1].reads
    assert row == Read(74, 64, 0)


def test_what_fits_is_one_window() -> None:
    group = GroupPlan(0, 128, (Read(7, 100, 0),), (), (Zero(100, 28),), (), ())
    assert windows(group, 128, 2) == (Window(0, 128, group.reads, (), group.zeros),)
    assert len(windows(group, 127, 2)) == 2


def test_a_move_that_no_window_holds() -> None:
    converts = (Convert(0, 400, "F32", 1, 100, 0, 100),)
    group = GroupPlan(0, 256, (), converts, (), (), ())
    with pytest.raises(InternalError, match="192 bytes is too small"):
        windows(group, 192, 2)
