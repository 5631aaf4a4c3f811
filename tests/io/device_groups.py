"""Groups of weights to copy, with what should be on the device then: for tests of devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from lorax_async.core.arena import Extent
from lorax_async.core.layout import ModelLayout, Module, Parallel
from lorax_async.core.moves import Read, Row
from lorax_async.io.devices.gated import POISON
from lorax_async.io.ports import CopyTicket, Device, FilePieces, StagedPiece
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
START = 64
"""Where a group's first tensor lies in its extent."""


class TabledDevice(Device, Tables, Protocol):
    """What kernels need as well: the tables."""


class NewDevice(Protocol):
    def __call__(
        self, *, dtype: str = "F32", nbytes: int = ARENA, slots: int = SLOTS
    ) -> TabledDevice: ...


Made = TypeVar("Made", bound=Device)


def made_by(kind: Callable[..., Made]) -> Iterator[Callable[..., Made]]:
    """What a fixture `new_device` yields: makes devices, and closes them afterwards."""
    devices: list[Made] = []

    def make(
        *,
        dtype: str = "F32",
        nbytes: int = ARENA,
        slots: int = SLOTS,
        layout: ModelLayout = LAYOUT,
        **options: float,
    ) -> Made:
        devices.append(kind(layout, dtype=dtype, nbytes=nbytes, slots=slots, **options))
        return devices[-1]

    yield make
    for device in devices:
        device.close()


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

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        self._before()
        size = len(buffer) // rows
        content = b"".join(self._content[offset + n * pitch :][:size] for n in range(rows))
        buffer[:] = content

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Group:
    """Some modules' weights as a file, how they go to an extent, and what should be there.

    `image` is the extent from `START` on, as a staging buffer has it.
    """

    content: bytes
    reads: tuple[Read, ...]
    rows: tuple[Row, ...]
    image: bytes
    weights: dict[int, Operands]

    @property
    def written(self) -> tuple[range, ...]:
        return tuple(range(read.target, read.target + read.nbytes) for read in self.reads)

    def file_pieces(self, before: Callable[[], None] = lambda: None) -> FilePieces:
        return FilePieces(BytesReader(self.content, before), self.reads)

    def staged(self, device: Device) -> StagedPiece:
        return staged(device, self.image, START)


def staged(device: Device, content: bytes, target: int) -> StagedPiece:
    memory = device.staging_memory(len(content))
    memory.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return StagedPiece(memory, target)


def group(seed: int, modules: Sequence[int], dtype: str = "F32", rank: int = 8) -> Group:
    """Random weights. The file has odd offsets, and the extent another order, with gaps."""
    random = torch.Generator().manual_seed(seed)
    file, image, rows, weights = b"odd", b"", [], {}
    reads: list[Read] = []
    for module in modules:
        a_shape, b_shape = (rank, SHAPES[module][0]), (SHAPES[module][1], rank)
        a, b = (torch.randn(s, generator=random).to(TORCH[dtype]) for s in (a_shape, b_shape))
        places = []
        for tensor in (b, a):
            data = tensor.view(torch.uint8).numpy().tobytes()
            reads.insert(0, Read(len(file), len(data), START + len(image)))
            places.append(START + len(image))
            file += data
            image += data + bytes(128 - len(data) % 64)
        scale = 1 / (3 + seed + module)
        # The true rank is smaller: what kernels read is padded.
        rows.append(Row(module, places[1], places[0], rank - 1, rank, scale))
        weights[module] = (a, b, scale)
    assert START + len(image) <= EXTENT
    return Group(file, tuple(reads), tuple(rows), image, weights)


def begin(device: Device, made: Group, extent: Extent, slot: int) -> CopyTicket:
    """Ask for the copy, in the way that the device has."""
    if device.reads_files:
        return device.copy(made.file_pieces(), made.rows, extent, slot)
    piece = made.staged(device)
    ticket = device.copy(piece, made.rows, extent, slot)
    # The memory is the asker's to keep until then.
    ticket.add_done_callback(lambda _, kept=piece: None)  # type: ignore[misc]
    return ticket


def move(device: Device, made: Group, extent: Extent, slot: int) -> None:
    begin(device, made, extent, slot).result(10)


def settle(device: Device) -> None:
    """Wait until all that was asked for has taken effect; what has no ticket, too."""
    move(device, Group(b"", (), (), bytes(64), {}), extent(ARENA // EXTENT - 1), 0)


def when_done(ticket: CopyTicket, look: Callable[[], None]) -> None:
    """Look at the moment the ticket becomes done, in the thread that says so."""
    looked: Future[None] = Future()

    def called(_: CopyTicket) -> None:
        try:
            look()
            looked.set_result(None)
        except BaseException as error:
            looked.set_exception(error)

    ticket.add_done_callback(called)
    looked.result(10)


def extent(number: int) -> Extent:
    return Extent(number * EXTENT, EXTENT)


def holds(device: TabledDevice, slot: int, expected: dict[int, Operands]) -> None:
    """The slot's column has these weights, bit for bit, and no others."""
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
    """The device's view of the extent, and of any part of it, has the group's bytes."""
    whole = device.view(where)
    assert (whole.dtype, whole.shape) == (torch.uint8, (where.nbytes,))
    assert device.view(where).data_ptr() == whole.data_ptr()
    for part in made.written:
        image = torch.tensor(list(made.image[part.start - START : part.stop - START]))
        some = device.view(Extent(where.offset + part.start, len(part)))
        assert torch.equal(some.cpu(), image.to(torch.uint8))
        assert torch.equal(whole[part.start : part.stop].cpu(), image.to(torch.uint8))


OLD, NEW = group(1, [0, 1]), group(2, [0, 1])
"""They have the same shapes, and so the same places in an extent."""


def weights(device: Device, slot: int = 0) -> torch.Tensor:
    """A of module 0: a view, which shows what is there whenever it is looked at."""
    operands = device.operands(0, slot)
    assert operands is not None
    return operands[0]


def is_of(made: Group, seen: torch.Tensor) -> bool:
    return torch.equal(seen, made.weights[0][0])


def is_poison(seen: torch.Tensor) -> bool:
    return bool((seen.view(torch.uint8) == POISON).all())
