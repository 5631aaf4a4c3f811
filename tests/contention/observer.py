"""Six adapters of uneven sizes, in versions, and a device that is watched from outside.

What is judged: what may be copied where, and when a slot may be cleared. It believes the calls at
the device's seam, the events that the loader tells, and what the test itself holds and runs; of the
loader's own state it knows nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from threading import Event, RLock

import torch
from safetensors.torch import load, save

import tiny
from lorax_async import events
from lorax_async.devices.base import CopyTicket, FilePieces, StagedPiece
from lorax_async.devices.simulated import SimulatedDevice
from lorax_async.events import Failed, LayerReady, Leaving, Resident, SlotGranted, SlotId
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.transfer_plan import TableRow
from lorax_async.types import AdapterKey
from wrapped_device import WrappedDevice

IDS = "abcdef"
DTYPE, RANK_MULTIPLE = torch.bfloat16, 8
LAYOUT = tiny.layout("BF16")
LAYERS = tuple(module.layer for module in LAYOUT.modules)

KINDS = (
    (8, torch.bfloat16),
    (16, torch.float32),
    (24, torch.float32),
    (12, torch.float16),
    (8, torch.float32),
    (24, torch.bfloat16),
)
"""Rank and dtype of the files: as the device has them, to be cast, to be cast and padded."""

LARGEST = 24 * (tiny.HIDDEN + 2 * tiny.HIDDEN) * DTYPE.itemsize * len(LAYERS)
"""Device bytes of an adapter of rank 24."""
LARGEST_FILE = 2 * LARGEST  # In float32, without its header

Weights = tuple[torch.Tensor, torch.Tensor, float]


@dataclass(frozen=True, slots=True)
class Made:
    """The files of one version; `weights` by module, as they must lie on the device: padded."""

    config: bytes
    content: bytes
    weights: Mapping[int, Weights]


@cache
def made(id: str, version: int) -> Made:
    """Each version has another rank and dtype than the one before."""
    number = IDS.index(id)
    rank, dtype = KINDS[(number + version) % len(KINDS)]
    content = save(tiny.tensors(number + 100 * version, rank, dtype))
    config = json.dumps(tiny.config(rank)).encode()
    return Made(config, content, _on_device(load(content), tiny.config(rank)))


def _on_device(saved: dict[str, torch.Tensor], config: dict[str, object]) -> dict[int, Weights]:
    """By PEFT's definition, with safetensors' reader and torch's cast."""
    rank, alpha = config["r"], config["lora_alpha"]
    assert isinstance(rank, int)
    assert isinstance(alpha, int)
    more = -rank % RANK_MULTIPLE
    found = {}
    for number, module in enumerate(LAYOUT.modules):
        a = saved[f"base_model.model.{module.name}.lora_A.weight"].to(DTYPE)
        b = saved[f"base_model.model.{module.name}.lora_B.weight"].to(DTYPE)
        a = torch.cat([a, torch.zeros(more, a.shape[1], dtype=DTYPE)])
        b = torch.cat([b, torch.zeros(b.shape[0], more, dtype=DTYPE)], dim=1)
        found[number] = (a, b, alpha / rank)
    return found


Cell = tuple[int, int, int, float]  # Where A and B are in the arena, padded rank, scale


@dataclass(slots=True, eq=False)
class Stay:
    """One adapter's time in a slot; `cells` are the rows that have been written, by module."""

    key: AdapterKey
    slot: SlotId
    nbytes: int
    extents: set[Extent] = field(default_factory=set)
    written: list[range] = field(default_factory=list)
    tickets: list[CopyTicket] = field(default_factory=list)
    asked: set[int] = field(default_factory=set)
    cells: dict[int, Cell] = field(default_factory=dict)
    kernels: int = 0
    resident: bool = False
    over: bool = False  # It is leaving, or failed: nobody is promised anything of it

    @property
    def copying(self) -> bool:
        return any(not ticket.done() for ticket in self.tickets)

    @property
    def spoiled(self) -> bool:
        """A copy failed."""
        return any(ticket.done() and ticket.exception() for ticket in self.tickets)


@dataclass(frozen=True, slots=True, eq=False)
class Flight:
    """A copy that was asked for; `content` is what its memory held then."""

    stay: Stay
    piece: StagedPiece
    content: torch.Tensor
    cells: Mapping[int, Cell]
    ticket: CopyTicket

    @property
    def memory(self) -> range:
        return _memory(self.piece.memory)


class ObservedDevice(WrappedDevice):
    """Collects, as `faults`, what was not right.

    `budgets` are sizes of the host memory that may be claimed; `expected` says what an adapter's
    modules must be, `leased` whether the test holds a handle on this stay.
    """

    def __init__(
        self,
        inner: SimulatedDevice,
        *,
        nbytes: int,
        budgets: list[int],
        expected: Callable[[AdapterKey], Mapping[int, Weights]],
        leased: Callable[[SlotId], bool],
    ) -> None:
        super().__init__(inner)
        self.simulated = inner
        self.faults: list[str] = []
        self.stays: dict[int, Stay] = {}
        self._arena = range(nbytes)
        self._budgets = budgets
        self._expected = expected
        self._leased = leased
        self._claimed: list[torch.Tensor] = []
        self._flights: list[Flight] = []
        self._base: int | None = None
        self._lock = RLock()

    def blame(self, holds: object, fault: str) -> None:
        if not holds:
            self.faults.append(fault)

    def heard(self, event: events.Event) -> None:
        """Every event, on the loop."""
        if event.slot is None:
            return
        with self._lock:
            if isinstance(event, SlotGranted):
                self._granted(event.key, event.slot, event.nbytes)
                return
            stay = self.stays.get(event.slot.index)
            if stay is None or stay.slot != event.slot or stay.key != event.key:
                self.faults.append(f"{type(event).__name__} of a slot that somebody else has")
            elif isinstance(event, LayerReady):
                self.check_weights(stay, event.layer)
            elif isinstance(event, Resident):
                stay.resident, stay.over = True, False
                self.check_weights(stay)
            elif isinstance(event, Leaving | Failed):
                stay.over = True

    def _granted(self, key: AdapterKey, slot: SlotId, nbytes: int) -> None:
        self.blame(slot.index not in self.stays, "a slot was granted before it was cleared")
        self.stays[slot.index] = Stay(key, slot, nbytes)
        taken = sum(stay.nbytes for stay in self.stays.values())
        self.blame(taken <= len(self._arena), "more was granted than the arena has")

    def check_weights(self, stay: Stay, layer: int = LAYERS[-1]) -> None:
        """The device has the right bytes of all layers up to this one."""
        for module, weights in self._expected(stay.key).items():
            if LAYERS[module] <= layer and not self.is_right(module, stay, weights):
                self.faults.append(f"wrong weights of module {module} in slot {stay.slot}")

    def is_right(self, module: int, stay: Stay, weights: Weights) -> bool:
        """Whether the tables name these weights, as a kernel would read them."""
        slot, device = stay.slot.index, self.simulated
        found = device.operands(module, slot)
        if found is None:
            return False
        (a, b, scale), (want_a, want_b, want_scale) = found, weights
        named = device.address[:, module, slot].tolist() == [a.data_ptr(), b.data_ptr()]
        shaped = int(device.rank[module, slot]) == want_a.shape[0] and scale == want_scale
        return named and shaped and torch.equal(a, want_a) and torch.equal(b, want_b)

    def staging_memory(self, nbytes: int) -> torch.Tensor:
        self.blame(nbytes in self._budgets, f"{nbytes} bytes of host memory are no budget")
        self.blame(len(self._claimed) < len(self._budgets), "host memory was claimed twice")
        self._claimed.append(super().staging_memory(nbytes))
        return self._claimed[-1]

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        with self._lock:
            stay = self.stays.get(slot)
            if stay is None or isinstance(pieces, FilePieces):
                self.faults.append("a copy of file pieces, or into a slot that nobody has")
                return super().copy(pieces, rows, extent, slot)
            self._judge(stay, pieces, rows, extent)
            content = pieces.memory.clone()
            ticket = super().copy(pieces, rows, extent, slot)
            stay.tickets.append(ticket)
            flight = Flight(stay, pieces, content, _cells(rows, extent), ticket)
            self._flights.append(flight)
            # First among those who hear of it, and before anything can be put behind the copy.
            ticket.add_done_callback(lambda _: self._landed(flight))
        return ticket

    def _judge(
        self, stay: Stay, piece: StagedPiece, rows: Sequence[TableRow], extent: Extent
    ) -> None:
        whole = range(extent.offset, extent.offset + extent.nbytes)
        part = range(whole.start + piece.target, whole.start + piece.target + piece.memory.nbytes)
        others = [each for each in self.stays.values() if each is not stay]
        self.blame(_inside(whole, self._arena) and _inside(part, whole), "outside the arena")
        theirs = [range(e.offset, e.offset + e.nbytes) for each in others for e in each.extents]
        mine = [range(e.offset, e.offset + e.nbytes) for e in stay.extents - {extent}]
        self.blame(not _meets(whole, theirs), "an extent of somebody else's")
        self.blame(not _meets(whole, mine), "extents of one adapter overlap")
        self.blame(not _meets(part, stay.written), "bytes are copied twice")
        self.blame(stay.asked.isdisjoint(row.module for row in rows), "rows are written twice")
        stay.extents.add(extent)
        stay.written.append(part)
        stay.asked.update(row.module for row in rows)
        taken = sum(each.nbytes for each in stay.extents)
        self.blame(taken <= stay.nbytes, "more bytes than were granted")
        self._judge_memory(_memory(piece.memory))

    def _judge_memory(self, memory: range) -> None:
        self._flights = [flight for flight in self._flights if not flight.ticket.done()]
        claimed = any(_inside(memory, _memory(each)) for each in self._claimed)
        self.blame(claimed, "a copy from memory that is no budget's")
        in_use = [flight.memory for flight in self._flights]
        self.blame(not _meets(memory, in_use), "host memory is used while a copy reads it")

    def _landed(self, flight: Flight) -> None:
        """Nothing that was asked for later has begun."""
        unchanged = torch.equal(flight.piece.memory, flight.content)
        self.blame(unchanged, "host memory was written to under a copy")
        if flight.ticket.exception() is not None:
            return
        stay = flight.stay
        stay.cells.update(flight.cells)
        if self._base is None and stay.cells:
            module, cell = next(iter(stay.cells.items()))
            self._base = int(self.simulated.address[0, module, stay.slot.index]) - cell[0]
        self.blame(self.column(stay.slot.index) == stay.cells, "rows of an earlier tenant")

    def column(self, slot: int) -> dict[int, Cell]:
        """What a kernel finds: the rows with a rank."""
        device = self.simulated
        a, b = (device.address[:, :, slot] - (self._base or 0)).tolist()
        ranks, scales = device.rank[:, slot].tolist(), device.scale[:, slot].tolist()
        cells = zip(a, b, ranks, scales, strict=True)
        return {n: cell for n, cell in enumerate(cells) if cell[2]}

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        with self._lock:
            for stay in self.stays.values():
                if not stay.extents.isdisjoint(extents):
                    self._blame_users(stay, "zeroed")
            return super().wipe(extents)

    def _blame_users(self, stay: Stay, deed: str) -> None:
        self.blame(not stay.copying, f"a slot was {deed} under a copy")
        self.blame(not stay.kernels, f"a slot was {deed} under a kernel")
        self.blame(not self._leased(stay.slot), f"a slot was {deed} under a lease")

    def clear_column(self, slot: int) -> None:
        with self._lock:
            stay = self.stays.pop(slot, None)
            if stay is None:
                self.faults.append("a slot that nobody has was cleared")
            else:
                self._blame_users(stay, "freed")
            super().clear_column(slot)

    def kernel(self, slot: SlotId, layer: int) -> Kernel:
        """One that reads all layers of a stay up to `layer`, from here on until it has run."""
        with self._lock:
            stay = self.stays[slot.index]
            stay.kernels += 1
        return Kernel(lambda: self._read(stay, layer))

    def _read(self, stay: Stay, layer: int) -> None:
        if not stay.spoiled:  # what it waited for may have failed
            self.check_weights(stay, layer)
        with self._lock:
            stay.kernels -= 1


class Kernel:
    """Runs when it is its turn on its stream and `go` is set."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.go = Event()
        self._work = work

    def __call__(self) -> None:
        self.go.wait(60)
        self._work()


def _cells(rows: Sequence[TableRow], extent: Extent) -> dict[int, Cell]:
    at = extent.offset
    return {
        module: (at + a, at + b, rank, torch.tensor(scale).item())
        for module, a, b, _, rank, scale in rows
    }


def _memory(tensor: torch.Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def _inside(inner: range, outer: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def _meets(one: range, others: Sequence[range]) -> bool:
    return any(one.start < other.stop and other.start < one.stop for other in others)


class _Complaints(logging.Handler):
    """What is logged as an error is one."""

    def __init__(self, blame: Callable[[object, str], None]) -> None:
        super().__init__(logging.ERROR)
        self._blame = blame

    def emit(self, record: logging.LogRecord) -> None:
        self._blame(False, self.format(record))


@contextmanager
def complaints(blame: Callable[[object, str], None]) -> Iterator[None]:
    """While the block lasts, what is logged or goes wrong in a callback is blamed on the play."""

    def complain(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        blame(False, str(context))

    asyncio.get_running_loop().set_exception_handler(complain)
    logger, handler = logging.getLogger("lorax_async"), _Complaints(blame)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
