"""Groups on their way to a device that copies staged bytes: windows, buffers, images, checks."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from device_groups import ARENA, LAYOUT, SLOTS, BytesReader, extent, holds
from staged_groups import (
    KINDS,
    MOVE,
    STALE,
    Case,
    RecordingDevice,
    Running,
    case,
    case_of,
    opened,
    require_whole,
    ring_of,
    tensors,
    transfer,
    until,
)

from lorax_async.core.arena import Extent
from lorax_async.errors import AdapterFormatError, InternalError
from lorax_async.io.devices.cpu import CpuDevice
from lorax_async.io.devices.gated import POISON
from lorax_async.io.staging import StagingRing


def unread() -> BytesReader:
    def fail() -> None:
        raise AssertionError("nobody may read")

    return BytesReader(b"", fail)


@pytest.mark.parametrize("check_finite", [False, True])
@pytest.mark.parametrize(("buffers", "move"), [(2, MOVE), (3, MOVE), (2, 4096)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_arrives(kind: str, buffers: int, move: int, check_finite: bool) -> None:
    made = case(kind)
    with opened(made.dtype) as device:
        ring = ring_of(device, buffers, move)
        moved = transfer(device, ring, check_finite=check_finite).run(made.copy(slot=1, place=2))
        moved.done.result(10)
        holds(device, 1, made.weights)
        around = device.bytes_at(Extent(0, ARENA)).clone()
        around[extent(2).offset : extent(2).offset + made.group.nbytes] = POISON
        assert (around == POISON).all()
        assert len(device.tickets) == 1 if move == 4096 else len(device.tickets) >= made.windows
        require_whole(ring)


def test_what_adjoins_in_the_file_is_read_at_once() -> None:
    made, calls = case("verbatim"), list[None]()
    with opened() as device:
        reader = BytesReader(made.file, lambda: calls.append(None))
        transfer(device, ring_of(device, 2, 4096)).run(made.copy(reader)).done.result(10)
        assert len(calls) == len(device.tickets) == 1


def test_it_returns_before_the_copies_have_run() -> None:
    made = case("mixed")
    with opened() as device:
        device.gate.clear()
        ring = ring_of(device, made.windows + 8)
        moved = transfer(device, ring).run(made.copy())
        assert not moved.ticket.done()
        assert not moved.done.done()
        assert moved.ticket is device.tickets[-1]
        assert ring.free == ring.buffers - len(device.tickets)
        holds(device, 0, {})
        device.gate.set()
        moved.done.result(10)
        holds(device, 0, made.weights)
        require_whole(ring)


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_is_not_written_to_before_its_copy_is_done(kind: str) -> None:
    """Copies read when the gate opens: by then every buffer was wanted again."""
    made = case(kind)
    with opened(made.dtype) as device:
        device.gate.clear()
        ring = ring_of(device, 3)
        running = Running(transfer(device, ring), made.copy())
        until(lambda: len(device.tickets) >= 2 and bool(ring._turns))  # it waits for a buffer
        time.sleep(0.02)
        assert not running.ended
        assert 2 <= len(device.tickets) <= 3
        device.gate.set()
        running.result().done.result(10)
        holds(device, 0, made.weights)
        require_whole(ring)


def test_two_that_need_two_buffers_of_two() -> None:
    """Nor do they mix their bytes, for each window has its own."""
    first, second = case("padded", 1), case("mixed", 2)
    with opened() as device:
        ring = ring_of(device, 2)
        moving = transfer(device, ring)
        for _ in range(20):
            running = [
                Running(moving, first.copy(slot=0, place=0)),
                Running(moving, second.copy(slot=1, place=1)),
            ]
            for each in running:
                each.result().done.result(10)
            holds(device, 0, first.weights)
            holds(device, 1, second.weights)
            device.clear_column(0)
            device.clear_column(1)
        require_whole(ring)


def test_one_buffer_is_not_enough() -> None:
    with opened() as device, pytest.raises(InternalError, match="two staging buffers"):
        transfer(device, ring_of(device, 1))
    cpu = CpuDevice(LAYOUT, dtype="F32", nbytes=ARENA, slots=SLOTS)
    ring = StagingRing(cpu.staging_memory(MOVE), MOVE)
    assert ring.buffers == 1
    transfer(cpu, ring)  # type: ignore[arg-type]


def image_of(device: RecordingDevice, made: Case) -> torch.Tensor:
    return device.staging_memory(made.group.nbytes).fill_(STALE)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_filled_and_serves_the_next_load(kind: str) -> None:
    made = case(kind)
    with opened(made.dtype) as device:
        ring, image = ring_of(device, 2), image_of(device, made)
        moving = transfer(device, ring, check_finite=True)
        moving.run(replace(made.copy(), image=image)).done.result(10)
        holds(device, 0, made.weights)
        assert torch.equal(image, device.bytes_at(Extent(0, made.group.nbytes)))
        warm = replace(made.copy(unread(), slot=2, place=5), image=image, warm=True)
        moving.run(warm).done.result(10)
        holds(device, 2, made.weights)
        assert len(device.tickets) == 2
        require_whole(ring)


def test_an_image_takes_no_buffer_while_it_is_copied() -> None:
    made = case("mixed")
    with opened() as device:
        device.gate.clear()
        ring = ring_of(device, 2)
        moved = transfer(device, ring).run(replace(made.copy(), image=image_of(device, made)))
        assert (ring.free, moved.done.done()) == (2, False)
        assert moved.done is moved.ticket
        device.gate.set()
        moved.done.result(10)
        holds(device, 0, made.weights)


@pytest.mark.parametrize("in_image", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtypes", [("F32", "F32"), ("BF16", "F16")])
@pytest.mark.parametrize("rank", [8, 5])
def test_weights_that_are_not_finite(
    rank: int, dtypes: tuple[str, str], value: float, in_image: bool
) -> None:
    for name, places in (("q", (0, -1)), ("k", (0, -1))):
        for part in "AB":
            for place in places:
                content = tensors(3, rank, dtypes)
                key = f"base_model.model.layers.0.{name}.lora_{part}.weight"
                content[key][place, place] = value
                made = case_of(content, rank, "F32")
                with opened() as device:
                    refused(device, made, f"'layers.0.{name}'", in_image=in_image)


def refused(device: RecordingDevice, made: Case, module: str, *, in_image: bool) -> None:
    ring = ring_of(device, 3)
    copy = replace(made.copy(), image=image_of(device, made) if in_image else None)
    with pytest.raises(AdapterFormatError, match=f"{module} has NaN .* check_finite=False"):
        transfer(device, ring, check_finite=True).run(copy)
    assert all(ticket.done() for ticket in device.tickets)
    holds(device, 0, {})
    require_whole(ring)


def test_a_value_too_large_for_the_device_is_not_finite() -> None:
    """1e5 is finite in the file; as float16 it is infinite, and that is what counts."""
    content = tensors(3, 8, ("F32", "F32"))
    content["base_model.model.layers.0.k.lora_B.weight"][-1, -1] = 1e5
    made = case_of(content, 8, "F16")
    with opened("F16") as device:
        refused(device, made, "'layers.0.k'", in_image=False)
        transfer(device, ring_of(device, 2)).run(made.copy(slot=1)).done.result(10)
        holds(device, 1, made.weights)


def test_staging_seconds_are_those_of_casts() -> None:
    """A slow read of what is cast counts, a slow copy and a slow read of the rest do not."""
    for kind, least, most in (("verbatim", 0.0, 0.02), ("cast", 0.03, 10.0)):
        made = case(kind)
        with opened() as device:
            device.delay = 0.05
            reader = BytesReader(made.file, lambda: time.sleep(0.03))
            moved = transfer(device, ring_of(device, 2, 4096)).run(made.copy(reader))
            assert least <= moved.staging_seconds < most
            moved.done.result(10)
