"""Host memory as a device: the arena is mapped once, and files are read straight into it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from math import prod

import torch

from lorax_async.core.arena import Extent
from lorax_async.core.layout import ModelLayout
from lorax_async.core.moves import Read, Row
from lorax_async.errors import CapacityError, UsageError
from lorax_async.io.ports import CopyTicket, FilePieces
from lorax_async.io.staging import TORCH_DTYPES

_CLAIMED_AT_ONCE = 32 << 20
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14, not named by Python's mmap
_MAX_BUFFERS = 1024  # IOV_MAX
_DONE: CopyTicket = Future()
_DONE.set_result(None)

Operands = tuple[torch.Tensor, torch.Tensor, float]


class CpuDevice:
    """An arena in host memory. Copies are done when `copy` returns; compute needs no event.

    Parameters
    ----------
    layout
        The base model, which gives the tables their rows.
    dtype
        What adapters are stored as: "F32", "F16" or "BF16".
    nbytes
        Size of the arena. Its pages are claimed by `open`, so that a machine without the memory
        says so at start and not under load.
    slots
        Columns of the tables.
    """

    name = "cpu"
    alignment = 64
    rank_multiple = 1

    def __init__(self, layout: ModelLayout, *, dtype: str, nbytes: int, slots: int) -> None:
        self._layout = layout
        self._dtype = TORCH_DTYPES[dtype]
        self._nbytes = nbytes
        self._slots = slots
        self._opened = False
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._memory = memoryview(b"")
        self._columns: list[dict[int, tuple[int, int, int, float]]] = [{} for _ in range(slots)]
        self._views: list[dict[int, Operands]] = [{} for _ in range(slots)]

    def open(self) -> None:
        """As the port has it, and once: whoever keeps the tables' addresses may rely on them."""
        if self._opened:
            raise UsageError("the device was opened before; make a new one")
        try:
            memory = self._claim_memory()
            self._make_tables()
        except (OSError, OverflowError, MemoryError) as error:
            raise CapacityError(
                f"no memory for an arena of {self._nbytes:,} bytes and {self._slots:,} slots"
                f" ({error}); lower device_bytes or max_slots"
            ) from error
        self._memory = memoryview(memory)
        self._arena = torch.frombuffer(memory, dtype=torch.uint8)
        self._base = self._arena.data_ptr()
        self._opened = True

    def _claim_memory(self) -> mmap.mmap:
        memory = mmap.mmap(-1, self._nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a wish, which a kernel without huge pages refuses
            memory.madvise(mmap.MADV_HUGEPAGE)
        _claim_pages(torch.frombuffer(memory, dtype=torch.uint8))
        return memory

    def _make_tables(self) -> None:
        modules = len(self._layout.modules)
        # Writing an element through torch costs microseconds, and an adapter has hundreds: the
        # tensors share memory with plain arrays.
        self.address, memory = _table(torch.int64, (2, modules, self._slots))
        self._address_words = memory.cast("q")
        self.rank, memory = _table(torch.int32, (modules, self._slots))
        self._rank_words = memory.cast("i")
        self.scale, memory = _table(torch.float32, (modules, self._slots))
        self._scale_words = memory.cast("f")

    def host_memory(self, extent: Extent) -> torch.Tensor:
        return self._arena[extent.offset : extent.offset + extent.nbytes]

    def copy(
        self, pieces: FilePieces, rows: Sequence[Row], extent: Extent, slot: int
    ) -> CopyTicket:
        for run in _file_runs(pieces.reads):
            buffers = [self._window(extent, read) for read in run]
            pieces.reader.read_into(buffers, run[0].file_offset)
        self._write_rows(rows, extent, slot)
        return _DONE

    def _window(self, extent: Extent, read: Read) -> memoryview:
        start = extent.offset + read.target
        return self._memory[start : start + read.nbytes]

    def _write_rows(self, rows: Sequence[Row], extent: Extent, slot: int) -> None:
        """Addresses and scale first: a row whose rank is not 0 is complete."""
        modules, slots = self.rank.shape
        column = self._columns[slot]
        for module, a, b, _, rank, scale in rows:
            cell = module * slots + slot
            column[module] = (extent.offset + a, extent.offset + b, rank, scale)
            self._address_words[cell] = self._base + extent.offset + a
            self._address_words[modules * slots + cell] = self._base + extent.offset + b
            self._scale_words[cell] = scale
            self._rank_words[cell] = rank

    def clear_column(self, slot: int) -> None:
        modules, slots = self.rank.shape
        for module in self._columns[slot]:
            cell = module * slots + slot
            self._rank_words[cell] = 0
            self._scale_words[cell] = 0.0
            self._address_words[cell] = 0
            self._address_words[modules * slots + cell] = 0
        self._columns[slot] = {}
        self._views[slot] = {}

    def operands(self, module: int, slot: int) -> Operands | None:
        """Views into the arena, made once per tenant of the slot."""
        views = self._views[slot]
        found = views.get(module)
        if found is None:
            row = self._columns[slot].get(module)
            if row is None:
                return None
            a, b, rank, scale = row
            shape = self._layout.modules[module]
            found = views[module] = (
                self._view(a, rank, shape.in_features),
                self._view(b, shape.out_features, rank),
                scale,
            )
        return found

    def _view(self, offset: int, rows: int, columns: int) -> torch.Tensor:
        nbytes = rows * columns * self._dtype.itemsize
        return self._arena[offset : offset + nbytes].view(self._dtype).view(rows, columns)

    def close(self) -> None:
        """Idempotent; a device that was never opened is closed, too."""
        self._columns = []
        self._views = []
        self._memory = memoryview(b"")
        self._arena = torch.empty(0, dtype=torch.uint8)


def _claim_pages(memory: torch.Tensor) -> None:
    """Fault all pages of `memory` in, in pieces: others may map and fault in between."""
    for start in range(0, memory.nbytes, _CLAIMED_AT_ONCE):
        piece = memory[start : start + _CLAIMED_AT_ONCE]
        code = _madvise(piece.data_ptr(), piece.nbytes, _POPULATE_WRITE)
        if code == errno.EINVAL:
            piece.zero_()  # an older kernel: touch them
        elif code:
            raise OSError(code, os.strerror(code))


def _madvise(address: int, size: int, advice: int) -> int:
    """As madvise(2), returning errno. Python's own would hold the GIL throughout."""
    call = ctypes.CDLL(None, use_errno=True).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return ctypes.get_errno() if call(address, size, advice) else 0


def _table(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[torch.Tensor, memoryview]:
    memory = bytearray(prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape), memoryview(memory)


def _file_runs(reads: Sequence[Read]) -> list[tuple[Read, ...]]:
    """Reads that follow each other in the file, to be read in one call each."""
    if len(reads) == 1:
        return [tuple(reads)]
    runs: list[list[Read]] = []
    end = -1
    for read in sorted(reads, key=lambda read: read.file_offset):
        if read.file_offset != end or len(runs[-1]) == _MAX_BUFFERS:
            runs.append([])
        runs[-1].append(read)
        end = read.file_offset + read.nbytes
    return [tuple(run) for run in runs]
