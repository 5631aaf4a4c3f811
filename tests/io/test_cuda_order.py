"""What the CUDA device puts on its stream runs in the order that others rely on, and late."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import accelerators
import pytest
import torch
from accelerators import (
    EMPTY_COLUMN,
    KINDS,
    a_of_module_0,
    column_now,
    column_of,
    compute_stream,
    copy_stream,
    devices_of,
    held,
    one_layer,
    opened_devices,
    read_on,
    step,
)
from device_groups import NEW, OLD, begin, extent, holds, move, settle

from late_device import build
from late_device.build import POISON
from late_device.world import bytes_now
from lorax_async.core.moves import Row
from lorax_async.io.devices import cuda
from lorax_async.io.devices.columns import IMAGES, Columns
from lorax_async.io.devices.cuda import CudaDevice
from lorax_async.io.ports import CopyTicket, StagedPiece

OLD_A, NEW_A = OLD.weights[0][0], NEW.weights[0][0]


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> Iterator[CudaDevice]:
    yield from opened_devices(request.param)


@pytest.fixture
def late() -> Iterator[CudaDevice]:
    """For tests that tell the device to fail, or let its streams do one thing after the other."""
    yield from opened_devices("late")


def empty_like(device: CudaDevice, weights: torch.Tensor) -> torch.Tensor:
    made = torch.empty_like(weights, device=device.name)
    torch.accelerator.synchronize()
    return made


class TestACopy:
    def test_writes_bytes_then_rows_then_its_ticket(self, late: CudaDevice) -> None:
        place = extent(2)
        target = a_of_module_0(late, NEW, place.offset)
        addresses, scales, ranks = column_of(late, NEW, place.offset)
        with build.held(copy_stream(late)):
            ticket = begin(late, NEW, place, 1)
            assert bytes_now(target) == {POISON}
            step(late)
            assert torch.equal(target.cpu(), NEW_A)
            assert column_now(late, 1) == EMPTY_COLUMN
            step(late)
            assert column_now(late, 1) == (addresses, scales, EMPTY_COLUMN[2])
            step(late)
            assert column_now(late, 1) == (addresses, scales, ranks)
            assert late.operands(0, 1) is None
            assert not ticket.done()
            assert build.pending() == 1  # the event
        ticket.result(10)
        holds(late, 1, NEW.weights)

    @pytest.mark.parametrize("rows", [OLD.rows, ()])
    def test_keeps_its_memory_alive_until_it_is_done(
        self, device: CudaDevice, rows: tuple[Row, ...]
    ) -> None:
        piece = OLD.staged(device)
        memory = weakref.ref(piece.memory)
        with held(copy_stream(device)):
            ticket = device.copy(piece, rows, extent(0), 0)
            del piece
            gc.collect()
            assert memory() is not None
        ticket.result(10)
        gc.collect()
        assert memory() is None

    def test_allocates_nothing(self, late: CudaDevice) -> None:
        pieces = [OLD.staged(late), NEW.staged(late)]
        build.fail_allocations(device=1, pinned=1)
        for slot, (made, piece) in enumerate(zip((OLD, NEW), pieces, strict=True)):
            late.copy(piece, made.rows, extent(slot), slot).result(10)
            late.clear_column(2)
            late.note_use().result(10)
        build.fail_allocations()
        holds(late, 0, OLD.weights)
        holds(late, 1, NEW.weights)

    def test_waits_while_all_row_images_are_in_use(self, device: CudaDevice) -> None:
        """Each image holds its own rows until its copy is done."""
        tickets: list[CopyTicket] = []

        def copy(n: int) -> None:
            rows = [row._replace(scale=float(n)) for row in OLD.rows]
            tickets.append(device.copy(StagedPiece(memory, 0), rows, extent(0), n % 3))

        memory = device.staging_memory(64)
        last = threading.Thread(target=copy, args=(IMAGES,))
        with held(copy_stream(device)):
            for n in range(IMAGES):
                copy(n)
            last.start()
            last.join(0.03)
            assert last.is_alive()
            assert len(tickets) == IMAGES
            device.copy(StagedPiece(memory, 0), (), extent(0), 0)  # needs none
        last.join(10)
        for ticket in tickets:
            ticket.result(10)
        assert device.scale[0].tolist() == [63.0, 64.0, 62.0]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_between_those_of_a_copy_are_empty_or_as_they_were(kind: str) -> None:
    for make in devices_of(kind):
        device = make(layout=one_layer(5))
        device.open()
        memory, row = device.staging_memory(64), Row(0, 64, 128, 7, 8, 0.5)
        for modules in ([2], [0, 4]):
            rows = [row._replace(module=module) for module in modules]
            device.copy(StagedPiece(memory, 0), rows, extent(1), 1).result(10)
        base = device.view(extent(1)).data_ptr()
        assert device.rank[:, 1].tolist() == [8, 0, 8, 0, 8]
        assert device.scale[:, 1].tolist() == [0.5, 0.0, 0.5, 0.0, 0.5]
        present = [base + 64, 0, base + 64, 0, base + 64]
        assert device.address[0, :, 1].tolist() == present
        assert device.address[1, :, 1].tolist() == [at and at + 64 for at in present]
        assert device.rank[:, 0].tolist() == [0] * 5


class TestAClearing:
    def test_comes_before_the_next_tenant_and_ranks_first(self, late: CudaDevice) -> None:
        place = extent(0)
        move(late, OLD, place, 0)
        addresses, scales, _ = column_of(late, OLD, place.offset)
        with build.held(copy_stream(late)):
            late.clear_column(0)
            assert late.operands(0, 0) is None
            ticket = begin(late, NEW, place, 1)
            step(late)
            assert column_now(late, 0) == (addresses, scales, EMPTY_COLUMN[2])
            step(late)
            assert column_now(late, 0) == EMPTY_COLUMN
            assert torch.equal(a_of_module_0(late, OLD, place.offset).cpu(), OLD_A)
            step(late)
            assert torch.equal(a_of_module_0(late, NEW, place.offset).cpu(), NEW_A)
        ticket.result(10)
        holds(late, 0, {})
        holds(late, 1, NEW.weights)


class TestAWipe:
    def test_has_its_ticket_after_the_zeros(self, late: CudaDevice) -> None:
        move(late, OLD, extent(0), 0)
        old = a_of_module_0(late, OLD, extent(0).offset)
        with build.held(copy_stream(late)):
            ticket = late.wipe([extent(0)])
            assert not ticket.done()
            assert old.cpu().any()
        ticket.result(10)
        assert not old.cpu().any()


class TestCompute:
    @pytest.mark.parametrize("waits", ["on its stream", "on the current stream", ""])
    def test_sees_the_copy_only_if_it_waits(self, device: CudaDevice, waits: str) -> None:
        move(device, OLD, extent(0), 0)
        source = a_of_module_0(device, NEW, 0)
        seen, compute = empty_like(device, source), compute_stream(device)
        piece = NEW.staged(device)
        with held(copy_stream(device)):
            ticket = device.copy(piece, NEW.rows, extent(0), 0)
            if waits == "on its stream":
                device.wait_for(ticket, compute)
            elif waits:
                with compute:
                    device.wait_for(ticket)
            read_on(compute, source, seen)
            if waits:
                accelerators.waits(compute)
            else:
                compute.synchronize()
        ticket.result(10)
        compute.synchronize()
        assert torch.equal(seen.cpu(), NEW_A if waits else OLD_A)

    def test_waits_for_no_copy_but_its_own(self, device: CudaDevice) -> None:
        move(device, OLD, extent(0), 0)
        first, source = begin(device, OLD, extent(1), 1), a_of_module_0(device, OLD, 0)
        seen, compute = empty_like(device, source), compute_stream(device)
        first.result(10)
        piece = NEW.staged(device)
        with held(copy_stream(device)):
            later = device.copy(piece, NEW.rows, extent(2), 2)
            device.wait_for(first, compute)
            read_on(compute, source, seen)
            compute.synchronize()
            assert not later.done()
        assert torch.equal(seen.cpu(), OLD_A)

    def test_a_use_is_noted_until_it_has_run(self, device: CudaDevice) -> None:
        """On its own stream; the news of copies, and uses of other streams, do not wait for it."""
        move(device, OLD, extent(0), 0)
        source = a_of_module_0(device, OLD, 0)
        seen, compute = empty_like(device, source), compute_stream(device)
        piece = NEW.staged(device)
        with held(compute):
            assert device.note_use(compute_stream(device)).result(10) is None
            read_on(compute, source, seen)
            with compute:
                uses = [device.note_use(), device.note_use(compute)]
            device.copy(piece, NEW.rows, extent(1), 1).result(10)
            assert not any(use.done() for use in uses)
        for use in uses:
            use.result(10)
        assert torch.equal(seen.cpu(), OLD_A)


# -- several threads at the same moment ----------------------------------------------------------


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
def test_one_thing_is_put_at_a_time(late: CudaDevice, crowd: Crowd, clears: bool) -> None:
    """A copy's bytes, rows and event stand together, and so does a clearing."""
    piece = NEW.staged(late)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(late.copy, piece, NEW.rows, extent(0), 0)
        assert crowd.entered.wait(10)
        if clears:
            late.clear_column(1)
        else:
            late.copy(piece, NEW.rows, extent(1), 1).result(10)
        first.result(10).result(10)
    settle(late)
    assert crowd.most == 1
    holds(late, 0, NEW.weights)
    holds(late, 1, {} if clears else NEW.weights)


def test_a_use_without_an_event_is_waited_for(
    late: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory for it; what stands on the stream runs all the same."""

    class Refused:
        def __init__(self, of: torch.device) -> None: ...

        def record(self, stream: torch.Stream) -> None:
            raise torch.OutOfMemoryError("out of memory")

    compute = compute_stream(late)
    monkeypatch.setattr(cuda, "new_event", Refused)
    with ThreadPoolExecutor(1) as threads:
        with build.held(compute):
            with compute:
                late.rank.zero_()
            noting = threads.submit(late.note_use, compute)
            with pytest.raises(TimeoutError):
                noting.result(0.03)
        assert noting.result(10).done()
