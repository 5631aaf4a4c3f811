"""The CUDA device, on the late device and on a GPU: the port, the order of its work, failures."""

import ctypes
import gc
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from device_groups import (
    ARENA,
    EXTENT,
    LAYOUT,
    NEW,
    OLD,
    SHAPES,
    SLOTS,
    Group,
    StagedDeviceConformance,
    begin,
    extent,
    holds,
    made_by,
    move,
    settle,
)
from late_device import build
from late_device.build import POISON
from late_device.world import bytes_now, loaded
from leaks import our_threads

from lorax_async import errors
from lorax_async.devices import cuda
from lorax_async.devices.base import CopyTicket, StagedPiece
from lorax_async.devices.cuda import IMAGES, CudaDevice, TableColumns
from lorax_async.devices.streams import EventTicket, EventWatcher
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.transfer_plan import TableRow

Made = Callable[..., CudaDevice]
Patch = pytest.MonkeyPatch


def devices_of(kind: str) -> Iterator[Made]:
    with contextmanager(loaded)() if kind == "late" else nullcontext():
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None or accelerator.type != kind:
            pytest.skip(f"{kind} is not this process's accelerator")
        gc.freeze()  # what is older than the test is not looked at: with torch, that takes long
        yield from made_by(partial(CudaDevice, device=kind))
        gc.unfreeze()


class _Witness(torch.Tensor):
    """Staged bytes that note on which stream they are copied."""

    seen: torch.Stream

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") == "copy_":
            cls.seen = torch.accelerator.current_stream()
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


_copy_streams: weakref.WeakKeyDictionary[CudaDevice, torch.Stream] = weakref.WeakKeyDictionary()


def copy_stream(device: CudaDevice) -> torch.Stream:
    """The stream that the device's copies run on: the first look copies some bytes."""
    if device not in _copy_streams:
        piece = StagedPiece(device.staging_memory(64).as_subclass(_Witness), 0)
        device.copy(piece, (), Extent(ARENA - EXTENT, EXTENT), 0).result(10)
        _copy_streams[device] = _Witness.seen
    return _copy_streams[device]


@contextmanager
def held(stream: torch.Stream) -> Iterator[None]:
    """The stream starts nothing more until the block ends; on CUDA it computes for a while."""
    if stream.device.type == "late":
        with build.held(stream):
            yield
        return
    with stream:
        square = torch.ones(4096, 4096, device=stream.device)
        for _ in range(200):  # some tenths of a second
            square = square @ square
    yield


def a_of_module_0(device: CudaDevice, made: Group, offset: int) -> torch.Tensor:
    """Where A of module 0 is, or will be, whatever the device says of it."""
    want = made.weights[0][0]
    found = device.view(Extent(offset + made.rows[0].a, want.nbytes))
    return found.view(want.dtype).view(want.shape)


def read_on(stream: torch.Stream, source: torch.Tensor, into: torch.Tensor) -> None:
    """Stands for a kernel: reads `source` when the stream gets there. Allocates nothing."""
    with stream:
        into.copy_(source, non_blocking=True)


Column = tuple[list[list[int]], list[float], list[int]]


def column_now(device: CudaDevice, slot: int) -> Column:
    """Addresses `[modules][A, B]`, scales and ranks, whatever streams have yet to do."""

    def now(table: torch.Tensor) -> torch.Tensor:
        content = table.untyped_storage()
        there = bytearray(ctypes.string_at(content.data_ptr(), content.nbytes()))
        words = torch.frombuffer(there, dtype=table.dtype)
        return words.as_strided(table.shape, table.stride(), table.storage_offset())[..., slot]

    return now(device.address).T.tolist(), now(device.scale).tolist(), now(device.rank).tolist()


def column_of(device: CudaDevice, made: Group, offset: int) -> Column:
    base = device.view(Extent(offset, 1)).data_ptr()
    addresses, scales, ranks = [[0, 0]] * len(SHAPES), [0.0] * len(SHAPES), [0] * len(SHAPES)
    for row in made.rows:
        addresses[row.module] = [base + row.a, base + row.b]
        scales[row.module] = float(torch.tensor(row.scale, dtype=torch.float32))
        ranks[row.module] = row.padded_rank
    return addresses, scales, ranks


EMPTY_COLUMN: Column = ([[0, 0]] * len(SHAPES), [0.0] * len(SHAPES), [0] * len(SHAPES))


def step(device: CudaDevice) -> None:
    """Let the copy stream of a late device, which is held, do one thing."""
    left = build.pending() - 1
    build.allow(1, copy_stream(device))
    while build.pending() != left:
        time.sleep(0.001)


LOST = r"late:0: the device was lost \(late device error.*restart the process"


@pytest.fixture(params=["late", pytest.param("cuda", marks=pytest.mark.gpu)])
def new_device(request: pytest.FixtureRequest) -> Iterator[Made]:
    """Of one in a process: where the late device is loaded, torch sees no other accelerator."""
    yield from devices_of(request.param)


@pytest.fixture
def new_late() -> Iterator[Made]:
    yield from devices_of("late")


@pytest.fixture
def device(new_device: Made) -> CudaDevice:
    (device := new_device()).open()
    return device


@pytest.fixture
def late(new_late: Made) -> CudaDevice:
    (device := new_late()).open()
    return device


class TestCudaDevice(StagedDeviceConformance):
    pass


class TestOpening:
    @pytest.mark.parametrize("name", ["late:2", "cuda:5", "cuda", "cpu", "xpu:0"])
    def test_no_such_device_here(self, new_late: Made, name: str) -> None:
        for wrong in ("gpu", "cuda:x", "late:", ""):
            with pytest.raises(errors.ConfigError, match="no device"):
                CudaDevice(LAYOUT, dtype="F32", nbytes=ARENA, slots=SLOTS, device=wrong)
        build.show_devices(2)
        device = CudaDevice(LAYOUT, dtype="F32", nbytes=ARENA, slots=SLOTS, device=name)
        for ask in (device.open, lambda: device.staging_memory(64)):
            text = rf"no {name}; this machine has 2|not available"
            with pytest.raises(errors.ConfigError, match=text):
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
            opening.join(0.5)
            assert opening.is_alive()
        opening.join(10)
        assert device.rank.tolist() == [[0] * SLOTS] * 4

    @pytest.mark.parametrize("nth", range(5))
    def test_no_room_on_device_or_host(self, new_late: Made, monkeypatch: Patch, nth: int) -> None:
        device, counter, allocate = new_late(), count(1), cuda.allocate_pinned

        def pinned(nbytes: int) -> torch.Tensor:
            build.fail_allocations(pinned=int(next(counter) == nth))
            return allocate(nbytes)

        build.fail_allocations(device=int(nth == 0))
        monkeypatch.setattr(cuda, "allocate_pinned", pinned)
        text = f"{ARENA:,} bytes and 3 slots.*out of memory.*lower"
        with pytest.raises(errors.CapacityError, match=text):
            device.open()
        assert not tensors_of("late")
        device.open()
        move(device, NEW, extent(0), 0)
        holds(device, 0, NEW.weights)

    def test_no_more_threads(self, new_late: Made, monkeypatch: Patch) -> None:
        device, start = new_late(), threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "lorax-watch-uses":
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(errors.CapacityError, match="lorax-watch-uses"):
                device.open()
        assert not our_threads()
        assert tensors_of("late") == []
        device.open()

    def test_no_room_for_staging(self, new_late: Made) -> None:
        device = new_late()
        device.open()
        build.fail_allocations(pinned=1)
        text = "4,096 bytes of pinned.*lower staging_bytes"
        with pytest.raises(errors.CapacityError, match=text):
            device.staging_memory(4096)
        assert device.staging_memory(4096).is_pinned()


def tensors_of(kind: str) -> list[torch.Size]:
    gc.collect()
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return [each.shape for each in found if each.device.type == kind]


def test_a_copy_that_is_refused_costs_no_row_image(device: CudaDevice) -> None:
    piece = NEW.staged(device)
    for _ in range(IMAGES + 1):
        with pytest.raises(IndexError):
            device.copy(piece, NEW.rows, extent(0), SLOTS)
    device.copy(piece, NEW.rows, extent(0), 0).result(10)


def test_bytes_that_cannot_be_copied_are_refused(late: CudaDevice) -> None:
    memory = late.staging_memory(64)
    for wrong, target, named in (
        (memory.view(torch.float32), 0, "not contiguous uint8"),
        (memory[::2], 0, "not contiguous uint8"),
        (memory, EXTENT - 63, "64 bytes at 16321 do not fit"),
        (memory.clone(), 0, "not in pinned memory; use staging_memory"),
    ):
        with pytest.raises(errors.InternalError, match=named):
            late.copy(StagedPiece(wrong, target), (), extent(0), 0)


def test_streams_that_are_others_or_captured(late: CudaDevice) -> None:
    class Captured(torch.Stream):
        def is_capturing(self) -> bool:
            return True

    streams = [(stream, "not a torch stream") for stream in (torch.Stream("late:1"), "late", 0)]
    streams.append((Captured(device="late:0"), "captured"))
    ticket = begin(late, NEW, extent(0), 0)
    for stream, problem in streams:
        for ask in (late.note_use, lambda each: late.wait_for(ticket, each)):
            with pytest.raises(errors.UsageError, match=problem):
                ask(stream)
    ticket.result(10)


class TestClosing:
    def test_waits_for_all_that_is_on_its_way(self, device: CudaDevice) -> None:
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

        def takes_none() -> None:
            for ask in (
                lambda: device.copy(piece, NEW.rows, extent(0), 0),
                lambda: device.clear_column(0),
                lambda: device.wipe([extent(0)]),
                device.note_use,
            ):
                with pytest.raises(errors.UsageError, match="not open"):
                    ask()

        takes_none()
        device.open()
        done = device.copy(piece, NEW.rows, extent(0), 0)
        device.close()
        takes_none()
        assert device.operands(0, 0) is None
        assert not tensors_of(torch.device(device.name).type)
        device.wait_for(done)


def test_when_the_device_is_lost_copies_on_their_way_fail_for_good(late: CudaDevice) -> None:
    """Whoever waits for one hears of it from its ticket alone; the device can be closed."""
    build.hold(compute := torch.Stream(device=late.name))
    read_on(compute, late.rank, late.rank.clone())
    use = late.note_use(compute)
    build.hold(copy_stream(late))
    tickets = [begin(late, NEW, extent(n), n) for n in range(3)]
    tickets.append(late.wipe([extent(3)]))
    assert not use.done()
    build.lose()
    assert use.result(10) is None, "uses of it have ended"
    late.wait_for(tickets[0])
    failures = [ticket.exception(10) for ticket in tickets]
    for error in failures:
        assert isinstance(error, errors.TransferError)
        assert not error.retryable
        assert re.search(LOST, str(error))
    assert len(set(map(id, failures))) == 4  # raising collects frames
    assert late.operands(0, 0) is None
    late.wait_for(tickets[0])
    late.clear_column(0)
    late.close()
    late.close()
    assert not our_threads()


@pytest.mark.parametrize("works_again", [False, True])
def test_nothing_is_tried_on_a_lost_device_again(late: CudaDevice, works_again: bool) -> None:
    done, piece = begin(late, OLD, extent(1), 1), NEW.staged(late)
    done.result(10)
    build.lose()
    for ask in (
        lambda: late.copy(piece, NEW.rows, extent(0), 0).result(10),
        lambda: late.wipe([extent(0)]),
        lambda: late.copy(piece, NEW.rows, extent(0), 0),
    ):
        with pytest.raises(errors.TransferError, match=LOST) as caught:
            ask()
        assert not caught.value.retryable
        if works_again:
            build.restore()
    late.clear_column(0)
    late.wait_for(done)
    assert late.note_use().result(10) is None


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 MiB"),
        (torch.AcceleratorError, "CUDA error: out of memory\nCUDA kernel errors might"),
    ],
)
def test_no_memory_for_a_copy_is_its_tickets_and_not_before_the_event(
    late: CudaDevice, monkeypatch: Patch, kind: type[RuntimeError], text: str
) -> None:
    """Copies allocate nothing, but a driver may."""

    def refuse(*_: object) -> None:
        raise kind(text)

    piece = OLD.staged(late)
    with build.held(copy_stream(late)), monkeypatch.context() as patch:
        patch.setattr(TableColumns, "write", refuse)
        ticket = late.copy(piece, OLD.rows, extent(0), 0)
        assert not ticket.done()
        assert build.pending() == 2  # the bytes, which were put there, and the event
    told = ticket.exception(10)
    assert isinstance(told, errors.TransferError)
    assert told.retryable
    assert "late:0 refused a copy (CUDA" in told.problem
    assert "might" not in told.problem
    with monkeypatch.context() as patch:
        patch.setattr(late, "view", refuse)
        assert isinstance(late.wipe([extent(0)]).exception(10), errors.TransferError)
    settle(late)
    holds(late, 0, {})
    for _ in range(IMAGES + 1):  # its row image came back
        move(late, NEW, extent(1), 1)
    holds(late, 1, NEW.weights)


@pytest.mark.parametrize("raised", [ValueError, SystemExit])
def test_what_callbacks_raise_ends_no_watcher(
    late: CudaDevice, raised: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    called = []

    def call(ticket: CopyTicket) -> None:
        called.append(threading.current_thread().name)
        raise raised("mine")

    with build.held():
        tickets = [begin(late, NEW, extent(0), 0), late.note_use()]
        for ticket in tickets:
            ticket.add_done_callback(call)
    assert [ticket.result(10) for ticket in tickets] == [None] * 2
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
    watcher = EventWatcher("lorax-watch-test", lambda error: errors.InternalError(str(error)))
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
    with pytest.raises(errors.UsageError, match="closed"):
        watcher.watch(EventTicket(None, SetEvent()))


OLD_A, NEW_A = OLD.weights[0][0], NEW.weights[0][0]


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
        self, device: CudaDevice, rows: tuple[TableRow, ...]
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
        seen, compute = empty_like(device, source), torch.Stream(device=device.name)
        piece = NEW.staged(device)
        with held(copy_stream(device)):
            ticket = device.copy(piece, NEW.rows, extent(0), 0)
            if waits == "on its stream":
                device.wait_for(ticket, compute)
            elif waits:
                with compute:
                    device.wait_for(ticket)
            read_on(compute, source, seen)
            for _ in range(30 if waits else 0):
                assert not compute.query()
                time.sleep(0.001)
            if not waits:
                compute.synchronize()
        ticket.result(10)
        compute.synchronize()
        assert torch.equal(seen.cpu(), NEW_A if waits else OLD_A)

    def test_a_use_is_noted_until_it_has_run(self, device: CudaDevice) -> None:
        """On its own stream; the news of copies, and uses of other streams, do not wait for it."""
        move(device, OLD, extent(0), 0)
        source = a_of_module_0(device, OLD, 0)
        seen, compute = empty_like(device, source), torch.Stream(device=device.name)
        piece = NEW.staged(device)
        with held(compute):
            assert device.note_use(torch.Stream(device=device.name)).result(10) is None
            read_on(compute, source, seen)
            with compute:
                uses = [device.note_use(), device.note_use(compute)]
            device.copy(piece, NEW.rows, extent(1), 1).result(10)
            assert not any(use.done() for use in uses)
        for use in uses:
            use.result(10)
        assert torch.equal(seen.cpu(), OLD_A)


@pytest.mark.parametrize("clears", [False, True])
def test_one_thing_is_put_at_a_time(late: CudaDevice, monkeypatch: Patch, clears: bool) -> None:
    piece, inside, most, entered = NEW.staged(late), list[int](), list[int](), threading.Event()

    def slow(work: Callable[..., None]) -> Callable[..., None]:
        def slowly(*args: object) -> None:
            inside.append(1)
            most.append(len(inside))
            entered.set()
            time.sleep(0.03)
            work(*args)
            inside.pop()

        return slowly

    for name in ("write", "clear"):
        monkeypatch.setattr(TableColumns, name, slow(getattr(TableColumns, name)))
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(late.copy, piece, NEW.rows, extent(0), 0)
        assert entered.wait(10)
        if clears:
            late.clear_column(1)
        else:
            late.copy(piece, NEW.rows, extent(1), 1).result(10)
        first.result(10).result(10)
    settle(late)
    assert max(most) == 1
    holds(late, 0, NEW.weights)
    holds(late, 1, {} if clears else NEW.weights)


def test_a_use_without_an_event_is_waited_for(late: CudaDevice, monkeypatch: Patch) -> None:
    class Refused:
        def __init__(self, of: torch.device) -> None: ...

        def record(self, stream: torch.Stream) -> None:
            raise torch.OutOfMemoryError("out of memory")

    compute = torch.Stream(device=late.name)
    monkeypatch.setattr(cuda, "new_event", Refused)
    with ThreadPoolExecutor(1) as threads:
        with build.held(compute):
            read_on(compute, late.rank, late.rank.clone())
            noting = threads.submit(late.note_use, compute)
            with pytest.raises(TimeoutError):
                noting.result(0.03)
        assert noting.result(10).done()
