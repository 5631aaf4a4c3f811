"""What a device with memory of its own claims once: arena, tables, pinned images, a copy stream."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

import torch

from lorax_async.core.arena import Extent
from lorax_async.core.layout import ModelLayout
from lorax_async.errors import CapacityError, ConfigError, InternalError, UsageError
from lorax_async.io.devices.columns import Columns
from lorax_async.io.devices.failures import first_line
from lorax_async.io.devices.streams import (
    new_event,
    new_stream,
    require_device,
    stream_on,
)

ALIGNMENT = 64
_NO_ROOM = (RuntimeError, MemoryError, TypeError)  # the last is torch's for more than 63 bits
NOTHING = torch.empty(0, dtype=torch.uint8)


class DeviceMemory:
    """One arena, uint8 `[nbytes]`, and its columns; claimed and let go as a whole."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.arena = NOTHING
        self._columns: Columns | None = None
        self._stream: torch.Stream | None = None

    @property
    def columns(self) -> Columns:
        if self._columns is None:
            raise UsageError("the device is not open")
        return self._columns

    @property
    def stream(self) -> torch.Stream:
        """The copy stream."""
        if self._stream is None:
            raise UsageError("the device is not open")
        return self._stream

    def claim(self, layout: ModelLayout, nbytes: int, slots: int) -> None:
        """Claim all of it, or nothing. Blocks.

        The memory is allocated, and the tables zeroed, on this thread's current stream, where work
        of the memory's last owner may still stand. The copy stream starts behind that, and both
        have got there when this returns.

        Raises
        ------
        ConfigError
            There is no such device here, or it cannot be used.
        CapacityError
            No room for arena and tables there, or for row images here.
        """
        require_device(self._device)
        try:
            self._stream = new_stream(self._device)
            self._allocate(layout, nbytes, slots)
            self._start_behind_current(self._stream)
        except RuntimeError as error:
            self.let_go()
            raise ConfigError(f"{self._device} cannot be used ({first_line(error)})") from error
        except BaseException:
            self.let_go()
            raise

    def _allocate(self, layout: ModelLayout, nbytes: int, slots: int) -> None:
        layers = [module.layer for module in layout.modules]
        try:
            self.arena = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            base = self.arena.data_ptr()
            self._columns = Columns(layers, slots, self._device, base, pinned)
        except _NO_ROOM as error:
            traceback.clear_frames(error.__traceback__)  # they keep what was allocated
            raise CapacityError(
                f"no memory on {self._device} for an arena of {nbytes:,} bytes and {slots:,} slots"
                f" ({first_line(error)}); lower device_bytes or max_slots"
            ) from error
        if base % ALIGNMENT:
            raise InternalError(f"{self._device} gave memory that is not aligned to {ALIGNMENT}")

    def _start_behind_current(self, stream: torch.Stream) -> None:
        before = new_event(self._device)
        before.record(stream_on(self._device, None))
        before.wait(stream)
        stream.synchronize()

    def wipe(self, extents: Sequence[Extent]) -> None:
        """Put zeros on the copy stream, by kernels; raises `RuntimeError` if they cannot be put."""
        with self.stream:
            for extent in extents:
                self.arena[extent.offset : extent.offset + extent.nbytes].zero_()

    def let_go(self) -> None:
        """Drop what was claimed.

        The allocator may give the memory to others at once, in the order of the stream on which it
        was claimed: the copy stream has run dry, and no other reads the memory any more.
        """
        self.arena = NOTHING
        self._columns = None
        self._stream = None


def pinned(nbytes: int) -> torch.Tensor:
    """Host memory that the device reads by DMA, uint8 `[nbytes]`."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def staging(device: torch.device, nbytes: int) -> torch.Tensor:
    """As `pinned`; `CapacityError` if there is not so much, `ConfigError` without the device."""
    require_device(device)
    try:
        return pinned(nbytes)
    except _NO_ROOM as error:
        raise CapacityError(
            f"no {nbytes:,} bytes of pinned host memory ({first_line(error)});"
            " lower staging_bytes or pinned_bytes"
        ) from error
