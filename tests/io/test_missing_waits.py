"""The simulated device's order: whoever forgets to wait for something gets wrong bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
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
    weights,
)

from lorax_async.io.ports import CopyTicket
from lorax_async.testing import SimulatedDevice
from lorax_kernels import Plan, apply

Made = Callable[..., SimulatedDevice]


@pytest.fixture
def new_device() -> Iterator[Made]:
    yield from made_by(SimulatedDevice)


@pytest.fixture
def device(new_device: Made) -> SimulatedDevice:
    device = new_device()
    device.open()
    return device


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
def test_kernels_find_the_tables_as_the_copies_left_them(
    device: SimulatedDevice, waits: bool
) -> None:
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    y, plan = torch.zeros(5, 40), Plan.from_segments([0, 5], [1])
    device.gate.clear()
    ticket = begin(device, NEW, extent(2), 1)
    if waits:
        device.wait_for(ticket)
    kernel = device.compute.run(lambda: apply(y, x, plan, 0, device))
    if waits:
        with pytest.raises(TimeoutError):
            kernel.result(0.03)
    else:
        kernel.result(10)
    device.gate.set()
    kernel.result(10)
    a, b, scale = NEW.weights[0]
    expected = scale * (x.double() @ a.double().T) @ b.double().T
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5) == waits


@pytest.mark.parametrize("waits", [True, False])
def test_staging_memory_that_is_used_too_early(device: SimulatedDevice, waits: bool) -> None:
    device.gate.clear()
    piece = OLD.staged(device)
    ticket = device.copy(piece, OLD.rows, extent(0), 0)
    if waits:
        device.gate.set()
        ticket.result(10)
    piece.memory.copy_(NEW.staged(device).memory)
    device.gate.set()
    ticket.result(10)
    assert is_of(OLD if waits else NEW, weights(device))


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


class Watched:
    """A rank that looks around at the moment it is written."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def __index__(self) -> int:
        self._look()
        return 8


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
    other = device.stream("other")
    device.gate.clear()
    ticket = begin(device, NEW, extent(0), 0)
    device.wait_for(ticket, other)
    behind, beside = device.note_use(other), device.note_use()
    beside.result(10)
    assert not behind.done()
    device.gate.set()
    behind.result(10)
    assert ticket.done()


def test_a_use_ends_after_the_kernels_before_it(device: SimulatedDevice) -> None:
    running = threading.Event()
    kernel = device.compute.run(lambda: running.wait(10))
    used = device.note_use()
    with pytest.raises(TimeoutError):
        used.result(0.05)
    running.set()
    used.result(10)
    assert kernel.done()


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
