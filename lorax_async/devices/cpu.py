"""Host memory as a device. The arena is mapped once, and files are read straight into it."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from math import prod

import torch

from lorax_async.devices.base import CopyTicket, StagedPiece
from lorax_async.devices.staging import TORCH_DTYPES, read
from lorax_async.errors import CapacityError, UsageError
from lorax_async.files import POPULATE_WRITE, Reader, madvise
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.transfer_plan import ReadMove, TableRow

_CLAIM_BYTES = 32 << 20

Operands = tuple[torch.Tensor, torch.Tensor, float]


class CpuDevice:
    """A device in host memory. Copies are done when `copy` returns; compute needs no event.

    The modules of `layout` are the rows of the tables, which have `slots` columns. Adapters are
    stored in `dtype`, "F32", "F16" or "BF16". `open` faults in the pages of the arena of `nbytes`,
    so that a lack of memory shows at start and not under load.
    """

    name = "cpu"
    alignment = 64
    rank_multiple = 1
    reads_files = True

    def __init__(self, layout: ModelLayout, *, dtype: str, nbytes: int, slots: int) -> None:
        self._layout = layout
        self._dtype = TORCH_DTYPES[dtype]
        self._nbytes = nbytes
        self._slots = slots
        self._was_opened = False
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._memory = memoryview(b"")
        self._columns: list[dict[int, tuple[int, int, int, float]]] = [{} for _ in range(slots)]
        self._views: list[dict[int, Operands]] = [{} for _ in range(slots)]
        self._done: CopyTicket = Future()
        self._done.set_result(None)

    def open(self) -> None:
        """Allocate as `Device.open`. Callable once, so that the tables' addresses stay valid."""
        if self._was_opened:
            raise UsageError("the device was opened before; make a new one")
        modules = len(self._layout.modules)
        try:
            memory = mmap.mmap(-1, self._nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a hint, which a kernel without huge pages refuses
                memory.madvise(mmap.MADV_HUGEPAGE)
            _claim_pages(torch.frombuffer(memory, dtype=torch.uint8))
            # The tensors share memory with plain arrays, because writing an element through torch
            # costs microseconds and an adapter has hundreds.
            self.address, words = _table(torch.int64, (2, modules, self._slots))
            self.rank, ranks = _table(torch.int32, (modules, self._slots))
            self.scale, scales = _table(torch.float32, (modules, self._slots))
        except (OSError, OverflowError, MemoryError) as error:
            raise CapacityError(
                f"no memory for an arena of {self._nbytes:,} bytes and {self._slots:,} slots"
                f" ({error}); lower device_bytes or max_slots"
            ) from error
        self._address_words, self._rank_words = words.cast("q"), ranks.cast("i")
        self._scale_words = scales.cast("f")
        self._memory = memoryview(memory)
        self._arena = torch.frombuffer(memory, dtype=torch.uint8)
        self._base = self._arena.data_ptr()
        self._was_opened = True

    def staging_memory(self, nbytes: int) -> torch.Tensor:
        """Return pageable memory, whose pages are allocated at the first write."""
        return lazy_memory(nbytes)

    def host_view(self, extent: Extent) -> torch.Tensor:
        return self._arena[extent.offset : extent.offset + extent.nbytes]

    def read(self, reader: Reader, moves: Sequence[ReadMove]) -> None:
        read(reader, moves, self._memory)

    def copy(
        self, piece: StagedPiece | None, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        if piece is not None:
            target = Extent(extent.offset + piece.target, piece.memory.nbytes)
            self.host_view(target).copy_(piece.memory)
        # Write addresses and scale before the rank, so that a row with a rank is complete.
        modules, slots = self.rank.shape
        column = self._columns[slot]
        for module, a, b, _, rank, scale in rows:
            cell = module * slots + slot
            column[module] = (extent.offset + a, extent.offset + b, rank, scale)
            self._address_words[cell] = self._base + extent.offset + a
            self._address_words[modules * slots + cell] = self._base + extent.offset + b
            self._scale_words[cell] = scale
            self._rank_words[cell] = rank
        return self._done

    def wait_for(self, ticket: CopyTicket, stream: object | None = None) -> None:  # noqa: ARG002
        """Do nothing: every copy is done when `copy` returns."""
        if ticket is not self._done:
            raise UsageError("the ticket belongs to another device")

    def note_use(self, stream: object | None = None) -> CopyTicket:  # noqa: ARG002 - it has none
        """Return a ticket that is done: compute is synchronous."""
        return self._done

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        for extent in extents:
            self.host_view(extent).zero_()
        return self._done

    def clear_column(self, slot: int) -> None:
        modules, slots = self.rank.shape
        zeros = memoryview(bytes(2 * modules * 8))
        self._rank_words[slot::slots] = zeros[: modules * 4].cast("i")
        self._scale_words[slot::slots] = zeros[: modules * 4].cast("f")
        self._address_words[slot::slots] = zeros.cast("q")
        self._columns[slot] = {}
        self._views[slot] = {}

    def operands(self, module: int, slot: int) -> Operands | None:
        """Return views into the arena, created once per occupant of the slot."""
        views = self._views[slot]
        operands = views.get(module)
        if operands is None:
            row = self._columns[slot].get(module)
            if row is None:
                return None
            a, b, rank, scale = row
            shape = self._layout.modules[module]
            operands = views[module] = (
                matrix_view(self._arena, a, self._dtype, (rank, shape.in_features)),
                matrix_view(self._arena, b, self._dtype, (shape.out_features, rank)),
                scale,
            )
        return operands

    view = host_view

    def close(self) -> None:
        """Release the arena. Idempotent, also before `open`."""
        self._columns = []
        self._views = []
        self._memory = memoryview(b"")
        self._arena = torch.empty(0, dtype=torch.uint8)


def matrix_view(
    arena: torch.Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, int]
) -> torch.Tensor:
    nbytes = shape[0] * shape[1] * dtype.itemsize
    return arena[offset : offset + nbytes].view(dtype).view(shape)


def lazy_memory(nbytes: int) -> torch.Tensor:
    """Return zeros, uint8 `[nbytes]`, whose pages are allocated when used.

    Raises `CapacityError` if the address space is short.
    """
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, MemoryError) as error:
        raise CapacityError(
            f"no {nbytes:,} bytes of host memory for staging ({error}); lower staging_bytes"
        ) from error
    return torch.frombuffer(memory, dtype=torch.uint8)


def _claim_pages(memory: torch.Tensor) -> None:
    """Fault in all pages of `memory`, in pieces, so that other threads can map memory between."""
    for start in range(0, memory.nbytes, _CLAIM_BYTES):
        piece = memory[start : start + _CLAIM_BYTES]
        code = madvise(piece.data_ptr(), piece.nbytes, POPULATE_WRITE)
        if code == errno.EINVAL:
            piece.zero_()  # an older kernel: touch the pages
        elif code:
            raise OSError(code, os.strerror(code))


def _table(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[torch.Tensor, memoryview]:
    memory = bytearray(prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape), memoryview(memory)
