"""The ring of host buffers in which layer groups are assembled, cast and padded."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from threading import Condition

import torch

from lorax_async.errors import InternalError
from lorax_async.files import Reader
from lorax_async.planning.transfer_plan import ConvertMove, ReadMove, ZeroMove, file_runs

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALIGNMENT = 64

MOVE_BYTES = 4 << 20
"""Bytes per cast through staging: few calls, and several casts fit the default ring."""


def is_finite(values: torch.Tensor) -> bool:
    """Return whether floating-point values on the CPU hold neither NaN nor infinity.

    A sum keeps both, and is twenty times as fast as `isfinite`; only where it overflows is every
    value looked at.
    """
    return isfinite(values.sum().item()) or bool(values.isfinite().all())


@dataclass(frozen=True, slots=True, eq=False)
class StagingBuffer:
    """One buffer as a writable memoryview of format "B" and as a uint8 `[nbytes]` tensor.

    `number` is its position in the ring, or None if it belongs to none.
    """

    memory: memoryview
    tensor: torch.Tensor
    number: int | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor, number: int | None = None) -> StagingBuffer:
        """Return a buffer over a contiguous uint8 tensor of host memory, which it keeps alive."""
        # Without numpy, a tensor has no memoryview.
        content = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
        return cls(memoryview(content).cast("B"), tensor, number)

    def convert(
        self, reader: Reader, moves: tuple[ConvertMove, ...], dtype: str, target: torch.Tensor
    ) -> None:
        """Read every move into this buffer, then cast and pad it into `target`, uint8.

        Blocks; call in an I/O thread. Casts round to nearest even, as `Tensor.copy_` does.
        """
        for move in moves:
            if move.nbytes > len(self.memory):
                raise InternalError(f"a move of {move.nbytes} bytes exceeds its buffer")
            first = 0
            for source in move.sources:
                last = first + source.nbytes
                part = [self.memory[first:last]]
                reader.read_into(part, source.start, source.rows, source.pitch)
                first = last
            _cast(self.tensor, move, TORCH_DTYPES[dtype], target)


class StagingRing:
    """Buffers of equal size in `memory`, uint8 `[nbytes]` of the device's `staging_memory`.

    `move_bytes`, rounded down to a multiple of 64, is the size of a buffer: the limit of what a
    `ConvertMove` reads or writes.
    """

    def __init__(self, memory: torch.Tensor, move_bytes: int) -> None:
        self.move_bytes = size = move_bytes - move_bytes % _ALIGNMENT
        self.buffers = memory.nbytes // size if size else 0
        if not self.buffers:
            raise InternalError(f"{memory.nbytes} bytes hold no buffer of {move_bytes}")
        self._free = [
            StagingBuffer.of(memory[n * size : (n + 1) * size], n) for n in range(self.buffers)
        ]
        self._waiting: deque[object] = deque()
        self._changed = Condition()

    @property
    def free(self) -> int:
        return len(self._free)

    def __repr__(self) -> str:
        free, waiting = f"{self.free} of {self.buffers} buffers free", len(self._waiting)
        return f"<StagingRing: {free}, {waiting} waiting>"

    def take(self, count: int) -> list[StagingBuffer]:
        """Take `count` buffers at once, in order of arrival. Blocks until they are free.

        A waiting call holds no buffer, so that two takers of two cannot deadlock.
        """
        if count > self.buffers:
            raise InternalError(f"{count} buffers of a ring of {self.buffers}")
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._is_served(ticket, count))
                return [self._free.pop() for _ in range(count)]
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def _is_served(self, ticket: object, count: int) -> bool:
        return self._waiting[0] is ticket and len(self._free) >= count

    def release(self, buffer: StagingBuffer, _: object = None) -> None:
        """Return a buffer to the ring, also as a callback of a ticket. Thread-safe."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()


def read(reader: Reader, moves: Sequence[ReadMove], target: memoryview) -> None:
    """Read every move verbatim into `target`, with one call per contiguous run of the file."""
    for run in file_runs(moves):
        buffers = [target[move.target : move.target + move.nbytes] for move in run]
        reader.read_into(buffers, run[0].file_offset, run[0].rows, run[0].pitch)


def zero(moves: tuple[ZeroMove, ...], target: torch.Tensor) -> None:
    """Write the zeros that pad ranks into `target`, uint8."""
    for move in moves:
        target[move.target : move.target + move.nbytes].zero_()


def _cast(
    buffer: torch.Tensor, move: ConvertMove, dtype: torch.dtype, target: torch.Tensor
) -> None:
    source = buffer[: move.nbytes].view(TORCH_DTYPES[move.source_dtype])
    nbytes = move.rows * move.row_pitch * dtype.itemsize
    flat = target[move.target : move.target + nbytes].view(dtype)
    if move.row_pitch == move.columns:
        flat.copy_(source)  # torch copies rows one by one
        return
    rows = flat.view(move.rows, move.row_pitch)
    rows[:, : move.columns].copy_(source.view(move.rows, move.columns))
    rows[:, move.columns :].zero_()
