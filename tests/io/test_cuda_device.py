"""The CUDA device keeps to the port, on the late device and on a GPU, and says what it lacks."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import torch
from accelerators import KINDS, Made, copy_stream, devices_of, eventually, held
from device_conformance import StagedDeviceConformance
from device_groups import ARENA, LAYOUT, NEW, SLOTS, begin, extent, holds, move

from common import our_threads
from late_device import build
from lorax_async.core.arena import Extent
from lorax_async.errors import CapacityError, ConfigError, InternalError, UsageError
from lorax_async.io.devices import device_memory
from lorax_async.io.devices.columns import IMAGES
from lorax_async.io.devices.cuda import CudaDevice
from lorax_async.io.ports import StagedPiece


@pytest.fixture(params=KINDS)
def new_device(request: pytest.FixtureRequest) -> Iterator[Made]:
    yield from devices_of(request.param)


@pytest.fixture
def device(new_device: Made) -> CudaDevice:
    device = new_device()
    device.open()
    return device


@pytest.fixture
def new_late() -> Iterator[Made]:
    """Of the late device, which can be told to fail."""
    yield from devices_of("late")


class TestCudaDevice(StagedDeviceConformance):
    pass


class TestOpening:
    def test_its_name_has_its_number(self, device: CudaDevice) -> None:
        assert device.name in {"late:0", "cuda:0"}
        assert (device.alignment, device.rank_multiple, device.reads_files) == (64, 8, False)

    def test_a_column_is_contiguous_in_memory(self, device: CudaDevice) -> None:
        """24 bytes and 4 for each module, whichever slot."""
        assert device.address.stride() == (1, 3, 3 * 4)
        assert device.scale.stride() == (6, 6 * 4)
        assert device.rank.stride() == (1, 4)

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
        assert device.name == "late:1"
        with ThreadPoolExecutor(1) as thread:
            thread.submit(device.open).result(10)
            thread.submit(move, device, NEW, extent(0), 0).result(10)
            assert thread.submit(torch.accelerator.current_device_index).result(10) == 0
        assert {t.device for t in (device.address, device.rank, device._memory.arena)} == {
            torch.device("late:1")
        }
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

    def test_no_more_threads(self, new_late: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        device, start = new_late(), threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "lorax-watch-uses":
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(CapacityError, match="lorax-watch-uses"):
            device.open()
        assert not our_threads()
        assert tensors_of("late") == []
        monkeypatch.undo()
        device.open()
        move(device, NEW, extent(0), 0)

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

    def test_memory_of_others_is_refused(self, device: CudaDevice) -> None:
        pinned = device.staging_memory(128)
        for memory in (pinned.view(torch.int32), pinned[::2], pinned.view(2, 64)):
            with pytest.raises(InternalError, match="uint8"):
                device.copy(StagedPiece(memory, 0), (), extent(0), 0)
        with pytest.raises(InternalError, match="pinned"):
            device.copy(StagedPiece(torch.empty(64, dtype=torch.uint8), 0), (), extent(0), 0)

    def test_a_slot_that_is_not_there_costs_no_row_image(self, device: CudaDevice) -> None:
        piece = NEW.staged(device)
        for _ in range(IMAGES + 1):
            with pytest.raises(IndexError):
                device.copy(piece, NEW.rows, extent(0), SLOTS)
        device.copy(piece, NEW.rows, extent(0), 0).result(10)
        holds(device, 0, NEW.weights)

    def test_tickets_cannot_be_cancelled(self, device: CudaDevice) -> None:
        piece = NEW.staged(device)
        with held(copy_stream(device)):
            ticket = device.copy(piece, NEW.rows, extent(0), 0)
            assert not ticket.cancel()
            assert not device.note_use(copy_stream(device)).cancel()
        assert ticket.result(10) is None

    def test_streams_of_others(self, new_late: Made) -> None:
        device = new_late()
        device.open()
        ticket = begin(device, NEW, extent(0), 0)
        for stream in (torch.Stream(device="late:1"), "late", 0):
            with pytest.raises(UsageError, match="not a torch stream of late:0"):
                device.note_use(stream)
            with pytest.raises(UsageError, match="not a torch stream of late:0"):
                device.wait_for(ticket, stream)
        ticket.result(10)

    def test_a_stream_that_is_captured(self, new_late: Made) -> None:
        class Captured(torch.Stream):
            def is_capturing(self) -> bool:
                return True

        device, stream = new_late(), Captured(device="late:0")
        device.open()
        ticket = begin(device, NEW, extent(0), 0)
        for ask in (lambda: device.wait_for(ticket, stream), lambda: device.note_use(stream)):
            with pytest.raises(UsageError, match="captured"):
                ask()
        ticket.result(10)


class TestClosing:
    def test_waits_for_all_that_is_on_its_way(self, device: CudaDevice) -> None:
        piece, compute = NEW.staged(device), torch.Stream(device=device.name)
        closing = threading.Thread(target=device.close)
        with held(compute), held(copy_stream(device)):
            tickets = [device.copy(piece, NEW.rows, extent(n), n) for n in range(3)]
            tickets.append(device.note_use(compute))
            device.clear_column(0)
            closing.start()
            closing.join(0.03)
            assert closing.is_alive()
            assert not any(ticket.done() for ticket in tickets)
        closing.join(10)
        assert [ticket.exception(0) for ticket in tickets] == [None] * 4
        assert not our_threads()

    def test_waits_for_a_clearing_that_has_no_ticket(self, device: CudaDevice) -> None:
        """The memory is another's afterwards."""
        closing = threading.Thread(target=device.close)
        with held(copy_stream(device)):
            device.clear_column(0)
            closing.start()
            closing.join(0.03)
            assert closing.is_alive()
        closing.join(10)
        assert not closing.is_alive()

    def test_a_second_one_waits_for_the_first(self, device: CudaDevice) -> None:
        piece = NEW.staged(device)
        with ThreadPoolExecutor(2) as threads:
            with held(copy_stream(device)):
                ticket = device.copy(piece, NEW.rows, extent(0), 0)
                closed = [threads.submit(device.close) for _ in range(2)]
                assert not any(each.done() for each in closed)
            assert [each.result(10) for each in closed] == [None, None]
        assert ticket.done()

    def test_a_closed_device_takes_no_work(self, device: CudaDevice) -> None:
        piece = NEW.staged(device)
        done = device.copy(piece, NEW.rows, extent(0), 0)
        device.close()
        asks: list[Callable[[], object]] = [
            lambda: device.copy(piece, NEW.rows, extent(0), 0),
            lambda: device.clear_column(0),
            device.note_use,
        ]
        for ask in asks:
            with pytest.raises(UsageError, match="not open"):
                ask()
        assert device.operands(0, 0) is None
        assert not tensors_of(torch.device(device.name).type)
        device.wait_for(done)

    def test_one_that_is_not_open_takes_none(self, new_device: Made) -> None:
        device = new_device()
        piece = NEW.staged(device)
        with pytest.raises(UsageError, match="not open"):
            device.copy(piece, NEW.rows, extent(0), 0)
        with pytest.raises(UsageError, match="not open"):
            device.note_use()

    def test_a_copy_that_waits_for_an_image_meanwhile(self, device: CudaDevice) -> None:
        piece = NEW.staged(device)
        with ThreadPoolExecutor(2) as threads:
            with held(copy_stream(device)):
                for _ in range(IMAGES):
                    device.copy(piece, NEW.rows, extent(0), 0)
                late = threads.submit(device.copy, piece, NEW.rows, extent(0), 0)
                closing = threads.submit(device.close)
                eventually(lambda: not device._working)
            with pytest.raises(UsageError, match="not open"):
                late.result(10)
            closing.result(10)
