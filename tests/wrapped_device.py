"""A device around a device: for tests that look at what passes between loader and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorax_async.devices.base import CopyTicket, Device, FilePieces, StagedPiece
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.transfer_plan import TableRow


class WrappedDevice:
    """Passes every call of the port on to `inner`."""

    def __init__(self, inner: Device) -> None:
        self.inner = inner
        self.name = inner.name
        self.alignment = inner.alignment
        self.rank_multiple = inner.rank_multiple
        self.reads_files = inner.reads_files

    def open(self) -> None:
        self.inner.open()

    def staging_memory(self, nbytes: int) -> torch.Tensor:
        return self.inner.staging_memory(nbytes)

    def host_view(self, extent: Extent) -> torch.Tensor:
        return self.inner.host_view(extent)

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        return self.inner.copy(pieces, rows, extent, slot)

    def wait_for(self, ticket: CopyTicket, stream: object | None = None) -> None:
        self.inner.wait_for(ticket, stream)

    def note_use(self, stream: object | None = None) -> CopyTicket:
        return self.inner.note_use(stream)

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        return self.inner.wipe(extents)

    def clear_column(self, slot: int) -> None:
        self.inner.clear_column(slot)

    def operands(self, module: int, slot: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        return self.inner.operands(module, slot)

    def view(self, extent: Extent) -> torch.Tensor:
        return self.inner.view(extent)

    def close(self) -> None:
        self.inner.close()
