"""Bytes, rows and events on devices: the order of writes, and waits for them."""

from concurrent.futures import Future
from typing import Any

from lorax_async.devices import cuda
from lorax_async.devices.cpu import CpuDevice
from lorax_async.devices.cuda import CudaDevice, TableColumns
from lorax_async.devices.streams import EventTicket, EventWatcher
from mutants.mutation import Mutants, NoLock, initialized, mutant, nothing, seen_by, skipped

DEVICE = "devices/test_cuda.py"
COPY = f"{DEVICE}::TestACopy"
CPU = "devices/test_devices.py"

_ticket, _put = CudaDevice._ticket, CudaDevice._put
_write, _copy = TableColumns.write, CpuDevice.copy


def done(*_: object, **__: object) -> Future[None]:
    """Return a ticket that is done."""
    ticket: Future[None] = Future()
    ticket.set_result(None)
    return ticket


def _recorded_first(self: CudaDevice, piece: Any, *image: Any) -> EventTicket:
    ticket = _ticket(self, piece, *image)
    ticket.event.record(self._stream)
    return ticket


def _rows_first(
    self: CudaDevice, piece: Any, start: int, slot: int, modules: Any, column: Any, image: Any
) -> Any:
    if image is not None:
        with self._stream:
            self._columns.write(slot, modules, column, image)
    return _put(self, piece, start, slot, modules, column, None)


def _image_given_back(self: CudaDevice, piece: Any, *image: Any) -> EventTicket:
    ticket = _ticket(self, piece, *image)
    release, ticket._release = ticket._release, None
    if release is not None:
        release()
    return ticket


def _ranks_first(self: TableColumns, slot: int, modules: Any, column: Any, image: Any) -> None:
    for module in modules:
        self._ranks[slot, module].fill_(column[module].rank)
    _write(self, slot, modules, column, image)


def _ranks_cleared_last(self: TableColumns, slot: int) -> None:
    self._entries[slot].copy_(self._zeros.entries, non_blocking=True)
    self._ranks[slot].copy_(self._zeros.ranks, non_blocking=True)


def _cpu_ranks_first(self: CpuDevice, piece: Any, rows: Any, extent: Any, slot: int) -> Any:
    for module, *_, rank, _ in rows:
        self._rank_words[module * self.rank.shape[1] + slot] = rank
    return _copy(self, piece, rows, extent, slot)


DEVICES: Mutants = {
    "cuda: the event is recorded behind the bytes": mutant(
        f"{COPY}::test_writes_bytes_then_rows_then_its_ticket",
        (CudaDevice, "_ticket", _recorded_first),
        (CudaDevice, "_record", lambda self, ticket: self._copies.watch(ticket))),
    "cuda: rows are written behind the bytes": mutant(
        f"{COPY}::test_writes_bytes_then_rows_then_its_ticket", (CudaDevice, "_put", _rows_first)),
    "cuda: ranks are written last": mutant(
        f"{COPY}::test_writes_bytes_then_rows_then_its_ticket",
        (TableColumns, "write", _ranks_first)),
    "cuda: ranks are cleared first": mutant(
        f"{DEVICE}::TestAClearing::test_comes_before_the_next_tenant_and_ranks_first",
        (TableColumns, "clear", _ranks_cleared_last)),
    "cuda: compute waits for the copy's event": mutant(
        f"{DEVICE}::TestCompute::test_sees_the_copy_only_if_it_waits",
        skipped(CudaDevice, "wait_for")),
    "cuda: a use ends after its kernels": mutant(
        f"{DEVICE}::TestCompute::test_a_use_is_noted_until_it_has_run",
        (CudaDevice, "note_use", done)),
    "cuda: a row image is reused after its copy": mutant(
        f"{COPY}::test_waits_while_all_row_images_are_in_use",
        (CudaDevice, "_ticket", _image_given_back)),
    "cuda: a ticket keeps its staged bytes": mutant(
        f"{COPY}::test_keeps_its_memory_alive_until_it_is_done",
        initialized(EventTicket, _held=nothing)),
    "cuda: weights are shown after their copy": mutant(
        f"{COPY}::test_writes_bytes_then_rows_then_its_ticket",
        (EventTicket, "succeeded", property(lambda _: True))),
    "cuda: one copy or clearing is enqueued at a time": mutant(
        f"{DEVICE}::test_one_thing_is_put_at_a_time", seen_by(cuda, "threading", Lock=NoLock)),
    "cuda: zeros have an event": mutant(
        f"{DEVICE}::TestAWipe::test_has_its_ticket_after_the_zeros", (CudaDevice, "wipe", done)),
    "cuda: the copy stream starts behind the current one": mutant(
        f"{DEVICE}::TestOpening::test_what_stands_on_the_current_stream_comes_first",
        skipped(CudaDevice, "_start_behind_current")),
    "cuda: close waits for copies and uses": mutant(
        f"{DEVICE}::TestClosing::test_waits_for_all_that_is_on_its_way",
        skipped(EventWatcher, "end")),
    "cpu: ranks are written last": mutant(
        f"{CPU}::test_the_rank_is_written_last", (CpuDevice, "copy", _cpu_ranks_first)),
}  # fmt: skip
