"""Layer groups on their way: windows, buffers, images, checks, and whatever fails on the way."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from adapter_files import file_of, plan
from device_groups import ARENA, LAYOUT, SHAPES, SLOTS, TORCH, BytesReader, extent, holds, settle
from event_loops import until
from gated_device import GatedDevice

from lorax_async import AdapterFormatError, FetchError, InternalError, Limits, TransferError
from lorax_async.devices.base import CopyTicket, Device, StagedPiece
from lorax_async.devices.simulated import POISON, SimulatedDevice
from lorax_async.devices.staging import StagingRing
from lorax_async.devices.transfer import GroupCopy, GroupTransfer
from lorax_async.files import Reader
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.transfer_plan import GroupPlan, TableRow
from lorax_async.types import AdapterSpec
from lorax_kernels import Operands

MOVE = 512  # the size of a buffer: a group takes half a dozen
NAMES = [module.name for module in LAYOUT.modules]
STALE = 0xFF  # what a ring is full of at first; NaN in every dtype
LATE = 0.002  # seconds that a copy is late: it is still under way if nobody waits
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """One layer: its file, its plan, and A, B and scale of each module as they shall be."""

    file: bytes
    group: GroupPlan
    dtype: str
    weights: dict[int, Operands]

    def copy(
        self, reader: Reader | None = None, *, slot: int = 0, image: torch.Tensor | None = None
    ) -> GroupCopy:
        """To the extent of the slot's number."""
        reader = reader or BytesReader(self.file)
        return GroupCopy(reader, self.group, self.dtype, extent(slot), slot, image=image)

    @property
    def windows(self) -> int:
        """At least that many: the file's bytes go through buffers of `MOVE` bytes."""
        return -(-self.group.nbytes // MOVE)


def tensors(seed: int, rank: int, dtypes: Sequence[str]) -> Weights:
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, dtype, (inputs, outputs) in zip("qk", dtypes, SHAPES[:2], strict=True):
        for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = torch.randn(shape, generator=random).to(TORCH[dtype])
            made[f"base_model.model.layers.0.{name}.lora_{part}.weight"] = values
    return made


def padded(a: torch.Tensor, b: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast, and with zeros up to a rank of 8: what the kernels read."""
    rows = torch.zeros(8, a.shape[1], dtype=TORCH[dtype])
    columns = torch.zeros(b.shape[0], 8, dtype=TORCH[dtype])
    rows[: a.shape[0]], columns[:, : b.shape[1]] = a, b
    return rows, columns


def case_of(content: Weights, rank: int, dtype: str, move: int = MOVE, dora: bool = False) -> Case:
    file, spec = file_of(list(content.items())), AdapterSpec(rank=rank, alpha=2.0 * rank, dora=dora)
    options: dict[str, Any] = {"rank_multiple": 8, "limits": Limits(max_rank=8)}
    made = plan(file, spec, LAYOUT, dtype=dtype, staging_move_bytes=move, **options)
    values = list(content.values())
    weights = {n: (*padded(values[2 * n], values[2 * n + 1], dtype), 2.0) for n in range(2)}
    return Case(file, made.groups[0], dtype, weights)


KINDS = {
    "verbatim": (8, ("F32", "F32"), "F32"),
    "cast": (8, ("BF16", "F16"), "F32"),
    "padded": (5, ("F32", "F32"), "F32"),
    "mixed": (3, ("F16", "F32"), "F32"),
    "narrow": (5, ("F32", "BF16"), "BF16"),
}


@cache
def case(kind: str, seed: int = 1) -> Case:
    rank, dtypes, dtype = KINDS[kind]
    return case_of(tensors(seed, rank, dtypes), rank, dtype)


class RecordingDevice(SimulatedDevice):
    def __init__(self, dtype: str = "F32") -> None:
        super().__init__(LAYOUT, dtype=dtype, nbytes=ARENA, slots=SLOTS)
        self.tickets: list[CopyTicket] = []
        self.refusing: set[int] = set()

    def copy(
        self, piece: StagedPiece | None, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        if len(self.tickets) in self.refusing:
            raise TransferError("the device refused")
        self.tickets.append(super().copy(piece, rows, extent, slot))
        return self.tickets[-1]


@contextmanager
def opened(dtype: str = "F32") -> Iterator[RecordingDevice]:
    with closing(RecordingDevice(dtype)) as device:
        device.open()
        yield device


@contextmanager
def from_file(dtype: str = "F32") -> Iterator[tuple[GatedDevice, StagingRing]]:
    device = GatedDevice(LAYOUT, dtype=dtype, nbytes=ARENA, slots=SLOTS)
    device.open()
    yield device, StagingRing(device.staging_memory(4096), 2048)
    device.close()


def ring_of(device: RecordingDevice, buffers: int, move: int = MOVE) -> StagingRing:
    memory = device.staging_memory(buffers * move)
    memory.fill_(STALE)
    return StagingRing(memory, move)


def transfer(
    device: RecordingDevice, ring: StagingRing, *, check_finite: bool = False
) -> GroupTransfer:
    return GroupTransfer(device, ring, NAMES, check_finite=check_finite)


def require_whole(ring: StagingRing) -> None:
    """All buffers come back, and each is there once."""
    buffers = ring.take(ring.buffers)
    assert len({buffer.tensor.data_ptr() for buffer in buffers}) == ring.buffers
    for buffer in buffers:
        ring.release(buffer)
    assert ring.free == ring.buffers


def image_of(device: Device, made: Case) -> torch.Tensor:
    return device.staging_memory(made.group.nbytes).fill_(STALE)


def failing_at(number: int, error: Exception) -> Callable[[], None]:
    calls = iter(range(1_000))

    def before() -> None:
        if next(calls) == number:
            raise error

    return before


async def waits_for_a_buffer(device: RecordingDevice, ring: StagingRing) -> None:
    await until(lambda: len(device.tickets) >= 2 and "1 waiting" in repr(ring))


@pytest.mark.parametrize("check_finite", [False, True])
@pytest.mark.parametrize(("buffers", "move"), [(2, MOVE), (3, MOVE), (2, 4096)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_arrives(kind: str, buffers: int, move: int, check_finite: bool) -> None:
    made = case(kind)
    with opened(made.dtype) as device:
        ring = ring_of(device, buffers, move)
        transfer(device, ring, check_finite=check_finite).run([made.copy(slot=2)]).joined().result(
            10
        )
        holds(device, 2, made.weights)
        around = device.view(Extent(0, ARENA)).clone()
        around[extent(2).offset : extent(2).offset + made.group.nbytes] = POISON
        assert (around == POISON).all()
        assert len(device.tickets) == 1 if move == 4096 else len(device.tickets) >= made.windows
        require_whole(ring)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_buffer_is_not_written_to_before_its_copy_is_done(kind: str) -> None:
    """Copies read when the gate opens: by then every buffer was wanted again."""
    made = case(kind)
    with opened(made.dtype) as device, ThreadPoolExecutor(1) as threads:
        device.gate.clear()
        ring = ring_of(device, 3)
        running = threads.submit(transfer(device, ring).run, [made.copy()])
        await waits_for_a_buffer(device, ring)
        assert not running.done()
        assert 2 <= len(device.tickets) <= 3
        device.gate.set()
        running.result(20).joined().result(10)
        holds(device, 0, made.weights)
        require_whole(ring)


def test_two_that_need_two_buffers_of_two() -> None:
    first, second = case("padded", 1), case("mixed", 2)
    with opened() as device, ThreadPoolExecutor(2) as threads:
        ring = ring_of(device, 2)
        moving = transfer(device, ring)
        for _ in range(20):
            for moved in threads.map(
                moving.run, ([first.copy()], [second.copy(slot=1)]), timeout=20
            ):
                moved.joined().result(10)
            holds(device, 0, first.weights)
            holds(device, 1, second.weights)
            device.clear_column(0)
            device.clear_column(1)
        require_whole(ring)
        with pytest.raises(InternalError, match="2 buffers of a ring of 1"):
            transfer(device, ring_of(device, 1)).run([first.copy()])


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_filled_and_serves_the_next_load(kind: str) -> None:
    """It takes no buffer while it is copied, and no file is read again."""

    def unread() -> None:
        raise AssertionError("nobody may read")

    made = case(kind)
    with opened(made.dtype) as device:
        ring, image = ring_of(device, 2), image_of(device, made)
        moving = transfer(device, ring, check_finite=True)
        moving.run([made.copy(image=image)]).joined().result(10)
        holds(device, 0, made.weights)
        assert torch.equal(image, device.view(Extent(0, made.group.nbytes)))
        device.gate.clear()
        again = made.copy(BytesReader(b"", unread), slot=2, image=image)
        moved = moving.run([again._replace(warm=True)])
        assert moved.tickets == [moved.joined()]
        assert (ring.free, moved.joined().done()) == (2, False)
        device.gate.set()
        moved.joined().result(10)
        holds(device, 2, made.weights)
        assert len(device.tickets) == 2


def refused(device: RecordingDevice, made: Case, module: str, *, in_image: bool) -> None:
    ring = ring_of(device, 3)
    copy = made.copy(image=image_of(device, made) if in_image else None)
    with pytest.raises(AdapterFormatError, match=f"{module} has NaN .* check_finite=False"):
        transfer(device, ring, check_finite=True).run([copy])
    assert all(ticket.done() for ticket in device.tickets)
    holds(device, 0, {})
    require_whole(ring)


@pytest.mark.parametrize("in_image", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtypes", [("F32", "F32"), ("BF16", "F16")])
@pytest.mark.parametrize("rank", [8, 5])
def test_nan_and_infinity(rank: int, dtypes: tuple[str, str], value: float, in_image: bool) -> None:
    for name, part, place in product("qk", "AB", (0, -1)):
        content = tensors(3, rank, dtypes)
        content[f"base_model.model.layers.0.{name}.lora_{part}.weight"][place, place] = value
        made = case_of(content, rank, "F32")
        with opened() as device:
            refused(device, made, f"'layers.0.{name}'", in_image=in_image)
        with from_file() as (host, ring):
            with pytest.raises(AdapterFormatError, match=f"'layers.0.{name}' has NaN"):
                GroupTransfer(host, ring, NAMES, check_finite=True).run([made.copy()])
            GroupTransfer(host, ring, NAMES, check_finite=False).run([made.copy()]).joined().result(
                10
            )


def test_a_value_too_large_for_the_device_is_not_finite() -> None:
    """1e5 is finite in the file; as float16 it is infinite, and that is what counts."""
    content = tensors(3, 8, ("F32", "F32"))
    content["base_model.model.layers.0.k.lora_B.weight"][-1, -1] = 1e5
    made = case_of(content, 8, "F16")
    with opened("F16") as device:
        refused(device, made, "'layers.0.k'", in_image=False)
        transfer(device, ring_of(device, 2)).run([made.copy(slot=1)]).joined().result(10)
        holds(device, 1, made.weights)


def left_nothing(device: RecordingDevice, ring: StagingRing, *, at_once: bool) -> None:
    if at_once:
        assert all(ticket.done() for ticket in device.tickets)
    require_whole(ring)
    assert all(ticket.done() for ticket in device.tickets)
    holds(device, 0, {})


def works(device: RecordingDevice, ring: StagingRing, made: Case) -> None:
    transfer(device, ring).run([made.copy(slot=1)]).joined().result(10)
    holds(device, 1, made.weights)
    device.clear_column(1)
    settle(device)


@pytest.mark.parametrize("way", ["two buffers", "many buffers", "an image"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_read(kind: str, way: str) -> None:
    made, calls = case(kind), list[None]()
    with opened(made.dtype) as device:
        device.delay = LATE
        ring = ring_of(device, 20 if way == "many buffers" else 2)
        image = image_of(device, made) if way == "an image" else None
        counted = BytesReader(made.file, lambda: calls.append(None))
        transfer(device, ring).run([made.copy(counted, image=image)]).joined().result(10)
        device.clear_column(0)
        settle(device)
        sent = len(device.tickets)
        assert image is not None or len(calls) >= made.windows
        for number in range(len(calls)):
            error = FetchError("the disk is on fire")
            reader = BytesReader(made.file, failing_at(number, error))
            with pytest.raises(FetchError) as caught:
                transfer(device, ring).run([made.copy(reader, image=image)])
            assert caught.value is error
            left_nothing(device, ring, at_once=True)
            assert image is None or len(device.tickets) == sent
        works(device, ring, made)


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("buffers", [2, 3, 20])
@pytest.mark.parametrize("kind", ["verbatim", "mixed"])
def test_each_copy_that_fails_later(kind: str, buffers: int, refused: bool) -> None:
    """Heard where it is asked for, if it is refused or fails before the last, or from `done`."""
    made = case(kind)
    with opened(made.dtype) as device:
        device.delay = LATE
        ring = ring_of(device, buffers)
        works(device, ring, made)
        for number in range(made.windows):
            device.refusing = {len(device.tickets) + number} if refused else set()
            device.failing = set() if refused else {device.copies + number}
            with pytest.raises(TransferError, match="refused" if refused else "was told"):
                transfer(device, ring).run([made.copy()]).joined().result(10)
            if not refused:
                device.clear_column(0)
                settle(device)
            left_nothing(device, ring, at_once=refused)
        device.refusing, device.failing = set(), set()
        works(device, ring, made)


def test_nothing_is_sent_after_a_copy_that_failed() -> None:
    """With two buffers the third window has the first one's: by the fourth the failure is known.

    Where all were sent by then, the first failure is told.
    """
    made = case("verbatim")
    with opened() as device:
        device.failing = {0}
        ring = ring_of(device, 2)
        with pytest.raises(TransferError, match="copy 0 was told"):
            transfer(device, ring).run([made.copy()])
        assert len(device.tickets) <= 3 < made.windows
        left_nothing(device, ring, at_once=True)
    with opened() as device:
        device.failing = {1, 3}
        device.gate.clear()
        moved = transfer(device, ring_of(device, 20)).run([made.copy()])
        device.gate.set()
        with pytest.raises(TransferError, match="copy 1 was told"):
            moved.joined().result(10)
        assert all(ticket.done() for ticket in device.tickets)


async def test_a_device_that_is_lost_frees_who_waits_for_a_buffer() -> None:
    made = case("verbatim")
    with opened() as device, ThreadPoolExecutor(1) as threads:
        device.gate.clear()
        ring = ring_of(device, 2)
        running = threads.submit(transfer(device, ring).run, [made.copy()])
        await waits_for_a_buffer(device, ring)
        device.lose()
        device.gate.set()
        with pytest.raises(TransferError, match="lost"):
            running.result(20)
        left_nothing(device, ring, at_once=True)


def test_a_reader_or_a_device_that_fails_leaves_no_row() -> None:
    made = case("mixed")
    with from_file() as (device, ring):
        moving = GroupTransfer(device, ring, NAMES, check_finite=True)
        calls: list[None] = []
        moving.run([made.copy(BytesReader(made.file, lambda: calls.append(None)))])
        device.clear_column(0)
        for number in range(len(calls)):
            error = FetchError("the disk is on fire")
            with pytest.raises(FetchError) as caught:
                moving.run([made.copy(BytesReader(made.file, failing_at(number, error)))])
            assert caught.value is error
            assert ring.free == ring.buffers
            holds(device, 0, {})
        device.failing = {device.copies}
        with pytest.raises(TransferError, match="told to fail"):
            moving.run([made.copy()])
        holds(device, 0, {})
        moving.run([made.copy()])
        holds(device, 0, made.weights)


LOOKS_NAN = torch.tensor(0x3F80FFFF, dtype=torch.int32).view(torch.float32)
"""About 1.008, whose lower half is NaN if it is read as bfloat16 or float16."""

DTYPES = [("F32", "F32"), ("BF16", "F32"), ("F16", "BF16"), ("F32", "F16"), ("BF16", "BF16")]


def vector_case(stored: str, own: str, value: float | None = None) -> Case:
    """Two modules with magnitudes in dtype `own`; `value` comes last in the first one's."""
    rank, dtypes = (8, ("F32", "F32")) if stored == own == "F32" else (5, ("F32", "BF16"))
    content = tensors(4, rank, dtypes)
    for name, length in (("q", 40), ("k", 8)):
        vector = LOOKS_NAN.repeat(length).to(TORCH[own])
        if value is not None and name == "q":
            vector[-1] = value
        content[f"base_model.model.layers.0.{name}.lora_magnitude_vector"] = vector
    return case_of(content, rank, stored, move=1 << 11, dora=True)


@pytest.mark.parametrize("way", ["windows", "image", "host"])
@pytest.mark.parametrize(("stored", "own"), DTYPES)
def test_vectors_arrive_as_they_are_in_the_file(stored: str, own: str, way: str) -> None:
    with from_file(stored) as (host, host_ring), opened(stored) as staged:
        device, ring = (host, host_ring) if way == "host" else (staged, ring_of(staged, 3, 2048))
        moving = GroupTransfer(device, ring, NAMES, check_finite=True)
        made = vector_case(stored, own)
        image = image_of(staged, made) if way == "image" else None
        moving.run([made.copy(slot=2, image=image)]).joined().result(10)
        assert [vector.module for vector in made.group.extras] == [0, 1]
        for vector, length in zip(made.group.extras, (40, 8), strict=True):
            there = device.view(Extent(extent(2).offset + vector.offset, vector.nbytes))
            assert torch.equal(there.view(TORCH[own]), LOOKS_NAN.repeat(length).to(TORCH[own]))
        for value in (torch.nan, torch.inf, -torch.inf):
            with pytest.raises(AdapterFormatError, match=r"'layers\.0\.q' has NaN"):
                moving.run([vector_case(stored, own, value).copy(image=image)])
        require_whole(ring)
