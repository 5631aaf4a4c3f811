"""A device with real asynchrony and no GPU: a missing wait shows as wrong bytes.

For the tests of whoever builds on the loader. Copies run in a thread, in order, and as late as
told; kernels are Python calls put on streams.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue

import torch

from lorax_async.devices.base import CopyTicket, FilePieces, StagedPiece
from lorax_async.devices.cpu import CpuDevice, Operands, lazy_memory
from lorax_async.errors import TransferError, UsageError
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.transfer_plan import TableRow

POISON = 0x7E
"""Memory full of it is huge in F32 and BF16 and NaN in F16: whoever computes with it shows it."""


class GatedDevice(CpuDevice):
    """As `CpuDevice`, with an arena that starts as poison.

    Attributes
    ----------
    gate
        Copies wait until it is set; it is at first.
    failing
        Numbers of copies, counted from 0, that raise instead.
    copies
        Copies begun so far.
    """

    name = "gated"

    def __init__(self, layout: ModelLayout, *, dtype: str, nbytes: int, slots: int) -> None:
        super().__init__(layout, dtype=dtype, nbytes=nbytes, slots=slots)
        self.gate = threading.Event()
        self.gate.set()
        self.failing: set[int] = set()
        self.copies = 0
        self._count = threading.Lock()

    def open(self) -> None:
        super().open()
        self._arena.fill_(POISON)

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        with self._count:
            number = self.copies
            self.copies += 1
        self.gate.wait()
        if number in self.failing:
            raise TransferError(f"copy {number} was told to fail")
        return super().copy(pieces, rows, extent, slot)


class SimulatedTicket(Future[None]):
    """Cannot be cancelled: what was put on a stream runs.

    Attributes
    ----------
    finished_at
        When a copy ended, on the device's clock, in simulated seconds; None for all else.
    """

    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self.device = device
        self.finished_at: float | None = None
        self.set_running_or_notify_cancel()


Work = Callable[[SimulatedTicket], object]


class SimulatedStream:
    """What is put on it runs one after the other, in a thread of its own; `gate` can hold it up."""

    def __init__(self, device: SimulatedDevice, name: str, gate: threading.Event) -> None:
        self.device = device
        self._name = name
        self._gate = gate
        self._queue: SimpleQueue[tuple[Work, SimulatedTicket] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ended = False
        self._lock = threading.Lock()

    def run(self, kernel: Callable[[], object]) -> CopyTicket:
        """Put a kernel on the stream. The ticket is done when it has run, and has its error."""
        return self.put(lambda _: kernel())

    def put(self, work: Work) -> SimulatedTicket:
        """As `run`, for work that is given its ticket."""
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
        """Wait until all that was put has run. Blocks. Idempotent."""
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
        """In its own function, so that an idle stream keeps no memory of its last work."""
        following = self._queue.get()
        if following is None:
            return False
        work, ticket = following
        self._gate.wait()
        try:
            work(ticket)
        except BaseException as error:  # noqa: BLE001 - it is the ticket's
            ticket.set_exception(error)
        else:
            ticket.set_result(None)
        return True


class SimulatedDevice:
    """An arena of poison in host memory, and a copy stream that fills it in its own time.

    `copy` poisons the range that it will write, at once; the copy stream reads the staged bytes
    only when it gets there, writes them, and then the rows. The extents of a cleared column become
    poison, too. Compute is what `SimulatedStream.run` is given; `compute` is the stream that None
    stands for, `stream` makes more.

    Parameters
    ----------
    layout, dtype, nbytes, slots
        As for `CpuDevice`.
    bytes_per_second
        Of the simulated link; None is infinitely fast.
    seconds_per_copy
        What the link takes for any copy besides its bytes.

    Attributes
    ----------
    gate
        The copy stream stands still while it is cleared; it is set at first, and by `close`.
    delay
        Real seconds by which each copy is late.
    failing
        Numbers of copies, counted from 0, whose tickets fail, after their time.
    copies
        Copies asked for so far.
    clock
        Simulated seconds that the link has worked. Nothing sleeps for them.
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
        """As `CpuDevice`: once."""
        self._memory.open()
        self._memory.host_view(self._whole).fill_(POISON)
        self.address = self._memory.address
        self.rank = self._memory.rank
        self.scale = self._memory.scale

    def stream(self, name: str) -> SimulatedStream:
        """A new stream for compute."""
        always = threading.Event()
        always.set()
        self._streams.append(SimulatedStream(self, name, always))
        return self._streams[-1]

    def staging_memory(self, nbytes: int) -> torch.Tensor:
        """As the port has it; a page of it is claimed when it is first written to."""
        return lazy_memory(nbytes)

    def host_view(self, extent: Extent) -> torch.Tensor:  # noqa: ARG002 - there is none
        raise UsageError("this device's arena is not host memory; copy staged bytes to it")

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        if isinstance(pieces, FilePieces):
            raise UsageError("this device cannot read files; copy staged bytes to it")
        self._require_device()
        written, kept = tuple(rows), pieces
        target = Extent(extent.offset + pieces.target, pieces.memory.nbytes)
        with self._order:  # the number of a copy is its place in the stream
            self._memory.host_view(target).fill_(POISON)
            number = self.copies
            ticket = self._copying.put(
                lambda ticket: self._copy(ticket, number, kept, written, extent, slot)
            )
            self.copies += 1
        return ticket

    def _copy(
        self,
        ticket: SimulatedTicket,
        number: int,
        piece: StagedPiece,
        rows: Sequence[TableRow],
        extent: Extent,
        slot: int,
    ) -> None:
        time.sleep(self.delay)
        self._require_device()
        self.clock += self._seconds_per_copy + piece.memory.nbytes * self._seconds_per_byte
        ticket.finished_at = self.clock
        if number in self.failing:
            raise TransferError(f"copy {number} was told to fail")
        self._extents[slot].add(extent)
        self._memory.copy(piece, rows, extent, slot)

    def lose(self) -> None:
        """Every copy that has not run fails from here on, for good, as on a GPU that fell off."""
        self._lost = True

    def _require_device(self) -> None:
        if self._lost:
            raise TransferError("the device is lost; restart the process", retryable=False)

    def wait_for(self, ticket: CopyTicket, stream: object | None = None) -> None:
        if not isinstance(ticket, SimulatedTicket) or ticket.device is not self:
            raise UsageError("a ticket of another device")
        self._stream(stream).run(ticket.exception)  # blocks until it is done, and raises nothing

    def note_use(self, stream: object | None = None) -> CopyTicket:
        return self._stream(stream).run(lambda: None)

    def _stream(self, stream: object | None) -> SimulatedStream:
        if stream is None:
            return self.compute
        if not isinstance(stream, SimulatedStream) or stream.device is not self:
            raise UsageError("a stream of another device; ask this one's stream() for one")
        return stream

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        """In the copy stream; what is cleared afterwards is poison again."""
        wiped = tuple(extents)
        return self._copying.run(lambda: self._memory.wipe(wiped))

    def clear_column(self, slot: int) -> None:
        """In the copy stream, after the copies that were asked for before."""
        index = self._slots[slot]  # raises here, for nobody looks at what the stream raises
        self._copying.run(lambda: self._clear(index))

    def _clear(self, slot: int) -> None:
        for extent in self._extents[slot]:
            self._memory.host_view(extent).fill_(POISON)
        self._extents[slot] = set()
        self._memory.clear_column(slot)

    def operands(self, module: int, slot: int) -> Operands | None:
        """Views into the arena, as of what the copy stream has done."""
        return self._memory.operands(module, slot)

    def view(self, extent: Extent) -> torch.Tensor:
        """A view into the arena, as of what the copy stream has done."""
        return self._memory.host_view(extent)

    def close(self) -> None:
        """Opens the gate and waits for all streams: what was put on them runs, kernels included."""
        self.gate.set()
        for stream in (self._copying, *self._streams):
            stream.end()
        self._memory.close()
