"""The devices in host memory: the CPU's, and the gated and simulated ones of tests."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from device_conformance import FileDeviceConformance, StagedDeviceConformance
from device_groups import (
    ARENA,
    EXTENT,
    LAYOUT,
    NEW,
    OLD,
    SLOTS,
    START,
    TabledDevice,
    begin,
    extent,
    group,
    holds,
    is_of,
    is_poison,
    made_by,
    move,
    settle,
    staged,
    weights,
)

from lorax_async.core.arena import Extent
from lorax_async.errors import CapacityError, TransferError, UsageError
from lorax_async.io.devices import cpu
from lorax_async.io.devices.cpu import CpuDevice
from lorax_async.io.devices.gated import GatedDevice
from lorax_async.io.ports import CopyTicket
from lorax_async.testing import SimulatedDevice, SimulatedTicket

Made = Callable[..., CpuDevice]

Simulated = Callable[..., SimulatedDevice]


class TestCpuDevice(FileDeviceConformance):
    @pytest.fixture
    def new_device(self) -> Iterator[Made]:
        yield from made_by(CpuDevice)


class TestGatedDevice(FileDeviceConformance):
    @pytest.fixture
    def new_device(self) -> Iterator[Made]:
        yield from made_by(GatedDevice)


class TestSimulatedDevice(StagedDeviceConformance):
    @pytest.fixture
    def new_device(self) -> Iterator[Simulated]:
        yield from made_by(SimulatedDevice)


@pytest.fixture
def new_device() -> Iterator[Made]:
    yield from made_by(CpuDevice)


@pytest.fixture
def new_simulated() -> Iterator[Simulated]:
    yield from made_by(SimulatedDevice)


@pytest.fixture
def device(new_simulated: Simulated) -> SimulatedDevice:
    device = new_simulated()
    device.open()
    return device


def test_staged_bytes_are_copied_too(new_device: Made) -> None:
    device, made = new_device(), group(1, [0, 2])
    device.open()
    assert device.copy(made.staged(device), made.rows, extent(1), 1).done()
    holds(device, 1, made.weights)
    with pytest.raises(RuntimeError, match="size"):  # it ends beyond the arena
        device.copy(made.staged(device), made.rows, Extent(ARENA - START, EXTENT), 0)
    holds(device, 0, {})


class Watched:
    """A rank that looks at the row at the moment it is written."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def __index__(self) -> int:
        self._look()
        return 8


def test_the_rank_is_written_last(new_device: Made) -> None:
    """Whoever reads a rank that is not 0 reads a complete row."""
    device, made = new_device(), group(1, [2])
    device.open()
    seen: list[tuple[list[int], float, int]] = []

    def look() -> None:
        row = device.address[:, 2, 1].tolist()
        seen.append((row, float(device.scale[2, 1]), int(device.rank[2, 1])))

    watched = made.rows[0]._replace(padded_rank=Watched(look))  # type: ignore[arg-type]
    device.copy(made.file_pieces(), [watched], extent(0), 1).result(10)
    (row,) = made.rows
    base = device.host_view(extent(0)).data_ptr()
    assert seen == [([base + row.a, base + row.b], float(torch.tensor(row.scale)), 0)]
    assert device.rank[2, 1] == 8


def test_an_older_kernel_will_do_and_pages_that_cannot_be_had_are_an_error(
    new_device: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OldKernel(mmap.mmap):
        """Does not know huge pages."""

        def madvise(self, *advice: int) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    device, made = new_device(), group(1, [0])
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "madvise", lambda *_: errno.ENOMEM)
        with pytest.raises(CapacityError, match="lower device_bytes"):
            device.open()
    monkeypatch.setattr(mmap, "mmap", OldKernel)
    monkeypatch.setattr(cpu, "madvise", lambda *_: errno.EINVAL)
    device.open()
    move(device, made, extent(0), 0)
    holds(device, 0, made.weights)


STACKS = 128 << 20
"""Address space that threads leave behind: the C library keeps an ended one's stack and heap."""


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@pytest.mark.parametrize("kind", [CpuDevice, SimulatedDevice])
def test_a_closed_arena_is_given_back(kind: Callable[..., TabledDevice]) -> None:
    size = 256 << 20
    before = address_space()
    device = kind(LAYOUT, dtype="F32", nbytes=size, slots=SLOTS)
    device.open()
    move(device, group(1, [0]), extent(0), 0)
    view = device.operands(0, 0)
    assert address_space() - before > 0.9 * size
    device.close()
    assert address_space() - before > 0.9 * size, "a view is still held"
    del view
    assert address_space() - before < 0.1 * size + STACKS


# -- the simulated device: what it is told, and what it shows of a wait that is missing ----------


def test_what_was_never_written_is_poison_and_rows_are_taken_at_once(
    device: SimulatedDevice,
) -> None:
    device.copy(staged(device, bytes(64), 0), NEW.rows, extent(3), 0).result(10)
    assert is_poison(weights(device))
    device.gate.clear()
    rows, asked = list(NEW.rows), [extent(3)]
    tickets = [device.copy(NEW.staged(device), rows, extent(0), 1), device.wipe(asked)]
    rows.clear()
    asked.clear()
    assert not any(ticket.cancel() or ticket.done() for ticket in tickets)
    assert device.view(extent(3)).any()
    device.gate.set()
    for ticket in tickets:
        ticket.result(10)
    holds(device, 1, NEW.weights)
    assert not device.view(extent(3)).any()


def test_copies_that_are_told_to_fail(device: SimulatedDevice) -> None:
    device.failing = {1}
    move(device, OLD, extent(0), 0)
    there = weights(device)
    ticket = begin(device, NEW, extent(0), 1)
    device.wait_for(ticket)
    assert device.note_use().result(10) is None, "the stream goes on"
    with pytest.raises(TransferError, match="copy 1 was told to fail") as caught:
        ticket.result(10)
    assert caught.value.retryable
    holds(device, 1, {})
    assert is_poison(there)
    move(device, NEW, extent(0), 1)
    holds(device, 1, NEW.weights)
    assert device.copies == 3


def test_a_lost_device(device: SimulatedDevice) -> None:
    move(device, OLD, extent(0), 0)
    device.gate.clear()
    waiting = [begin(device, NEW, extent(1 + n), 1) for n in range(3)]
    device.lose()
    device.gate.set()
    for ticket in waiting:
        with pytest.raises(TransferError, match="lost") as caught:
            ticket.result(10)
        assert not caught.value.retryable
    with pytest.raises(TransferError, match="lost"):
        begin(device, NEW, extent(0), 0)
    holds(device, 1, {})
    assert is_of(OLD, weights(device)), "nobody touched it"


def test_the_clock_counts_what_the_link_took(new_simulated: Simulated) -> None:
    """At 1,000 bytes a second, and half a second for each copy; a failed one takes its time."""
    device = new_simulated(bytes_per_second=1000.0, seconds_per_copy=0.5)
    device.open()
    device.failing = {1}
    sizes = (250, 1000, 2000)
    started = time.monotonic()
    tickets = [device.copy(staged(device, bytes(n), 0), (), extent(0), 0) for n in sizes]
    settle(device)
    assert device.clock == pytest.approx(4.75 + 0.5 + 0.064)
    assert time.monotonic() - started < 4, "nothing sleeps for it"
    tickets.append(device.note_use())
    tickets[-1].result(10)
    times = [ticket.finished_at for ticket in tickets if isinstance(ticket, SimulatedTicket)]
    assert times == [0.75, 2.25, 4.75, None]


def test_a_kernels_error_is_its_tickets(device: SimulatedDevice, new_simulated: Simulated) -> None:
    def fail() -> None:
        raise ZeroDivisionError("in the kernel")

    with pytest.raises(ZeroDivisionError, match="in the kernel"):
        device.compute.run(fail).result(10)
    assert device.note_use().result(10) is None
    for stream in (new_simulated().compute, object()):
        with pytest.raises(UsageError, match="a stream of another device"):
            device.note_use(stream)


def test_closing_opens_the_gate_and_ends_the_threads(device: SimulatedDevice) -> None:
    def threads() -> int:
        return sum(thread.name.startswith("lorax-sim-") for thread in threading.enumerate())

    before, piece = threads(), NEW.staged(device)
    device.gate.clear()
    ticket = begin(device, NEW, extent(0), 0)
    other = device.stream("other")
    device.wait_for(ticket, other)
    used = [device.note_use(other), device.note_use()]
    assert threads() == before + 3
    device.close()
    assert threads() == before
    assert ticket.result(0) is None
    assert all(use.done() for use in used)
    device.close()
    for ask in (
        lambda: device.copy(piece, (), extent(0), 0),
        lambda: device.clear_column(0),
        lambda: device.wipe([extent(0)]),
        device.note_use,
        lambda: device.compute.run(lambda: None),
    ):
        with pytest.raises(UsageError, match="the device is closed"):
            ask()


@pytest.mark.parametrize("waits", [True, False])
def test_a_kernel_that_does_not_wait_reads_poison(device: SimulatedDevice, waits: bool) -> None:
    """Not the old bytes, which would do no harm, and not the new ones. It overtakes the copy."""
    move(device, OLD, extent(0), 0)
    there, seen = weights(device), list[torch.Tensor]()
    device.gate.clear()
    ticket = begin(device, NEW, extent(0), 0)
    if waits:
        device.wait_for(ticket)
    kernel = device.compute.run(lambda: seen.append(there.clone()))
    if waits:
        with pytest.raises(TimeoutError):
            kernel.result(0.03)
    else:
        kernel.result(10)
        assert not ticket.done()
    device.gate.set()
    kernel.result(10)
    assert is_poison(seen[0]) != waits
    assert is_of(NEW, seen[0]) == waits


@pytest.mark.parametrize("waits", [True, False])
def test_an_extent_that_is_given_away_under_a_kernel(device: SimulatedDevice, waits: bool) -> None:
    move(device, OLD, extent(0), 0)
    there, seen, may_read = weights(device), list[torch.Tensor](), threading.Event()

    def kernel() -> None:
        may_read.wait(10)
        seen.append(there.clone())

    device.compute.run(kernel)
    used = device.note_use()
    if waits:
        may_read.set()
        used.result(10)
    device.clear_column(0)
    move(device, NEW, extent(0), 1)
    may_read.set()
    used.result(10)
    assert is_of(OLD if waits else NEW, seen[0])


def test_bytes_come_before_rows_and_rows_before_the_ticket(device: SimulatedDevice) -> None:
    move(device, OLD, extent(0), 0)
    there, seen, tickets = weights(device), list[tuple[bool, bool]](), list[CopyTicket]()
    device.gate.clear()

    def look() -> None:
        seen.append((is_of(NEW, there), tickets[0].done()))

    watched = NEW.rows[0]._replace(padded_rank=Watched(look))  # type: ignore[arg-type]
    tickets.append(device.copy(NEW.staged(device), [watched], extent(0), 1))
    device.gate.set()
    tickets[0].result(10)
    assert seen == [(True, False)]


def test_a_wait_holds_up_its_own_stream_alone(device: SimulatedDevice) -> None:
    """And a use ends after the kernels before it."""
    other, running = device.stream("other"), threading.Event()
    device.gate.clear()
    ticket = begin(device, NEW, extent(0), 0)
    device.wait_for(ticket, other)
    behind, beside = device.note_use(other), device.note_use()
    beside.result(10)
    kernel = device.compute.run(lambda: running.wait(10))
    used = device.note_use()
    with pytest.raises(TimeoutError):
        used.result(0.05)
    running.set()
    used.result(10)
    assert kernel.done()
    assert not behind.done()
    device.gate.set()
    behind.result(10)
    assert ticket.done()


def test_columns_are_cleared_in_their_turn_and_weights_with_them(device: SimulatedDevice) -> None:
    move(device, OLD, extent(0), 0)
    there = weights(device)
    device.gate.clear()
    device.clear_column(0)
    holds(device, 0, OLD.weights)
    device.gate.set()
    settle(device)
    holds(device, 0, {})
    assert is_poison(there), "a kernel that still runs must show it"
    with pytest.raises(IndexError):
        device.clear_column(3)
