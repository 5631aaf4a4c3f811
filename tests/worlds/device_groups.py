"""Layer groups to copy, and the conformance suite of `Device`, by a fixture `new_device`."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol, TypeVar

import pytest
import torch
from fault_server import until

from lorax_async.devices.base import CopyTicket, Device, StagedPiece
from lorax_async.errors import CapacityError, LoraxError, UsageError
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.layout import ModelLayout, Module, Parallelism
from lorax_async.planning.transfer_plan import ReadMove, TableRow
from lorax_kernels import Operands, Tables

SHAPES = ((24, 40), (16, 8), (8, 56), (40, 24))
LAYOUT = ModelLayout(
    tuple(
        Module(f"layers.{n // 2}.{'qk'[n % 2]}", *shape, n // 2, Parallelism.COLUMN)
        for n, shape in enumerate(SHAPES)
    ),
    2,
    "F32",
)
ARENA, SLOTS = 1 << 18, 3
EXTENT = 1 << 14
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
START = 64  # where a group's first tensor lies in its extent


class TabledDevice(Device, Tables, Protocol):
    """A device with the tables that kernels need."""


NewDevice = Callable[..., TabledDevice]
Made = TypeVar("Made", bound=Device)


def made_by(kind: Callable[..., Made]) -> Iterator[Callable[..., Made]]:
    with ExitStack() as stack:

        def make(*, dtype: str = "F32", nbytes: int = ARENA) -> Made:
            device = kind(LAYOUT, dtype=dtype, nbytes=nbytes, slots=SLOTS)
            stack.callback(device.close)
            return device

        yield make


class BytesReader:
    """A file in memory; `before` is called at every read."""

    def __init__(self, content: bytes, before: Callable[[], None] = lambda: None) -> None:
        self._content = content
        self._before = before

    @property
    def nbytes(self) -> int:
        return len(self._content)

    def read_into(
        self, buffers: Sequence[memoryview], offset: int, rows: int = 1, pitch: int = 0
    ) -> None:
        self._before()
        for buffer in buffers:
            size = len(buffer) // rows
            starts = range(offset, offset + max(1, rows * pitch), pitch or 1)
            buffer[:] = b"".join(self._content[start : start + size] for start in starts)
            offset += size

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Group:
    """Some modules' weights as a file, how they go to an extent, and what should be there.

    `image` is the extent from `START` on, as a staging buffer has it.
    """

    content: bytes
    reads: tuple[ReadMove, ...]
    rows: tuple[TableRow, ...]
    image: bytes
    weights: dict[int, Operands]

    def read_into(self, device: Device, extent: Extent) -> None:
        moves = [move._replace(target=extent.offset + move.target) for move in self.reads]
        if moves:
            device.read(BytesReader(self.content), moves)

    def staged(self, device: Device) -> StagedPiece:
        return staged(device, self.image, START)


def staged(device: Device, content: bytes, target: int) -> StagedPiece:
    memory = device.staging_memory(len(content))
    memory.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return StagedPiece(memory, target)


def group(seed: int, modules: Sequence[int], dtype: str = "F32", rank: int = 8) -> Group:
    """Return random weights. The file has odd offsets; the extent has another order, and gaps."""
    random = torch.Generator().manual_seed(seed)
    file, image, rows, weights = b"odd", b"", [], {}
    reads: list[ReadMove] = []
    for module in modules:
        a_shape, b_shape = (rank, SHAPES[module][0]), (SHAPES[module][1], rank)
        a, b = (torch.randn(s, generator=random).to(TORCH[dtype]) for s in (a_shape, b_shape))
        places = []
        for tensor in (b, a):
            data = tensor.view(torch.uint8).numpy().tobytes()
            reads.insert(0, ReadMove(len(file), len(data), START + len(image)))
            places.append(START + len(image))
            file += data
            image += data + bytes(128 - len(data) % 64)
        scale = 1 / (3 + seed + module)
        # The true rank is smaller: what kernels read is padded.
        rows.append(TableRow(module, places[1], places[0], rank - 1, rank, scale))
        weights[module] = (a, b, scale)
    assert START + len(image) <= EXTENT
    return Group(file, tuple(reads), tuple(rows), image, weights)


def begin(device: Device, made: Group, extent: Extent, slot: int) -> CopyTicket:
    if device.reads_files:
        made.read_into(device, extent)
        return device.copy(None, made.rows, extent, slot)
    piece = made.staged(device)
    ticket = device.copy(piece, made.rows, extent, slot)
    # The memory is the asker's to keep until then.
    ticket.add_done_callback(lambda _, kept=piece: None)  # type: ignore[misc]
    return ticket


def move(device: Device, made: Group, extent: Extent, slot: int) -> None:
    begin(device, made, extent, slot).result(10)


def settle(device: Device) -> None:
    move(device, Group(b"", (), (), bytes(64), {}), extent(ARENA // EXTENT - 1), 0)


def extent(number: int) -> Extent:
    return Extent(number * EXTENT, EXTENT)


def holds(device: TabledDevice, slot: int, expected: dict[int, Operands]) -> None:
    """Assert that the slot's column has exactly these weights, bit for bit."""
    address, rank, scale = (t.cpu() for t in (device.address, device.rank, device.scale))
    for module in range(len(SHAPES)):
        operands = device.operands(module, slot)
        if module not in expected:
            assert operands is None
            assert not rank[module, slot]
            assert not scale[module, slot]
            assert address[:, module, slot].tolist() == [0, 0]
            continue
        assert operands is not None
        a, b, factor = operands
        want_a, want_b, want_factor = expected[module]
        assert a.dtype == want_a.dtype
        assert torch.equal(a.cpu(), want_a)
        assert torch.equal(b.cpu(), want_b)
        assert factor == want_factor
        assert address[:, module, slot].tolist() == [a.data_ptr(), b.data_ptr()]
        assert rank[module, slot] == want_a.shape[0]
        assert scale[module, slot] == torch.tensor(want_factor)


def shows(device: Device, made: Group, where: Extent) -> None:
    whole = device.view(where)
    assert (whole.dtype, whole.shape) == (torch.uint8, (where.nbytes,))
    assert device.view(where).data_ptr() == whole.data_ptr()
    for source, nbytes, target, *_ in made.reads:
        some = device.view(Extent(where.offset + target, nbytes))
        assert some.data_ptr() == whole.data_ptr() + target
        assert bytes(some.tolist()) == made.content[source : source + nbytes]


OLD, NEW = group(1, [0, 1]), group(2, [0, 1])
"""They have the same shapes, and so the same places in an extent."""


class DeviceConformance:
    @pytest.fixture
    def device(self, new_device: NewDevice) -> TabledDevice:
        (device := new_device()).open()
        return device

    @pytest.mark.parametrize("dtype", TORCH)
    def test_what_was_copied_is_there(self, new_device: NewDevice, dtype: str) -> None:
        device = new_device(dtype=dtype)
        device.open()
        first, second = group(1, [0, 1], dtype), group(2, [2, 3], dtype, rank=16)
        move(device, second, extent(3), 1)
        move(device, first, extent(1), 1)
        holds(device, 1, first.weights | second.weights)
        shows(device, first, extent(1))
        shows(device, second, extent(3))
        for slot in (0, 2):
            holds(device, slot, {})

    def test_it_is_there_once_the_ticket_is_done(self, device: TabledDevice) -> None:
        made, seen = group(1, [0, 1, 2, 3]), list[bool]()
        ticket = begin(device, made, extent(1), 2)

        def look(_: object) -> None:
            seen.append(False)
            holds(device, 2, made.weights)
            seen.append(True)

        ticket.add_done_callback(look)
        assert ticket.result(5) is None
        until(lambda: seen == [False, True])

    def test_tables_are_as_the_kernels_expect(self, device: TabledDevice) -> None:
        assert (device.address.dtype, device.address.shape) == (torch.int64, (2, 4, SLOTS))
        assert (device.rank.dtype, device.rank.shape) == (torch.int32, (4, SLOTS))
        assert (device.scale.dtype, device.scale.shape) == (torch.float32, (4, SLOTS))
        assert device.alignment % 64 == 0
        move(device, group(1, [0]), extent(1), 0)
        assert (device.address[:, 0, 0].cpu() % device.alignment).tolist() == [0, 0]

    def test_neighbours_are_left_alone(self, device: TabledDevice) -> None:
        groups = [group(n, [0, 3]) for n in range(3)]
        size = START + len(groups[0].image)
        assert size % device.alignment == 0
        for n in (0, 2, 1):
            move(device, groups[n], Extent(n * size, size), n)
        for n in range(3):
            holds(device, n, groups[n].weights)

    def test_a_cleared_column_names_nobody(self, device: TabledDevice) -> None:
        """The next occupant sees no rows of the last one; the tables keep their addresses."""
        stays = group(9, [0, 1, 3])
        tables = [table.data_ptr() for table in (device.address, device.rank, device.scale)]
        move(device, stays, extent(2), 1)
        for seed, modules in ((1, [0, 1]), (2, [1, 2]), (3, [3])):
            made = group(seed, modules, rank=8 * seed)
            move(device, made, extent(seed % 2), 0)
            holds(device, 0, made.weights)
            device.clear_column(0)
        settle(device)
        holds(device, 0, {})
        holds(device, 1, stays.weights)
        assert tables == [table.data_ptr() for table in (device.address, device.rank, device.scale)]

    def test_what_is_wiped_is_zero(self, device: TabledDevice) -> None:
        gone, stays = group(1, [0, 1]), group(2, [2, 3])
        for place, made in ((0, gone), (2, gone), (1, stays)):
            move(device, made, extent(place), place)
        assert device.wipe([extent(0), extent(2)]).result(10) is None
        for place in (0, 2):
            assert not device.view(extent(place)).cpu().any()
        shows(device, stays, extent(1))
        holds(device, 1, stays.weights)

    def test_what_is_asked_for_takes_effect_in_order(self, device: TabledDevice) -> None:
        """Submit copies, clearings and wipes without waits, while extents change owners."""
        groups = [group(n, [n % 4, (n + 1) % 4]) for n in range(8)]
        tickets = [device.wipe([])]
        for n, made in enumerate(groups):
            for slot in (0, 1):
                device.clear_column(slot)
            tickets += [device.wipe([extent(1)]), begin(device, made, extent(1), n % 2)]
        tickets += [begin(device, groups[0], extent(2), 2), device.wipe([extent(2)])]
        for ticket in tickets:
            ticket.result(10)
        holds(device, 0, {})
        holds(device, 1, groups[7].weights)
        assert not device.view(extent(2)).cpu().any()

    def test_copies_side_by_side(self, device: TabledDevice) -> None:
        groups = [group(n, [2 * (n % 2), 2 * (n % 2) + 1]) for n in range(2 * SLOTS)]
        with ThreadPoolExecutor(4) as threads:
            places = [(made, extent(n), n // 2) for n, made in enumerate(groups)]
            assert list(threads.map(lambda place: move(device, *place), places)) == [None] * 6
        for slot in range(SLOTS):
            holds(device, slot, groups[2 * slot].weights | groups[2 * slot + 1].weights)

    def test_a_stream_that_waits_for_a_copy_finds_it(self, device: TabledDevice) -> None:
        made = group(1, [0, 1])
        ticket = begin(device, made, extent(2), 1)
        device.wait_for(ticket)
        device.note_use().result(10)
        assert device.rank[:, 1].cpu().tolist() == [8, 8, 0, 0]
        ticket.result(10)
        holds(device, 1, made.weights)
        device.wait_for(ticket)
        assert device.note_use().result(10) is None

    def test_tickets_of_another_device(self, new_device: NewDevice) -> None:
        (device := new_device()).open()
        (other := new_device()).open()
        ticket = begin(other, group(1, [0]), extent(0), 0)
        with pytest.raises(UsageError, match="another device"):
            device.wait_for(ticket)
        ticket.result(10)
        other.wait_for(ticket)

    @pytest.mark.parametrize("nbytes", [1 << 60, 1 << 63, 1 << 80])
    def test_memory_beyond_the_machine(self, new_device: NewDevice, nbytes: int) -> None:
        (device := new_device()).open()
        too_large = new_device(nbytes=nbytes)
        for ask in (lambda: device.staging_memory(nbytes), too_large.open):
            with pytest.raises(CapacityError, match=f"{nbytes:,} bytes"):
                ask()
        too_large.close()
        move(device, NEW, extent(0), 0)
        holds(device, 0, NEW.weights)

    def test_it_is_opened_once_and_closed_any_number_of_times(self, new_device: NewDevice) -> None:
        new_device().close()
        device, made = new_device(), group(1, [0])
        device.open()
        move(device, made, extent(0), 0)
        with pytest.raises(UsageError, match="make a new one"):
            device.open()
        holds(device, 0, made.weights)
        operands = device.operands(0, 0)
        tickets = [begin(device, group(n, [n]), extent(n), 1) for n in range(1, 4)]
        tickets.append(device.note_use())
        device.close()
        assert [ticket.done() for ticket in tickets] == [True] * 4
        device.close()
        with pytest.raises(UsageError, match="make a new one"):
            device.open()
        assert operands is not None
        for kept, expected in zip(operands[:2], made.weights[0][:2], strict=True):
            assert torch.equal(kept.cpu(), expected)


class FileDeviceConformance(DeviceConformance):
    """The suite for devices that read files: the arena is host memory."""

    def test_nothing_else_is_written(self, device: TabledDevice) -> None:
        made = group(1, [0, 1])
        memory = device.host_view(Extent(0, ARENA)).fill_(0xFF)  # NaN in every dtype
        move(device, made, extent(2), 0)
        holds(device, 0, made.weights)
        for _, nbytes, target, *_ in made.reads:
            memory[extent(2).offset + target :][:nbytes] = 0xFF
        assert (memory == 0xFF).all()

    def test_what_was_written_before_the_copy_counts(self, device: TabledDevice) -> None:
        """Converted tensors are written first; their copy has rows and no bytes."""
        made = group(1, [0, 3])
        memory = device.host_view(extent(1))
        assert (memory.dtype, memory.shape) == (torch.uint8, (EXTENT,))
        made.read_into(device, extent(1))
        device.copy(None, made.rows, extent(1), 2).result(10)
        holds(device, 2, made.weights)
        operands = device.operands(0, 2)
        assert operands is not None
        assert operands[0].data_ptr() == memory.data_ptr() + made.rows[0].a


class StagedDeviceConformance(DeviceConformance):
    """The suite for devices with their own memory."""

    def test_what_it_cannot_do_it_refuses(self, device: TabledDevice) -> None:
        made = group(1, [0, 1])
        with pytest.raises(UsageError, match="host memory"):
            device.host_view(extent(0))
        with pytest.raises(LoraxError, match="read files"):
            device.copy(None, made.rows, extent(0), 0)
        with pytest.raises(UsageError, match="read files"):
            device.read(BytesReader(made.content), made.reads)
        settle(device)
        holds(device, 0, {})

    def test_a_group_may_come_in_pieces(self, device: TabledDevice) -> None:
        made = group(1, [0, 1, 2, 3])
        end = len(made.image)
        for start, stop, rows in ((1024, end, ()), (0, 192, ()), (192, 1024, made.rows)):
            piece = staged(device, made.image[start:stop], START + start)
            device.copy(piece, rows, extent(1), 1).result(10)
        holds(device, 1, made.weights)
