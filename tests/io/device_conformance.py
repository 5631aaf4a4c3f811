"""What every `Device` keeps to. A test class derives from `DeviceConformance`.

Its module has a fixture `new_device`, which makes devices (not yet opened) for `LAYOUT` and closes
them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import pytest
import torch

from lorax_async.core.arena import Extent
from lorax_async.core.layout import ModelLayout, Module, Parallel
from lorax_async.core.moves import Read, Row
from lorax_async.errors import CapacityError, FetchError, UsageError
from lorax_async.io.ports import Device, FilePieces
from lorax_kernels import Operands, Tables

SHAPES = ((24, 40), (16, 8), (8, 56), (40, 24))
LAYOUT = ModelLayout(
    tuple(
        Module(f"layers.{layer}.{name}", *SHAPES[2 * layer + n], layer, Parallel.COLUMN)
        for layer in range(2)
        for n, name in enumerate("qk")
    ),
    2,
    "F32",
)
ARENA, SLOTS = 1 << 18, 3
EXTENT = 1 << 14
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAN_BYTE = 0xFF
"""Memory full of it is NaN in every dtype."""


class TabledDevice(Device, Tables, Protocol):
    """What kernels need as well: the tables."""


class NewDevice(Protocol):
    def __call__(
        self, *, dtype: str = "F32", nbytes: int = ARENA, slots: int = SLOTS
    ) -> TabledDevice: ...


class BytesReader:
    """A file in memory; `before` is called at every read."""

    def __init__(self, content: bytes, before: Callable[[], None] = lambda: None) -> None:
        self._content = content
        self._before = before

    @property
    def nbytes(self) -> int:
        return len(self._content)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._before()
        for buffer in buffers:
            buffer[:] = self._content[offset : offset + len(buffer)]
            offset += len(buffer)

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Group:
    """Some modules' weights as a file, how they go to an extent, and what should be there."""

    content: bytes
    reads: tuple[Read, ...]
    rows: tuple[Row, ...]
    weights: dict[int, Operands]
    written: tuple[range, ...]

    def pieces(self, before: Callable[[], None] = lambda: None) -> FilePieces:
        return FilePieces(BytesReader(self.content, before), self.reads)


def group(seed: int, modules: Sequence[int], dtype: str = "F32", rank: int = 8) -> Group:
    """Random weights. The file has odd offsets, and the extent another order, with gaps."""
    random = torch.Generator().manual_seed(seed)
    file, target, rows, weights = b"odd", 64, [], {}
    reads: list[Read] = []
    for module in modules:
        a_shape, b_shape = (rank, SHAPES[module][0]), (SHAPES[module][1], rank)
        a, b = (torch.randn(s, generator=random).to(TORCH[dtype]) for s in (a_shape, b_shape))
        places = []
        for tensor in (b, a):
            data = tensor.view(torch.uint8).numpy().tobytes()
            reads.insert(0, Read(len(file), len(data), target))
            places.append(target)
            file += data
            target += len(data) + 128 - len(data) % 64
        scale = 1 / (3 + seed + module)
        # The true rank is smaller: what kernels read is padded.
        rows.append(Row(module, places[1], places[0], rank - 1, rank, scale))
        weights[module] = (a, b, scale)
    assert target <= EXTENT
    written = tuple(range(read.target, read.target + read.nbytes) for read in reads)
    return Group(file, tuple(reads), tuple(rows), weights, written)


def move(device: Device, made: Group, extent: Extent, slot: int) -> None:
    device.copy(made.pieces(), made.rows, extent, slot).result(10)


def extent(number: int) -> Extent:
    return Extent(number * EXTENT, EXTENT)


def holds(device: TabledDevice, slot: int, expected: dict[int, Operands]) -> None:
    """The slot's column has these weights, bit for bit, and no others."""
    for module in range(len(SHAPES)):
        operands = device.operands(module, slot)
        if module not in expected:
            assert operands is None
            assert not device.rank[module, slot]
            assert not device.scale[module, slot]
            assert device.address[:, module, slot].tolist() == [0, 0]
            continue
        assert operands is not None
        a, b, scale = operands
        want_a, want_b, want_scale = expected[module]
        assert a.dtype == want_a.dtype
        assert torch.equal(a, want_a)
        assert torch.equal(b, want_b)
        assert scale == want_scale
        assert device.address[:, module, slot].tolist() == [a.data_ptr(), b.data_ptr()]
        assert device.rank[module, slot] == want_a.shape[0]
        assert device.scale[module, slot] == torch.tensor(want_scale)


class DeviceConformance:
    @pytest.mark.parametrize("dtype", TORCH)
    def test_what_was_copied_is_there(self, new_device: NewDevice, dtype: str) -> None:
        device = new_device(dtype=dtype)
        device.open()
        first, second = group(1, [0, 1], dtype), group(2, [2, 3], dtype, rank=16)
        move(device, second, extent(3), 1)
        move(device, first, extent(1), 1)
        holds(device, 1, first.weights | second.weights)
        for slot in (0, 2):
            holds(device, slot, {})

    def test_tables_are_as_the_kernels_expect(self, new_device: NewDevice) -> None:
        device = new_device()
        device.open()
        assert (device.address.dtype, device.address.shape) == (torch.int64, (2, 4, SLOTS))
        assert (device.rank.dtype, device.rank.shape) == (torch.int32, (4, SLOTS))
        assert (device.scale.dtype, device.scale.shape) == (torch.float32, (4, SLOTS))
        for slot in range(SLOTS):
            holds(device, slot, {})

    def test_tensors_are_aligned(self, new_device: NewDevice) -> None:
        device = new_device()
        device.open()
        assert device.alignment % 64 == 0
        move(device, group(1, [0]), extent(1), 0)
        assert (device.address[:, 0, 0] % device.alignment).tolist() == [0, 0]

    def test_bytes_come_before_rows_and_rows_before_the_ticket(self, new_device: NewDevice) -> None:
        device, made, seen = new_device(), group(1, [0, 1]), []
        device.open()

        def look() -> None:
            seen.append((int(device.rank.count_nonzero()), device.operands(0, 0)))

        ticket = device.copy(made.pieces(look), made.rows, extent(0), 0)
        ticket.result(10)
        assert seen
        assert set(seen) == {(0, None)}
        holds(device, 0, made.weights)

    def test_nothing_else_is_written(self, new_device: NewDevice) -> None:
        device, made = new_device(), group(1, [0, 1])
        device.open()
        whole = Extent(0, ARENA)
        device.host_memory(whole).fill_(NAN_BYTE)
        move(device, made, extent(2), 0)
        untouched = torch.ones(ARENA, dtype=torch.bool)
        for part in made.written:
            untouched[extent(2).offset + part.start : extent(2).offset + part.stop] = False
        assert untouched.sum() < ARENA
        assert (device.host_memory(whole)[untouched] == NAN_BYTE).all()
        holds(device, 0, made.weights)

    def test_what_was_written_before_the_copy_counts(self, new_device: NewDevice) -> None:
        """Converted tensors come this way: the copy has rows, and nothing to read."""
        device, made = new_device(), group(1, [0, 3])
        device.open()
        memory = device.host_memory(extent(1))
        assert (memory.dtype, memory.shape) == (torch.uint8, (EXTENT,))
        for read in made.reads:
            data = made.content[read.file_offset : read.file_offset + read.nbytes]
            memory[read.target : read.target + read.nbytes] = torch.tensor(list(data))
        device.copy(FilePieces(BytesReader(b""), ()), made.rows, extent(1), 2).result(10)
        holds(device, 2, made.weights)

    def test_a_cleared_column_names_nobody(self, new_device: NewDevice) -> None:
        device, gone, stays = new_device(), group(1, [0, 1, 2]), group(2, [0, 1, 3])
        device.open()
        move(device, gone, extent(0), 0)
        move(device, stays, extent(1), 1)
        holds(device, 0, gone.weights)
        device.clear_column(0)
        holds(device, 0, {})
        holds(device, 1, stays.weights)

    def test_the_next_tenant_sees_nothing_of_the_last(self, new_device: NewDevice) -> None:
        device = new_device()
        device.open()
        tables = [table.data_ptr() for table in (device.address, device.rank, device.scale)]
        for seed, modules in ((1, [0, 1]), (2, [1, 2]), (3, [3])):
            made = group(seed, modules, rank=8 * seed)
            move(device, made, extent(seed % 2), 0)
            holds(device, 0, made.weights)
            device.clear_column(0)
        assert tables == [table.data_ptr() for table in (device.address, device.rank, device.scale)]

    def test_a_failed_read_writes_no_row(self, new_device: NewDevice) -> None:
        device, made = new_device(), group(1, [0, 1])
        device.open()

        def fail() -> None:
            raise FetchError("the disk is on fire")

        with pytest.raises(FetchError, match="on fire"):
            device.copy(made.pieces(fail), made.rows, extent(0), 0).result(10)
        holds(device, 0, {})
        move(device, made, extent(0), 0)
        holds(device, 0, made.weights)

    def test_copies_side_by_side(self, new_device: NewDevice) -> None:
        device = new_device()
        device.open()
        groups = [group(n, [2 * (n % 2), 2 * (n % 2) + 1]) for n in range(2 * SLOTS)]
        with ThreadPoolExecutor(4) as threads:
            places = [(made, extent(n), n // 2) for n, made in enumerate(groups)]
            assert list(threads.map(lambda place: move(device, *place), places)) == [None] * 6
        for slot in range(SLOTS):
            holds(device, slot, groups[2 * slot].weights | groups[2 * slot + 1].weights)

    def test_views_outlive_the_device(self, new_device: NewDevice) -> None:
        device, made = new_device(), group(1, [0])
        device.open()
        move(device, made, extent(0), 0)
        operands = device.operands(0, 0)
        device.close()
        device.close()
        assert operands is not None
        assert torch.equal(operands[0], made.weights[0][0])
        assert torch.equal(operands[1], made.weights[0][1])

    def test_it_is_opened_once(self, new_device: NewDevice) -> None:
        device, made = new_device(), group(1, [0])
        device.open()
        move(device, made, extent(0), 0)
        with pytest.raises(UsageError, match="make a new one"):
            device.open()
        holds(device, 0, made.weights)
        device.close()
        with pytest.raises(UsageError, match="make a new one"):
            device.open()

    @pytest.mark.parametrize("nbytes", [1 << 60, 1 << 63, 1 << 80])
    def test_an_arena_beyond_the_machine(self, new_device: NewDevice, nbytes: int) -> None:
        device = new_device(nbytes=nbytes)
        with pytest.raises(CapacityError, match=f"{nbytes:,} bytes"):
            device.open()
        device.close()
