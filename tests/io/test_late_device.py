"""The late device keeps what others' tests rely on: work that runs late, in the order of streams."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from late_device import build
from late_device.build import POISON, NotBuilt
from late_device.world import (
    LATE,
    SIZE,
    bytes_now,
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
    def test_pinned_memory_is_read_and_written_when_the_stream_gets_there(self) -> None:
        """And it outlives its copy."""
        source, there = pinned(1), on_device(4)
        target, back, kept = on_device(), pinned(0), on_device()
        copied = torch.Event(device=LATE)
        with build.held():
            target.copy_(source, non_blocking=True)
            back.copy_(there, non_blocking=True)
            kept.copy_(pinned(7), non_blocking=True)
            copied.record()
            others = [pinned(8) for _ in range(4)]
            source.fill_(2)
            assert (bytes_now(target), bytes_now(back)) == ({POISON}, {0})
        copied.synchronize()
        assert (bytes_now(target), bytes_now(back), bytes_now(kept)) == ({2}, {4}, {7})
        assert all(other.is_pinned() and other[5:].is_pinned() for other in others)

    def test_other_sources_and_blocking_copies_are_done_when_it_returns(self) -> None:
        build.set_delay(20_000)
        source, target, start = torch.ones(SIZE, dtype=torch.uint8), on_device(), time.monotonic()
        target.copy_(source, non_blocking=True)
        source.fill_(2)
        assert set(target.cpu().tolist()) == {1}
        for blocking in ({}, {"non_blocking": False}):
            target.copy_(pinned(3), **blocking)
            assert bytes_now(target) == {3}
        assert time.monotonic() - start >= 0.06, "each copy has the delay"
        target.copy_(pinned(9), non_blocking=True)
        assert set((target + 1).cpu().tolist()) == {10}, "other operators come after it"

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

    def test_an_event_is_done_when_its_last_record_is(self) -> None:
        """One that was never recorded is."""
        event = torch.Event(device=LATE)
        with build.held():
            on_device().copy_(pinned(1), non_blocking=True)
            event.synchronize()
            assert event.query()
            event.record()
            assert not event.query()
        event.synchronize()
        assert event.query()


class TestFreedMemory:
    def copied_late(self, *, told: bool) -> set[int]:
        stream, source, seen = new_stream(), on_device(1), on_device()
        build.hold(stream)
        with stream:
            seen.copy_(source)
        if told:
            source.record_stream(stream)
        del source
        build.release()
        stream.synchronize()
        return bytes_now(seen)

    def test_is_poison_for_a_stream_that_nobody_told_of(self) -> None:
        assert self.copied_late(told=False) == {POISON}
        assert self.copied_late(told=True) == {1}


class TestFailures:
    def test_memory_runs_out_as_often_as_ordered(self) -> None:
        build.fail_allocations(device=2, pinned=1)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 1000 bytes"):
                on_device()
        with pytest.raises(torch.AcceleratorError, match="out of memory"):
            pinned(1)
        assert on_device().nbytes == pinned(1).nbytes == SIZE
        for nbytes in (1 << 31, 1 << 62):
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(nbytes, dtype=torch.uint8, device=LATE)

    @pytest.mark.slow
    def test_work_that_is_queued_at_the_end_hinders_no_exit(self) -> None:
        script = """if True:
            import threading, torch
            from late_device import build
            build.load()
            target = torch.empty(8, device="late")
            event = torch.Event(device="late")
            build.hold()
            target.copy_(torch.ones(8, pin_memory=True), non_blocking=True)
            event.record()
            threading.Thread(target=event.synchronize, daemon=True).start()
            """
        folder = Path(build.__file__).parent.parent
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, timeout=60, capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")


class TestBuild:
    def test_says_what_is_missing(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(NotBuilt, match=r"needs g\+\+"):
            build.library_path()
        monkeypatch.setenv("CXX", "false")
        with pytest.raises(NotBuilt, match="does not compile"):
            build.library_path()
