"""Biases and magnitudes on their way to a device: verbatim, and looked at as what they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from device_groups import ARENA, LAYOUT, SLOTS, TORCH, BytesReader, TabledDevice, extent, holds
from staged_groups import (
    MOVE,
    NAMES,
    STALE,
    Case,
    opened,
    padded,
    require_whole,
    ring_of,
    transfer,
)
from staged_groups import tensors as matrices

from core.adapter_files import file_of, plan
from lorax_async.adapter import AdapterSpec
from lorax_async.core.arena import Extent
from lorax_async.errors import AdapterFormatError
from lorax_async.io.devices.gated import POISON, GatedDevice
from lorax_async.io.ports import Device
from lorax_async.io.staging import StagingRing
from lorax_async.io.transfer import GroupCopy, Transfer

LOOKS_NAN = torch.tensor(0x3F80FFFF, dtype=torch.int32).view(torch.float32)
"""About 1.008, whose lower half is NaN if it is read as bfloat16 or float16."""
DTYPES = [("F32", "F32"), ("BF16", "F32"), ("F16", "BF16"), ("F32", "F16"), ("BF16", "BF16")]


def case(
    stored: str,
    own: str,
    *,
    rank: int = 5,
    dtypes: tuple[str, str] = ("F32", "BF16"),
    value: float | None = None,
) -> Case:
    """Two modules with magnitudes in dtype `own`; `value` comes last in the first one's."""
    content = matrices(4, rank, dtypes)
    prefix = "base_model.model.layers.0"
    for name, length in (("q", 40), ("k", 8)):
        vector = LOOKS_NAN.repeat(length).to(TORCH[own])
        if value is not None and name == "q":
            vector[-1] = value
        content[f"{prefix}.{name}.lora_magnitude_vector"] = vector
    file = file_of(sorted(content.items()))
    spec = AdapterSpec(rank=rank, alpha=2.0 * rank, dora=True)
    (group,) = plan(
        file, spec, LAYOUT, dtype=stored, rank_multiple=8, staging_move_bytes=1 << 11
    ).groups
    weights = {
        n: (
            *padded(
                content[f"{prefix}.{name}.lora_A.weight"],
                content[f"{prefix}.{name}.lora_B.weight"],
                stored,
            ),
            2.0,
        )
        for n, name in enumerate("qk")
    }
    return Case(file, group, stored, weights)


def image_of(device: Device, made: Case) -> torch.Tensor:
    return device.staging_memory(made.group.nbytes).fill_(STALE)


def holds_vectors(device: Device, made: Case, where: Extent, own: str) -> None:
    """Bit for bit those of the file."""
    assert [vector.module for vector in made.group.vectors] == [0, 1]
    for vector in made.group.vectors:
        place = Extent(where.offset + vector.offset, vector.nbytes)
        there = device.view(place).view(TORCH[own])
        assert torch.equal(there, LOOKS_NAN.repeat((40, 8)[vector.module]).to(TORCH[own]))


@pytest.mark.parametrize("in_image", [False, True])
@pytest.mark.parametrize(("stored", "own"), DTYPES)
def test_vectors_arrive_as_they_are_in_the_file(stored: str, own: str, in_image: bool) -> None:
    """In windows of a few tensors, or at once; and nobody takes them for what they are not."""
    made = case(stored, own)
    with opened(stored) as device:
        ring = ring_of(device, 3, 4 * MOVE)
        image = image_of(device, made) if in_image else None
        copy = replace(made.copy(slot=1, place=2), image=image)
        transfer(device, ring, check_finite=True).run(copy).done.result(10)
        holds(device, 1, made.weights)
        holds_vectors(device, made, extent(2), own)
        require_whole(ring)


@pytest.mark.parametrize("value", [None, torch.nan])
def test_a_vector_may_be_cut_between_windows(value: float | None) -> None:
    made = case("F32", "F32", rank=8, dtypes=("F32", "F32"), value=value)
    small = 128
    ends = [(v.offset // small, (v.offset + v.nbytes - 1) // small) for v in made.group.vectors]
    assert any(first < last for first, last in ends)
    with opened() as device:
        ring = ring_of(device, 4, small)
        moving = transfer(device, ring, check_finite=True)
        if value is None:
            moving.run(made.copy(place=1)).done.result(10)
            holds_vectors(device, made, extent(1), "F32")
        else:
            with pytest.raises(AdapterFormatError, match=r"'layers\.0\.q' has NaN"):
                moving.run(made.copy(place=1))
        require_whole(ring)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("stored", "own"), DTYPES)
def test_a_magnitude_that_is_not_finite(stored: str, own: str, value: float) -> None:
    made = case(stored, own, value=value)
    for in_image in (False, True):
        with opened(stored) as device:
            ring = ring_of(device, 3, 4 * MOVE)
            copy = replace(made.copy(), image=image_of(device, made) if in_image else None)
            with pytest.raises(AdapterFormatError, match=r"'layers\.0\.q' has NaN"):
                transfer(device, ring, check_finite=True).run(copy)
            holds(device, 0, {})
            require_whole(ring)
            transfer(device, ring).run(made.copy(slot=2, place=3)).done.result(10)


def from_file(stored: str) -> tuple[TabledDevice, Transfer]:
    device = GatedDevice(LAYOUT, dtype=stored, nbytes=ARENA, slots=SLOTS)
    device.open()
    ring = StagingRing(device.staging_memory(4096), 2048)
    return device, Transfer(device, ring, NAMES, check_finite=True)


@pytest.mark.parametrize(("stored", "own"), DTYPES)
def test_vectors_are_read_straight_into_host_memory(stored: str, own: str) -> None:
    made = case(stored, own)
    device, moving = from_file(stored)
    moving.run(GroupCopy(BytesReader(made.file), made.group, stored, extent(1), 2))
    holds(device, 2, made.weights)
    holds_vectors(device, made, extent(1), own)
    device.close()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("stored", "own"), DTYPES)
def test_a_magnitude_in_host_memory_that_is_not_finite(stored: str, own: str, value: float) -> None:
    made = case(stored, own, value=value)
    device, moving = from_file(stored)
    with pytest.raises(AdapterFormatError, match=r"'layers\.0\.q' has NaN"):
        moving.run(GroupCopy(BytesReader(made.file), made.group, stored, extent(1), 2))
    device.close()


def test_a_cleared_columns_vectors_are_poison_on_the_simulated_device() -> None:
    made = case("F32", "F32")
    with opened() as device:
        copy = made.copy(slot=1, place=2)
        transfer(device, ring_of(device, 3, 4 * MOVE)).run(copy).done.result(10)
        views = [
            device.view(Extent(extent(2).offset + vector.offset, vector.nbytes))
            for vector in made.group.vectors
        ]
        device.clear_column(1)
        transfer(device, ring_of(device, 3, 4 * MOVE)).run(made.copy()).done.result(10)
        assert all(bool((view == POISON).all()) for view in views)
