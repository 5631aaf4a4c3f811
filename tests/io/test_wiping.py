"""What broke is zeroed by a device's copy stream, in its turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerators import KINDS, a_of_module_0, copy_stream, devices_of, held
from device_groups import NEW, OLD, begin, extent, holds, is_poison, made_by, move, settle

from late_device import build
from lorax_async.errors import TransferError, UsageError
from lorax_async.io.devices.cuda import CudaDevice
from lorax_async.testing import SimulatedDevice


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> Iterator[CudaDevice]:
    for make in devices_of(request.param):
        device = make()
        device.open()
        yield device


@pytest.fixture
def late() -> Iterator[CudaDevice]:
    for make in devices_of("late"):
        device = make()
        device.open()
        yield device


@pytest.fixture
def simulated() -> Iterator[SimulatedDevice]:
    for make in made_by(SimulatedDevice):
        device = make()
        device.open()
        yield device


def test_the_ticket_comes_after_the_zeros(late: CudaDevice) -> None:
    move(late, OLD, extent(0), 0)
    old = a_of_module_0(late, OLD, extent(0).offset)
    with build.held(copy_stream(late)):
        ticket = late.wipe([extent(0)])
        assert not ticket.done()
        assert old.cpu().any()
    ticket.result(10)
    assert not old.cpu().any()


def test_zeros_come_between_the_copies_around_them(device: CudaDevice) -> None:
    with held(copy_stream(device)):
        tickets = [begin(device, OLD, extent(n), n) for n in range(2)]
        wiped = device.wipe([extent(0), extent(1)])
        device.clear_column(0)
        device.clear_column(1)
        tickets.append(begin(device, NEW, extent(0), 2))
        assert not wiped.done()
    for ticket in (*tickets, wiped):
        ticket.result(10)
    holds(device, 2, NEW.weights)
    assert not device.view(extent(1)).cpu().any()


def test_a_lost_device_is_told_of(late: CudaDevice) -> None:
    move(late, OLD, extent(0), 0)
    build.hold(copy_stream(late))
    ticket = late.wipe([extent(0)])
    build.lose()
    assert isinstance(ticket.exception(10), TransferError)
    with pytest.raises(TransferError, match="the device was lost"):
        late.wipe([extent(0)])


def test_a_closed_one_takes_no_work(device: CudaDevice, simulated: SimulatedDevice) -> None:
    for closed in (device, simulated):
        closed.close()
        with pytest.raises(UsageError):
            closed.wipe([extent(0)])


def test_the_simulated_device_is_late_too_and_poisons_what_is_cleared(
    simulated: SimulatedDevice,
) -> None:
    move(simulated, OLD, extent(0), 0)
    simulated.gate.clear()
    asked = [extent(0)]
    ticket = simulated.wipe(asked)
    asked.clear()
    assert not ticket.done()
    assert simulated.view(extent(0)).any()
    simulated.gate.set()
    ticket.result(10)
    assert not simulated.view(extent(0)).any()
    simulated.clear_column(0)
    settle(simulated)
    assert is_poison(simulated.view(extent(0)))
