"""What the CUDA device puts on its stream runs in the order that others rely on, and late."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import accelerators
import pytest
import torch
from accelerators import (
    EMPTY_COLUMN,
    KINDS,
    Made,
    a_of_module_0,
    column_now,
    column_of,
    compute_stream,
    copy_stream,
    devices_of,
    held,
    one_layer,
    read_on,
    step,
)
from device_groups import NEW, OLD, begin, extent, group, holds, move, settle

from late_device import build
from late_device.build import POISON
from late_device.world import bytes_now
from lorax_async.core.moves import Row
from lorax_async.io.devices.columns import IMAGES
from lorax_async.io.devices.cuda import CudaDevice
from lorax_async.io.ports import CopyTicket, StagedPiece

OLD_A, NEW_A = OLD.weights[0][0], NEW.weights[0][0]


def opened(devices: Iterator[Made]) -> Iterator[CudaDevice]:
    for make in devices:
        device = make()
        device.open()
        yield device


@pytest.fixture(params=KINDS)
def device(request: pytest.FixtureRequest) -> Iterator[CudaDevice]:
    yield from opened(devices_of(request.param))


@pytest.fixture
def late() -> Iterator[CudaDevice]:
    """For tests that let the copy stream do one thing after the other."""
    yield from opened(devices_of("late"))


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

    def test_reads_its_staged_bytes_late(self, late: CudaDevice) -> None:
        """So that whoever writes to them before the ticket is done sees wrong bytes."""
        piece = OLD.staged(late)
        with build.held(copy_stream(late)):
            ticket = late.copy(piece, OLD.rows, extent(0), 0)
            piece.memory.copy_(NEW.staged(late).memory)
            assert not ticket.done()
        ticket.result(10)
        assert torch.equal(a_of_module_0(late, OLD, 0).cpu(), NEW_A)

    def test_leaves_its_staged_bytes_alone_once_it_is_done(self, device: CudaDevice) -> None:
        piece = OLD.staged(device)
        ticket = device.copy(piece, OLD.rows, extent(0), 0)
        ticket.result(10)
        piece.memory.fill_(0)
        settle(device)
        holds(device, 0, OLD.weights)

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


class TestRows:
    def test_those_between_are_empty_or_as_they_were(self, device: CudaDevice) -> None:
        """Modules 0 and 1 are of one layer, 2 and 3 of the next."""
        images = device._memory.columns._free.qsize()
        move(device, group(1, [1]), extent(0), 0)
        ends = group(2, [0, 3])
        move(device, ends, extent(1), 0)
        holds(device, 0, group(1, [1]).weights | ends.weights)
        three = group(3, [0, 1, 2])  # more than one layer has: an image is made, and not kept
        move(device, three, extent(2), 1)
        holds(device, 1, three.weights)
        assert device._memory.columns._free.qsize() == images

    def test_a_run_over_a_module_without_a_row(self, new_layer: CudaDevice) -> None:
        device, memory = new_layer, new_layer.staging_memory(64)
        row = Row(0, 64, 128, 7, 8, 0.5)
        for modules in ([2], [0, 4]):
            rows = [row._replace(module=module) for module in modules]
            device.copy(StagedPiece(memory, 0), rows, extent(1), 1).result(10)
        base = device._memory.arena.data_ptr() + extent(1).offset
        assert device.rank[:, 1].tolist() == [8, 0, 8, 0, 8]
        assert device.scale[:, 1].tolist() == [0.5, 0.0, 0.5, 0.0, 0.5]
        present = [base + 64, 0, base + 64, 0, base + 64]
        assert device.address[0, :, 1].tolist() == present
        assert device.address[1, :, 1].tolist() == [at and at + 64 for at in present]
        assert device.rank[:, 0].tolist() == [0] * 5

    @pytest.fixture(params=KINDS)
    def new_layer(self, request: pytest.FixtureRequest) -> Iterator[CudaDevice]:
        """One layer of five modules."""
        for make in devices_of(request.param):
            device = make(layout=one_layer(5))
            device.open()
            yield device


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

    def test_comes_after_the_copies_before_it(self, device: CudaDevice) -> None:
        old, new = OLD.staged(device), NEW.staged(device)
        with held(copy_stream(device)):
            device.copy(old, OLD.rows, extent(0), 0)
            device.clear_column(0)
            ticket = device.copy(new, NEW.rows, extent(1), 1)
            assert not ticket.done()
        ticket.result(10)
        holds(device, 0, {})
        holds(device, 1, NEW.weights)


class TestCompute:
    @pytest.mark.parametrize("waits", [True, False])
    def test_sees_the_copy_only_if_it_waits(self, device: CudaDevice, waits: bool) -> None:
        move(device, OLD, extent(0), 0)
        source = a_of_module_0(device, NEW, 0)
        seen, compute = empty_like(device, source), compute_stream(device)
        piece = NEW.staged(device)
        with held(copy_stream(device)):
            ticket = device.copy(piece, NEW.rows, extent(0), 0)
            if waits:
                device.wait_for(ticket, compute)
            read_on(compute, source, seen)
            if waits:
                accelerators.waits(compute)
            else:
                compute.synchronize()
        ticket.result(10)
        compute.synchronize()
        assert torch.equal(seen.cpu(), NEW_A if waits else OLD_A)

    def test_waits_on_its_current_stream(self, device: CudaDevice) -> None:
        source = a_of_module_0(device, NEW, 0)
        seen, compute = empty_like(device, source), compute_stream(device)
        piece = NEW.staged(device)
        with held(copy_stream(device)):
            ticket = device.copy(piece, NEW.rows, extent(0), 0)
            with compute:
                device.wait_for(ticket)
                seen.copy_(source, non_blocking=True)
            accelerators.waits(compute)
            assert not ticket.done()
        compute.synchronize()
        assert torch.equal(seen.cpu(), NEW_A)

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
        move(device, OLD, extent(0), 0)
        source = a_of_module_0(device, OLD, 0)
        seen, compute = empty_like(device, source), compute_stream(device)
        piece = NEW.staged(device)
        with held(compute):
            read_on(compute, source, seen)
            use = device.note_use(compute)
            # The news of copies do not wait for it.
            device.copy(piece, NEW.rows, extent(1), 1).result(10)
            assert not use.done()
        use.result(10)
        assert torch.equal(seen.cpu(), OLD_A)

    def test_a_use_is_of_its_own_stream(self, device: CudaDevice) -> None:
        compute, other = compute_stream(device), compute_stream(device)
        with held(compute):
            assert device.note_use(other).result(10) is None
            with compute:
                use = device.note_use()
            assert not use.done()
        use.result(10)
