"""The simulated device keeps to the port, and does as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from device_conformance import StagedDeviceConformance
from device_groups import (
    NEW,
    OLD,
    begin,
    extent,
    holds,
    is_of,
    is_poison,
    made_by,
    move,
    settle,
    staged,
    weights,
)

from lorax_async.errors import TransferError, UsageError
from lorax_async.testing import SimulatedDevice, SimulatedTicket

Made = Callable[..., SimulatedDevice]


@pytest.fixture
def new_device() -> Iterator[Made]:
    yield from made_by(SimulatedDevice)


@pytest.fixture
def device(new_device: Made) -> SimulatedDevice:
    device = new_device()
    device.open()
    return device


class TestSimulatedDevice(StagedDeviceConformance):
    pass


def test_what_was_never_written_is_poison(device: SimulatedDevice) -> None:
    device.copy(staged(device, bytes(64), 0), NEW.rows, extent(3), 0).result(10)
    assert is_poison(weights(device))


def test_a_list_of_rows_may_change_at_once(device: SimulatedDevice) -> None:
    device.gate.clear()
    rows = list(NEW.rows)
    ticket = device.copy(NEW.staged(device), rows, extent(0), 0)
    rows.clear()
    device.gate.set()
    ticket.result(10)
    holds(device, 0, NEW.weights)


def test_copies_that_are_told_to_fail(new_device: Made) -> None:
    device = new_device()
    device.open()
    device.failing = {1}
    move(device, OLD, extent(0), 0)
    there = weights(device)
    ticket = begin(device, NEW, extent(0), 1)
    with pytest.raises(TransferError, match="copy 1 was told to fail") as caught:
        ticket.result(10)
    assert caught.value.retryable
    holds(device, 1, {})
    assert is_poison(there)
    move(device, NEW, extent(0), 1)
    holds(device, 1, NEW.weights)
    assert device.copies == 3


def test_a_stream_goes_on_after_a_copy_that_failed(device: SimulatedDevice) -> None:
    device.failing = {0}
    ticket = begin(device, NEW, extent(0), 0)
    device.wait_for(ticket)
    assert device.note_use().result(10) is None
    assert isinstance(ticket.exception(), TransferError)


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


def test_the_clock_counts_what_the_link_took(new_device: Made) -> None:
    """At 1,000 bytes a second, and half a second for each copy; a failed one takes its time."""
    device = new_device(bytes_per_second=1000.0, seconds_per_copy=0.5)
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


def test_copies_are_late_by_the_delay(device: SimulatedDevice) -> None:
    device.delay = 0.05
    started = time.monotonic()
    tickets = [begin(device, NEW, extent(n), n) for n in range(2)]
    assert not tickets[0].done()
    tickets[1].result(10)
    assert time.monotonic() - started >= 0.1


def test_a_kernels_error_is_its_tickets(device: SimulatedDevice) -> None:
    def fail() -> None:
        raise ZeroDivisionError("in the kernel")

    with pytest.raises(ZeroDivisionError, match="in the kernel"):
        device.compute.run(fail).result(10)
    assert device.note_use().result(10) is None


def test_tickets_cannot_be_cancelled(device: SimulatedDevice) -> None:
    device.gate.clear()
    ticket = begin(device, NEW, extent(0), 0)
    assert not ticket.cancel()
    device.gate.set()
    ticket.result(10)
    holds(device, 0, NEW.weights)


def test_streams_of_others(device: SimulatedDevice, new_device: Made) -> None:
    for stream in (new_device().compute, object()):
        with pytest.raises(UsageError, match="a stream of another device"):
            device.note_use(stream)


def threads() -> int:
    return sum(thread.name.startswith("lorax-sim-") for thread in threading.enumerate())


def test_closing_opens_the_gate_and_ends_the_threads(device: SimulatedDevice) -> None:
    before = threads()
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


def test_a_closed_device_takes_no_work(device: SimulatedDevice) -> None:
    piece = NEW.staged(device)
    device.close()
    for asked in (
        lambda: device.copy(piece, (), extent(0), 0),
        lambda: device.clear_column(0),
        device.note_use,
        lambda: device.compute.run(lambda: None),
    ):
        with pytest.raises(UsageError, match="the device is closed"):
            asked()
