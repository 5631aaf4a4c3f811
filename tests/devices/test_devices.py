"""The devices in host memory: the CPU's, and the gated and simulated ones of tests."""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import device_groups as groups
import pytest
import torch
from gated_device import GatedDevice

from lorax_async.devices import cpu
from lorax_async.devices.cpu import CpuDevice
from lorax_async.devices.simulated import SimulatedDevice
from lorax_async.errors import CapacityError
from lorax_async.lifecycle.arena import Extent

Made = Callable[..., CpuDevice]


class TestCpuDevice(groups.FileDeviceConformance):
    @pytest.fixture(params=[CpuDevice, GatedDevice])
    def new_device(self, request: pytest.FixtureRequest) -> Iterator[Made]:
        yield from groups.made_by(request.param)


class TestSimulatedDevice(groups.StagedDeviceConformance):
    @pytest.fixture
    def new_device(self) -> Iterator[Callable[..., SimulatedDevice]]:
        yield from groups.made_by(SimulatedDevice)


@pytest.fixture
def new_device() -> Iterator[Made]:
    yield from groups.made_by(CpuDevice)


def test_staged_bytes_are_copied_too(new_device: Made) -> None:
    device, made = new_device(), groups.group(1, [0, 2])
    device.open()
    assert device.copy(made.staged(device), made.rows, groups.extent(1), 1).done()
    groups.holds(device, 1, made.weights)
    with pytest.raises(RuntimeError, match="size"):  # it ends beyond the arena
        device.copy(
            made.staged(device), made.rows, Extent(groups.ARENA - groups.START, groups.EXTENT), 0
        )
    groups.holds(device, 0, {})


def test_the_rank_is_written_last(new_device: Made) -> None:
    """Whoever reads a rank that is not 0 reads a complete row."""
    device, made = new_device(), groups.group(1, [2])
    device.open()
    seen: list[tuple[list[int], float, int]] = []

    class Watched:
        def __index__(self) -> int:
            row = device.address[:, 2, 1].tolist()
            seen.append((row, float(device.scale[2, 1]), int(device.rank[2, 1])))
            return 8

    watched = made.rows[0]._replace(padded_rank=Watched())  # type: ignore[arg-type]
    made.read_into(device, groups.extent(0))
    device.copy(None, [watched], groups.extent(0), 1).result(10)
    (row,) = made.rows
    base = device.host_view(groups.extent(0)).data_ptr()
    assert seen == [([base + row.a, base + row.b], float(torch.tensor(row.scale)), 0)]
    assert device.rank[2, 1] == 8


def test_older_kernels_and_missing_pages(new_device: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    class OldKernel(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    device, made = new_device(), groups.group(1, [0])
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "madvise", lambda *_: errno.ENOMEM)
        with pytest.raises(CapacityError, match="lower device_bytes"):
            device.open()
    monkeypatch.setattr(mmap, "mmap", OldKernel)
    monkeypatch.setattr(cpu, "madvise", lambda *_: errno.EINVAL)
    device.open()
    groups.move(device, made, groups.extent(0), 0)
    groups.holds(device, 0, made.weights)


STACKS = 128 << 20
"""Address space that threads leave behind: the C library keeps an ended one's stack and heap."""


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@pytest.mark.parametrize("kind", [CpuDevice, SimulatedDevice])
def test_a_closed_arena_is_given_back(kind: Callable[..., groups.TabledDevice]) -> None:
    size = 256 << 20
    before = address_space()
    device = kind(groups.LAYOUT, dtype="F32", nbytes=size, slots=groups.SLOTS)
    device.open()
    groups.move(device, groups.group(1, [0]), groups.extent(0), 0)
    view = device.operands(0, 0)
    assert address_space() - before > 0.9 * size
    device.close()
    assert address_space() - before > 0.9 * size, "a view is still held"
    del view
    assert address_space() - before < 0.1 * size + STACKS
