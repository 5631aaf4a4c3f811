"""The late device keeps what others' tests rely on: copies that run late, in the order of streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from late_device import build
from late_device.build import POISON
from late_device.world import (
    LATE,
    SIZE,
    bytes_now,
    in_thread,
    loaded,
    new_stream,
    on_device,
    pinned,
)

pytestmark = pytest.mark.usefixtures("late")


@pytest.fixture
def late() -> Iterator[None]:
    yield from loaded()


class TestCopies:
    def test_a_pinned_source_is_read_when_the_stream_gets_there(self) -> None:
        source, target = pinned(1), on_device()
        with build.held():
            target.copy_(source, non_blocking=True)
            source.fill_(2)
            assert bytes_now(target) == {POISON}
        assert set(target.cpu().tolist()) == {2}

    def test_a_source_that_is_not_pinned_is_read_at_once(self) -> None:
        build.set_delay(20_000)
        source, target = torch.ones(SIZE, dtype=torch.uint8), on_device()
        target.copy_(source, non_blocking=True)
        source.fill_(2)
        assert set(target.cpu().tolist()) == {1}

    @pytest.mark.parametrize("blocking", [{}, {"non_blocking": False}])
    def test_a_blocking_copy_is_done_when_it_returns(self, blocking: dict[str, bool]) -> None:
        build.set_delay(20_000)
        target = on_device()
        target.copy_(pinned(3), **blocking)
        assert bytes_now(target) == {3}

    def test_a_pinned_target_is_written_late(self) -> None:
        source, target, copied = on_device(4), pinned(0), torch.Event(device=LATE)
        with build.held():
            target.copy_(source, non_blocking=True)
            copied.record()
            assert bytes_now(target) == {0}
        copied.synchronize()
        assert bytes_now(target) == {4}

    def test_copies_on_the_device_and_fills_are_late(self) -> None:
        source, copy, zeros = on_device(5), on_device(), on_device()
        with build.held():
            copy.copy_(source)
            zeros.zero_()
            source.fill_(6)
            assert bytes_now(copy) == bytes_now(zeros) == {POISON}
            assert bytes_now(source) == {5}
        torch.accelerator.synchronize()
        assert (bytes_now(copy), bytes_now(zeros), bytes_now(source)) == ({5}, {0}, {6})

    def test_pinned_memory_outlives_its_copy(self) -> None:
        target = on_device()
        with build.held():
            target.copy_(pinned(7), non_blocking=True)
            others = [pinned(8) for _ in range(4)]
        assert set(target.cpu().tolist()) == {7}
        assert all(other.is_pinned() and other[5:].is_pinned() for other in others)

    def test_other_operators_come_after_what_is_on_the_current_stream(self) -> None:
        build.set_delay(20_000)
        target = on_device(1)
        target.copy_(pinned(9), non_blocking=True)
        assert set((target + 1).cpu().tolist()) == {10}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
    def test_views_casts_and_broadcasts_are_those_of_the_cpu(self, dtype: torch.dtype) -> None:
        def worked(device: str) -> list[torch.Tensor]:
            base = torch.zeros(64, dtype=torch.float32, device=device)
            grid = base.as_strided((4, 3), (8, 2), 1)
            grid.copy_(torch.arange(3, dtype=dtype))
            base[40:].view(2, 12)[:, ::5].copy_(grid[:2].t().to(dtype)[:2, :1].expand(2, 3))
            raw = base.view(torch.uint8)[160:].view(torch.int16)
            return [base.cpu(), grid.t().to(dtype).cpu(), raw.to("cpu", copy=True)]

        for late, cpu in zip(worked("late"), worked("cpu"), strict=True):
            assert late.dtype == cpu.dtype
            assert torch.equal(late, cpu)


class TestOrder:
    def waits(self, kind: str, second: torch.Stream, first: torch.Stream) -> None:
        if kind == "wait_stream":
            second.wait_stream(first)
        if kind == "wait_event":
            second.wait_event(first.record_event())
        if kind == "wait":
            event = torch.Event(device=LATE)
            event.record(first)
            event.wait(second)

    @pytest.mark.parametrize("kind", ["wait_stream", "wait_event", "wait", "nothing"])
    def test_a_missing_wait_shows_as_wrong_bytes(self, kind: str) -> None:
        first, second, done = new_stream(), new_stream(), torch.Event(device=LATE)
        middle, seen = on_device(), on_device()
        build.hold(first)
        with first:
            middle.copy_(pinned(1), non_blocking=True)
        self.waits(kind, second, first)
        with second:
            seen.copy_(middle)
            done.record()
        if kind == "nothing":
            done.synchronize()
            assert bytes_now(seen) == {POISON}
        assert done.query() == (kind == "nothing")
        build.release()
        done.synchronize()
        assert bytes_now(seen) == ({POISON} if kind == "nothing" else {1})

    def test_cpu_waits_for_the_current_stream_alone(self) -> None:
        other, target = new_stream(), on_device(1)
        with build.held(other), other:
            target.fill_(2)
            seen = in_thread(target.cpu)  # where the default stream is the current one
        assert set(seen.tolist()) == {1}

    def test_the_current_stream_is_of_a_thread_and_a_device(self) -> None:
        mine = new_stream()
        with mine:
            assert torch.accelerator.current_stream() == mine
            assert torch.accelerator.current_stream("late:1").stream_id == 0
            assert in_thread(torch.accelerator.current_stream) != mine
        default = torch.accelerator.current_stream()
        assert default.stream_id == 0
        torch.accelerator.set_stream(mine)
        assert torch.accelerator.current_stream() == mine
        torch.accelerator.set_stream(default)

    def test_items_start_in_order_and_as_many_as_allowed(self) -> None:
        stream, target = new_stream(), on_device(0)
        build.hold(stream)
        events = []
        for value in (1, 2, 3):
            with stream:
                target.fill_(value)
            events.append(stream.record_event())
        assert build.pending() == 6
        for value, event in zip((1, 2, 3), events, strict=True):
            build.allow(2, stream)
            event.synchronize()
            assert bytes_now(target) == {value}
            assert stream.query() == (value == 3)
        assert build.pending() == 0

    def test_a_delay_is_that_of_every_copy(self) -> None:
        build.set_delay(40_000)
        target, start = on_device(), time.monotonic()
        target.copy_(pinned(1), non_blocking=True)
        target.fill_(2)
        assert not torch.accelerator.current_stream().query()
        torch.accelerator.current_stream().synchronize()
        assert time.monotonic() - start >= 0.08


class TestEvents:
    def test_one_that_was_never_recorded_is_done(self) -> None:
        event = torch.Event(device=LATE)
        with build.held():
            on_device().copy_(pinned(1), non_blocking=True)
            event.synchronize()
            assert event.query()

    def test_a_new_record_is_what_is_asked_for(self) -> None:
        event = torch.Event(device=LATE)
        event.record()
        event.synchronize()
        assert event.query()
        with build.held():
            event.record()
            assert not event.query()
        event.synchronize()
        assert event.query()

    def test_who_waits_leaves_the_gil_to_others(self) -> None:
        stream, target = new_stream(), on_device()
        for wait in (
            lambda: stream.record_event().synchronize(),
            stream.synchronize,
            torch.accelerator.synchronize,
            target.cpu,
        ):
            build.hold()
            with stream:
                target.fill_(1)
                threading.Timer(0.05, build.release).start()
                wait()
            assert bytes_now(target) == {1}
