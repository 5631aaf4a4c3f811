"""Windows, each filled on its own by slices and casts, against the group filled at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.adapter_files import TORCH, carry_out, file_of, layout_of, plan
from lorax_async.adapter import AdapterSpec
from lorax_async.config import Limits
from lorax_async.core.moves import Convert, GroupPlan, Read, Zero
from lorax_async.core.windows import Window, windows
from lorax_async.errors import InternalError

MOST = 1_000
"""The largest convert, in bytes on the device, that is drawn."""


@dataclass
class Drawing:
    """A group in the making: moves one after the other, some with a gap between them."""

    item: int
    end: int = 0
    file: int = 3
    reads: list[Read] = field(default_factory=list)
    converts: list[Convert] = field(default_factory=list)
    zeros: list[Zero] = field(default_factory=list)

    def read(self, elements: int) -> None:
        self.reads.append(Read(self.file, elements * self.item, self.end))
        self.file += elements * self.item
        self.end += elements * self.item

    def read_rows(self, elements: int, rows: int, gap: int) -> None:
        nbytes = elements * self.item
        pitch = nbytes + gap * self.item
        self.reads.append(Read(self.file, rows * nbytes, self.end, rows, pitch))
        self.file += rows * pitch
        self.end += rows * nbytes

    def zero(self, elements: int) -> None:
        self.zeros.append(Zero(self.end, elements * self.item))
        self.end += elements * self.item

    def convert(self, source: str, rows: int, columns: int, pitch: int) -> None:
        nbytes = rows * columns * TORCH[source].itemsize
        self.converts.append(Convert(self.file, nbytes, source, rows, columns, self.end, pitch))
        self.file += nbytes
        self.end += rows * pitch * self.item

    def group(self) -> GroupPlan:
        moves = tuple(self.reads), tuple(self.converts), tuple(self.zeros)
        return GroupPlan(0, self.end + -self.end % 64, *moves, (), ())


@st.composite
def groups(draw: st.DrawFn) -> tuple[GroupPlan, str, bytes]:
    dtype = draw(st.sampled_from(sorted(TORCH)))
    drawing = Drawing(TORCH[dtype].itemsize)
    for kind in draw(st.lists(st.sampled_from("rsscz"), min_size=1, max_size=12)):
        if draw(st.booleans()):
            drawing.end += -drawing.end % 64
        if kind == "c":
            columns = draw(st.integers(1, 20))
            pitch = columns + draw(st.integers(0, 4))
            rows = draw(st.integers(1, MOST // (pitch * drawing.item)))
            drawing.convert(draw(st.sampled_from(sorted(TORCH))), rows, columns, pitch)
        elif kind == "r":
            drawing.read(draw(st.integers(1, 1_500)))
        elif kind == "s":
            elements = draw(st.sampled_from([1, 16, 32, 50, 700]))
            drawing.read_rows(elements, draw(st.integers(2, 40)), draw(st.integers(0, 9)))
        else:
            drawing.zero(draw(st.integers(1, 400)))
    file = torch.randint(256, (drawing.file,), dtype=torch.uint8)
    return drawing.group(), dtype, file.numpy().tobytes()


def filled(made: tuple[Window, ...], file: bytes, dtype: str) -> torch.Tensor:
    parts = [
        carry_out(
            GroupPlan(0, each.nbytes, each.reads, each.converts, each.zeros, (), ()), file, dtype
        )
        for each in made
    ]
    return torch.cat(parts)


def bytes_read(reads: Iterable[Read]) -> list[int]:
    """Their numbers in the file, in order; what is read twice is there twice."""
    ranges = [each for read in reads for each in read.source.ranges()]
    return sorted(n for start, stop in ranges for n in range(start, stop))


def ends(convert: Convert, dtype: str) -> tuple[int, int]:
    nbytes = convert.rows * convert.row_pitch * TORCH[dtype].itemsize
    return convert.target, convert.target + nbytes


def may_be_cut(place: int, group: GroupPlan, dtype: str) -> bool:
    spans = [ends(convert, dtype) for convert in group.converts]
    if any(first < place < last for first, last in spans):
        return False
    return place % 64 == 0 or any(place in span for span in spans) or place == group.nbytes


@settings(max_examples=200, deadline=None)
@given(drawn=groups(), nbytes=st.sampled_from([1_000, 1_024, 1_100, 2_048, 1 << 20]))
def test_windows_are_the_group_in_parts(drawn: tuple[GroupPlan, str, bytes], nbytes: int) -> None:
    group, dtype, file = drawn
    made = windows(group, nbytes, TORCH[dtype].itemsize)
    assert [each.start for each in made] == [0, *(each.stop for each in made[:-1])]
    assert made[-1].stop == group.nbytes
    for each in made:
        assert 0 < each.nbytes <= nbytes
        assert may_be_cut(each.stop, group, dtype)
    assert torch.equal(filled(made, file, dtype), carry_out(group, file, dtype))
    assert sum(len(each.converts) for each in made) == len(group.converts)
    assert bytes_read(read for each in made for read in each.reads) == bytes_read(group.reads)
    parts = [read for each in made for read in each.reads]
    assert len(parts) <= 3 * len(group.reads) + 3 * (len(made) - 1)


@settings(max_examples=100, deadline=None)
@given(drawn=groups(), nbytes=st.sampled_from([1_000, 1_024, 1_536]))
def test_no_window_could_be_larger(drawn: tuple[GroupPlan, str, bytes], nbytes: int) -> None:
    group, dtype, _ = drawn
    for each in windows(group, nbytes, TORCH[dtype].itemsize)[:-1]:
        beyond = range(each.stop + -each.stop % 64, each.start + nbytes + 1, 64)
        larger = [place for place in beyond if may_be_cut(place, group, dtype)]
        assert larger in ([], [each.stop])


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


def test_a_real_plan_is_cut() -> None:
    """Rank 5 padded to 8 and cast from F32, beside tensors that are read as they lie."""
    tensors = []
    for name, dtype in (("q", torch.float32), ("k", torch.bfloat16)):
        stem = f"base_model.model.model.layers.0.{name}.lora_"
        tensors.append((f"{stem}A.weight", torch.randn(5, 96).to(dtype)))
        tensors.append((f"{stem}B.weight", torch.randn(160, 5).to(dtype)))
    file = file_of(tensors)
    layout = layout_of(
        ("model.layers.0.q", 96, 160, 0), ("model.layers.0.k", 96, 160, 0), num_layers=1
    )
    spec = AdapterSpec(rank=5, alpha=8.0)
    limits = Limits(max_rank=8)
    made = plan(file, spec, layout, rank_multiple=8, limits=limits, staging_move_bytes=512)
    (group,) = made.groups
    parts = windows(group, 512, 2)
    assert len(parts) > group.nbytes // 512
    assert torch.equal(filled(parts, file, "BF16"), carry_out(group, file, "BF16"))
