"""The late device keeps what others' tests rely on: work that runs late, in the order of streams."""

import pytest
import torch
from late_device import build
from late_device.build import POISON
from late_device.world import LATE, bytes_now, new_stream

SIZE = 1000
pytestmark = pytest.mark.usefixtures("late")


def pinned(value: int) -> torch.Tensor:
    return torch.full((SIZE,), value, dtype=torch.uint8, pin_memory=True)


def on_device(value: int = POISON) -> torch.Tensor:
    made = torch.empty(SIZE, dtype=torch.uint8, device=LATE)
    if value != POISON:
        made.fill_(value)
        torch.accelerator.synchronize(LATE)
    return made


def test_pinned_memory_is_read_and_written_when_the_stream_gets_there() -> None:
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


@pytest.mark.parametrize("kind", ["stream", "event", "nothing"])
def test_a_missing_wait_shows_as_wrong_bytes(kind: str) -> None:
    first, second, done = new_stream(), new_stream(), torch.Event(device=LATE)
    middle, seen = on_device(), on_device()
    build.hold(first)
    with first:
        middle.copy_(pinned(1), non_blocking=True)
    if kind == "stream":
        second.wait_stream(first)
    elif kind == "event":
        first.record_event().wait(second)
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


@pytest.mark.parametrize("told", [False, True])
def test_freed_memory_is_poison_for_a_stream_that_nobody_told_of(told: bool) -> None:
    stream, source, seen = new_stream(), on_device(1), on_device()
    build.hold(stream)
    with stream:
        seen.copy_(source)
    if told:
        source.record_stream(stream)
    del source
    build.release()
    stream.synchronize()
    assert bytes_now(seen) == ({1} if told else {POISON})
