"""An asynchronous device without a GPU, on which a missing wait shows as wrong bytes.

For tests of the loader and of servers built on it. Copies run in a thread, in order, with an
adjustable delay; kernels are Python calls submitted to streams.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

import torch

from lorax_async.devices.base import CopyTicket, StagedPiece
from lorax_async.devices.cpu import CpuDevice, Operands, lazy_memory
from lorax_async.errors import TransferError, UsageError
from lorax_async.files import Reader
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.transfer_plan import ReadMove, TableRow

POISON = 0x7E
"""A byte that is huge in F32 and BF16 and NaN in F16, so that its use in compute shows."""


class SimulatedTicket(Future[None]):
    """A ticket that cannot be cancelled, because submitted work runs.

    `finished_at` is when the copy ended, in simulated seconds of the device's clock; None for other
    work.
    """

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self.device = device
        self.finished_at: float | None = None
        self.set_running_or_notify_cancel()


Work = Callable[[SimulatedTicket], object]


class SimulatedStream:
    """A queue of work that runs in order in its own thread, while `gate` is set."""

    def __init__(self, device: SimulatedDevice, name: str, gate: threading.Event) -> None:
        self.device = device
        self._name = name
        self._gate = gate
        self._queue: SimpleQueue[tuple[Work, SimulatedTicket] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ended = False
        self._lock = threading.Lock()

    def run(self, kernel: Callable[[], object]) -> CopyTicket:
        """Submit a kernel. The ticket is done when it has run, and carries its error."""
        return self.put(lambda _: kernel())

    def put(self, work: Work) -> SimulatedTicket:
        """Submit work that takes its ticket as argument, as `run` otherwise."""
        ticket = SimulatedTicket(self.device)
        with self._lock:
            if self._ended:
                raise UsageError("the device is closed")
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name=f"lorax-sim-{self._name}", daemon=True
                )
                self._thread.start()
            self._queue.put((work, ticket))
        return ticket

    def end(self) -> None:
        """Wait until all submitted work has run. Blocks. Idempotent."""
        with self._lock:
            if not self._ended:
                self._queue.put(None)
            self._ended = True
        if self._thread is not None:
            self._thread.join()

    def _serve(self) -> None:
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        """Run one work item. A separate function, so that an idle stream keeps no memory alive."""
        following = self._queue.get()
        if following is None:
            return False
        work, ticket = following
        self._gate.wait()
        try:
            work(ticket)
        except BaseException as error:  # noqa: BLE001 - set on the ticket
            ticket.set_exception(error)
        else:
            ticket.set_result(None)
        return True


class SimulatedDevice:
    """A device in host memory whose arena starts as poison and is filled asynchronously.

    `copy` poisons its target range at once. The copy stream reads the staged bytes only when the
    copy runs, writes them, and then the rows. Clearing a column poisons its extents. Submit compute
    by `SimulatedStream.run`: `compute` is the default stream, `stream` creates others.

    The first parameters are as for `CpuDevice`. The simulated link has `bytes_per_second` (None is
    infinite) and a latency of `seconds_per_copy`; `clock` counts its seconds, for which no thread
    sleeps. `delay` delays each copy by real seconds. The copy stream stops while `gate` is cleared;
    `close` sets it. `copies` counts those submitted; tickets fail when they run for those whose
    numbers, from 0, are in `failing`.
    """

    name = "simulated"
    alignment = 64
    rank_multiple = 8
    reads_files = False

    def __init__(
        self,
        layout: ModelLayout,
        *,
        dtype: str,
        nbytes: int,
        slots: int,
        bytes_per_second: float | None = None,
        seconds_per_copy: float = 0.0,
    ) -> None:
        self._memory = CpuDevice(layout, dtype=dtype, nbytes=nbytes, slots=slots)
        self._whole = Extent(0, nbytes)
        self._slots = range(slots)
        self._extents: list[set[Extent]] = [set() for _ in self._slots]
        self._seconds_per_byte = 1 / bytes_per_second if bytes_per_second else 0.0
        self._seconds_per_copy = seconds_per_copy
        self.gate = threading.Event()
        self.gate.set()
        self.delay = 0.0
        self.failing: set[int] = set()
        self.copies = 0
        self.clock = 0.0
        self._lost = False
        self._copying = SimulatedStream(self, "copy", self.gate)
        self._streams: list[SimulatedStream] = []
        self.compute = self.stream("compute")
        self._order = threading.Lock()

    def open(self) -> None:
        """Allocate as `Device.open`. Callable once."""
        self._memory.open()
        self._memory.host_view(self._whole).fill_(POISON)
        self.address = self._memory.address
        self.rank = self._memory.rank
        self.scale = self._memory.scale

    def stream(self, name: str) -> SimulatedStream:
        """Return a new stream for compute."""
        always = threading.Event()
        always.set()
        self._streams.append(SimulatedStream(self, name, always))
        return self._streams[-1]

    def staging_memory(self, nbytes: int) -> torch.Tensor:
        """Return pageable memory, whose pages are allocated at the first write."""
        return lazy_memory(nbytes)

    def host_view(self, extent: Extent) -> torch.Tensor:  # noqa: ARG002 - there is none
        raise UsageError("this device's arena is not host memory; copy staged bytes to it")

    def read(self, reader: Reader, moves: Sequence[ReadMove]) -> None:  # noqa: ARG002
        raise UsageError("this device cannot read files; copy staged bytes to it")

    def copy(
        self, piece: StagedPiece | None, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        if piece is None:
            raise UsageError("this device cannot read files; copy staged bytes to it")
        self._require_device()
        written = tuple(rows)

        def run(ticket: SimulatedTicket) -> None:
            time.sleep(self.delay)
            self._require_device()
            self.clock += self._seconds_per_copy + piece.memory.nbytes * self._seconds_per_byte
            ticket.finished_at = self.clock
            if number in self.failing:
                raise TransferError(f"copy {number} was told to fail")
            self._extents[slot].add(extent)
            self._memory.copy(piece, written, extent, slot)

        target = Extent(extent.offset + piece.target, piece.memory.nbytes)
        with self._order:  # copies are numbered in stream order
            self._memory.host_view(target).fill_(POISON)
            number = self.copies
            ticket = self._copying.put(run)
            self.copies += 1
        return ticket

    def lose(self) -> None:
        """Lose the device, like a GPU that fell off the bus: copies that have not run fail."""
        self._lost = True

    def _require_device(self) -> None:
        if self._lost:
            raise TransferError("the device is lost; restart the process", retryable=False)

    def wait_for(self, ticket: CopyTicket, stream: object | None = None) -> None:
        if not isinstance(ticket, SimulatedTicket) or ticket.device is not self:
            raise UsageError("the ticket belongs to another device")
        # Blocks the stream until the copy is done; does not raise.
        self._stream(stream).run(ticket.exception)

    def note_use(self, stream: object | None = None) -> CopyTicket:
        return self._stream(stream).run(lambda: None)

    def _stream(self, stream: object | None) -> SimulatedStream:
        if stream is None:
            return self.compute
        if not isinstance(stream, SimulatedStream) or stream.device is not self:
            raise UsageError("the stream belongs to another device; use this device's stream()")
        return stream

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        """Zero the extents in the copy stream. Clearing the column later poisons them again."""
        wiped = tuple(extents)
        return self._copying.run(lambda: self._memory.wipe(wiped))

    def clear_column(self, slot: int) -> None:
        """Clear the column in the copy stream, after the copies submitted before."""
        index = self._slots[slot]  # raises here, because errors in the stream are not seen

        def clear() -> None:
            for extent in self._extents[index]:
                self._memory.host_view(extent).fill_(POISON)
            self._extents[index] = set()
            self._memory.clear_column(index)

        self._copying.run(clear)

    def operands(self, module: int, slot: int) -> Operands | None:
        """Return views into the arena, with what the copy stream has written."""
        return self._memory.operands(module, slot)

    def view(self, extent: Extent) -> torch.Tensor:
        """Return a view into the arena, with what the copy stream has written."""
        return self._memory.host_view(extent)

    def close(self) -> None:
        """Open the gate and wait for all streams to run their work, kernels included."""
        self.gate.set()
        for stream in (self._copying, *self._streams):
            stream.end()
        self._memory.close()
