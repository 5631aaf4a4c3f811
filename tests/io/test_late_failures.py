"""The late device in trouble: memory freed too early, memory that runs out, a loss, the end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from late_device import build
from late_device.build import POISON, NotBuilt
from late_device.world import LATE, SIZE, bytes_now, loaded, new_stream, on_device, pinned

pytestmark = pytest.mark.usefixtures("late")


@pytest.fixture
def late() -> Iterator[None]:
    yield from loaded()


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

    def test_waits_for_a_stream_that_was_told_of(self) -> None:
        assert self.copied_late(told=True) == {1}

    def test_is_poison_after_what_its_own_stream_does(self) -> None:
        source, seen = on_device(1), on_device()
        with build.held():
            seen.copy_(source)
            del source
        assert set(seen.cpu().tolist()) == {1}


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

    def test_every_operation_on_a_lost_device_raises(self) -> None:
        stream, event, target, source = (
            new_stream(),
            torch.Event(device=LATE),
            on_device(),
            pinned(1),
        )
        event.record()
        operations: list[Callable[[], object]] = [
            *(event.query, event.synchronize, event.record, event.wait),
            *(stream.query, stream.synchronize, stream.record_event),
            *(lambda: stream.wait_event(event), torch.accelerator.synchronize, new_stream),
            *(lambda: target.copy_(source, non_blocking=True), target.zero_, target.cpu),
        ]
        build.lose()
        for operation in operations:
            with pytest.raises(torch.AcceleratorError, match="the device was lost"):
                operation()
        build.restore()
        for operation in operations:
            operation()

    def test_a_loss_wakes_who_waits_and_drops_what_is_queued(self) -> None:
        target, event = on_device(1), torch.Event(device=LATE)
        build.hold()
        target.fill_(2)
        event.record()
        threading.Timer(0.05, build.lose).start()
        with pytest.raises(torch.AcceleratorError, match="the device was lost"):
            event.synchronize()
        build.reset()
        assert event.query()
        assert bytes_now(target) == {1}


class TestProcess:
    def test_ordinary_work_on_the_cpu_is_as_before(self) -> None:
        layer, given = torch.nn.Linear(3, 2, bias=False), torch.ones(4, 3)
        layer(given).sum().backward()
        assert layer.weight.grad is not None
        assert torch.equal(layer.weight.grad, torch.full((2, 3), 4.0))
        assert torch.empty(3).device == torch.get_default_device() == torch.device("cpu")
        assert not torch.empty(3).is_pinned()
        torch.manual_seed(1)
        first = torch.rand(3)
        torch.manual_seed(1)
        with torch.random.fork_rng():
            assert torch.equal(first, torch.rand(3))
        assert torch.equal(first, torch.rand(3))

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
            build._built()
        monkeypatch.setenv("CXX", "false")
        with pytest.raises(NotBuilt, match="does not compile"):
            build._built()

    def test_two_may_build_at_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        compiler = tmp_path / "compiler"
        compiler.write_text(
            '#!/bin/sh\nfor made; do :; done\necho -n b > "$made"; sleep 0.2\necho -n uilt >> "$made"\n'
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("CXX", str(compiler))
        with ThreadPoolExecutor(2) as pool:
            made = list(pool.map(lambda _: build._built().read_text(), range(2)))
        assert made == ["built", "built"]
        assert len(list((tmp_path / "lorax-async").iterdir())) == 1
