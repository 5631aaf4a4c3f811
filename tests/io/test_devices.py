"""The CPU device and the gated one keep to the port, and do what is theirs alone."""

from __future__ import annotations

import errno
import json
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from device_conformance import NAN_BYTE, FileDeviceConformance
from device_groups import (
    ARENA,
    EXTENT,
    LAYOUT,
    SLOTS,
    START,
    BytesReader,
    TabledDevice,
    extent,
    group,
    holds,
    made_by,
    move,
)
from safetensors.torch import load_file, save_file

import tiny
from lorax_async.config import Limits
from lorax_async.core.arena import Extent
from lorax_async.core.header import parse_header
from lorax_async.core.moves import Read
from lorax_async.core.peft_config import parse_config
from lorax_async.core.transfer_plan import TransferPlan, plan_transfer
from lorax_async.errors import CapacityError, TransferError
from lorax_async.io.devices import cpu
from lorax_async.io.devices.cpu import CpuDevice
from lorax_async.io.devices.gated import POISON, GatedDevice
from lorax_async.io.ports import FilePieces
from lorax_async.io.sources.checked_open import FileReader, identity_of
from lorax_async.io.staging import StagingRing
from lorax_async.io.transfer import GroupCopy, Transfer
from lorax_async.testing import SimulatedDevice
from lorax_kernels import Plan, apply
from lorax_kernels.reference import reference

Made = Callable[..., CpuDevice]


@pytest.fixture
def new_device() -> Iterator[Made]:
    yield from made_by(CpuDevice)


class TestCpuDevice(FileDeviceConformance):
    pass


class TestGatedDevice(FileDeviceConformance):
    @pytest.fixture
    def new_device(self) -> Iterator[Made]:
        yield from made_by(GatedDevice)


def file_reader(path: Path) -> FileReader:
    def opened() -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    return FileReader(opened, identity_of(path.stat()), path.name)


def whole_adapter(folder: Path, device: CpuDevice, dtype: str) -> TransferPlan:
    config, weights = tiny.files(folder)
    return plan_transfer(
        parse_header(weights, len(weights)),
        parse_config(config, Limits()),
        tiny.layout(),
        dtype=dtype,
        alignment=device.alignment,
        rank_multiple=device.rank_multiple,
        limits=Limits(),
        staging_move_bytes=1 << 12,
    )


def fill(device: CpuDevice, folder: Path, slot: int, *, dtype: str) -> None:
    """Bring an adapter to the device as the loader does, group by group."""
    memory = device.staging_memory(1 << 14)
    transfer = Transfer(device, StagingRing(memory, 1 << 12), [], check_finite=False)
    reader = file_reader(folder / "adapter_model.safetensors")
    offset = slot * EXTENT * tiny.LAYERS
    plan = whole_adapter(folder, device, dtype)
    for made in plan.groups:
        here = Extent(offset, made.nbytes)
        transfer.run(GroupCopy(reader, made, dtype, here, slot)).done.result(10)
        offset += made.nbytes
    reader.close()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_kernels_compute_with_what_was_copied(
    new_device: Made, tmp_path: Path, stored: torch.dtype
) -> None:
    """Small integers, which every step keeps exactly; alpha 8 and rank 4 make a scale of 2."""
    device = new_device(layout=tiny.layout(), nbytes=1 << 20)
    device.open()
    device.host_view(Extent(0, 1 << 20)).fill_(NAN_BYTE)
    random = torch.Generator().manual_seed(5)
    for slot in (0, 2):
        folder = tmp_path / str(slot)
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(tiny.config()))
        weights = {
            name: torch.randint(-3, 4, t.shape, generator=random).to(stored)
            for name, t in tiny.tensors(slot).items()
        }
        save_file(weights, folder / "adapter_model.safetensors")
        fill(device, folder, slot, dtype="F32")
    plan = Plan.from_segments([0, 3, 4, 9], [2, 1, 0])
    x = torch.randint(-3, 4, (9, tiny.HIDDEN), generator=random).float()
    for module, each in enumerate(tiny.layout().modules):
        y = torch.ones(9, 2 * tiny.HIDDEN)
        expected, by_definition = y.double(), reference(y, x, plan, module, device)
        for slot, rows in ((2, slice(3)), (0, slice(4, 9))):
            saved = load_file(tmp_path / str(slot) / "adapter_model.safetensors")
            a, b = (saved[f"base_model.model.{each.name}.lora_{part}.weight"] for part in "AB")
            expected[rows] += 2 * (x[rows].double() @ a.double().T) @ b.double().T
        apply(y, x, plan, module, device)
        assert torch.equal(y.double(), expected)
        assert torch.equal(by_definition, expected)


def test_neighbours_in_the_file_are_read_in_one_call(new_device: Made) -> None:
    device, calls = new_device(), list[None]()
    device.open()
    reads = [Read(8 + 4 * n, 4, 8 * n) for n in (3, 0, 2, 1, 5)]
    reader = BytesReader(bytes(range(32)), lambda: calls.append(None))
    device.copy(FilePieces(reader, tuple(reads)), (), extent(0), 0).result(10)
    assert len(calls) == 2
    memory = device.host_view(extent(0))
    assert [int(memory[read.target]) for read in reads] == [20, 8, 16, 12, 28]


@pytest.mark.parametrize("count", [1023, 1024, 1025, 2500])
def test_more_pieces_than_one_call_takes(new_device: Made, tmp_path: Path, count: int) -> None:
    """Neighbours in the file, scattered in the extent, asked for in a third order."""
    path = tmp_path / "numbers"
    path.write_bytes(torch.arange(count + 1, dtype=torch.int32).numpy().tobytes())
    device = new_device()
    device.open()
    memory = device.host_view(Extent(0, ARENA)).view(torch.int32)
    memory.fill_(-1)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    reads = [Read(4 * n, 4, 8 * shuffled[n]) for n in reversed(range(1, count))]
    reader = file_reader(path)
    device.copy(FilePieces(reader, tuple(reads)), (), Extent(EXTENT, 2 * EXTENT), 0).result(10)
    reader.close()
    expected = torch.full((ARENA // 4,), -1, dtype=torch.int32)
    for n in range(1, count):
        expected[EXTENT // 4 + 2 * shuffled[n]] = n
    assert torch.equal(memory, expected)


def test_staged_bytes_are_copied_too(new_device: Made) -> None:
    device, made = new_device(), group(1, [0, 2])
    device.open()
    assert device.copy(made.staged(device), made.rows, extent(1), 1).done()
    holds(device, 1, made.weights)
    with pytest.raises(RuntimeError, match="size"):  # it ends beyond the arena
        device.copy(made.staged(device), made.rows, Extent(ARENA - START, EXTENT), 0)
    holds(device, 0, {})


def test_staging_writes_where_kernels_read(new_device: Made) -> None:
    device, made = new_device(), group(1, [0])
    device.open()
    move(device, made, extent(1), 0)
    operands = device.operands(0, 0)
    assert operands is not None
    (row,) = made.rows
    memory = device.host_view(extent(1))
    assert operands[0].data_ptr() == memory.data_ptr() + row.a
    memory.zero_()
    assert not operands[0].any()


class Watched:
    """A rank that looks at the row at the moment it is written."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def __index__(self) -> int:
        self._look()
        return 8


def test_the_rank_is_written_last(new_device: Made) -> None:
    device, made = new_device(), group(1, [2])
    device.open()
    seen: list[tuple[list[int], float, int]] = []

    def look() -> None:
        row = device.address[:, 2, 1].tolist()
        seen.append((row, float(device.scale[2, 1]), int(device.rank[2, 1])))

    watched = made.rows[0]._replace(padded_rank=Watched(look))  # type: ignore[arg-type]
    device.copy(made.file_pieces(), [watched], extent(0), 1).result(10)
    (row,) = made.rows
    base = device.host_view(extent(0)).data_ptr()
    assert seen == [([base + row.a, base + row.b], float(torch.tensor(row.scale)), 0)]
    assert device.rank[2, 1] == 8


class OldKernel(mmap.mmap):
    """Does not know huge pages."""

    def madvise(self, *advice: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def test_an_older_kernel_will_do(new_device: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "mmap", OldKernel)
    monkeypatch.setattr(cpu, "madvise", lambda *_: errno.EINVAL)
    device, made = new_device(), group(1, [0])
    device.open()
    move(device, made, extent(0), 0)
    holds(device, 0, made.weights)


def test_pages_that_cannot_be_had(new_device: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    device, made = new_device(), group(1, [0])
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "madvise", lambda *_: errno.ENOMEM)
        with pytest.raises(CapacityError, match="lower device_bytes"):
            device.open()
    device.open()  # there is memory now
    move(device, made, extent(0), 0)
    holds(device, 0, made.weights)


STACKS = 128 << 20
"""Address space that threads leave behind: the C library keeps an ended one's stack and heap."""


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@pytest.mark.parametrize("kind", [CpuDevice, SimulatedDevice])
def test_a_closed_arena_is_given_back(kind: Callable[..., TabledDevice]) -> None:
    size = 256 << 20
    before = address_space()
    device = kind(LAYOUT, dtype="F32", nbytes=size, slots=SLOTS)
    device.open()
    move(device, group(1, [0]), extent(0), 0)
    view = device.operands(0, 0)
    assert address_space() - before > 0.9 * size
    device.close()
    assert address_space() - before > 0.9 * size, "a view is still held"
    del view
    assert address_space() - before < 0.1 * size + STACKS


def test_the_gated_device_does_as_told() -> None:
    device, made = GatedDevice(LAYOUT, dtype="F32", nbytes=ARENA, slots=SLOTS), group(1, [0])
    device.open()
    assert (device.host_view(Extent(0, ARENA)) == POISON).all()
    device.gate.clear()
    device.failing = {1}
    copying = threading.Thread(target=move, args=(device, made, extent(0), 0))
    copying.start()
    copying.join(0.05)
    assert copying.is_alive()
    holds(device, 0, {})
    device.gate.set()
    copying.join()
    holds(device, 0, made.weights)
    with pytest.raises(TransferError, match="copy 1 was told to fail"):
        move(device, made, extent(1), 1)
    holds(device, 1, {})
    assert (device.host_view(extent(1)) == POISON).all()
    move(device, made, extent(1), 1)
    holds(device, 1, made.weights)
    assert device.copies == 3
    device.close()
