"""The bounded ring of host buffers in which tensors are cast and padded on their way."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import torch

from lorax_async.core.moves import Convert, Zero
from lorax_async.errors import InternalError
from lorax_async.io.ports import Reader

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StagingRing:
    """Equal buffers of ordinary memory; a move uses one while it runs.

    Parameters
    ----------
    nbytes
        The budget, in bytes.
    move_bytes
        Size of a buffer: the most that one `Convert` reads.
    """

    def __init__(self, nbytes: int, move_bytes: int) -> None:
        self.buffers = max(1, nbytes // move_bytes)
        self.move_bytes = move_bytes
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()
        for _ in range(self.buffers):
            # A map's pages come when they are used; a bytearray would be zeroed here.
            self._free.put(mmap.mmap(-1, move_bytes))

    @property
    def free(self) -> int:
        return self._free.qsize()

    @contextmanager
    def buffer(self) -> Iterator[mmap.mmap]:
        """A buffer of `move_bytes`; waits until one is free."""
        buffer = self._free.get()
        try:
            yield buffer
        finally:
            self._free.put(buffer)

    def convert(
        self, reader: Reader, moves: tuple[Convert, ...], dtype: str, target: torch.Tensor
    ) -> None:
        """Read, cast and pad every move into `target`, the uint8 bytes of a group's extent.

        Blocks, in an I/O thread. Casts round to nearest even, as `Tensor.copy_` does.
        """
        with self.buffer() as buffer:
            memory = memoryview(buffer)
            source = torch.frombuffer(buffer, dtype=torch.uint8)
            for move in moves:
                if move.nbytes > self.move_bytes:
                    raise InternalError(f"a move of {move.nbytes} bytes exceeds its buffer")
                reader.read_into([memory[: move.nbytes]], move.file_offset)
                _cast(source, move, TORCH_DTYPES[dtype], target)


def zero(moves: tuple[Zero, ...], target: torch.Tensor) -> None:
    """Write the zeros that pad ranks into `target`, the uint8 bytes of a group's extent."""
    for move in moves:
        target[move.target : move.target + move.nbytes].zero_()


def _cast(buffer: torch.Tensor, move: Convert, dtype: torch.dtype, target: torch.Tensor) -> None:
    source = buffer[: move.nbytes].view(TORCH_DTYPES[move.source_dtype])
    nbytes = move.rows * move.row_pitch * dtype.itemsize
    rows = target[move.target : move.target + nbytes].view(dtype).view(move.rows, move.row_pitch)
    rows[:, : move.columns].copy_(source.view(move.rows, move.columns))
    if move.row_pitch > move.columns:
        rows[:, move.columns :].zero_()
