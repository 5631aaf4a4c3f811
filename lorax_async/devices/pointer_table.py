"""A GPU's pointer table: its record on the host, and the pinned images of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from queue import SimpleQueue
from typing import NamedTuple

import torch

from lorax_async.devices.cpu import Operands, matrix_view
from lorax_async.devices.staging import StagingBuffer
from lorax_async.devices.streams import EventTicket
from lorax_async.planning.layout import Module


class TableCell(NamedTuple):
    """A module's row: the arena offsets `a` and `b` of A and B, the padded rank, the scale."""

    a: int
    b: int
    rank: int
    scale: float


class ColumnRecord:
    """The rows submitted to one column since it was last cleared."""

    def __init__(self) -> None:
        self.cells: dict[int, TableCell] = {}
        self._tickets: dict[int, EventTicket] = {}
        self._views: dict[int, Operands] = {}

    def add(self, cells: dict[int, TableCell], ticket: EventTicket) -> None:
        self.cells.update(cells)
        self._tickets.update(dict.fromkeys(cells, ticket))

    def operands(
        self, module: int, shape: Module, arena: torch.Tensor, dtype: torch.dtype
    ) -> Operands | None:
        """Return views into the arena, created once; None before the copy's ticket is done."""
        operands = self._views.get(module)
        if operands is None:
            ticket = self._tickets.get(module)
            if ticket is None or not ticket.succeeded:
                return None
            a, b, rank, scale = self.cells[module]
            operands = self._views[module] = (
                matrix_view(arena, a, dtype, (rank, shape.in_features)),
                matrix_view(arena, b, dtype, (shape.out_features, rank)),
                scale,
            )
        return operands


IMAGES = 64
"""The number of copies with rows that can be in flight; one more waits."""

_EMPTY = TableCell(0, 0, 0, 0.0)


def row_ranges(modules: Iterable[int], layers: Sequence[int]) -> list[range]:
    """Return, for each layer of `modules`, the range from its first to its last module."""
    groups = groupby(sorted(modules), key=layers.__getitem__)
    spans = [list(members) for _, members in groups]
    return [range(span[0], span[-1] + 1) for span in spans]


class RowImage:
    """Pinned rows in the layout of a column: int64 `[rows, 3]` (A, B, scale), int32 ranks `[rows]`.

    The host writes through the memoryviews, which takes nanoseconds per element; the tensors keep
    the memory alive.
    """

    def __init__(self, entries: torch.Tensor, ranks: torch.Tensor) -> None:
        self.entries = entries
        self.ranks = ranks
        words = StagingBuffer.of(entries.view(torch.uint8)).memory
        self.words, self.scales = words.cast("q"), words.cast("f")
        self.rank_words = StagingBuffer.of(ranks.view(torch.uint8)).memory.cast("i")


class TableColumns:
    """The pointer tables, as transposed views of `[slots, modules, …]`, and the row images.

    Call `write` and `clear` with the copy stream current, one call at a time. They only enqueue
    memcpys from pinned memory, in the order of the calls.

    `layers` are those of the modules, and `base` is the address of the arena. The tables are zeroed
    on the device's current stream. `pinned` allocates host memory, here and for copies of more rows
    than a layer has.
    """

    def __init__(
        self,
        layers: Sequence[int],
        slots: int,
        device: torch.device,
        base: int,
        pinned: Callable[[int], torch.Tensor],
    ) -> None:
        modules = len(layers)
        self._layers = layers
        self._base = base
        self._pinned = pinned
        self._entries = torch.zeros(slots, modules, 3, dtype=torch.int64, device=device)
        self._ranks = torch.zeros(slots, modules, dtype=torch.int32, device=device)
        self.address = self._entries[:, :, :2].permute(2, 1, 0)
        self.scale = self._entries.view(torch.float32)[:, :, 4].permute(1, 0)
        self.rank = self._ranks.permute(1, 0)
        self._zeros = self._images(1, modules)[0]
        self._zeros.entries.zero_()
        self._zeros.ranks.zero_()
        self._capacity = max(len(list(members)) for _, members in groupby(layers))
        self._free: SimpleQueue[RowImage] = SimpleQueue()
        for image in self._images(IMAGES, self._capacity):
            self._free.put(image)

    def _images(self, count: int, rows: int) -> list[RowImage]:
        """Create images in two allocations, as pinned ones are rounded up to a power of two."""
        entries = self._pinned(count * rows * 24).view(torch.int64).view(count, rows, 3)
        ranks = self._pinned(count * rows * 4).view(torch.int32).view(count, rows)
        return [RowImage(entries[n], ranks[n]) for n in range(count)]

    def image_for(self, modules: Iterable[int]) -> RowImage:
        """Take an image for the row ranges of these modules. Blocks until one is free."""
        rows = sum(map(len, row_ranges(modules, self._layers)))
        # Copies of a transfer plan have the rows of one layer; others may have more.
        return self._free.get() if rows <= self._capacity else self._images(1, rows)[0]

    def release(self, image: RowImage) -> None:
        """Return an image that no copy reads any more. Thread-safe."""
        if len(image.ranks) == self._capacity:
            self._free.put(image)

    def write(
        self, slot: int, modules: Iterable[int], column: Mapping[int, TableCell], image: RowImage
    ) -> None:
        """Enqueue the rows of `modules` with the content of `column`, and rewrite those between.

        The image holds the rows until the copies are done. Ranks are written last, so that a row
        with a rank is complete.
        """
        spans = row_ranges(modules, self._layers)
        for place, module in enumerate(module for span in spans for module in span):
            a, b, rank, scale = column.get(module, _EMPTY)
            image.words[3 * place] = self._base + a if rank else 0
            image.words[3 * place + 1] = self._base + b if rank else 0
            image.scales[6 * place + 4] = scale
            image.rank_words[place] = rank
        place = 0
        for span in spans:
            rows, copied = slice(span.start, span.stop), slice(place, place + len(span))
            self._entries[slot, rows].copy_(image.entries[copied], non_blocking=True)
            self._ranks[slot, rows].copy_(image.ranks[copied], non_blocking=True)
            place += len(span)

    def clear(self, slot: int) -> None:
        """Enqueue an empty column, the ranks first."""
        self._ranks[slot].copy_(self._zeros.ranks, non_blocking=True)
        self._entries[slot].copy_(self._zeros.entries, non_blocking=True)
