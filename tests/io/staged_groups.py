"""Adapters of one layer for tests of staged copies, with what should be on the device then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from device_groups import ARENA, LAYOUT, SHAPES, SLOTS, TORCH, BytesReader, extent

from core.adapter_files import file_of, plan
from lorax_async.adapter import AdapterSpec
from lorax_async.config import Limits
from lorax_async.core.arena import Extent
from lorax_async.core.moves import GroupPlan, Row
from lorax_async.errors import TransferError
from lorax_async.io.ports import CopyTicket, FilePieces, Reader, StagedPiece
from lorax_async.io.staging import StagingRing
from lorax_async.io.transfer import GroupCopy, Moved, Transfer
from lorax_async.testing import SimulatedDevice
from lorax_kernels import Operands

MOVE = 512
"""Size of a buffer: a group takes half a dozen."""
NAMES = [module.name for module in LAYOUT.modules]
STALE = 0xFF
"""What a ring is full of at first; NaN in every dtype."""

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """One layer: its file, its plan, and A, B and scale of each module as they shall be."""

    file: bytes
    group: GroupPlan
    dtype: str
    weights: dict[int, Operands]

    def copy(self, reader: Reader | None = None, *, slot: int = 0, place: int = 0) -> GroupCopy:
        reader = reader or BytesReader(self.file)
        return GroupCopy(reader, self.group, self.dtype, extent(place), slot)

    @property
    def windows(self) -> int:
        """At least so many: the file's bytes go through buffers of `MOVE` bytes."""
        return -(-self.group.nbytes // MOVE)


def tensors(seed: int, rank: int, dtypes: Sequence[str]) -> Weights:
    """A and B of the layer's two modules, q and k."""
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


def case_of(content: Weights, rank: int, dtype: str, move: int = MOVE) -> Case:
    file = file_of(list(content.items()))
    (group,) = plan(
        file,
        AdapterSpec(rank=rank, alpha=2.0 * rank),
        LAYOUT,
        dtype=dtype,
        rank_multiple=8,
        limits=Limits(max_rank=8),
        staging_move_bytes=move,
    ).groups
    values = list(content.values())
    weights = {n: (*padded(values[2 * n], values[2 * n + 1], dtype), 2.0) for n in range(2)}
    return Case(file, group, dtype, weights)


@cache
def case(kind: str, seed: int = 1) -> Case:
    rank, dtypes, dtype = {
        "verbatim": (8, ("F32", "F32"), "F32"),
        "cast": (8, ("BF16", "F16"), "F32"),
        "padded": (5, ("F32", "F32"), "F32"),
        "mixed": (3, ("F16", "F32"), "F32"),
        "narrow": (5, ("F32", "BF16"), "BF16"),
    }[kind]
    return case_of(tensors(seed, rank, dtypes), rank, dtype)


KINDS = ("verbatim", "cast", "padded", "mixed", "narrow")


class RecordingDevice(SimulatedDevice):
    """Remembers tickets, and refuses the copies that it is told to refuse."""

    def __init__(self, dtype: str = "F32") -> None:
        super().__init__(LAYOUT, dtype=dtype, nbytes=ARENA, slots=SLOTS)
        self.tickets: list[CopyTicket] = []
        self.refusing: set[int] = set()

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[Row], extent: Extent, slot: int
    ) -> CopyTicket:
        if len(self.tickets) in self.refusing:
            raise TransferError("the device refused")
        self.tickets.append(super().copy(pieces, rows, extent, slot))
        return self.tickets[-1]

    def bytes_at(self, where: Extent) -> torch.Tensor:
        return self._memory.host_view(where)


@contextmanager
def opened(dtype: str = "F32") -> Iterator[RecordingDevice]:
    device = RecordingDevice(dtype)
    device.open()
    try:
        yield device
    finally:
        device.close()


def ring_of(device: RecordingDevice, buffers: int, move: int = MOVE) -> StagingRing:
    memory = device.staging_memory(buffers * move)
    memory.fill_(STALE)
    return StagingRing(memory, move)


def transfer(device: RecordingDevice, ring: StagingRing, *, check_finite: bool = False) -> Transfer:
    return Transfer(device, ring, NAMES, check_finite=check_finite)


def require_whole(ring: StagingRing) -> None:
    """All buffers come back, and each is there once."""
    buffers = ring.take(ring.buffers)
    assert len({buffer.tensor.data_ptr() for buffer in buffers}) == ring.buffers
    for buffer in buffers:
        ring.release(buffer)
    assert ring.free == ring.buffers


class Running:
    """`Transfer.run` in a thread, as an I/O thread runs it."""

    def __init__(self, moving: Transfer, copy: GroupCopy) -> None:
        self._outcome: Future[Moved] = Future()
        threading.Thread(target=self._run, args=(moving, copy), daemon=True).start()

    def _run(self, moving: Transfer, copy: GroupCopy) -> None:
        try:
            self._outcome.set_result(moving.run(copy))
        except BaseException as error:
            self._outcome.set_exception(error)

    @property
    def ended(self) -> bool:
        return self._outcome.done()

    def result(self) -> Moved:
        return self._outcome.result(20)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def failing_at(number: int, error: Exception) -> Callable[[], None]:
    """For a reader: its call of this number raises."""
    calls = iter(range(1_000))

    def before() -> None:
        if next(calls) == number:
            raise error

    return before
