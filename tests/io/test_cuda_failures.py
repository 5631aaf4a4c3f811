"""What the CUDA device says when the device fails it: lost, out of memory, or in a callback."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from accelerators import compute_stream, copy_stream, devices_of, one_layer, read_on
from device_groups import NEW, OLD, begin, extent, holds, move, settle

from common import our_threads
from late_device import build
from lorax_async.core.moves import Row
from lorax_async.errors import InternalError, LoraxError, TransferError
from lorax_async.io.devices.columns import IMAGES, Columns
from lorax_async.io.devices.cuda import CudaDevice
from lorax_async.io.devices.watcher import EventTicket, Watcher
from lorax_async.io.ports import CopyTicket, StagedPiece

LOST = r"late:0: the device was lost \(late device error.*restart the process"


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    for make in devices_of("late"):
        device = make()
        device.open()
        yield device


def failing(ticket: CopyTicket) -> LoraxError:
    error = ticket.exception(10)
    assert isinstance(error, LoraxError)
    return error


class TestALostDevice:
    def test_copies_on_their_way_fail_for_good(self, device: CudaDevice) -> None:
        build.hold(copy_stream(device))
        tickets = [begin(device, NEW, extent(n), n) for n in range(3)]
        build.lose()
        errors = [failing(ticket) for ticket in tickets]
        for error in errors:
            assert type(error) is TransferError
            assert not error.retryable
            with pytest.raises(TransferError, match=LOST):
                raise error
        assert len(set(map(id, errors))) == 3  # raising collects frames
        assert device.operands(0, 0) is None

    @pytest.mark.parametrize("works_again", [False, True])
    def test_nothing_is_tried_on_it_again(self, device: CudaDevice, works_again: bool) -> None:
        done, piece = begin(device, OLD, extent(1), 1), NEW.staged(device)
        done.result(10)
        build.lose()
        with pytest.raises(TransferError, match=LOST):
            device.copy(piece, NEW.rows, extent(0), 0).result(10)
        if works_again:
            build.restore()
        with pytest.raises(TransferError, match=LOST) as caught:
            device.copy(piece, NEW.rows, extent(0), 0)
        assert not caught.value.retryable
        device.clear_column(0)
        device.wait_for(done)
        assert device.note_use().result(10) is None

    def test_compute_that_waits_is_not_told_twice(self, device: CudaDevice) -> None:
        build.hold(copy_stream(device))
        ticket = begin(device, NEW, extent(0), 0)
        build.lose()
        device.wait_for(ticket)
        assert failing(ticket)
        device.wait_for(ticket)

    def test_uses_of_it_have_ended(self, device: CudaDevice) -> None:
        compute = compute_stream(device)
        build.hold(compute)
        read_on(compute, device.rank, device.rank.clone())
        use = device.note_use(compute)
        assert not use.done()
        build.lose()
        assert use.result(10) is None
        build.restore()
        with pytest.raises(TransferError, match=LOST):
            begin(device, NEW, extent(0), 0)

    def test_whoever_waits_for_a_row_image_is_told(self, device: CudaDevice) -> None:
        piece, told = NEW.staged(device), []

        def copy() -> None:
            try:
                device.copy(piece, NEW.rows, extent(0), 0)
            except TransferError as error:
                told.append(error)

        build.hold(copy_stream(device))
        for _ in range(IMAGES):
            device.copy(piece, NEW.rows, extent(0), 0)
        waiting = threading.Thread(target=copy)
        waiting.start()
        waiting.join(0.03)
        assert waiting.is_alive()
        build.lose()
        waiting.join(10)
        assert [error.retryable for error in told] == [False]

    def test_it_can_be_closed(self, device: CudaDevice) -> None:
        build.hold(copy_stream(device))
        tickets = [begin(device, NEW, extent(n), n) for n in range(3)]
        device.clear_column(1)
        build.lose()
        device.clear_column(0)
        device.close()
        device.close()
        assert all(ticket.done() for ticket in tickets)
        assert not our_threads()


class TestOutOfMemory:
    """Copies allocate nothing, but a driver may."""

    @pytest.mark.parametrize(
        ("kind", "text"),
        [
            (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 MiB"),
            (torch.AcceleratorError, "CUDA error: out of memory\nCUDA kernel errors might"),
        ],
    )
    def test_is_the_tickets_and_not_before_the_event(
        self,
        device: CudaDevice,
        monkeypatch: pytest.MonkeyPatch,
        kind: type[RuntimeError],
        text: str,
    ) -> None:
        def refuse(*_: object) -> None:
            raise kind(text)

        piece = OLD.staged(device)
        with build.held(copy_stream(device)), monkeypatch.context() as patch:
            patch.setattr(Columns, "write", refuse)
            ticket = device.copy(piece, OLD.rows, extent(0), 0)
            assert not ticket.done()
            assert build.pending() == 2  # the bytes, which were put there, and the event
        told = failing(ticket)
        assert type(told) is TransferError
        assert told.retryable
        assert "late:0 refused a copy (CUDA" in told.problem
        assert "might" not in told.problem
        settle(device)
        holds(device, 0, {})
        for _ in range(IMAGES + 1):  # its row image came back
            move(device, NEW, extent(1), 1)
        holds(device, 1, NEW.weights)

    def test_rows_of_a_copy_that_failed_are_written_by_no_other(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As those between the rows of another are, of copies that did not fail."""

        def refuse(*_: object) -> None:
            raise torch.OutOfMemoryError("out of memory")

        for make in devices_of("late"):
            device, row = make(layout=one_layer(3)), Row(1, 64, 128, 7, 8, 0.5)
            device.open()
            piece = StagedPiece(device.staging_memory(64), 0)
            with monkeypatch.context() as patch:
                patch.setattr(Columns, "write", refuse)
                assert failing(device.copy(piece, [row], extent(0), 0))
            ends = [row._replace(module=0), row._replace(module=2)]
            device.copy(piece, ends, extent(0), 0).result(10)
            assert device.rank[:, 0].tolist() == [8, 0, 8]


class TestCallbacks:
    @pytest.mark.parametrize("raised", [ValueError, SystemExit])
    def test_what_they_raise_ends_no_watcher(
        self, device: CudaDevice, raised: type[BaseException], caplog: pytest.LogCaptureFixture
    ) -> None:
        called = []

        def call(ticket: CopyTicket) -> None:
            called.append(threading.current_thread().name)
            raise raised("mine")

        with build.held():
            tickets = [begin(device, NEW, extent(0), 0), device.note_use()]
            for ticket in tickets:
                ticket.add_done_callback(call)
        for ticket in tickets:
            assert ticket.result(10) is None
        move(device, OLD, extent(1), 1)
        assert device.note_use().result(10) is None
        assert sorted(called) == ["lorax-watch-copies", "lorax-watch-uses"]
        assert [record.levelname for record in caplog.records] == ["ERROR"] * 2
        holds(device, 0, NEW.weights)

    def test_the_row_image_is_back_before_they_run(self, device: CudaDevice) -> None:
        """So that a callback may ask for the next copy."""
        tickets: list[CopyTicket] = []
        piece = NEW.staged(device)
        with build.held(copy_stream(device)):
            for _ in range(IMAGES):
                ticket = device.copy(piece, NEW.rows, extent(0), 0)
                ticket.add_done_callback(
                    lambda _: tickets.append(device.copy(piece, NEW.rows, extent(1), 1))
                )
        ticket.result(10)
        settle(device)
        assert len(tickets) == IMAGES
        holds(device, 1, NEW.weights)


class CapturedEvent:
    """As CUDA's while another thread captures a graph in mode "global"."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals

    def synchronize(self) -> None:
        if self.refusals:
            self.refusals -= 1
            raise torch.AcceleratorError(
                "CUDA error: operation not permitted when stream is capturing\nadvice"
            )

    def record(self, stream: torch.Stream) -> None: ...
    def wait(self, stream: torch.Stream) -> None: ...


def test_a_capture_of_others_delays_the_news() -> None:
    def never(error: RuntimeError) -> LoraxError:
        return InternalError(str(error))

    watcher, event = Watcher("lorax-watch-test", never), CapturedEvent(3)
    watcher.start()
    ticket = EventTicket(None, event)
    watcher.watch(ticket)
    assert ticket.result(10) is None
    assert event.refusals == 0
    watcher.end()
    assert not our_threads()
