"""The CUDA device keeps to the port, on the late device and on a GPU; what it lacks, and failures."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import torch
from accelerators import (
    KINDS,
    Made,
    compute_stream,
    copy_stream,
    devices_of,
    held,
    opened_devices,
    read_on,
)
from device_conformance import StagedDeviceConformance
from device_groups import ARENA, LAYOUT, NEW, OLD, SLOTS, begin, extent, holds, move, settle

from common import our_threads
from late_device import build
from lorax_async.core.arena import Extent
from lorax_async.errors import (
    CapacityError,
    ConfigError,
    InternalError,
    LoraxError,
    TransferError,
    UsageError,
)
from lorax_async.io.devices import device_memory
from lorax_async.io.devices.columns import IMAGES, Columns
from lorax_async.io.devices.cuda import CudaDevice
from lorax_async.io.devices.watcher import EventTicket, Watcher
from lorax_async.io.ports import CopyTicket, StagedPiece

LOST = r"late:0: the device was lost \(late device error.*restart the process"


@pytest.fixture(params=KINDS)
def new_device(request: pytest.FixtureRequest) -> Iterator[Made]:
    yield from devices_of(request.param)


@pytest.fixture
def new_late() -> Iterator[Made]:
    """Of the late device, which can be told to fail."""
    yield from devices_of("late")


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> Iterator[CudaDevice]:
    yield from opened_devices(request.param)


@pytest.fixture
def late() -> Iterator[CudaDevice]:
    """For tests that tell the device to fail, or let its streams do one thing after the other."""
    yield from opened_devices("late")


class TestCudaDevice(StagedDeviceConformance):
    pass


class TestOpening:
    @pytest.mark.parametrize("name", ["gpu", "cuda:x", "late:", ""])
    def test_no_name_of_a_device(self, new_late: Made, name: str) -> None:
        with pytest.raises(ConfigError, match="no device"):
            CudaDevice(LAYOUT, dtype="F32", nbytes=ARENA, slots=SLOTS, device=name)

    @pytest.mark.parametrize("name", ["late:2", "cuda:5", "cuda", "cpu", "xpu:0"])
    def test_no_such_device_here(self, new_late: Made, name: str) -> None:
        build.show_devices(2)
        device = CudaDevice(LAYOUT, dtype="F32", nbytes=ARENA, slots=SLOTS, device=name)
        for ask in (device.open, lambda: device.staging_memory(64)):
            with pytest.raises(ConfigError, match=rf"no {name}; this machine has 2|not available"):
                ask()
        device.close()

    def test_the_makers_current_device_counts(self, new_late: Made) -> None:
        """Threads that open and copy have another one: the first."""
        build.show_devices(2)
        with torch.accelerator.device_index(1):
            device = new_late()
        with ThreadPoolExecutor(1) as thread:
            thread.submit(device.open).result(10)
            thread.submit(move, device, NEW, extent(0), 0).result(10)
            assert thread.submit(torch.accelerator.current_device_index).result(10) == 0
        assert device.name == "late:1"
        tables = (device.address, device.rank, device.view(extent(0)))
        assert {str(table.device) for table in tables} == {"late:1"}
        holds(device, 0, NEW.weights)

    def test_what_stands_on_the_current_stream_comes_first(self, new_late: Made) -> None:
        device = new_late()
        opening = threading.Thread(target=device.open)
        with build.held():
            opening.start()
            opening.join(0.03)
            assert opening.is_alive()
        opening.join(10)
        assert device.rank.tolist() == [[0] * SLOTS] * 4

    @pytest.mark.parametrize("pinned", range(5))
    def test_no_room_on_the_device_or_the_host(
        self, new_late: Made, monkeypatch: pytest.MonkeyPatch, pinned: int
    ) -> None:
        """Nothing stays, not even in the error; and then there is room."""
        device = new_late()
        if pinned == 0:
            build.fail_allocations(device=1)
        else:
            monkeypatch.setattr(device_memory, "pinned", failing_at(pinned))
        with pytest.raises(CapacityError, match=f"{ARENA:,} bytes and 3 slots.*lower") as caught:
            device.open()
        assert not tensors_of("late")
        assert "out of memory" in str(caught.value)
        device.open()
        move(device, NEW, extent(0), 0)
        holds(device, 0, NEW.weights)

    def test_no_room_for_staging(self, new_late: Made) -> None:
        device = new_late()
        device.open()
        build.fail_allocations(pinned=1)
        with pytest.raises(CapacityError, match=r"4,096 bytes of pinned.*lower staging_bytes"):
            device.staging_memory(4096)
        assert device.staging_memory(4096).is_pinned()


def failing_at(number: int) -> Callable[[int], torch.Tensor]:
    """Pinned memory, but for one allocation of several."""
    counter, allocate = count(1), device_memory.pinned

    def pinned(nbytes: int) -> torch.Tensor:
        build.fail_allocations(pinned=int(next(counter) == number))
        return allocate(nbytes)

    return pinned


def tensors_of(kind: str) -> list[torch.Size]:
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return [each.shape for each in found if each.device.type == kind]


class TestCopying:
    @pytest.mark.parametrize(
        ("target", "place"),
        [
            (-1, extent(0)),
            (extent(0).nbytes - 63, extent(0)),
            (0, Extent(ARENA - 64, 128)),
            (0, Extent(-64, 64)),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, device: CudaDevice, target: int, place: Extent
    ) -> None:
        with pytest.raises(InternalError, match=r"64 bytes at .* do not fit"):
            device.copy(StagedPiece(device.staging_memory(64), target), (), place, 0)

    def test_memory_of_others_and_a_slot_that_is_not_there_are_refused(
        self, device: CudaDevice
    ) -> None:
        pinned = device.staging_memory(128)
        for memory in (pinned.view(torch.int32), pinned[::2], pinned.view(2, 64)):
            with pytest.raises(InternalError, match="uint8"):
                device.copy(StagedPiece(memory, 0), (), extent(0), 0)
        with pytest.raises(InternalError, match="pinned"):
            device.copy(StagedPiece(torch.empty(64, dtype=torch.uint8), 0), (), extent(0), 0)
        piece = NEW.staged(device)
        for _ in range(IMAGES + 1):  # none of them costs a row image
            with pytest.raises(IndexError):
                device.copy(piece, NEW.rows, extent(0), SLOTS)
        device.copy(piece, NEW.rows, extent(0), 0).result(10)

    def test_streams_that_are_others_or_captured(self, late: CudaDevice) -> None:
        class Captured(torch.Stream):
            def is_capturing(self) -> bool:
                return True

        streams = [(stream, "not a torch stream") for stream in (torch.Stream("late:1"), "late", 0)]
        streams.append((Captured(device="late:0"), "captured"))
        ticket = begin(late, NEW, extent(0), 0)
        for stream, problem in streams:
            for ask in (late.note_use, lambda each: late.wait_for(ticket, each)):
                with pytest.raises(UsageError, match=problem):
                    ask(stream)
        ticket.result(10)


class TestClosing:
    def test_waits_for_all_that_is_on_its_way(self, device: CudaDevice) -> None:
        """As does a second one; and tickets cannot be cancelled."""
        piece, compute = NEW.staged(device), torch.Stream(device=device.name)
        with ThreadPoolExecutor(2) as threads:
            with held(compute), held(copy_stream(device)):
                tickets = [device.copy(piece, NEW.rows, extent(n), n) for n in range(3)]
                tickets.append(device.note_use(compute))
                device.clear_column(0)
                closing = [threads.submit(device.close) for _ in range(2)]
                with pytest.raises(TimeoutError):
                    closing[0].result(0.03)
                assert not any(each.done() or each.cancel() for each in (*tickets, closing[1]))
            assert [each.result(10) for each in closing] == [None, None]
        assert [ticket.exception(0) for ticket in tickets] == [None] * 4
        assert not our_threads()

    def test_a_device_that_is_not_open_takes_no_work(self, new_device: Made) -> None:
        device = new_device()
        piece = NEW.staged(device)
        asks: list[Callable[[], object]] = [
            lambda: device.copy(piece, NEW.rows, extent(0), 0),
            lambda: device.clear_column(0),
            lambda: device.wipe([extent(0)]),
            device.note_use,
        ]
        for ask in asks:
            with pytest.raises(UsageError, match="not open"):
                ask()
        device.open()
        done = device.copy(piece, NEW.rows, extent(0), 0)
        device.close()
        for ask in asks:
            with pytest.raises(UsageError, match="not open"):
                ask()
        assert device.operands(0, 0) is None
        assert not tensors_of(torch.device(device.name).type)
        device.wait_for(done)


def failing(ticket: CopyTicket) -> LoraxError:
    error = ticket.exception(10)
    assert isinstance(error, LoraxError)
    return error


class TestALostDevice:
    def test_copies_on_their_way_fail_for_good(self, late: CudaDevice) -> None:
        """Whoever waits for one hears of it from its ticket alone; the device can be closed."""
        build.hold(copy_stream(late))
        tickets = [begin(late, NEW, extent(n), n) for n in range(3)]
        tickets.append(late.wipe([extent(3)]))
        build.lose()
        late.wait_for(tickets[0])
        errors = [failing(ticket) for ticket in tickets]
        for error in errors:
            assert type(error) is TransferError
            assert not error.retryable
            with pytest.raises(TransferError, match=LOST):
                raise error
        assert len(set(map(id, errors))) == 4  # raising collects frames
        assert late.operands(0, 0) is None
        late.wait_for(tickets[0])
        late.clear_column(0)
        late.close()
        late.close()
        assert not our_threads()

    @pytest.mark.parametrize("works_again", [False, True])
    def test_nothing_is_tried_on_it_again(self, late: CudaDevice, works_again: bool) -> None:
        done, piece = begin(late, OLD, extent(1), 1), NEW.staged(late)
        done.result(10)
        build.lose()
        with pytest.raises(TransferError, match=LOST):
            late.copy(piece, NEW.rows, extent(0), 0).result(10)
        if works_again:
            build.restore()
        with pytest.raises(TransferError, match=LOST):
            late.wipe([extent(0)])
        with pytest.raises(TransferError, match=LOST) as caught:
            late.copy(piece, NEW.rows, extent(0), 0)
        assert not caught.value.retryable
        late.clear_column(0)
        late.wait_for(done)
        assert late.note_use().result(10) is None

    def test_uses_of_it_have_ended(self, late: CudaDevice) -> None:
        compute = compute_stream(late)
        build.hold(compute)
        read_on(compute, late.rank, late.rank.clone())
        use = late.note_use(compute)
        assert not use.done()
        build.lose()
        assert use.result(10) is None


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
        late: CudaDevice,
        monkeypatch: pytest.MonkeyPatch,
        kind: type[RuntimeError],
        text: str,
    ) -> None:
        def refuse(*_: object) -> None:
            raise kind(text)

        piece = OLD.staged(late)
        with build.held(copy_stream(late)), monkeypatch.context() as patch:
            patch.setattr(Columns, "write", refuse)
            ticket = late.copy(piece, OLD.rows, extent(0), 0)
            assert not ticket.done()
            assert build.pending() == 2  # the bytes, which were put there, and the event
        told = failing(ticket)
        assert type(told) is TransferError
        assert told.retryable
        assert "late:0 refused a copy (CUDA" in told.problem
        assert "might" not in told.problem
        settle(late)
        holds(late, 0, {})
        for _ in range(IMAGES + 1):  # its row image came back
            move(late, NEW, extent(1), 1)
        holds(late, 1, NEW.weights)


class TestCallbacks:
    @pytest.mark.parametrize("raised", [ValueError, SystemExit])
    def test_what_they_raise_ends_no_watcher(
        self, late: CudaDevice, raised: type[BaseException], caplog: pytest.LogCaptureFixture
    ) -> None:
        called = []

        def call(ticket: CopyTicket) -> None:
            called.append(threading.current_thread().name)
            raise raised("mine")

        with build.held():
            tickets = [begin(late, NEW, extent(0), 0), late.note_use()]
            for ticket in tickets:
                ticket.add_done_callback(call)
        for ticket in tickets:
            assert ticket.result(10) is None
        move(late, OLD, extent(1), 1)
        assert late.note_use().result(10) is None
        assert sorted(called) == ["lorax-watch-copies", "lorax-watch-uses"]
        assert [record.levelname for record in caplog.records] == ["ERROR"] * 2
        holds(late, 0, NEW.weights)


class SetEvent:
    """Done when it is set; before that, as CUDA's while another thread captures a graph."""

    def __init__(self) -> None:
        self.is_set = threading.Event()
        self.refusals = 2

    def record(self, stream: torch.Stream) -> None: ...
    def wait(self, stream: torch.Stream) -> None: ...

    def synchronize(self) -> None:
        assert self.is_set.wait(10)
        if self.refusals:
            self.refusals -= 1
            raise torch.AcceleratorError(
                "CUDA error: operation not permitted when stream is capturing\nadvice"
            )


def test_a_watchers_end_waits_for_all_events_also_while_others_capture() -> None:
    watcher = Watcher("lorax-watch-test", lambda error: InternalError(str(error)))
    watcher.start()
    events = [SetEvent() for _ in range(3)]
    tickets = [EventTicket(None, event) for event in events]
    for ticket in tickets:
        watcher.watch(ticket)
    with ThreadPoolExecutor(1) as threads:
        ending = threads.submit(watcher.end)
        for event, ticket in zip(events, tickets, strict=True):
            with pytest.raises(TimeoutError):
                ending.result(0.02)
            assert not ticket.done()
            event.is_set.set()
            assert ticket.result(10) is None
            assert event.refusals == 0
        ending.result(10)
    assert not our_threads()
    with pytest.raises(UsageError, match="closed"):
        watcher.watch(EventTicket(None, SetEvent()))
