"""What several threads put on the CUDA device's copy stream at the same moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerators import compute_stream, copy_stream, devices_of
from device_groups import NEW, extent, holds, settle

from common import our_threads
from late_device import build
from lorax_async.io.devices import cuda, streams
from lorax_async.io.devices.columns import Columns
from lorax_async.io.devices.cuda import CudaDevice


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    for make in devices_of("late"):
        device = make()
        device.open()
        yield device


class Crowd:
    """Counts who is inside at the same time; each stays for a while."""

    def __init__(self) -> None:
        self.most = 0
        self.entered = threading.Event()
        self._inside = 0

    def around(self, work: Callable[..., None]) -> Callable[..., None]:
        def slowly(*args: object) -> None:
            self._inside += 1
            self.most = max(self.most, self._inside)
            self.entered.set()
            time.sleep(0.03)
            work(*args)
            self._inside -= 1

        return slowly


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> Crowd:
    crowd = Crowd()
    for name in ("write", "clear"):
        monkeypatch.setattr(Columns, name, crowd.around(getattr(Columns, name)))
    return crowd


@pytest.mark.parametrize("clears", [False, True])
def test_one_thing_is_put_at_a_time(device: CudaDevice, crowd: Crowd, clears: bool) -> None:
    """A copy's bytes, rows and event stand together, and so does a clearing."""
    piece = NEW.staged(device)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(device.copy, piece, NEW.rows, extent(0), 0)
        assert crowd.entered.wait(10)
        if clears:
            device.clear_column(1)
        else:
            device.copy(piece, NEW.rows, extent(1), 1).result(10)
        first.result(10).result(10)
    settle(device)
    assert crowd.most == 1
    holds(device, 0, NEW.weights)
    holds(device, 1, {} if clears else NEW.weights)


def test_close_comes_after_a_copy_that_is_being_put(device: CudaDevice, crowd: Crowd) -> None:
    piece = NEW.staged(device)
    with ThreadPoolExecutor(1) as threads:
        copying = threads.submit(device.copy, piece, NEW.rows, extent(0), 0)
        assert crowd.entered.wait(10)
        device.close()
        assert copying.result(10).result(0) is None
    assert not our_threads()


def test_nothing_is_watched_before_its_event_is_recorded(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To wait for an event that was never recorded is no wait."""

    class Slow:
        def __init__(self, of: torch.device) -> None:
            event = streams.new_event(of)
            self.wait, self.synchronize = event.wait, event.synchronize
            self._record = event.record

        def record(self, stream: torch.Stream) -> None:
            time.sleep(0.03)
            self._record(stream)

    piece, compute = NEW.staged(device), compute_stream(device)
    monkeypatch.setattr(cuda, "new_event", Slow)
    with build.held(compute), build.held(copy_stream(device)):
        with compute:
            device.rank.zero_()
        tickets = [device.copy(piece, (), extent(0), 0), device.note_use(compute)]
        time.sleep(0.02)
        assert not any(ticket.done() for ticket in tickets)
    for ticket in tickets:
        ticket.result(10)


def test_a_use_without_an_event_is_waited_for(
    device: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory for it; what stands on the stream runs all the same."""

    class Refused:
        def __init__(self, of: torch.device) -> None: ...

        def record(self, stream: torch.Stream) -> None:
            raise torch.OutOfMemoryError("out of memory")

    compute = compute_stream(device)
    monkeypatch.setattr(cuda, "new_event", Refused)
    with ThreadPoolExecutor(1) as threads:
        with build.held(compute):
            with compute:
                device.rank.zero_()
            noting = threads.submit(device.note_use, compute)
            with pytest.raises(TimeoutError):
                noting.result(0.03)
        assert noting.result(10).done()
