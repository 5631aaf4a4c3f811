"""Six adapters in several versions, and a device that checks calls against events and leases."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from threading import Event, RLock

import tiny
import torch
from hypothesis import HealthCheck, settings
from safetensors.torch import load, save
from torch.nn.functional import pad

from lorax_async import events
from lorax_async.devices.base import CopyTicket, StagedPiece
from lorax_async.devices.simulated import SimulatedDevice
from lorax_async.events import Failed, LayerReady, Leaving, Resident, SlotGranted, SlotId
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.transfer_plan import TableRow
from lorax_async.types import AdapterKey

IDS = "abcdef"
DTYPE, RANK_MULTIPLE = torch.bfloat16, 8
LAYOUT = tiny.layout("BF16")
LAYERS = tuple(module.layer for module in LAYOUT.modules)

RANKS = (8, 16, 24, 12, 8, 24)
DTYPES = (DTYPE, torch.float32, torch.float32, torch.float16, torch.float32, DTYPE)
"""Of the files: as the device has them, to be cast, to be cast and padded."""

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
    """Each version has another rank and dtype than the one before.

    The weights are those of PEFT's definition, with safetensors' reader and torch's cast.
    """
    number = IDS.index(id)
    kind = (number + version) % len(RANKS)
    rank, config = RANKS[kind], tiny.config(RANKS[kind])
    content = save(tiny.tensors(number + 100 * version, rank, DTYPES[kind]))
    saved, weights, more = load(content), dict[int, Weights](), -rank % RANK_MULTIPLE
    for n, module in enumerate(LAYOUT.modules):
        name = f"base_model.model.{module.name}"
        a, b = (saved[f"{name}.lora_{part}.weight"].to(DTYPE) for part in "AB")
        weights[n] = pad(a, (0, 0, 0, more)), pad(b, (0, more)), 8 / rank  # alpha is 8
    return Made(json.dumps(config).encode(), content, weights)


Cell = tuple[int, int, int, float]  # Where A and B are in the arena, padded rank, scale


@dataclass(slots=True, eq=False)
class Stay:
    """One adapter's occupancy of a slot; `cells` are the rows written so far, by module."""

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
    over: bool = False  # it is leaving, or failed: no handle may rely on it


class ObservedDevice(SimulatedDevice):
    """Collects, as `faults`, what was not right.

    `budgets` are sizes of the host memory that may be claimed; `expected` says what an adapter's
    modules must be, `leased` whether the test holds a handle on this stay.
    """

    def __init__(
        self,
        *,
        nbytes: int,
        slots: int,
        budgets: list[int],
        expected: Callable[[AdapterKey], Mapping[int, Weights]],
        leased: Callable[[SlotId], bool],
    ) -> None:
        super().__init__(LAYOUT, dtype="BF16", nbytes=nbytes, slots=slots)
        self.faults: list[str] = []
        self.stays: dict[int, Stay] = {}
        self._arena = range(nbytes)
        self._budgets, self._expected, self._leased = budgets, expected, leased
        self._claimed: list[torch.Tensor] = []
        self._flights: list[tuple[CopyTicket, range]] = []  # and the memory that each reads
        self._base: int | None = None
        self._lock = RLock()

    def blame(self, holds: object, fault: str) -> None:
        if not holds:
            self.faults.append(fault)

    def require_no_faults(self) -> None:
        assert not self.faults, self.faults[:5]

    def heard(self, event: events.Event) -> None:
        """Record an event. On the loop."""
        if event.slot is None:
            return
        with self._lock:
            stay = self.stays.get(event.slot.index)
            if isinstance(event, SlotGranted):
                self.blame(stay is None, "a slot was granted before it was cleared")
                self.stays[event.slot.index] = Stay(event.key, event.slot, event.nbytes)
                taken = sum(stay.nbytes for stay in self.stays.values())
                self.blame(taken <= len(self._arena), "more was granted than the arena has")
            elif isinstance(event, events.SlotFreed):
                self.blame(stay is None, "a slot was freed before it was cleared")
            elif stay is None or (stay.slot, stay.key) != (event.slot, event.key):
                self.blame(False, f"{type(event).__name__} of a slot that another adapter has")
            elif isinstance(event, LayerReady):
                self.check_weights(stay, event.layer)
            elif isinstance(event, Resident):
                stay.resident, stay.over = True, False
                self.check_weights(stay)
            elif isinstance(event, Leaving | Failed):
                stay.over = True

    def check_weights(self, stay: Stay, layer: int = LAYERS[-1]) -> None:
        """Check that the device has the right bytes of all layers up to this one."""
        for module, weights in self._expected(stay.key).items():
            right = LAYERS[module] > layer or self._is_right(module, stay, weights)
            self.blame(right, f"wrong weights of module {module} in slot {stay.slot}")

    def _is_right(self, module: int, stay: Stay, weights: Weights) -> bool:
        """Return whether a kernel would read these weights through the tables."""
        slot = stay.slot.index
        found = self.operands(module, slot)
        if found is None:
            return False
        (a, b, scale), (want_a, want_b, want_scale) = found, weights
        named = self.address[:, module, slot].tolist() == [a.data_ptr(), b.data_ptr()]
        shaped = int(self.rank[module, slot]) == want_a.shape[0] and scale == want_scale
        return named and shaped and torch.equal(a, want_a) and torch.equal(b, want_b)

    def staging_memory(self, nbytes: int) -> torch.Tensor:
        self.blame(nbytes in self._budgets, f"{nbytes} bytes of host memory are not a budget")
        self.blame(len(self._claimed) < len(self._budgets), "host memory was claimed twice")
        self._claimed.append(super().staging_memory(nbytes))
        return self._claimed[-1]

    def copy(
        self, piece: StagedPiece | None, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        with self._lock:
            stay = self.stays.get(slot)
            if stay is None or piece is None:
                self.blame(False, "a copy of rows alone, or into an empty slot")
                return super().copy(piece, rows, extent, slot)
            self._judge(stay, piece, rows, extent)
            memory, content, cells = piece.memory, piece.memory.clone(), _cells(rows, extent)
            ticket = super().copy(piece, rows, extent, slot)
            stay.tickets.append(ticket)
            self._flights.append((ticket, _range_of(memory)))

            def landed(ticket: CopyTicket) -> None:
                """Check the copy's bytes, before any later request begins."""
                self.blame(torch.equal(memory, content), "memory was written to under a copy")
                if ticket.exception() is None:
                    self._landed(stay, cells)

            # First among those who hear of it, and before anything can be put behind the copy.
            ticket.add_done_callback(landed)
        return ticket

    def _judge(
        self, stay: Stay, piece: StagedPiece, rows: Sequence[TableRow], extent: Extent
    ) -> None:
        whole = _bytes_of(extent)
        part = range(whole.start + piece.target, whole.start + piece.target + piece.memory.nbytes)
        others = [each for each in self.stays.values() if each is not stay]
        self.blame(_inside(whole, self._arena) and _inside(part, whole), "outside the arena")
        theirs = [_bytes_of(extent) for each in others for extent in each.extents]
        mine = [_bytes_of(each) for each in stay.extents - {extent}]
        self.blame(not _meets(whole, theirs), "another adapter's extent")
        self.blame(not _meets(whole, mine), "extents of one adapter overlap")
        self.blame(not _meets(part, stay.written), "bytes are copied twice")
        self.blame(stay.asked.isdisjoint(row.module for row in rows), "rows are written twice")
        stay.extents.add(extent)
        stay.written.append(part)
        stay.asked.update(row.module for row in rows)
        taken = sum(each.nbytes for each in stay.extents)
        self.blame(taken <= stay.nbytes, "more bytes than were granted")
        memory = _range_of(piece.memory)
        claimed = any(_inside(memory, _range_of(each)) for each in self._claimed)
        self.blame(claimed, "a copy from memory outside the budgets")
        self._flights = [flight for flight in self._flights if not flight[0].done()]
        in_use = [memory for _, memory in self._flights]
        self.blame(not _meets(memory, in_use), "host memory is used while a copy reads it")

    def _landed(self, stay: Stay, cells: Mapping[int, Cell]) -> None:
        stay.cells.update(cells)
        if self._base is None and stay.cells:
            module, cell = next(iter(stay.cells.items()))
            self._base = int(self.address[0, module, stay.slot.index]) - cell[0]
        self.blame(self.column(stay.slot.index) == stay.cells, "rows of an earlier tenant")

    def column(self, slot: int) -> dict[int, Cell]:
        """Return the rows with a rank, as a kernel finds them."""
        a, b = (self.address[:, :, slot] - (self._base or 0)).tolist()
        cells = zip(a, b, self.rank[:, slot].tolist(), self.scale[:, slot].tolist(), strict=True)
        return {n: cell for n, cell in enumerate(cells) if cell[2]}

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        with self._lock:
            for stay in self.stays.values():
                if not stay.extents.isdisjoint(extents):
                    self._blame_users(stay, "zeroed")
            return super().wipe(extents)

    def _blame_users(self, stay: Stay, deed: str) -> None:
        copying = any(not ticket.done() for ticket in stay.tickets)
        self.blame(not copying, f"a slot was {deed} under a copy")
        self.blame(not stay.kernels, f"a slot was {deed} under a kernel")
        self.blame(not self._leased(stay.slot), f"a slot was {deed} under a lease")

    def clear_column(self, slot: int) -> None:
        with self._lock:
            stay = self.stays.pop(slot, None)
            self.blame(stay is not None, "an empty slot was cleared")
            if stay is not None:
                self._blame_users(stay, "freed")
            super().clear_column(slot)

    def kernel(self, slot: SlotId, layer: int) -> Kernel:
        """Return a kernel that reads all layers of an occupancy up to `layer`."""
        with self._lock:
            stay = self.stays[slot.index]
            stay.kernels += 1
        return Kernel(lambda: self._read(stay, layer))

    def _read(self, stay: Stay, layer: int) -> None:
        if not any(ticket.done() and ticket.exception() for ticket in stay.tickets):
            self.check_weights(stay, layer)
        with self._lock:
            stay.kernels -= 1


class Kernel:
    """A kernel that runs in the order of its stream, once `go` is set."""

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


def _bytes_of(extent: Extent) -> range:
    return range(extent.offset, extent.offset + extent.nbytes)


def _range_of(tensor: torch.Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


def _inside(inner: range, outer: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def _meets(one: range, others: Sequence[range]) -> bool:
    return any(one.start < other.stop and other.start < one.stop for other in others)


CHECKS = list(HealthCheck)
QUICK = settings(derandomize=True, database=None, deadline=None, suppress_health_check=CHECKS)


@contextmanager
def complaints(blame: Callable[[object, str], None]) -> Iterator[None]:
    """Report what is logged, or raised in a callback, during the block as a fault."""
    asyncio.get_running_loop().set_exception_handler(lambda _, context: blame(False, str(context)))
    logger, handler = logging.getLogger("lorax_async"), logging.Handler(logging.ERROR)
    handler.emit = lambda record: blame(False, handler.format(record))  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
