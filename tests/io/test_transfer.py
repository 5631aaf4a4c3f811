"""One group's way: conversions before rows, the rest by the device, and the check of what came."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest
import torch
from device_groups import ARENA, LAYOUT, SLOTS, BytesReader, TabledDevice, extent, holds

from lorax_async.core.arena import Extent
from lorax_async.core.moves import Convert, GroupPlan, Read, Row, Zero
from lorax_async.core.runs import Span
from lorax_async.errors import AdapterFormatError, FetchError, TransferError
from lorax_async.io.devices.gated import POISON, GatedDevice
from lorax_async.io.ports import CopyTicket, FilePieces, Reader, StagedPiece
from lorax_async.io.staging import StagingRing
from lorax_async.io.transfer import GroupCopy, Transfer

NAMES = [module.name for module in LAYOUT.modules]
A = torch.arange(72, dtype=torch.float32).view(3, 24)
B = torch.arange(120, dtype=torch.float32).view(40, 3) - 60
NBYTES = 4 * (8 * 24 + 40 * 8)


def opened() -> GatedDevice:
    device = GatedDevice(LAYOUT, dtype="F32", nbytes=ARENA, slots=SLOTS)
    device.open()
    return device


def file_of(a: torch.Tensor, b: torch.Tensor) -> bytes:
    data: bytes = a.view(torch.uint8).numpy().tobytes() + b.view(torch.uint8).numpy().tobytes()
    return data


def mixed_group() -> GroupPlan:
    """Rank 3 padded to 8: A read as it lies with zeros after it, B's columns padded in staging."""
    return GroupPlan(
        layer=0,
        nbytes=NBYTES,
        reads=(Read(0, 288, 0),),
        converts=(Convert(288, 480, "F32", rows=40, columns=3, target=768, row_pitch=8),),
        zeros=(Zero(288, 480),),
        rows=(Row(0, 0, 768, 3, 8, 0.5),),
        spans=(Span(0, 768),),
    )


def copy_of(reader: Reader, group: GroupPlan, slot: int = 1) -> GroupCopy:
    return GroupCopy(reader, group, "F32", extent(2), slot)


def transfer(device: TabledDevice, *, check_finite: bool = False) -> Transfer:
    return Transfer(
        device, StagingRing(device.staging_memory(4096), 2048), NAMES, check_finite=check_finite
    )


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.zeros(8, 24), torch.zeros(40, 8)
    a[:3], b[:, :3] = A, B
    return a, b


@pytest.mark.parametrize("check_finite", [False, True])
def test_every_move_reaches_its_place(check_finite: bool) -> None:
    device = opened()
    moving = transfer(device, check_finite=check_finite)
    moving.run(copy_of(BytesReader(file_of(A, B)), mixed_group()))
    holds(device, 1, {0: (*padded(), 0.5)})
    around = device.host_view(extent(2))[NBYTES:]
    assert (around == POISON).all()
    device.close()


class LateDevice(GatedDevice):
    """Looks at its memory at the moment it is asked to copy."""

    seen: torch.Tensor

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[Row], extent: Extent, slot: int
    ) -> CopyTicket:
        self.seen = self.host_view(extent)[:NBYTES].clone()
        return super().copy(pieces, rows, extent, slot)


def test_what_is_converted_is_there_before_the_device_is_asked() -> None:
    device = LateDevice(LAYOUT, dtype="F32", nbytes=ARENA, slots=SLOTS)
    device.open()
    transfer(device).run(copy_of(BytesReader(file_of(A, B)), mixed_group()))
    assert (device.seen[:288] == POISON).all(), "this is the device's to read"
    assert not device.seen[288:768].any()
    assert torch.equal(device.seen[768:].view(torch.float32).view(40, 8), padded()[1])
    device.close()


def failing_at(number: int, error: Exception) -> Callable[[], None]:
    calls = iter(range(100))

    def before() -> None:
        if next(calls) == number:
            raise error

    return before


@pytest.mark.parametrize("number", [0, 1])
def test_a_reader_that_fails_leaves_no_row(number: int) -> None:
    """First while staging, then while the device reads."""
    device, error = opened(), FetchError("the disk is on fire")
    staging = StagingRing(device.staging_memory(4096), 2048)
    moving = Transfer(device, staging, NAMES, check_finite=True)
    with pytest.raises(FetchError) as caught:
        moving.run(copy_of(BytesReader(file_of(A, B), failing_at(number, error)), mixed_group()))
    assert caught.value is error
    assert staging.free == staging.buffers
    assert device.copies == number
    holds(device, 1, {})
    device.close()


def test_a_device_that_fails_is_heard() -> None:
    device = opened()
    device.failing = {0}
    with pytest.raises(TransferError, match="told to fail"):
        transfer(device).run(copy_of(BytesReader(file_of(A, B)), mixed_group()))
    holds(device, 1, {})
    device.close()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["a", "b"])
def test_weights_that_are_not_finite(part: str, value: float) -> None:
    a, b = A.clone(), B.clone()
    (a if part == "a" else b)[-1, -1] = value
    content = file_of(a, b)
    device = opened()
    with pytest.raises(AdapterFormatError, match=r"layers\.0\.q.* check_finite=False"):
        transfer(device, check_finite=True).run(copy_of(BytesReader(content), mixed_group()))
    transfer(device).run(copy_of(BytesReader(content), mixed_group(), slot=0))
    operands = device.operands(0, 0)
    assert operands is not None
    whole = torch.cat([operands[0].flatten(), operands[1].flatten()])
    assert int(whole.isfinite().logical_not().sum()) == 1
    device.close()


def test_only_its_own_modules_are_checked() -> None:
    """The arena around them is poison, and another layer of the slot may be anything."""
    device = opened()
    bad = B.clone()
    bad[0, 0] = torch.nan
    transfer(device).run(copy_of(BytesReader(file_of(A, bad)), mixed_group()))
    other = GroupPlan(
        1, 640, (Read(0, 640, 0),), (), (), (Row(2, 0, 64, 2, 2, 1.0),), (Span(0, 640),)
    )
    content = torch.ones(160).view(torch.uint8).numpy().tobytes()
    copy = GroupCopy(BytesReader(content), other, "F32", extent(5), 1)
    transfer(device, check_finite=True).run(copy)
    assert device.rank[:, 1].tolist() == [8, 0, 2, 0]
    device.close()


def test_a_value_too_large_for_the_device_is_not_finite() -> None:
    """1e5 is finite in the file; as float16 it is infinite, and that is what counts."""
    device = GatedDevice(LAYOUT, dtype="F16", nbytes=ARENA, slots=SLOTS)
    device.open()
    values = torch.full((24 + 40,), 1e5)
    group = GroupPlan(
        layer=0,
        nbytes=128,
        reads=(),
        converts=(Convert(0, 256, "F32", rows=1, columns=64, target=0, row_pitch=64),),
        zeros=(),
        rows=(Row(0, 0, 48, 1, 1, 1.0),),
        spans=(Span(0, 256),),
    )
    reader = BytesReader(values.view(torch.uint8).numpy().tobytes())
    with pytest.raises(AdapterFormatError, match="NaN or infinite"):
        transfer(device, check_finite=True).run(GroupCopy(reader, group, "F16", extent(0), 0))
    device.close()


class PatientDevice(GatedDevice):
    """Copies in a thread, some time after it was asked to."""

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[Row], extent: Extent, slot: int
    ) -> CopyTicket:
        ticket: CopyTicket = Future()

        def copy() -> None:
            super(PatientDevice, self).copy(pieces, rows, extent, slot)
            ticket.set_result(None)

        threading.Timer(0.03, copy).start()
        return ticket


def test_weights_are_checked_once_they_are_there() -> None:
    device, bad = PatientDevice(LAYOUT, dtype="F32", nbytes=ARENA, slots=SLOTS), A.clone()
    device.open()
    bad[0, 0] = torch.nan
    reader = BytesReader(file_of(bad, B))
    with pytest.raises(AdapterFormatError, match="NaN or infinite"):
        transfer(device, check_finite=True).run(copy_of(reader, mixed_group()))
    device.close()
